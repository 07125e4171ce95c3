//! Compiled kernels kept on disk: an image (cubin) a file, under a key of everything that decides it.
//!
//! ```text
//! offset  bytes
//!      0      8  `CALDPOK1`
//!      8     32  the key, which the file's name repeats in hexadecimal
//!     40     32  BLAKE3 of the image
//!     72      8  length of the image, little-endian
//!     80      -  the image, as NVRTC made it
//! ```
//! Files appear whole (`storage::atomic_write`), are never removed, and may be deleted at any time; processes may share the folder.
//! The checksums tell damage, not malice: who can write into the folder decides what runs on the GPU, as in the driver's own cache.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Names the folder; empty: nothing is kept.
pub(crate) const VARIABLE: &str = "CALDPO_KERNEL_CACHE";

const MAGIC: &[u8; 8] = b"CALDPOK1";
const HEADER: usize = 80;
/// An image of this project has some hundred KiB. Whatever claims more is none, and is not read into memory.
const IMAGE_BYTES_MAX: u64 = 256 << 20;

/// What kernels include of the toolkit, by themselves and through each other.
const HEADERS: [&str; 4] = [
    "cuda_bf16.h",
    "cuda_bf16.hpp",
    "cuda_fp16.h",
    "cuda_fp16.hpp",
];

/// Digest of what decides an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key([u8; 32]);

/// What decides an image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recipe<'a> {
    /// CUDA C++.
    pub source: &'a str,
    /// The compiler's options without those that only say where headers lie.
    pub options: &'a [String],
    /// [`headers_digest`] of what the source includes.
    pub headers: [u8; 32],
    /// Compute capability.
    pub capability: u32,
    /// NVRTC's version, major and minor.
    pub compiler: [i32; 2],
}

/// Why the cache could not serve; what it was asked for can be compiled nevertheless.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CacheError {
    #[error("read {path}: {source}; the kernel is compiled again")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}: {reason}; the kernel is compiled again and the file replaced")]
    Damaged { path: PathBuf, reason: String },
    #[error(
        "{0}; compiled kernels are not kept for the next start: name a folder that can be written in {VARIABLE}"
    )]
    Write(#[from] storage::FileError),
}

impl Key {
    pub fn of(recipe: &Recipe<'_>) -> Self {
        let Recipe {
            source,
            options,
            headers,
            capability,
            compiler: [major, minor],
        } = *recipe;
        let mut hasher = blake3::Hasher::new_derive_key("caldpo compiled kernel 1");
        // Lengths before texts: no two recipes run together to the same bytes.
        let mut text = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        text(source);
        for option in options {
            text(option);
        }
        hasher.update(&headers);
        hasher.update(&capability.to_le_bytes());
        hasher
            .update(&major.to_le_bytes())
            .update(&minor.to_le_bytes());
        Self(*hasher.finalize().as_bytes())
    }
}

/// Digest of the toolkit's headers that kernels include. They are part of the compiled text, and `CUDA_PATH` may name those of
/// another version than the compiler's.
///
/// # Errors
/// One that cannot be read, by name.
pub(crate) fn headers_digest(folder: &Path) -> Result<[u8; 32], String> {
    let mut hasher = blake3::Hasher::new_derive_key("caldpo CUDA headers 1");
    for name in HEADERS {
        let path = folder.join(name);
        let bytes = std::fs::read(&path);
        let bytes = bytes.map_err(|error| format!("read {}: {error}", path.display()))?;
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(&bytes);
    }
    Ok(*hasher.finalize().as_bytes())
}

