//! The messages of an event file that are written or read here, and its frames.
//!
//! ```text
//! frame   0   8  length n of the event, u64 little endian
//!         8   4  masked crc32c of bytes 0..8, u32 little endian
//!         12  n  event, protobuf (tensorflow.Event)
//!         12+n 4 masked crc32c of the event
//! masked  rotate right by 15, then add 0xa282ead8
//! ```
//! Field numbers are those of TensorFlow's event.proto, summary.proto and tensor.proto, and of TensorBoard's
//! hparams/plugin_data.proto; what is not named here is skipped.

use std::collections::BTreeMap;

use prost::Message;

/// `DT_FLOAT` and `DT_STRING` of tensor types.
const DT_FLOAT: i32 = 1;
const DT_STRING: i32 = 7;
/// `DATA_CLASS_TENSOR`.
const DATA_CLASS_TENSOR: i32 = 2;
/// `SessionLog.START`.
const SESSION_START: i32 = 1;
/// What the first event of a file says of its format.
const FILE_VERSION: &str = "brain.Event:2";
/// `PLUGIN_DATA_VERSION` of the hparams plugin.
const HPARAMS_VERSION: i32 = 0;
const HPARAMS_TAG: &str = "_hparams_/session_start_info";
/// Before and behind an event.
const HEAD: usize = 12;
const TAIL: usize = 4;

