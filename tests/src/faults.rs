//! Faults that no signal makes: a clock that jumps, a disk that is full (both by a library that is loaded before a program's own,
//! `faults.c`; needs a C compiler), and a link that is slow.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::workspace_root;

/// Faults of the processes that are started with [`Faults::variables`].
pub struct Faults {
    library: PathBuf,
    steer: PathBuf,
    path: String,
}

impl Faults {
    /// None yet. A full disk will be that of files whose path holds `path`.
    ///
    /// # Panics
    /// If there is no C compiler.
    pub fn new(folder: &Path, path: &str) -> Self {
        let library = folder.join("faults.so");
        let source = workspace_root().join("tests/src/faults.c");
        let mut compiler = Command::new("cc");
        compiler.args([
            "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o",
        ]);
        compiler.args([&library, &source]).arg("-ldl");
        let status = compiler.status().expect("a C compiler under the name cc");
        assert!(status.success(), "faults.c does not compile");
        let steer = folder.join("faults");
        fs::write(&steer, [0; 24]).expect("a file");
        Self {
            library,
            steer,
            path: path.to_owned(),
        }
    }

    /// The environment of a process that is to have them.
    pub fn variables(&self) -> [(&'static str, String); 3] {
        [
            ("LD_PRELOAD", self.library.display().to_string()),
            ("FAULTS", self.steer.display().to_string()),
            ("FAULTS_PATH", self.path.clone()),
        ]
    }

    /// The clock of the day jumps to so many seconds beside the true time.
    pub fn shift_clock(&self, seconds: i64) {
        self.set(0, seconds);
    }

    /// Writes fail, or do again.
    pub fn fill_disk(&self, full: bool) {
        self.set(1, i64::from(full));
    }

    /// Writes that have failed so far.
    ///
    /// # Panics
    /// If it cannot be read.
    pub fn failed_writes(&self) -> i64 {
        let all = fs::read(&self.steer).expect("a file");
        i64::from_le_bytes(all[16..24].try_into().expect("8 bytes"))
    }

    fn set(&self, index: u64, value: i64) {
        let file = File::options().write(true).open(&self.steer);
        let written = file.and_then(|file| file.write_all_at(&value.to_le_bytes(), 8 * index));
        written.expect("a file");
    }
}

/// A link on loopback over which every byte takes `delay`, and not more than `bytes_per_second` pass in either direction.
pub struct SlowLink {
    address: String,
}

impl SlowLink {
    /// To `target`, `host:port`.
    ///
    /// # Panics
    /// Without a free port.
    pub fn to(target: &str, delay: Duration, bytes_per_second: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address").to_string();
        let target = target.to_owned();
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let Ok(far) = TcpStream::connect(&target) else {
                    continue;
                };
                for (from, to) in [(&near, &far), (&far, &near)] {
                    if let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) {
                        carry(from, to, delay, bytes_per_second);
                    }
                }
            }
        });
        Self { address }
    }

    /// Where it is entered, `host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }
}

/// One direction, by two threads: one notes when bytes came, the other passes them on when their time has come.
fn carry(mut from: TcpStream, mut to: TcpStream, delay: Duration, bytes_per_second: usize) {
    let (came, coming) = mpsc::channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            if came
                .send((Instant::now(), buffer[..count].to_vec()))
                .is_err()
            {
                return;
            }
        }
    });
    thread::spawn(move || {
        let mut pass = || -> io::Result<()> {
            for (at, bytes) in &coming {
                thread::sleep((at + delay).saturating_duration_since(Instant::now()));
                to.write_all(&bytes)?;
                thread::sleep(Duration::from_secs_f64(
                    bytes.len() as f64 / bytes_per_second as f64,
                ));
            }
            to.shutdown(Shutdown::Write)
        };
        drop(pass());
    });
}
