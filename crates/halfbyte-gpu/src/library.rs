//! Shared libraries opened at run time, and tables of their functions.
//!
//! Nothing here panics: a missing library or function is an [`Error`] that names it. Libraries
//! are never closed, so that functions taken from them stay valid for the process's life.

use crate::error::{Error, Result};
use std::env;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Where a library may be.
#[derive(Clone, Debug)]
pub(crate) enum Candidate {
    /// Under this name, if the process has it loaded already.
    Mapped(&'static str),
    /// A path, or a name for the system's search.
    Open(PathBuf),
}

impl Candidate {
    /// A name for the system's search.
    pub(crate) fn name(name: &str) -> Self {
        Self::Open(name.into())
    }

    /// What an environment variable names, alone, when it is set; else all of `otherwise`.
    pub(crate) fn from_env(variable: &str, otherwise: impl FnOnce() -> Vec<Self>) -> Vec<Self> {
        match env::var_os(variable).filter(|value| !value.is_empty()) {
            Some(path) => vec![Self::Open(path.into())],
            None => otherwise(),
        }
    }

    /// The files with one of these names in the folders of [`add_library_folder`].
    pub(crate) fn in_folders(names: &[&str]) -> Vec<Self> {
        let folders = FOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
        let files = folders.iter().flat_map(|folder| names.iter().map(|name| folder.join(name)));
        files.filter(|file| file.exists()).map(Self::Open).collect()
    }
}

static FOLDERS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Adds a folder in which compilers (NVRTC, hiprtc) are looked for after the system's own places,
/// for example `site-packages/nvidia/cu13/lib`. A folder that does not exist does no harm.
pub fn add_library_folder(folder: impl AsRef<Path>) {
    let folder = folder.as_ref();
    let mut folders = FOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
    if !folders.iter().any(|known| known == folder) {
        folders.push(folder.to_owned());
    }
}

/// An open library.
pub(crate) struct Library {
    raw: ManuallyDrop<libloading::Library>,
    what: &'static str,
    path: PathBuf,
}

impl Library {
    /// Opens the first candidate that can be opened. `what` names the library in messages, for
    /// example `the CUDA driver`.
    pub(crate) fn open(what: &'static str, candidates: &[Candidate]) -> Result<Self> {
        let mut tried = Vec::with_capacity(candidates.len());
        for candidate in candidates {
            let (path, opened) = match candidate {
                Candidate::Mapped(name) => match open_mapped(name) {
                    Some(raw) => (PathBuf::from(name), Ok(raw)),
                    None => continue,
                },
                Candidate::Open(path) if is_cut_off(path) => {
                    tried.push(format!("{}: the file is cut off", path.display()));
                    continue;
                }
                // SAFETY: these are drivers and compilers of the GPUs' makers (or what the user
                // names in their place); their initializers have no requirements.
                Candidate::Open(path) => (path.clone(), unsafe { libloading::Library::new(path) }),
            };
            match opened {
                Ok(raw) => return Ok(Self { raw: ManuallyDrop::new(raw), what, path }),
                Err(error) => tried.push(reason(&path, &error)),
            }
        }
        Err(Error::Library { library: what, tried })
    }

    /// The file that was opened; once a function of it is known, its full path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The function of that name.
    ///
    /// # Safety
    /// `F` is the function's type, an `extern "C"` function pointer.
    pub(crate) unsafe fn function<F: Copy>(
        &self,
        symbol: &'static str,
        expected: &'static str,
    ) -> Result<F> {
        // SAFETY: by the caller's contract.
        unsafe { self.optional(symbol) }.ok_or_else(|| Error::Symbol {
            library: self.what,
            path: self.path.clone(),
            symbol,
            expected,
        })
    }

    /// The same for a function that not every supported version has.
    ///
    /// # Safety
    /// As [`Library::function`].
    pub(crate) unsafe fn optional<F: Copy>(&self, symbol: &str) -> Option<F> {
        // SAFETY: by the caller's contract.
        unsafe { self.raw.get::<F>(symbol) }.ok().map(|found| *found)
    }

    /// Replaces the name under which the library was opened by the path of the file, where the
    /// system tells. `symbol` is any function of the library.
    pub(crate) fn resolve_path(&mut self, symbol: &str) {
        // SAFETY: the address is only looked up, never called.
        let address = unsafe { self.optional::<*const std::ffi::c_void>(symbol) };
        if let Some(path) = address.and_then(file_of) {
            self.path = path;
        }
    }
}

/// `libx.so: cannot open shared object file: ...`, without naming the file twice.
fn reason(path: &Path, error: &libloading::Error) -> String {
    let path = path.display().to_string();
    let error =
        std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    if error.contains(&path) { error } else { format!("{path}: {error}") }
}

/// True for an ELF file that ends before what its program headers say: opening it would end the
/// process (SIGBUS), where every other damage is an error. False for what is no path to a file.
fn is_cut_off(path: &Path) -> bool {
    fn read(path: &Path) -> std::io::Result<bool> {
        if path.components().count() < 2 {
            return Ok(false); // a name, for the system's search
        }
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut header = [0; 64];
        file.read_exact(&mut header)?;
        if header[..6] != *b"\x7fELF\x02\x01" {
            return Ok(false); // of another kind: the system's loader judges it
        }
        let number = |bytes: &[u8], at: usize, width: usize| {
            bytes[at..at + width].iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte))
        };
        let (start, size) = (number(&header, 32, 8), number(&header, 54, 2).max(56));
        let mut table = vec![0; (size * number(&header, 56, 2)) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut table)?;
        let end = |entry: &[u8]| number(entry, 8, 8).saturating_add(number(entry, 32, 8));
        Ok(table.chunks_exact(size as usize).any(|entry| end(entry) > length))
    }
    read(path).is_ok_and(|cut_off| cut_off)
}

