//! The quickstart's data: short letters in which 16 words are either formal or informal and everything else follows from the
//! prompt.
//!
//! The reference model is trained on letters that choose either word with probability ½; a preferred letter is formal
//! with probability 0.9 at each place and a rejected one with 0.1. So it is known what training can reach: the best
//! policy gives the chosen letters 16·(0.9 ln 1.8 + 0.1 ln 0.2) = 5.889 nats more than the reference does, and no
//! objective can get more on average.
//!
//! Everything is a pure function of one seed. Texts only; the initial model is made by the example `make_quickstart`.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use serde_json::{Value, json};

/// Places of a letter that are formal or informal.
pub const STYLE_WORDS: usize = 16;
/// Rows of `train.jsonl`.
pub const TRAIN_PAIRS: usize = 512;
/// Rows of `eval.jsonl`.
pub const EVAL_PAIRS: usize = 128;
/// Rows of `reference.jsonl`.
pub const REFERENCE_ROWS: usize = 2000;

const SEED: u64 = 241_214_516;
const CHOSEN_FORMAL: f64 = 0.9;
const REJECTED_FORMAL: f64 = 0.1;
const REFERENCE_FORMAL: f64 = 0.5;

/// A kind of request: the prompt, the letter with its `[formal|informal]` places, the things it may be about.
struct Kind {
    prompt: &'static str,
    letter: &'static str,
    things: [&'static str; 12],
}

const PEOPLE: [&str; 12] = [
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jonas", "Karin",
    "Leo",
];

const DAYS: [&str; 7] = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
];

const KINDS: [Kind; 4] = [
    Kind {
        prompt: "Ask PERSON for help with the THING on DAY.",
        letter: " [Dear|Hi] PERSON, I [require|need] [assistance|help] with the THING on DAY. It is [rather|pretty] \
                 [difficult|hard], and I [cannot|can't] [complete|finish] it alone. [Perhaps|Maybe] we could \
                 [commence|start] at [approximately|around] nine. [Kindly|Please] [inform|tell] me [whether|if] you are \
                 [available|free]. I would be [grateful|glad]. [Regards|Cheers], Sam",
        things: [
            "garden",
            "fence",
            "kitchen",
            "roof",
            "piano",
            "report",
            "translation",
            "budget",
            "attic",
            "shed",
            "move",
            "harvest",
        ],
    },
    Kind {
        prompt: "Thank PERSON for help with the THING on DAY.",
        letter: " [Dear|Hi] PERSON, I am [extremely|so] [grateful|glad] that you [assisted|helped] me with the THING on \
                 DAY. It was [truly|really] [splendid|great], and my [children|kids] and my [parents|folks] \
                 [adored|loved] it. You [demonstrated|showed] [considerable|real] patience. I [shall|will] \
                 [certainly|surely] [purchase|buy] you dinner [shortly|soon]. [Regards|Cheers], Sam",
        things: [
            "party",
            "garden",
            "cake",
            "concert",
            "picnic",
            "kitchen",
            "wedding",
            "dinner",
            "costume",
            "playground",
            "treehouse",
            "recital",
        ],
    },
    Kind {
        prompt: "Invite PERSON to see the THING on DAY.",
        letter: " [Dear|Hi] PERSON, I [wish|want] to see the THING on DAY, and I would be [delighted|happy] if you could \
                 [attend|come]. My [companions|friends] [consider|think] it [excellent|great]. We can [depart|leave] at \
                 [approximately|around] ten and [obtain|get] a [beverage|drink] [afterwards|later]. [Kindly|Please] \
                 [inform|tell] me [whether|if] you are free. [Regards|Cheers], Sam",
        things: [
            "museum",
            "concert",
            "match",
            "play",
            "film",
            "lighthouse",
            "fireworks",
            "harbour",
            "castle",
            "market",
            "exhibition",
            "parade",
        ],
    },
    Kind {
        prompt: "Tell PERSON that the THING broke on DAY.",
        letter: " [Dear|Hi] PERSON, I [regret|hate] to say that the THING is [defective|broken]. The \
                 [difficulty|trouble] [commenced|started] on DAY, and it is [extremely|so] [inconvenient|annoying]. I \
                 have [attempted|tried] to [repair|fix] it, [however|but] I [require|need] a [professional|pro]. \
                 [Kindly|Please] [respond|reply] [promptly|soon]. [Regards|Cheers], Sam",
        things: [
            "heater", "lift", "printer", "boiler", "washer", "oven", "fridge", "lamp", "door",
            "radio", "window", "tap",
        ],
    },
];

/// A prompt with the letter that answers it, style still open.
#[derive(Clone, Debug)]
struct Request {
    prompt: String,
    letter: String,
}

/// The files of the data set, each with its name.
pub fn data_files() -> Vec<(&'static str, String)> {
    let mut random = SplitMix(SEED);
    let mut requests = requests();
    random.shuffle(&mut requests);
    // The three files have no prompt in common.
    let (eval, rest) = requests.split_at(EVAL_PAIRS);
    let (train, rest) = rest.split_at(TRAIN_PAIRS);
    let reference = &rest[..REFERENCE_ROWS];
    let mut pairs = |requests: &[Request]| {
        jsonl(requests.iter().map(|request| {
            json!({
                "prompt": request.prompt,
                "chosen": styled(&request.letter, CHOSEN_FORMAL, &mut random),
                "rejected": styled(&request.letter, REJECTED_FORMAL, &mut random),
            })
        }))
    };
    let (eval, train) = (pairs(eval), pairs(train));
    let reference = jsonl(reference.iter().map(|request| {
        json!({
            "prompt": request.prompt,
            "completion": styled(&request.letter, REFERENCE_FORMAL, &mut random),
        })
    }));
    vec![
        ("reference.jsonl", reference),
        ("train.jsonl", train),
        ("eval.jsonl", eval),
    ]
}

