//! A crash at any point leaves the previous checkpoint (C1); any changed byte is found before use and named (C2).
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use checkpoint::{
    Checkpoint, CheckpointError, CommitError, Kind, MANIFEST, PieceEntry, Retention, commit,
    newest, retain,
};
use support::{GENERATION, elements, info, save, tensors, values, write};

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
}

fn found(dir: &Path) -> Option<u64> {
    newest(dir).unwrap().found.map(|(step, _)| step)
}

/// Whether all values of a checkpoint can be read, and are those of its step.
fn reads_whole(path: &Path, step: u64) -> Result<(), CheckpointError> {
    let checkpoint = Checkpoint::open(path)?;
    for kind in Kind::ALL {
        for (index, spec) in tensors().iter().enumerate() {
            let mut out = vec![0.0; elements(spec)];
            checkpoint.read(&spec.name, kind, 0, &mut out)?;
            assert_eq!(out, values(step, index, kind, out.len()), "{}", spec.name);
        }
    }
    Ok(())
}

#[test]
fn c1_a_save_cut_short_anywhere_leaves_the_previous_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    save(dir, 10, 2);
    let next = save(dir, 20, 2).path;
    let whole: Vec<(PathBuf, Vec<u8>)> = files(&next)
        .into_iter()
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    assert_eq!(whole[0].0.file_name().unwrap(), MANIFEST);
    let order = [1, 2, 0];
    // Cut within the nth file: those before are whole, those after are not there.
    for (done, &now) in order.iter().enumerate() {
        let (path, bytes) = &whole[now];
        let name = path.file_name().unwrap().to_str().unwrap();
        for cut in (0..bytes.len()).step_by(13) {
            fs::remove_dir_all(&next).unwrap();
            fs::create_dir(&next).unwrap();
            for &before in &order[..done] {
                fs::write(&whole[before].0, &whole[before].1).unwrap();
            }
            // A crash leaves the temporary file; a disk that lies may even leave the name with part of the bytes.
            fs::write(
                path.with_file_name(format!("{name}.1-0.tmp")),
                &bytes[..cut],
            )
            .unwrap();
            assert_eq!(found(dir), Some(10), "{name} cut at {cut}");
            fs::write(path, &bytes[..cut]).unwrap();
            assert_eq!(found(dir), Some(10), "{name} cut at {cut} under its name");
        }
    }
    // And the next try over the remains succeeds and cleans up.
    save(dir, 20, 2);
    assert_eq!(found(dir), Some(20));
    assert_eq!(files(&next).len(), 3);
}

#[test]
fn c1_saving_a_step_again_keeps_the_first_save_until_the_second_is_complete() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    let first = save(dir, 20, 2).path;
    let again: Vec<_> = (0..3)
        .map(|rank| write(dir, GENERATION + 1, 20, 3, rank))
        .collect();
    reads_whole(&first, 20).unwrap();
    let opened = Checkpoint::open(&first).unwrap();
    assert_eq!(opened.manifest().world, 2);
    assert_eq!(opened.verify().unwrap().unlisted.len(), 3);
    commit(dir, &again, &info()).unwrap();
    commit(dir, &again, &info()).unwrap();
    let opened = Checkpoint::open(&first).unwrap();
    assert_eq!(opened.manifest().world, 3);
    assert!(opened.verify().unwrap().unlisted.is_empty());
}

#[test]
fn a_commit_of_a_dead_generation_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    let late = write(dir, GENERATION - 1, 20, 1, 0);
    let now = write(dir, GENERATION, 20, 1, 0);
    commit(dir, std::slice::from_ref(&now), &info()).unwrap();
    // The commit removed the late one's file; it writes it again and asks.
    write(dir, GENERATION - 1, 20, 1, 0);
    let error = commit(dir, &[late], &info()).unwrap_err();
    assert!(
        matches!(
            error,
            CommitError::Stale {
                committed: GENERATION,
                ..
            }
        ),
        "{error}"
    );
    reads_whole(&dir.join("step-00000020"), 20).unwrap();
}

