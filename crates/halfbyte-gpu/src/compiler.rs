//! Run-time compilers: NVRTC and hiprtc, which have the same interface under other names.

use crate::cache;
use crate::error::{Error, Result};
use crate::library::{Library, dynlib};
use crate::module::Source;
use crate::native::IMAGE_ERRORS;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr;

type Program = *mut c_void;

/// Which column of [`Calls`] holds NVRTC's names.
pub(crate) const NVRTC: usize = 0;
/// Which column of [`Calls`] holds hiprtc's names.
pub(crate) const HIPRTC: usize = 1;

dynlib! {
    struct Calls: "NVRTC 12.1 or newer, or hiprtc of ROCm 5.6 or newer" {
        version(*mut c_int, *mut c_int) -> c_int = ["nvrtcVersion", "hiprtcVersion"];
        error_string(c_int) -> *const c_char = ["nvrtcGetErrorString", "hiprtcGetErrorString"];
        create(
            *mut Program, *const c_char, *const c_char, c_int,
            *const *const c_char, *const *const c_char,
        ) -> c_int = ["nvrtcCreateProgram", "hiprtcCreateProgram"];
        compile(Program, c_int, *const *const c_char) -> c_int = ["nvrtcCompileProgram", "hiprtcCompileProgram"];
        log_size(Program, *mut usize) -> c_int = ["nvrtcGetProgramLogSize", "hiprtcGetProgramLogSize"];
        log(Program, *mut c_char) -> c_int = ["nvrtcGetProgramLog", "hiprtcGetProgramLog"];
        code_size(Program, *mut usize) -> c_int = ["nvrtcGetCUBINSize", "hiprtcGetCodeSize"];
        code(Program, *mut c_char) -> c_int = ["nvrtcGetCUBIN", "hiprtcGetCode"];
        destroy(*mut Program) -> c_int = ["nvrtcDestroyProgram", "hiprtcDestroyProgram"];
    }
    optional {
        architecture_count(*mut c_int) -> c_int = ["nvrtcGetNumSupportedArchs", "-"];
        architectures(*mut c_int) -> c_int = ["nvrtcGetSupportedArchs", "-"];
    }
}

/// An open run-time compiler.
pub(crate) struct Compiler {
    calls: Calls,
    library: Library,
    /// `NVRTC 13.2`
    name: String,
    /// What its code is kept under: hiprtc gives all its versions one number, and NVRTC those that
    /// differ in the third part.
    identity: String,
    version: (c_int, c_int),
}

impl Compiler {
    /// The compiler in `library`; `column` says which, `name` what to call it.
    pub(crate) fn new(mut library: Library, column: usize, name: &str) -> Result<Self> {
        let calls = Calls::load(&library, column)?;
        library.resolve_path(["nvrtcVersion", "hiprtcVersion"][column]);
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both numbers are written during the call. Without an answer they stay zero.
        unsafe { (calls.version)(&raw mut major, &raw mut minor) };
        let name = format!("{name} {major}.{minor}");
        let bytes = std::fs::metadata(library.path()).map_or(0, |file| file.len());
        let identity = format!("{name}, {bytes} bytes");
        Ok(Self { calls, library, name, identity, version: (major, minor) })
    }

    /// `NVRTC 13.2`.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The major and the minor version.
    pub(crate) fn version(&self) -> (c_int, c_int) {
        self.version
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        self.library.path()
    }

    /// The CUDA architectures (75, 80, ...) it can compile for; empty when it does not tell.
    pub(crate) fn architectures(&self) -> Vec<c_int> {
        let (Some(count), Some(list)) = (self.calls.architecture_count, self.calls.architectures)
        else {
            return Vec::new();
        };
        let mut length = 0;
        // SAFETY: the number is written during the call.
        if unsafe { count(&raw mut length) } != 0 || length <= 0 {
            return Vec::new();
        }
        let mut architectures = vec![0; length as usize];
        // SAFETY: the call writes as many numbers as the one before said.
        if unsafe { list(architectures.as_mut_ptr()) } != 0 {
            return Vec::new();
        }
        architectures
    }