/// A folder of images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// The user's; `None` where [`VARIABLE`] is empty, or the environment names no folder of the user.
    #[cfg(feature = "cuda")]
    pub fn of_user() -> Option<Self> {
        Self::placed(|name| std::env::var_os(name))
    }

    /// Below `XDG_CACHE_HOME`, or the home's `.cache`, unless [`VARIABLE`] says where.
    fn placed(variable: impl Fn(&str) -> Option<OsString>) -> Option<Self> {
        if let Some(folder) = variable(VARIABLE) {
            return (!folder.is_empty()).then(|| Self::new(folder.into()));
        }
        // The XDG base directory specification: a relative path is to be ignored.
        let absolute = |name: &str| {
            variable(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
        Some(Self::new(base.join("caldpo/kernels")))
    }

    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn file(&self, key: &Key) -> PathBuf {
        let name = blake3::Hash::from(key.0).to_hex();
        self.folder.join(format!("{name}.cubin"))
    }

    /// The image under `key`; `None` where there is none.
    ///
    /// # Errors
    /// A file that cannot be read, or is not what was written.
    pub fn read(&self, key: &Key) -> Result<Option<Vec<u8>>, CacheError> {
        let path = self.file(key);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(CacheError::Read { path, source }),
        };
        match contents(&mut file, key) {
            Ok(Ok(image)) => Ok(Some(image)),
            Ok(Err(reason)) => Err(CacheError::Damaged { path, reason }),
            Err(source) => Err(CacheError::Read { path, source }),
        }
    }

    /// Puts `image` under `key`, in place of whatever is there.
    ///
    /// # Errors
    /// A folder that cannot be made or written.
    pub fn write(&self, key: &Key, image: &[u8]) -> Result<(), CacheError> {
        storage::create_directory(&self.folder)?;
        let mut bytes = Vec::with_capacity(HEADER + image.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&key.0);
        bytes.extend_from_slice(blake3::hash(image).as_bytes());
        bytes.extend_from_slice(&(image.len() as u64).to_le_bytes());
        bytes.extend_from_slice(image);
        Ok(storage::atomic_write(&self.file(key), &bytes)?)
    }
}

