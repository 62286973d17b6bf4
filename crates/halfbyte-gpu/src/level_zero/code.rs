//! SPIR-V of a kernel: from this build, or made here by Intel's `ocloc`.
//!
//! SPIR-V is what Level Zero's driver surely takes: its compiler is part of the driver. OpenCL C
//! it does not take, and what `PyTorch` brings along (SYCL, Triton) does not compile OpenCL C
//! either. So wheels carry SPIR-V (`build/spirv.rs`), and a build without it needs `libocloc.so`
//! (Debian and Intel: `intel-ocloc`).

use crate::cache::Entry;
use crate::error::{Error, Result};
use crate::library::{Candidate, Library, dynlib};
use crate::module::Source;
use crate::packed::Packed;
use std::ffi::{CStr, c_char, c_int, c_uint};
use std::io::ErrorKind::NotFound;
use std::{ptr, slice};

include!(concat!(env!("OUT_DIR"), "/spirv.rs"));

/// Names an `ocloc` library in place of the system's.
const VARIABLE: &str = "HALFBYTE_OCLOC";
#[cfg(windows)]
const SYSTEM: &str = "ocloc64.dll";
#[cfg(not(windows))]
const SYSTEM: &str = "libocloc.so";
/// Two of these are outputs' names; SPIR-V's ends in `.spv`, the log is `stdout.log`.
const ENDING: &[u8] = b".spv";
const LOG: &[u8] = b"stdout.log";
const ARCHITECTURE: &str = "spirv";

type Texts = *const *const c_char;
type Datas = *const *const u8;
type Lengths = *const u64;

dynlib! {
    struct Ocloc: "ocloc of 2020 or newer" {
        invoke(
            c_uint, Texts,
            u32, Datas, Lengths, Texts,
            u32, Datas, Lengths, Texts,
            *mut u32, *mut *mut *mut u8, *mut *mut u64, *mut *mut *mut c_char,
        ) -> c_int = ["oclocInvoke"];
        free(*mut u32, *mut *mut *mut u8, *mut *mut u64, *mut *mut *mut c_char) -> c_int = ["oclocFreeOutput"];
        version() -> c_uint = ["oclocVersion"];
    }
}

/// SPIR-V of `source`.
pub(super) fn spirv(source: &Source) -> Result<Vec<u8>> {
    let reason = match SPIRV.unpack(source.name) {
        Ok(code) => return Ok(code),
        Err(error) if error.kind() == NotFound => "this build has no SPIR-V".into(),
        Err(error) => format!("this build's SPIR-V is damaged: {error}"),
    };
    let candidates = Candidate::from_env(VARIABLE, || vec![Candidate::name(SYSTEM)]);
    let opened = Library::open("Intel's offline compiler", &candidates)
        .and_then(|library| Ocloc::load(&library, 0));
    match opened {
        Ok(ocloc) => compile(&ocloc, source),
        Err(error) => Err(Error::NoCode {
            source_name: source.name,
            architecture: ARCHITECTURE.into(),
            reasons: vec![reason, error.to_string()],
        }),
    }
}

/// What [`spirv`] would use, in words.
pub(super) fn describe() -> String {
    if !SPIRV.is_empty() {
        return "SPIR-V in this build".into();
    }
    let candidates = Candidate::from_env(VARIABLE, || vec![Candidate::name(SYSTEM)]);
    match Library::open("Intel's offline compiler", &candidates) {
        Ok(library) => format!("no SPIR-V in this build; ocloc ({})", library.path().display()),
        Err(error) => format!("no SPIR-V in this build, and {error}"),
    }
}

fn compile(ocloc: &Ocloc, source: &Source) -> Result<Vec<u8>> {
    // SAFETY: the function takes nothing.
    let version = format!("ocloc {}", unsafe { (ocloc.version)() });
    let source_text = source.text()?;
    let entry = Entry::new(source.name, ARCHITECTURE, &[&source_text, &version]);
    if let Some(code) = entry.load() {
        return Ok(code);
    }
    // FP_CONTRACT is off in port.h; how division rounds is said when the module is made.
    let arguments: [&CStr; 7] =
        [c"ocloc", c"-q", c"-spv_only", c"-file", c"kernel.cl", c"-options", c"-cl-std=CL2.0"];
    let arguments = arguments.map(CStr::as_ptr);
    let text = [source_text.as_bytes(), b"\0"].concat();
    let (data, length, name) = (text.as_ptr(), text.len() as u64, c"kernel.cl".as_ptr());
    let mut outputs = Outputs {
        count: 0,
        datas: ptr::null_mut(),
        lengths: ptr::null_mut(),
        names: ptr::null_mut(),
    };
    // SAFETY: seven arguments, one source of the length given, no headers; the outputs are ocloc's
    // until they are given back.
    let status = unsafe {
        (ocloc.invoke)(
            arguments.len() as c_uint,
            arguments.as_ptr(),
            1,
            &raw const data,
            &raw const length,
            &raw const name,
            0,
            ptr::null(),
            ptr::null(),
            ptr::null(),
            &raw mut outputs.count,
            &raw mut outputs.datas,
            &raw mut outputs.lengths,
            &raw mut outputs.names,
        )
    };
    // SAFETY: the call above filled them.
    let (code, log) = unsafe { (outputs.find(ENDING), outputs.find(LOG)) };
    // SAFETY: given back once, after the last use.
    unsafe {
        (ocloc.free)(
            &raw mut outputs.count,
            &raw mut outputs.datas,
            &raw mut outputs.lengths,
            &raw mut outputs.names,
        );
    }
    match code {
        Some(code) if status == 0 => {
            entry.store(&code);
            Ok(code)
        }
        _ => Err(Error::Compile {
            compiler: version,
            source_name: source.name,
            architecture: ARCHITECTURE.into(),
            log: format!(
                "status {status}: {}",
                String::from_utf8_lossy(log.as_deref().unwrap_or(b"no log")).trim()
            ),
        }),
    }
}

/// What `oclocInvoke` gives out.
struct Outputs {
    count: u32,
    datas: *mut *mut u8,
    lengths: *mut u64,
    names: *mut *mut c_char,
}

impl Outputs {
    /// A copy of the first output whose name ends so.
    ///
    /// # Safety
    /// `oclocInvoke` filled the fields, and they have not been given back.
    unsafe fn find(&self, ending: &[u8]) -> Option<Vec<u8>> {
        (0..self.count as usize).find_map(|i| {
            // SAFETY: there are `count` names, C strings, and as many datas and lengths.
            unsafe {
                let name = CStr::from_ptr(*self.names.add(i)).to_bytes();
                let (data, length) = (*self.datas.add(i), *self.lengths.add(i));
                let whole = name.ends_with(ending) && !data.is_null();
                whole.then(|| slice::from_raw_parts(data, length as usize).to_vec())
            }
        })
    }
}