/// The files of the model's folder besides its weights, each with its name.
pub fn model_files() -> Vec<(&'static str, String)> {
    vec![
        ("config.json", model_config_json()),
        ("tokenizer.json", tokenizer_json()),
        ("tokenizer_config.json", tokenizer_config_json()),
    ]
}

/// `tokenizer.json`: one id per word, with the space before it, so that decoding gives the text back.
fn tokenizer_json() -> String {
    let special = ["<pad>", "<s>", "</s>", "<unk>"];
    let words = words();
    let ids = special.into_iter().map(str::to_owned).chain(words);
    let vocabulary: serde_json::Map<String, Value> = ids
        .enumerate()
        .map(|(id, word)| (word, Value::from(id)))
        .collect();
    let added: Vec<Value> = special
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        })
        .collect();
    let bos = json!({ "SpecialToken": { "id": "<s>", "type_id": 0 } });
    let first = json!({ "Sequence": { "id": "A", "type_id": 0 } });
    let second = json!({ "Sequence": { "id": "B", "type_id": 1 } });
    pretty(&json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {
            "type": "Split", "pattern": { "Regex": WORD }, "behavior": "Isolated", "invert": false,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } },
        },
        "decoder": { "type": "Fuse" },
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>" },
    }))
}

/// `tokenizer_config.json`.
fn tokenizer_config_json() -> String {
    pretty(&json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": false,
        "model_max_length": 128,
    }))
}

/// `config.json` of a Llama with two blocks.
fn model_config_json() -> String {
    pretty(&json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": 4 + words().len(),
        "hidden_size": 64,
        "intermediate_size": 176,
        "hidden_act": "silu",
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_parameters": { "rope_type": "default", "rope_theta": 10000.0 },
        "max_position_embeddings": 128,
        "attention_bias": false,
        "attention_dropout": 0.0,
        "mlp_bias": false,
        "initializer_range": 0.02,
        "tie_word_embeddings": true,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }))
}

/// A word with the space before it, or a stop.
const WORD: &str = " ?[A-Za-z']+|[.,]";

/// What [`WORD`] matches in `text`, one after the other.
fn split(text: &str) -> Vec<String> {
    let mut pieces: Vec<String> = Vec::new();
    for character in text.chars() {
        let joins = character.is_ascii_alphabetic() || character == '\'';
        match pieces.last_mut() {
            Some(piece) if joins && !piece.ends_with(['.', ',']) => piece.push(character),
            _ => pieces.push(character.into()),
        }
    }
    pieces
}

/// Every word that can occur, sorted.
fn words() -> Vec<String> {
    let mut words = BTreeSet::new();
    for request in requests() {
        for text in [
            request.prompt,
            choose(&request.letter, || true),
            choose(&request.letter, || false),
        ] {
            words.extend(split(&text));
        }
    }
    words.into_iter().collect()
}

fn requests() -> Vec<Request> {
    let mut requests = Vec::new();
    for kind in &KINDS {
        for thing in kind.things {
            for person in PEOPLE {
                for day in DAYS {
                    let fill = |text: &str| {
                        text.replace("PERSON", person)
                            .replace("THING", thing)
                            .replace("DAY", day)
                    };
                    requests.push(Request {
                        prompt: fill(kind.prompt),
                        letter: fill(kind.letter),
                    });
                }
            }
        }
    }
    requests
}

fn styled(letter: &str, formal: f64, random: &mut SplitMix) -> String {
    choose(letter, || random.unit() < formal)
}

/// `letter` with each `[formal|informal]` decided by `formal`.
fn choose(letter: &str, mut formal: impl FnMut() -> bool) -> String {
    let mut text = String::with_capacity(letter.len());
    let mut rest = letter;
    let mut places = 0;
    while let Some((before, behind)) = rest.split_once('[') {
        let (choice, behind) = behind.split_once(']').expect("every place is closed");
        let (formal_word, informal_word) = choice.split_once('|').expect("a place has two words");
        text.push_str(before);
        text.push_str(if formal() { formal_word } else { informal_word });
        rest = behind;
        places += 1;
    }
    assert_eq!(places, STYLE_WORDS, "places for style in {letter:?}");
    text.push_str(rest);
    text
}

fn jsonl(rows: impl Iterator<Item = Value>) -> String {
    let mut text = String::new();
    for row in rows {
        writeln!(text, "{row}").expect("writing into a String does not fail");
    }
    text
}

fn pretty(value: &Value) -> String {
    let text = serde_json::to_string_pretty(value).expect("a JSON value has a text");
    text + "\n"
}

/// SplitMix64 (Steele, Lea and Flood 2014): small, and the same everywhere.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Uniform in [0, 1).
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Fisher and Yates; the bias of the remainder is below 1e-15 for lists of this size.
    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = (self.next() % (last as u64 + 1)) as usize;
            items.swap(last, other);
        }
    }
}