#[test]
fn a_commit_reads_the_files_back() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    let ranks = [0, 1].map(|rank| write(dir, GENERATION, 20, 2, rank));
    let path = dir.join("step-00000020").join(&ranks[1].file.name);
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 0x10;
    fs::write(&path, bytes).unwrap();
    let error = commit(dir, &ranks, &info()).unwrap_err().to_string();
    assert!(error.contains(&ranks[1].file.name), "{error}");
    assert_eq!(found(dir), None);
}

#[test]
fn c2_a_flipped_bit_in_any_byte_is_found_and_its_file_and_tensor_named() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    let folder = save(dir, 20, 2).path;
    let manifest = Checkpoint::open(&folder).unwrap().manifest().clone();
    for path in files(&folder) {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let whole = fs::read(&path).unwrap();
        let entry = manifest.files.iter().find(|entry| entry.name == name);
        for byte in 0..whole.len() {
            // In place: some file systems sync a file that is written anew.
            let file = fs::File::options().write(true).open(&path).unwrap();
            let flipped = [whole[byte] ^ (1 << (byte % 8))];
            file.write_all_at(&flipped, byte as u64).unwrap();
            let verified = Checkpoint::open(&folder).and_then(|checkpoint| checkpoint.verify());
            let read = reads_whole(&folder, 20);
            file.write_all_at(&whole[byte..=byte], byte as u64).unwrap();
            let error = verified.expect_err("detected");
            assert!(error.to_string().contains(&name), "{error}");
            let Some(entry) = entry else {
                assert!(
                    matches!(error, CheckpointError::Manifest { .. }),
                    "byte {byte}"
                );
                continue;
            };
            let CheckpointError::Damaged { damages, .. } = error else {
                panic!("byte {byte}: {error}");
            };
            let piece = entry.pieces.iter().find(|piece| {
                (piece.offset..piece.offset + 4 * piece.len as u64).contains(&(byte as u64))
            });
            assert_eq!(damages.len(), 1, "byte {byte}");
            assert_eq!(
                damages[0].tensor,
                piece.map(PieceEntry::name),
                "byte {byte}"
            );
            let region = damages[0].offset..damages[0].offset + damages[0].bytes;
            assert!(region.contains(&(byte as u64)), "byte {byte} in {region:?}");
            // Reading does not use it either; of the header, which holds no values, it uses nothing.
            assert_eq!(read.is_err(), piece.is_some(), "byte {byte}");
        }
    }
    reads_whole(&folder, 20).unwrap();
}

#[test]
fn c2_missing_swapped_shortened_and_extended_files_are_found_and_named() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    let folder = save(dir, 20, 2).path;
    let (one, two) = (files(&folder)[1].clone(), files(&folder)[2].clone());
    let (one_bytes, two_bytes) = (fs::read(&one).unwrap(), fs::read(&two).unwrap());
    let check = |what: &str, names: &[&Path]| {
        let error = Checkpoint::open(&folder).unwrap().verify().unwrap_err();
        let text = error.to_string();
        assert!(text.contains(what), "{text}");
        for name in names {
            let name = name.file_name().unwrap().to_str().unwrap();
            assert!(text.contains(name), "{text}");
        }
        assert!(reads_whole(&folder, 20).is_err());
        assert_eq!(found(dir), None);
        fs::write(&one, &one_bytes).unwrap();
        fs::write(&two, &two_bytes).unwrap();
        reads_whole(&folder, 20).unwrap();
    };
    fs::remove_file(&two).unwrap();
    check("missing", &[&two]);
    fs::write(&one, &two_bytes).unwrap();
    fs::write(&two, &one_bytes).unwrap();
    check("the manifest says", &[&one, &two]);
    // The same rank's file of another step has the same size and holds in itself.
    let other = tempfile::tempdir().unwrap();
    let other = save(other.path(), 10, 2).path;
    fs::copy(other.join(one.file_name().unwrap()), &one).unwrap();
    assert_eq!(fs::read(&one).unwrap().len(), one_bytes.len());
    check("the checksum does not hold", &[&one]);
    fs::write(&one, &one_bytes[..one_bytes.len() - 4]).unwrap();
    check("in second/", &[&one]);
    fs::write(&two, [&two_bytes[..], b"x"].concat()).unwrap();
    check("the manifest says", &[&two]);
    fs::write(&two, []).unwrap();
    check("0 bytes", &[&two]);
    // Bytes after the end of the manifest, and an empty one.
    let manifest = folder.join(MANIFEST);
    let whole = fs::read(&manifest).unwrap();
    for damaged in [[&whole[..], b"\n"].concat(), Vec::new()] {
        fs::write(&manifest, damaged).unwrap();
        let error = Checkpoint::open(&folder).unwrap_err().to_string();
        assert!(error.contains(MANIFEST), "{error}");
    }
}