    /// Machine code of `source`: from the disk cache, or compiled and kept there. `accept` loads
    /// it; code from the cache is compiled again when it is the code that is refused.
    pub(crate) fn build<T>(
        &self,
        source: &Source,
        architecture: &str,
        options: &[String],
        accept: impl Fn(&[u8]) -> Result<T>,
    ) -> Result<T> {
        let text = source.text()?;
        let mut parts = vec![&*text, self.identity.as_str()];
        parts.extend(options.iter().map(String::as_str));
        let entry = cache::Entry::new(source.name, architecture, &parts);
        if let Some(code) = entry.load() {
            match accept(&code) {
                Err(Error::Call { code, .. }) if IMAGE_ERRORS.contains(&code) => entry.remove(),
                loaded => return loaded,
            }
        }
        let code = self.compile(source.name, &text, architecture, options)?;
        let loaded = accept(&code)?;
        entry.store(&code);
        Ok(loaded)
    }

    fn compile(
        &self,
        source_name: &'static str,
        text: &str,
        architecture: &str,
        options: &[String],
    ) -> Result<Vec<u8>> {
        let fail = |log: String| Error::Compile {
            compiler: self.name.clone(),
            source_name,
            architecture: architecture.to_owned(),
            log,
        };
        let c = |text: &str| CString::new(text).map_err(|_| fail("the text holds a NUL".into()));
        let (text, file) = (c(text)?, c(&format!("{source_name}.cu"))?);
        let options = options.iter().map(|option| c(option)).collect::<Result<Vec<_>>>()?;
        let options: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program = Owned { compiler: self, raw: ptr::null_mut() };
        // SAFETY: text and name are C strings; no headers are given.
        let code = unsafe {
            (self.calls.create)(
                &raw mut program.raw,
                text.as_ptr(),
                file.as_ptr(),
                0,
                ptr::null(),
                ptr::null(),
            )
        };
        if code != 0 {
            return Err(fail(self.describe(code)));
        }
        // SAFETY: the options are C strings that live until the end of this function.
        let code =
            unsafe { (self.calls.compile)(program.raw, options.len() as c_int, options.as_ptr()) };
        if code != 0 {
            let log = program.fetch(self.calls.log_size, self.calls.log).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let log = log.trim_end_matches('\0').trim();
            return Err(fail(match log {
                "" => self.describe(code),
                log => format!("{}\n{log}", self.describe(code)),
            }));
        }
        match program.fetch(self.calls.code_size, self.calls.code) {
            Ok(code) if code.is_empty() => Err(fail("it made no machine code".to_owned())),
            Ok(code) => Ok(code),
            Err(code) => Err(fail(self.describe(code))),
        }
    }

    fn describe(&self, code: c_int) -> String {
        // SAFETY: the call takes any number, and answers with a string constant or null.
        let text = unsafe { (self.calls.error_string)(code) };
        if text.is_null() {
            return format!("error {code}");
        }
        // SAFETY: it is not null, so it is a string constant.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

/// A program that is destroyed on drop.
struct Owned<'a> {
    compiler: &'a Compiler,
    raw: Program,
}

type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Get = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

impl Owned<'_> {
    /// A string of bytes whose size and content two calls tell, or the code one failed with.
    fn fetch(&self, size: Size, get: Get) -> Result<Vec<u8>, c_int> {
        let mut length = 0;
        // SAFETY: the program is live; the length is written during the call.
        let code = unsafe { size(self.raw, &raw mut length) };
        if code != 0 {
            return Err(code);
        }
        let mut bytes = vec![0u8; length];
        // SAFETY: the call writes as many bytes as the one before said.
        let code = unsafe { get(self.raw, bytes.as_mut_ptr().cast()) };
        if code == 0 { Ok(bytes) } else { Err(code) }
    }
}

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: the program came from `create` and is used no more.
            unsafe { (self.compiler.calls.destroy)(&raw mut self.raw) };
        }
    }
}