/// The image of an open file, or what is wrong with it.
fn contents(file: &mut File, key: &Key) -> io::Result<Result<Vec<u8>, String>> {
    let len = file.metadata()?.len();
    if len < HEADER as u64 {
        return Ok(Err(format!("{len} bytes, less than a header")));
    }
    let mut header = [0; HEADER];
    file.read_exact(&mut header)?;
    let (magic, rest) = header.split_at(8);
    let (kept, rest) = rest.split_at(32);
    let (digest, length) = rest.split_at(32);
    if magic != MAGIC {
        return Ok(Err("not a compiled kernel of this program".into()));
    }
    if kept != key.0 {
        return Ok(Err("the kernel of another key".into()));
    }
    let length = u64::from_le_bytes(length.try_into().expect("eight bytes"));
    if length > IMAGE_BYTES_MAX || length != len - HEADER as u64 {
        let found = len - HEADER as u64;
        return Ok(Err(format!("{found} bytes of an image of {length}")));
    }
    // One byte more than there should be shows a file that grew meanwhile.
    let mut image = Vec::with_capacity(length as usize + 1);
    file.take(length + 1).read_to_end(&mut image)?;
    if image.len() as u64 != length || blake3::hash(&image).as_bytes() != digest {
        return Ok(Err("the image does not have its checksum".into()));
    }
    Ok(Ok(image))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe<'a>(source: &'a str, options: &'a [String]) -> Recipe<'a> {
        Recipe {
            source,
            options,
            headers: [1; 32],
            capability: 90,
            compiler: [13, 0],
        }
    }

    fn options(texts: &[&str]) -> Vec<String> {
        texts.iter().map(ToString::to_string).collect()
    }

    fn cache() -> (tempfile::TempDir, Cache, Key) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let cache = Cache::new(folder.path().join("not/there/yet"));
        let key = Key::of(&recipe("source", &[]));
        (folder, cache, key)
    }

    #[test]
    fn everything_that_decides_an_image_decides_its_key() {
        let (one, two) = (options(&["-DX=1", "-DD=0"]), options(&["-DX=1-DD=0"]));
        let base = recipe("source", &one);
        let others = [
            recipe("source ", &one),
            recipe("source", &two),
            recipe("source", &one[..1]),
            // The source's end is not an option's beginning.
            recipe("source-DX=1", &one[1..]),
            Recipe {
                headers: [2; 32],
                ..base
            },
            Recipe {
                capability: 89,
                ..base
            },
            Recipe {
                compiler: [13, 1],
                ..base
            },
            Recipe {
                compiler: [0, 13],
                ..base
            },
        ];
        let mut keys: Vec<_> = others.iter().map(|it| Key::of(it).0).collect();
        keys.push(Key::of(&base).0);
        assert_eq!(Key::of(&base), Key::of(&base.clone()));
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), others.len() + 1);
    }

    #[test]
    fn headers_of_another_version_have_another_digest_and_missing_ones_are_an_error() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let missing = headers_digest(folder.path()).expect_err("no headers");
        assert!(missing.contains("cuda_bf16.h: "), "{missing}");
        for name in HEADERS {
            std::fs::write(folder.path().join(name), name).expect("write");
        }
        let before = headers_digest(folder.path()).expect("headers");
        std::fs::write(folder.path().join("cuda_fp16.hpp"), "another").expect("write");
        assert_ne!(headers_digest(folder.path()).expect("headers"), before);
    }

    #[test]
    fn what_was_written_is_read_back_and_nothing_else_is_there() {
        let (_folder, cache, key) = cache();
        assert_eq!(cache.read(&key).expect("an empty cache"), None);
        cache.write(&key, b"an image").expect("write");
        let found = cache.read(&key).expect("read");
        assert_eq!(found.as_deref(), Some(&b"an image"[..]));
        let other = Key::of(&recipe("another source", &[]));
        assert_eq!(cache.read(&other).expect("read"), None);
        cache.write(&key, b"").expect("write");
        assert_eq!(cache.read(&key).expect("read").as_deref(), Some(&b""[..]));
    }

    #[test]
    fn any_flipped_missing_or_extra_byte_is_noticed_and_the_next_write_mends_it() {
        let (_folder, cache, key) = cache();
        cache.write(&key, b"an image").expect("write");
        let path = cache.file(&key);
        let whole = std::fs::read(&path).expect("a file");
        let damaged = |bytes: &[u8], what: &str| {
            std::fs::write(&path, bytes).expect("write");
            match cache.read(&key) {
                Err(CacheError::Damaged { .. }) => {}
                other => panic!("{what}: {other:?}"),
            }
        };
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            damaged(&bytes, &format!("byte {at} flipped"));
        }
        for len in 0..whole.len() {
            damaged(&whole[..len], &format!("cut to {len} bytes"));
        }
        damaged(&[&whole[..], b"x"].concat(), "one byte more");
        // A length that only a file of that size could have, in one that has not.
        let mut lying = whole.clone();
        lying[72..80].copy_from_slice(&u64::MAX.to_le_bytes());
        damaged(&lying, "a length beyond all memory");
        cache.write(&key, b"an image").expect("write");
        assert_eq!(std::fs::read(&path).expect("a file"), whole);
    }

    #[test]
    fn an_image_under_the_name_of_another_key_is_refused() {
        let (_folder, cache, key) = cache();
        cache.write(&key, b"an image").expect("write");
        let other = Key::of(&recipe("another source", &[]));
        std::fs::copy(cache.file(&key), cache.file(&other)).expect("copy");
        let error = cache.read(&other).expect_err("another's image");
        assert!(error.to_string().contains("another key"), "{error}");
    }

    #[test]
    fn writers_at_the_same_time_leave_one_whole_image_and_readers_never_see_a_part() {
        let (_folder, cache, key) = cache();
        let images: Vec<Vec<u8>> = (0..4).map(|writer| vec![writer; 100_000]).collect();
        std::thread::scope(|scope| {
            for image in &images {
                scope.spawn(|| (0..20).for_each(|_| cache.write(&key, image).expect("write")));
            }
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        if let Some(found) = cache.read(&key).expect("a whole file") {
                            assert!(images.contains(&found));
                        }
                    }
                });
            }
        });
        let left = std::fs::read_dir(cache.folder()).expect("the folder");
        assert_eq!(left.count(), 1, "no temporary files");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_with_its_cure() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("a file");
        std::fs::write(&file, "").expect("write");
        let cache = Cache::new(file.join("kernels"));
        let key = Key::of(&recipe("source", &[]));
        let error = cache.write(&key, b"an image").expect_err("no folder");
        assert!(error.to_string().contains(VARIABLE), "{error}");
    }

    #[test]
    fn the_folder_is_the_variables_or_the_users_cache_or_none() {
        let check = |variables: &[(&str, &str)], expected: Option<&str>| {
            let placed = Cache::placed(|name| {
                let found = variables.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).into())
            });
            let expected = expected.map(|folder| Cache::new(folder.into()));
            assert_eq!(placed, expected, "{variables:?}");
        };
        let home = ("HOME", "/home/ada");
        let xdg = ("XDG_CACHE_HOME", "/var/cache/worker");
        check(&[home], Some("/home/ada/.cache/caldpo/kernels"));
        check(&[home, xdg], Some("/var/cache/worker/caldpo/kernels"));
        let relative = ("XDG_CACHE_HOME", "cache");
        check(&[home, relative], Some("/home/ada/.cache/caldpo/kernels"));
        check(&[home, xdg, (VARIABLE, "kernels")], Some("kernels"));
        check(&[home, xdg, (VARIABLE, "")], None);
        check(&[], None);
        check(&[("HOME", "")], None);
    }
}
