//! Compiled kernels on disk, so that a kernel is compiled once per machine and not once per
//! process.
//!
//! An entry is a file whose name holds a hash of everything its content depends on. It is written
//! under another name in the same folder and renamed, so that processes that write at once, or die
//! while they write, leave whole files only; and it carries a checksum, so that what a disk or a
//! person has damaged is built again. No failure here is an error: without a folder to write to,
//! kernels are compiled in each process.

use std::env;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

/// What an entry starts with; then come the checksum and the length of the rest.
const MAGIC: &[u8; 8] = b"hbcache1";
const HEADER: usize = MAGIC.len() + 16 + 8;
/// Age from which a file that was not renamed is taken for that of a process that died.
const STALE: Duration = Duration::from_secs(3600);

/// One compiled kernel file: where it would lie.
pub(crate) struct Entry {
    path: Option<PathBuf>,
}

impl Entry {
    /// The entry of `name` for `architecture`. `parts` are all that its content depends on: text,
    /// options, the compiler's version; this crate's version and the architecture are added.
    pub(crate) fn new(name: &str, architecture: &str, parts: &[&str]) -> Self {
        Self { path: folder().map(|folder| folder.join(file_name(name, architecture, parts))) }
    }

    /// The entry's content; none when there is no such file, or when it is not whole.
    pub(crate) fn load(&self) -> Option<Vec<u8>> {
        let mut bytes = fs::read(self.path.as_ref()?).ok()?;
        let (magic, rest) = bytes.split_at_checked(MAGIC.len())?;
        let (checksum, rest) = rest.split_at_checked(16)?;
        let (length, content) = rest.split_at_checked(8)?;
        // An entry without content has no machine code for a driver to look at.
        let whole = magic == MAGIC
            && !content.is_empty()
            && length == (content.len() as u64).to_le_bytes()
            && checksum == Hash::of(content).to_le_bytes();
        whole.then(|| bytes.split_off(HEADER))
    }

    /// Keeps `content`, if there is a folder that can be written to.
    pub(crate) fn store(&self, content: &[u8]) {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let Some(path) = &self.path else { return };
        let Some(folder) = path.parent() else { return };
        if fs::create_dir_all(folder).is_err() {
            return;
        }
        sweep(folder);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_extension(format!("{}-{number}.tmp", std::process::id()));
        let written = fs::File::create(&temporary).and_then(|mut file| {
            file.write_all(MAGIC)?;
            file.write_all(&Hash::of(content).to_le_bytes())?;
            file.write_all(&(content.len() as u64).to_le_bytes())?;
            file.write_all(content)
        });
        if written.and_then(|()| fs::rename(&temporary, path)).is_err() {
            let _ = fs::remove_file(&temporary);
        }
    }

    /// Forgets the content: it was whole and of no use.
    pub(crate) fn remove(&self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

fn file_name(name: &str, architecture: &str, parts: &[&str]) -> String {
    let mut hash = Hash::new();
    for part in [env!("CARGO_PKG_VERSION"), name, architecture].iter().chain(parts) {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    // What a file may not be called: colons of AMD's names, on Windows.
    let architecture = architecture.replace(':', "_");
    format!("{name}-{architecture}-{:032x}.bin", hash.0)
}

/// The folder of the cache: `HALFBYTE_CACHE_DIR`, else `halfbyte` in the user's cache folder. None
/// when the user has no such folder, or `HALFBYTE_CACHE_DIR` is empty.
pub(crate) fn folder() -> Option<PathBuf> {
    if let Some(folder) = env::var_os("HALFBYTE_CACHE_DIR") {
        return (!folder.is_empty()).then(|| folder.into());
    }
    let absolute = |variable| {
        env::var_os(variable).map(PathBuf::from).filter(|path: &PathBuf| path.is_absolute())
    };
    let user = if cfg!(windows) {
        absolute("LOCALAPPDATA")
    } else {
        absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))
    };
    Some(user?.join("halfbyte"))
}

/// Removes what writers that died have left.
fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    let now = SystemTime::now();
    for entry in entries.flatten() {
        let path = entry.path();
        let age = || now.duration_since(entry.metadata().ok()?.modified().ok()?).ok();
        if path.extension().is_some_and(|e| e == "tmp") && age().is_some_and(|age| age > STALE) {
            let _ = fs::remove_file(path);
        }
    }
}