#[cfg(unix)]
fn open_mapped(name: &str) -> Option<libloading::Library> {
    use libloading::os::unix::{Library, RTLD_NOW};
    // SAFETY: RTLD_NOLOAD runs no initializers: the library is there already or this fails.
    unsafe { Library::open(Some(name), RTLD_NOW | libc::RTLD_NOLOAD) }.ok().map(Into::into)
}

#[cfg(windows)]
fn open_mapped(name: &str) -> Option<libloading::Library> {
    libloading::os::windows::Library::open_already_loaded(name).ok().map(Into::into)
}

#[cfg(unix)]
fn file_of(address: *const std::ffi::c_void) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: dladdr fills the struct when it answers other than 0.
    let info = unsafe {
        if libc::dladdr(address, info.as_mut_ptr()) == 0 {
            return None;
        }
        info.assume_init()
    };
    if info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: the name is a C string that lives as long as the library, which is never closed.
    let name = unsafe { std::ffi::CStr::from_ptr(info.dli_fname) };
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(name.to_bytes())))
}

#[cfg(windows)]
fn file_of(_: *const std::ffi::c_void) -> Option<PathBuf> {
    None
}

/// Declares a table of C functions that is filled from a [`Library`].
///
/// ```text
/// dynlib! {
///     /// What the table is.
///     pub(crate) struct Table: "version 12.0 or newer" {
///         init(c_uint) -> c_int = ["cuInit"];
///     }
///     optional {
///         prefetch(u64, usize) -> c_int = ["cuMemPrefetchAsync"];
///     }
/// }
/// let table = Table::load(&library, 0)?;
/// ```
///
/// The text after the struct's name says which version has every function. A function can have
/// several names, one per library of the same shape; `load` takes the index of the one to use. A
/// missing function is [`Error::Symbol`]; a missing optional one is `None`.
macro_rules! dynlib {
    (
        $(#[$meta:meta])*
        $visibility:vis struct $table:ident: $expected:literal {
            $($name:ident($($argument:ty),* $(,)?) -> $result:ty = [$($symbol:literal),+];)*
        }
        $(optional {
            $($maybe:ident($($maybe_argument:ty),* $(,)?) -> $maybe_result:ty = [$($maybe_symbol:literal),+];)*
        })?
    ) => {
        $(#[$meta])*
        $visibility struct $table {
            $($visibility $name: unsafe extern "C" fn($($argument),*) -> $result,)*
            $($($visibility $maybe: Option<unsafe extern "C" fn($($maybe_argument),*) -> $maybe_result>,)*)?
        }

        impl $table {
            /// Takes every function from the library, each by its name number `column`.
            $visibility fn load(library: &$crate::library::Library, column: usize) -> $crate::Result<Self> {
                // SAFETY: the signatures are those of the library's header.
                unsafe {
                    Ok(Self {
                        $($name: library.function([$($symbol),+][column], $expected)?,)*
                        $($($maybe: library.optional([$($maybe_symbol),+][column]),)*)?
                    })
                }
            }
        }
    };
}
pub(crate) use dynlib;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_named_with_what_was_tried() {
        let candidates =
            [Candidate::name("libhalfbyte-one.so.7"), Candidate::name("/no/where/two.so")];
        let error = Library::open("the test library", &candidates).err().map(|e| e.to_string());
        let error = error.unwrap_or_default();
        assert!(
            error.starts_with("the test library was not found, tried libhalfbyte-one.so.7"),
            "{error}"
        );
        assert!(error.contains("/no/where/two.so"), "{error}");
        assert_eq!(error.matches("libhalfbyte-one.so.7").count(), 1, "{error}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_missing_function_is_named_with_the_file() {
        dynlib! {
            #[allow(dead_code, reason = "loading fails")]
            struct Table: "a C library" {
                getpid() -> i32 = ["getpid"];
                nothing() -> i32 = ["halfbyte_no_such_function"];
            }
        }
        dynlib! {
            struct Some: "a C library" {
                getpid() -> i32 = ["halfbyte_wrong_column", "getpid"];
            }
            optional {
                nothing() -> i32 = ["halfbyte_no_such_function", "halfbyte_nor_this"];
            }
        }
        let mut libc = Library::open("the C library", &[Candidate::Mapped("libc.so.6")]).unwrap();
        libc.resolve_path("getpid");
        assert!(libc.path().is_absolute(), "{}", libc.path().display());
        let error = Table::load(&libc, 0).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(
            error.ends_with("lacks the function halfbyte_no_such_function: expected a C library"),
            "{error}"
        );
        let table = Some::load(&libc, 1).unwrap();
        assert!(table.nothing.is_none());
        // SAFETY: getpid takes nothing and returns a number.
        assert_eq!(unsafe { (table.getpid)() }, std::process::id() as i32);
    }
}
