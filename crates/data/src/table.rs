//! Rows of tables as the JSON objects that the same rows are in a .jsonl file, and what both table readers share.
//!
//! Lists of structs (conversations) become lists of objects. A field that is null is left out of its object: tables have no other
//! way to say that a message lacks a key, and a chat template must not meet `tool_calls` where nobody wrote it. Values that JSON has
//! no word for (dates, decimals, bytes that are not text) become `{"type": …}`, which no column of a pair can be.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Once};

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type,
    UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{Array, RecordBatch};
use arrow_schema::DataType;
use serde_json::{Map, Value, json};

use crate::error::{DataError, Place};
use crate::rows::{Row, Sink};

/// Hands the rows of `batch` to `sink`; `before` rows of the file came earlier.
pub(crate) fn rows(
    file: &Arc<Path>,
    before: usize,
    batch: &RecordBatch,
    sink: &mut Sink<'_>,
) -> Result<(), DataError> {
    let schema = batch.schema();
    for index in 0..batch.num_rows() {
        let named = schema.fields().iter().map(|field| field.name());
        let place = Place {
            file: file.clone(),
            line: before + index + 1,
        };
        let object = object(named, batch.columns().iter(), index);
        sink(Row { place, object })?;
    }
    Ok(())
}

/// Runs a decoder over bytes that nobody vouches for: what it says, and should it panic, that it did.
pub(crate) fn decode<T>(
    file: &Path,
    kind: &'static str,
    work: impl FnOnce() -> Result<T, String>,
) -> Result<T, DataError> {
    quiet_panics();
    DECODING.set(true);
    let done = catch_unwind(AssertUnwindSafe(work));
    DECODING.set(false);
    let reason = match done {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(reason)) => reason,
        Err(_) => "its parts contradict each other".into(),
    };
    Err(DataError::Damaged {
        file: file.into(),
        kind,
        reason,
    })
}

thread_local! {
    /// Whether a panic of this thread is [`decode`]'s to report.
    static DECODING: Cell<bool> = const { Cell::new(false) };
}

/// Keeps panics of decoders out of the output, which has the error; all others are told as before.
fn quiet_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let tell = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !DECODING.get() {
                tell(panic);
            }
        }));
    });
}

fn object<'a>(
    names: impl Iterator<Item = &'a String>,
    columns: impl Iterator<Item = &'a arrow_array::ArrayRef>,
    row: usize,
) -> Map<String, Value> {
    let cells = names.zip(columns);
    cells
        .map(|(name, column)| (name.clone(), value(column, row)))
        .filter(|(_, value)| !value.is_null())
        .collect()
}

fn value(array: &dyn Array, row: usize) -> Value {
    if array.is_null(row) {
        return Value::Null;
    }
    match array.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => array.as_boolean().value(row).into(),
        DataType::Int8 => array.as_primitive::<Int8Type>().value(row).into(),
        DataType::Int16 => array.as_primitive::<Int16Type>().value(row).into(),
        DataType::Int32 => array.as_primitive::<Int32Type>().value(row).into(),
        DataType::Int64 => array.as_primitive::<Int64Type>().value(row).into(),
        DataType::UInt8 => array.as_primitive::<UInt8Type>().value(row).into(),
        DataType::UInt16 => array.as_primitive::<UInt16Type>().value(row).into(),
        DataType::UInt32 => array.as_primitive::<UInt32Type>().value(row).into(),
        DataType::UInt64 => array.as_primitive::<UInt64Type>().value(row).into(),
        DataType::Float16 => f64::from(array.as_primitive::<Float16Type>().value(row)).into(),
        DataType::Float32 => f64::from(array.as_primitive::<Float32Type>().value(row)).into(),
        DataType::Float64 => array.as_primitive::<Float64Type>().value(row).into(),
        DataType::Utf8 => array.as_string::<i32>().value(row).into(),
        DataType::LargeUtf8 => array.as_string::<i64>().value(row).into(),
        DataType::Utf8View => array.as_string_view().value(row).into(),
        DataType::Binary => text(array, array.as_binary::<i32>().value(row)),
        DataType::LargeBinary => text(array, array.as_binary::<i64>().value(row)),
        DataType::BinaryView => text(array, array.as_binary_view().value(row)),
        DataType::List(_) => list(&array.as_list::<i32>().value(row)),
        DataType::LargeList(_) => list(&array.as_list::<i64>().value(row)),
        DataType::FixedSizeList(..) => list(&array.as_fixed_size_list().value(row)),
        DataType::Struct(fields) => {
            let names = fields.iter().map(|field| field.name());
            object(names, array.as_struct().columns().iter(), row).into()
        }
        DataType::Map(..) => list(&array.as_map().value(row)),
        DataType::Dictionary(key, _) => match keyed(array, key, row) {
            Some((values, key)) => value(values, key),
            None => unknown(array),
        },
        _ => unknown(array),
    }
}

fn list(elements: &dyn Array) -> Value {
    (0..elements.len())
        .map(|index| value(elements, index))
        .collect()
}

/// Old writers do not mark their texts as such.
fn text(array: &dyn Array, bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(_) => unknown(array),
    }
}

fn unknown(array: &dyn Array) -> Value {
    json!({ "type": array.data_type().to_string() })
}

/// The values of a dictionary and which of them a row has.
fn keyed<'a>(array: &'a dyn Array, key: &DataType, row: usize) -> Option<(&'a dyn Array, usize)> {
    let dictionary = array.as_any_dictionary_opt()?;
    let keys = dictionary.keys();
    let key = match key {
        DataType::Int8 => keys.as_primitive::<Int8Type>().value(row) as usize,
        DataType::Int16 => keys.as_primitive::<Int16Type>().value(row) as usize,
        DataType::Int32 => keys.as_primitive::<Int32Type>().value(row) as usize,
        DataType::Int64 => keys.as_primitive::<Int64Type>().value(row) as usize,
        DataType::UInt8 => keys.as_primitive::<UInt8Type>().value(row) as usize,
        DataType::UInt16 => keys.as_primitive::<UInt16Type>().value(row) as usize,
        DataType::UInt32 => keys.as_primitive::<UInt32Type>().value(row) as usize,
        DataType::UInt64 => keys.as_primitive::<UInt64Type>().value(row) as usize,
        _ => return None,
    };
    Some((dictionary.values().as_ref(), key))
}