/// FNV-1a of 128 bits: quick to write down, and no two kernels meet by accident.
struct Hash(u128);

impl Hash {
    fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    fn update(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u128::from(byte)).wrapping_mul((1 << 88) + 0x13b);
        }
    }

    fn of(bytes: &[u8]) -> u128 {
        let mut hash = Self::new();
        hash.update(bytes);
        hash.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temporary(name: &str) -> PathBuf {
        let folder = env::temp_dir().join(format!("halfbyte-cache-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        folder
    }

    fn entry(folder: &Path) -> Entry {
        Entry { path: Some(folder.join("kernel-sm_80-0.bin")) }
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        assert_eq!(Hash::of(b""), 0x6c62272e07bb014262b821756295c58d);
        assert_eq!(Hash::of(b"foobar"), 0x343e1662793c64bf6f0d3597ba446f18);
    }

    #[test]
    fn what_is_stored_is_loaded_and_damage_is_noticed() {
        let folder = temporary("damage");
        let entry = entry(&folder);
        assert_eq!(entry.load(), None);
        let content: Vec<u8> = (0..1000u32).map(|i| (i * 7) as u8).collect();
        entry.store(&content);
        assert_eq!(entry.load().as_deref(), Some(&content[..]));

        let path = entry.path.clone().unwrap();
        let whole = fs::read(&path).unwrap();
        for cut in [0, 3, HEADER - 1, HEADER, whole.len() - 1] {
            fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(entry.load(), None, "cut to {cut} bytes");
        }
        for flipped in [0, MAGIC.len(), HEADER - 8, HEADER, whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[flipped] ^= 1;
            fs::write(&path, damaged).unwrap();
            assert_eq!(entry.load(), None, "byte {flipped} changed");
        }
        entry.store(&content);
        assert_eq!(entry.load().as_deref(), Some(&content[..]));
        entry.remove();
        assert_eq!(entry.load(), None);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_no_cache() {
        let folder = temporary("file");
        fs::write(&folder, "a file where the folder should be").unwrap();
        let entry = entry(&folder.join("sub"));
        entry.store(b"content");
        assert_eq!(entry.load(), None);
        fs::remove_file(folder).unwrap();
    }

    #[test]
    fn what_a_dead_writer_left_is_swept_and_what_a_live_one_writes_is_kept() {
        let folder = temporary("sweep");
        fs::create_dir_all(&folder).unwrap();
        let (dead, live) = (folder.join("dead.1-0.tmp"), folder.join("live.2-0.tmp"));
        fs::write(&dead, "half a ker").unwrap();
        fs::write(&live, "half a ker").unwrap();
        let old = SystemTime::now() - 2 * STALE;
        fs::File::options().write(true).open(&dead).unwrap().set_modified(old).unwrap();
        entry(&folder).store(b"content");
        assert!(!dead.exists() && live.exists());
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn names_depend_on_every_part() {
        let name = |architecture, parts: &[&str]| file_name("k", architecture, parts);
        let names =
            [name("sm_80", &["ab", "c"]), name("sm_80", &["a", "bc"]), name("sm_86", &["ab", "c"])];
        assert!(names[0] != names[1] && names[0] != names[2] && names[1] != names[2]);
        assert_eq!(names[0], name("sm_80", &["ab", "c"]));
        let amd = name("gfx90a:sramecc+:xnack-", &[]);
        assert!(amd.starts_with("k-gfx90a_sramecc+_xnack--"), "{amd}");
    }
}