#[test]
fn c2_folders_swapped_between_steps_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    let one = save(dir, 10, 1).path;
    fs::rename(&one, dir.join("step-00000030")).unwrap();
    let newest = newest(dir).unwrap();
    assert_eq!(newest.found, None);
    assert!(newest.refused[0].1.contains("holds step 10"), "{newest:?}");
}

#[test]
fn the_newest_that_verifies_is_found_and_why_newer_ones_were_not() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    assert_eq!(found(&dir.join("absent")), None);
    for step in [10, 20, 30] {
        save(dir, step, 2);
    }
    let rank = files(&dir.join("step-00000030"))[1].clone();
    let mut bytes = fs::read(&rank).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&rank, bytes).unwrap();
    // Not completed, so not refused: it never was a checkpoint.
    write(dir, GENERATION, 40, 2, 0);
    fs::create_dir(dir.join("step-5")).unwrap();
    fs::write(dir.join("notes.txt"), "x").unwrap();
    let newest = newest(dir).unwrap();
    assert_eq!(newest.found, Some((20, dir.join("step-00000020"))));
    assert_eq!(newest.refused.len(), 1);
    assert_eq!(newest.refused[0].0, dir.join("step-00000030"));
    assert!(newest.refused[0].1.contains("second/"), "{newest:?}");
}

/// Keeps the newest so many.
fn last(keep_last: usize) -> Retention<'static> {
    Retention {
        keep_last,
        keep_every_steps: 0,
        best_first: &[],
        since: u64::MAX,
        idle: false,
    }
}

#[test]
fn old_checkpoints_go_only_when_newer_ones_hold() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    for step in [10, 20, 30, 40] {
        save(dir, step, 1);
    }
    write(dir, GENERATION, 15, 2, 0);
    write(dir, GENERATION, 50, 2, 0);
    let rank = files(&dir.join("step-00000040"))[1].clone();
    let mut bytes = fs::read(&rank).unwrap();
    bytes[20] ^= 1;
    fs::write(&rank, bytes).unwrap();
    // 50 is being written, 40 is damaged: 30 and 20 are the two that count.
    let removed = retain(dir, last(2)).unwrap();
    assert_eq!(
        removed,
        [dir.join("step-00000015"), dir.join("step-00000010")]
    );
    assert!(dir.join("step-00000050").exists() && dir.join("step-00000040").exists());
    assert_eq!(retain(dir, last(2)).unwrap(), Vec::<PathBuf>::new());
    assert_eq!(retain(dir, last(0)).unwrap(), [dir.join("step-00000020")]);
    assert_eq!(found(dir), Some(30));
}

#[test]
fn nothing_is_removed_while_no_newer_checkpoint_holds() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    save(dir, 10, 1);
    let damaged = save(dir, 20, 1).path;
    fs::remove_file(&files(&damaged)[1]).unwrap();
    assert_eq!(retain(dir, last(1)).unwrap(), Vec::<PathBuf>::new());
    assert_eq!(found(dir), Some(10));
}
