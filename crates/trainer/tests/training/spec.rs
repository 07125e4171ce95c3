//! What a specification names is refused before or while it is read, with the cure.

use crate::support::Folder;
use model::Device;
use trainer::plan::Peers;
use trainer::{Setup, TrainError};

#[test]
fn a_tokenizer_with_more_words_than_the_model_is_refused_with_the_row() {
    let folder = Folder::new(2);
    let tokenizer = folder.path("model").join("tokenizer.json");
    let text = std::fs::read_to_string(&tokenizer).unwrap();
    std::fs::write(&tokenizer, text.replace("\"w3\":3", "\"w3\":64")).unwrap();
    let row = "{\"prompt\": \"w2\", \"chosen\": \" w3\", \"rejected\": \" w4\"}\n";
    folder.write("train.jsonl", row);
    let error = Setup::load(
        &folder.spec(""),
        &Device::flex(),
        Peers::NONE,
        &mut |_, _, _| Ok(()),
    )
    .err()
    .expect("refused");
    assert!(
        matches!(error, TrainError::Vocabulary { id: 64, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("train.jsonl:1"), "{error}");
}