#[derive(Clone, PartialEq, Message)]
pub(super) struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    pub wall_time: f64,
    #[prost(int64, tag = "2")]
    pub step: i64,
    #[prost(string, optional, tag = "3")]
    pub file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    pub summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    pub session_log: Option<SessionLog>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct SessionLog {
    #[prost(int32, tag = "1")]
    pub status: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Summary {
    #[prost(message, repeated, tag = "1")]
    pub value: Vec<SummaryValue>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct SummaryValue {
    #[prost(string, tag = "1")]
    pub tag: String,
    #[prost(float, optional, tag = "2")]
    pub simple_value: Option<f32>,
    #[prost(message, optional, tag = "8")]
    pub tensor: Option<Tensor>,
    #[prost(message, optional, tag = "9")]
    pub metadata: Option<Metadata>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Tensor {
    #[prost(int32, tag = "1")]
    pub dtype: i32,
    #[prost(message, optional, tag = "2")]
    pub shape: Option<Shape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    pub string_val: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Shape {
    #[prost(message, repeated, tag = "2")]
    pub dim: Vec<Dimension>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct Dimension {
    #[prost(int64, tag = "1")]
    pub size: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Metadata {
    #[prost(message, optional, tag = "1")]
    pub plugin_data: Option<PluginData>,
    #[prost(int32, tag = "4")]
    pub data_class: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PluginData {
    #[prost(string, tag = "1")]
    pub plugin_name: String,
    #[prost(bytes = "vec", tag = "2")]
    pub content: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct HparamsContent {
    #[prost(int32, tag = "1")]
    version: i32,
    #[prost(message, optional, tag = "3")]
    session_start_info: Option<SessionStart>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionStart {
    #[prost(btree_map = "string, message", tag = "1")]
    hparams: BTreeMap<String, Hyperparameter>,
    #[prost(double, tag = "5")]
    start_time_secs: f64,
}

/// `google.protobuf.Value` of one of the kinds that the plugin shows.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Hyperparameter {
    #[prost(double, optional, tag = "2")]
    pub number: Option<f64>,
    #[prost(string, optional, tag = "3")]
    pub text: Option<String>,
    #[prost(bool, optional, tag = "4")]
    pub flag: Option<bool>,
}

/// The first event of a file.
pub(super) fn version(wall_time: f64) -> Event {
    Event {
        wall_time,
        file_version: Some(FILE_VERSION.into()),
        ..Event::default()
    }
}

/// Events of `step` and later ones that were read before this one no longer count.
pub(super) fn restart(wall_time: f64, step: u64) -> Event {
    Event {
        wall_time,
        step: step as i64,
        session_log: Some(SessionLog {
            status: SESSION_START,
        }),
        ..Event::default()
    }
}

/// The first step that an event of [`restart`] takes back.
pub(super) fn restarts_at(event: &Event) -> Option<u64> {
    let session = event.session_log.as_ref()?;
    (session.status == SESSION_START).then_some(u64::try_from(event.step).unwrap_or(0))
}

/// Values of one step.
pub(super) fn summary(wall_time: f64, step: u64, value: Vec<SummaryValue>) -> Event {
    Event {
        wall_time,
        step: step as i64,
        summary: Some(Summary { value }),
        ..Event::default()
    }
}

/// A number; the format has f32 for them.
pub(super) fn scalar(tag: String, value: f64) -> SummaryValue {
    SummaryValue {
        tag,
        simple_value: Some(value as f32),
        ..SummaryValue::default()
    }
}

/// A text in Markdown.
pub(super) fn text(tag: String, markdown: String) -> SummaryValue {
    SummaryValue {
        tag,
        tensor: Some(vector(DT_STRING, vec![markdown.into_bytes()])),
        metadata: Some(metadata("text", Vec::new())),
        ..SummaryValue::default()
    }
}

/// What the hparams plugin shows of the run.
pub(super) fn hyperparameters(
    start_time_secs: f64,
    hparams: BTreeMap<String, Hyperparameter>,
) -> SummaryValue {
    let content = HparamsContent {
        version: HPARAMS_VERSION,
        session_start_info: Some(SessionStart {
            hparams,
            start_time_secs,
        }),
    };
    SummaryValue {
        tag: HPARAMS_TAG.into(),
        // The content is in the metadata; a value without a tensor would be passed over.
        tensor: Some(vector(DT_FLOAT, Vec::new())),
        metadata: Some(metadata("hparams", content.encode_to_vec())),
        ..SummaryValue::default()
    }
}

fn vector(dtype: i32, string_val: Vec<Vec<u8>>) -> Tensor {
    let size = string_val.len() as i64;
    Tensor {
        dtype,
        shape: Some(Shape {
            dim: vec![Dimension { size }],
        }),
        string_val,
    }
}

fn metadata(plugin: &str, content: Vec<u8>) -> Metadata {
    Metadata {
        plugin_data: Some(PluginData {
            plugin_name: plugin.into(),
            content,
        }),
        data_class: DATA_CLASS_TENSOR,
    }
}

/// An event with its length and checksums.
pub(super) fn frame(event: &Event) -> Vec<u8> {
    let payload = event.encode_to_vec();
    let length = (payload.len() as u64).to_le_bytes();
    let mut frame = Vec::with_capacity(HEAD + payload.len() + TAIL);
    frame.extend_from_slice(&length);
    frame.extend_from_slice(&masked(&length).to_le_bytes());
    frame.extend_from_slice(&payload);
    frame.extend_from_slice(&masked(&payload).to_le_bytes());
    frame
}

/// The events of a file up to the first frame that does not hold: TensorBoard reads no further either.
pub(super) fn read(bytes: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    let mut rest = bytes;
    while let Some((event, after)) = first(rest) {
        events.push(event);
        rest = after;
    }
    events
}

fn first(bytes: &[u8]) -> Option<(Event, &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let (checksum, rest) = rest.split_first_chunk::<TAIL>()?;
    if u32::from_le_bytes(*checksum) != masked(length) {
        return None;
    }
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (payload, rest) = rest.split_at_checked(length)?;
    let (checksum, rest) = rest.split_first_chunk::<TAIL>()?;
    if u32::from_le_bytes(*checksum) != masked(payload) {
        return None;
    }
    Some((Event::decode(payload).ok()?, rest))
}

fn masked(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What TensorBoard 2.21's own writer makes of the same events.
    #[test]
    fn frames_are_those_of_tensorboards_writer() {
        let hexadecimal = |bytes: Vec<u8>| {
            let digits = bytes.iter().map(|byte| format!("{byte:02x}"));
            digits.collect::<String>()
        };
        assert_eq!(
            hexadecimal(frame(&version(1.5))),
            "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c"
        );
        let values = vec![
            scalar("loss".into(), 0.25),
            scalar("eval/loss".into(), f64::NAN),
        ];
        assert_eq!(
            hexadecimal(frame(&summary(2.5, 300, values))),
            concat!(
                "2d000000000000003c418afb09000000000000044010ac022a1f0a0b0a046c6f7373150000803e0a100a096576616c2f",
                "6c6f7373150000c07f17f18f8f",
            )
        );
        assert_eq!(
            hexadecimal(frame(&restart(3.5, 21))),
            "0f000000000000006d532b09090000000000000c4010153a0208018da926fb"
        );
        let values = vec![text("samples/1".into(), "a *b*".into())];
        assert_eq!(
            hexadecimal(frame(&summary(4.5, 0, values))),
            concat!(
                "3500000000000000d6c55de60900000000000012402a2a0a280a0973616d706c65732f31420f08071204120208014205",
                "61202a622a4a0a0a060a0474657874200235ed4b59",
            )
        );
        let number = Hyperparameter {
            number: Some(0.1),
            ..Hyperparameter::default()
        };
        let values = vec![hyperparameters(
            5.5,
            [("objective.beta".into(), number)].into(),
        )];
        assert_eq!(
            hexadecimal(frame(&summary(5.5, 0, values))),
            concat!(
                "6c00000000000000f5dab0d70900000000000016402a610a5f0a1c5f68706172616d735f2f73657373696f6e5f737461",
                "72745f696e666f42060801120212004a370a330a0768706172616d7312281a260a1b0a0e6f626a6563746976652e6265",
                "74611209119a9999999999b93f290000000000001640200236ac64cb",
            )
        );
    }

    #[test]
    fn a_file_cut_or_flipped_at_any_byte_gives_the_events_before() {
        let events = [
            version(1.0),
            restart(2.0, 3),
            summary(4.0, 5, vec![scalar("a".into(), 6.0)]),
        ];
        let frames = events.each_ref().map(frame);
        let bytes = frames.concat();
        assert_eq!(read(&bytes), events);
        let whole = |at: usize| {
            let ends = frames.iter().scan(0, |end, frame| {
                *end += frame.len();
                Some(*end)
            });
            ends.take_while(|end| *end <= at).count()
        };
        for at in 0..bytes.len() {
            assert_eq!(read(&bytes[..at]), events[..whole(at)], "cut at {at}");
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            assert_eq!(read(&flipped), events[..whole(at)], "flipped at {at}");
        }
    }
}
