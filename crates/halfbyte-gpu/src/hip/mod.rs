//! ROCm through the HIP runtime and hiprtc.
//!
//! HIP's runtime interface has a current device per thread and no contexts to hold: `PyTorch` sets
//! it with `hipSetDevice`, and so does this crate, around each call and only where another device
//! is current. (The context functions of HIP are deprecated and do the same.)
//!
//! No machine code is embedded for AMD's many architectures: kernels are compiled by hiprtc when
//! first used, and kept in the disk cache.

mod runtime;

use crate::chain::{self, Backend, BackendReport, DeviceReport, Refusal, looked_for};
use crate::compiler::{self, Compiler};
use crate::device::{Device, Facts, Module, Runtime};
use crate::error::{Error, Result};
use crate::library::{Candidate, Library};
use crate::module::Source;
use crate::native::{self, Calls, Native, Platform};
use runtime::Sys;
use std::ffi::{CStr, c_char, c_int};
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};

#[cfg(not(windows))]
const RUNTIME_NAMES: &[&str] = &["libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so"];
#[cfg(not(windows))]
const COMPILER_NAMES: &[&str] = &["libhiprtc.so.7", "libhiprtc.so.6", "libhiprtc.so"];
#[cfg(windows)]
const RUNTIME_NAMES: &[&str] = &["amdhip64_7.dll", "amdhip64_6.dll"];
#[cfg(windows)]
const COMPILER_NAMES: &[&str] = &["hiprtc0701.dll", "hiprtc0700.dll", "hiprtc0604.dll"];
/// Where ROCm is when the system's search does not know.
const ROCM_FOLDER: &str = "/opt/rocm/lib";

/// Bytes of kernel arguments that HIP takes.
const PARAMETERS: usize = 4096;
/// More bytes than any version's device properties have (1472 in ROCm 6).
const PROPERTIES: usize = 8192;
/// The properties start with the name, in so many bytes.
const NAME: usize = 256;

/// The runtime, open and initialized.
struct Hip {
    sys: Sys,
    calls: Calls,
    path: PathBuf,
    version: c_int,
    devices: Box<[OnceLock<&'static Device>]>,
    making: Mutex<()>,
}

/// The ROCm device of that number, in the order of `HIP_VISIBLE_DEVICES`. The first call opens the
/// HIP runtime.
///
/// # Errors
/// As [`crate::cuda_device`].
pub fn rocm_device(ordinal: usize) -> Result<&'static Device> {
    let hip = hip().map_err(|refusal| refusal.error.clone())?;
    match hip.devices.get(ordinal) {
        Some(slot) => slot.get().map_or_else(|| hip.make(ordinal, slot), |device| Ok(*device)),
        None => {
            Err(Error::Ordinal { runtime: Runtime::Rocm, got: ordinal, count: hip.devices.len() })
        }
    }
}

/// Why [`rocm_device`] would refuse the device of that number, or None. Opens the runtime only.
#[must_use]
pub fn rocm_refusal(ordinal: usize) -> Option<Error> {
    match hip() {
        Err(refusal) => Some(refusal.error.clone()),
        Ok(hip) if ordinal < hip.devices.len() => hip.facts(ordinal).err(),
        Ok(_) => rocm_device(ordinal).err(),
    }
}

/// What was looked for, found and refused.
pub(crate) fn probe() -> BackendReport {
    let looked_for = looked_for("HALFBYTE_HIP", &RUNTIME_NAMES.join(", "));
    let hip = match hip() {
        Ok(hip) => hip,
        Err(refusal) => {
            let found = refusal.found.clone();
            let report = BackendReport::refused(Backend::Rocm, looked_for, &refusal.error);
            return BackendReport { found, ..report };
        }
    };
    let describe = |ordinal| match hip.facts(ordinal) {
        Ok(facts) => DeviceReport {
            ordinal,
            name: facts.name,
            architecture: facts.architecture,
            refused: None,
        },
        Err(error) => DeviceReport {
            ordinal,
            name: "unknown".to_owned(),
            architecture: "unknown".to_owned(),
            refused: Some(error.to_string()),
        },
    };
    let devices: Vec<_> = (0..hip.devices.len()).map(describe).collect();
    let kernels = match hiprtc() {
        _ if devices.is_empty() => String::new(),
        Ok(compiler) => {
            format!("compiled when first used: {} ({})", compiler.name(), compiler.path().display())
        }
        Err(error) => format!("compiled when first used: {error}"),
    };
    let found = Some(hip.describe());
    BackendReport { backend: Backend::Rocm, looked_for, found, kernels, devices, refused: None }
        .judged()
}

/// Names as candidates: what the process has loaded already (`import torch` does), what the
/// system finds, what lies in ROCm's folder.
fn candidates(variable: &str, names: &'static [&'static str]) -> Vec<Candidate> {
    Candidate::from_env(variable, || {
        let mut candidates: Vec<_> = names.iter().map(|name| Candidate::Mapped(name)).collect();
        candidates.extend(names.iter().map(|name| Candidate::name(name)));
        candidates.extend(Candidate::in_folders(names));
        if cfg!(not(windows)) {
            let last = names.last().copied().unwrap_or_default();
            candidates.push(Candidate::Open(PathBuf::from(ROCM_FOLDER).join(last)));
        }
        candidates
    })
}

/// The compiler, opened on first use: the file `HALFBYTE_HIPRTC` names, else by [`candidates`].
fn hiprtc() -> Result<&'static Compiler> {
    static COMPILER: OnceLock<Compiler> = OnceLock::new();
    if let Some(compiler) = COMPILER.get() {
        return Ok(compiler);
    }
    let candidates = candidates("HALFBYTE_HIPRTC", COMPILER_NAMES);
    let library = Library::open("the run-time compiler hiprtc", &candidates)?;
    let compiler = Compiler::new(library, compiler::HIPRTC, "hiprtc")?;
    Ok(COMPILER.get_or_init(|| compiler))
}

fn hip() -> Result<&'static Hip, &'static Refusal> {
    static HIP: OnceLock<Result<Hip, Refusal>> = OnceLock::new();
    HIP.get_or_init(open).as_ref()
}

fn open() -> Result<Hip, Refusal> {
    let missing = |error| Refusal { found: None, error };
    chain::permit(Runtime::Rocm).map_err(missing)?;
    let candidates = candidates("HALFBYTE_HIP", RUNTIME_NAMES);
    let mut library = Library::open("the HIP runtime", &candidates).map_err(missing)?;
    library.resolve_path("hipInit");
    let path = library.path().to_owned();
    let broken = |error| Refusal { found: Some(path.display().to_string()), error };
    let sys = Sys::load(&library, 0).map_err(broken)?;
    let calls = Calls::load(&library, native::HIP).map_err(broken)?;
    let mut hip = Hip {
        sys,
        calls,
        path: path.clone(),
        version: 0,
        devices: Box::default(),
        making: Mutex::new(()),
    };
    // SAFETY: flags must be zero.
    let code = unsafe { (hip.sys.init)(0) };
    hip.check(code, || "hipInit".to_owned()).map_err(broken)?;
    // SAFETY: the number is written during the call. Without an answer it stays zero.
    unsafe { (hip.sys.version)(&raw mut hip.version) };
    let mut count = 0;
    // SAFETY: the number is written during the call.
    let code = unsafe { (hip.sys.device_count)(&raw mut count) };
    hip.check(code, || "hipGetDeviceCount".to_owned())
        .map_err(|error| Refusal { found: Some(hip.describe()), error })?;
    hip.devices = (0..count).map(|_| OnceLock::new()).collect();
    Ok(hip)
}

impl Hip {
    fn check(&self, code: c_int, call: impl FnOnce() -> String) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let (name, text) = self.describe_error(code);
        Err(Error::Call { runtime: Runtime::Rocm, call: call(), code, name, text })
    }

    fn describe_error(&self, code: c_int) -> (String, String) {
        let ask = |call: unsafe extern "C" fn(c_int) -> *const c_char| {
            // SAFETY: the call takes any number and answers with a string constant or null.
            let text = unsafe { call(code) };
            if text.is_null() {
                return String::new();
            }
            // SAFETY: it is not null, so it is a string constant.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        };
        (ask(self.sys.error_name), ask(self.sys.error_string))
    }

    /// The file and the version.
    fn describe(&self) -> String {
        let (major, minor) = (self.version / 10_000_000, self.version / 100_000 % 100);
        format!("{}, HIP {major}.{minor}", self.path.display())
    }

    fn attribute(&self, attribute: c_int, device: c_int) -> Result<c_int> {
        let mut value = 0;
        // SAFETY: the value is written during the call.
        let code = unsafe { (self.sys.device_attribute)(&raw mut value, attribute, device) };
        self.check(code, || format!("hipDeviceGetAttribute({attribute})"))?;
        Ok(value)
    }

    /// What is known about a device.
    fn facts(&self, ordinal: usize) -> Result<Facts> {
        let device = ordinal as c_int;
        let properties =
            self.sys.properties.or(self.sys.properties_5).ok_or(Error::Unsupported {
                runtime: Runtime::Rocm,
                what: "tell a device's architecture (hipGetDeviceProperties is missing)",
            })?;
        let mut bytes = vec![0u8; PROPERTIES];
        // SAFETY: the buffer has more bytes than any version of the struct.
        let code = unsafe { properties(bytes.as_mut_ptr(), device) };
        self.check(code, || format!("hipGetDeviceProperties({ordinal})"))?;
        let name = CStr::from_bytes_until_nul(&bytes[..NAME]).unwrap_or_default();
        let architecture = architecture(&bytes[NAME..]).ok_or(Error::Unsupported {
            runtime: Runtime::Rocm,
            what: "tell a device's architecture (its properties name none)",
        })?;
        Ok(Facts {
            runtime: Runtime::Rocm,
            ordinal,
            name: name.to_string_lossy().trim().to_owned(),
            architecture,
            capability: 0,
            multiprocessors: self.attribute(runtime::MULTIPROCESSORS, device)? as u32,
            max_shared_bytes: self.attribute(runtime::SHARED, device)? as u32,
            parameter_bytes: PARAMETERS,
        })
    }

    #[cold]
    fn make(
        &'static self,
        ordinal: usize,
        slot: &OnceLock<&'static Device>,
    ) -> Result<&'static Device> {
        let _making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = slot.get() {
            return Ok(device); // another thread was faster
        }
        let facts = self.facts(ordinal)?;
        let managed = self.attribute(runtime::CONCURRENT_MANAGED_ACCESS, ordinal as c_int)? != 0;
        let platform = HipDevice {
            hip: self,
            ordinal: ordinal as c_int,
            architecture: facts.architecture.clone(),
            managed,
        };
        let device = Box::leak(Box::new(Device::new(facts, Box::new(Native(platform)))));
        Ok(*slot.get_or_init(|| device))
    }
}

/// `gcnArchName` of the device properties, for example `gfx90a:sramecc+:xnack-`. Where it lies
/// differs between versions, so it is found by what it starts with.
fn architecture(properties: &[u8]) -> Option<String> {
    let start = properties.windows(4).position(|w| w[..3] == *b"gfx" && w[3].is_ascii_digit())?;
    let text = CStr::from_bytes_until_nul(&properties[start..]).ok()?;
    text.to_str().ok().map(str::to_owned)
}

/// One device.
struct HipDevice {
    hip: &'static Hip,
    ordinal: c_int,
    architecture: String,
    managed: bool,
}

impl Platform for HipDevice {
    /// The device that was current, if it was another.
    type Previous = Option<c_int>;

    fn runtime(&self) -> Runtime {
        Runtime::Rocm
    }

    fn ordinal(&self) -> c_int {
        self.ordinal
    }

    fn calls(&self) -> &'static Calls {
        &self.hip.calls
    }

    fn describe(&self, code: c_int) -> (String, String) {
        self.hip.describe_error(code)
    }

    fn enter(&self) -> Result<Option<c_int>> {
        let mut current = 0;
        // SAFETY: the number is written during the call.
        let code = unsafe { (self.hip.sys.current_device)(&raw mut current) };
        self.hip.check(code, || "hipGetDevice".to_owned())?;
        if current == self.ordinal {
            return Ok(None);
        }
        // SAFETY: the number is that of a device.
        let code = unsafe { (self.hip.sys.set_device)(self.ordinal) };
        self.hip.check(code, || format!("hipSetDevice({})", self.ordinal))?;
        Ok(Some(current))
    }

    fn leave(&self, previous: Option<c_int>) {
        if let Some(device) = previous {
            // SAFETY: the number is that of the device that was current.
            unsafe { (self.hip.sys.set_device)(device) };
        }
    }

    fn shares_managed_memory(&self) -> bool {
        self.managed
    }

    fn code(
        &self,
        source: &'static Source,
        load: &dyn Fn(&[u8]) -> Result<Module>,
    ) -> Result<Module> {
        if source.cuda_only {
            return Err(Error::CudaOnly { source_name: source.name, runtime: Runtime::Rocm });
        }
        let compiler = hiprtc().map_err(|error| Error::NoCode {
            source_name: source.name,
            architecture: self.architecture.clone(),
            reasons: vec![error.to_string()],
        })?;
        compiler.build(source, &self.architecture, &options(source, &self.architecture), load)
    }
}

/// Options for one source. Clang contracts `a * b + c` unless it is told not to.
fn options(source: &Source, architecture: &str) -> Vec<String> {
    let mut options =
        vec![format!("--offload-arch={architecture}"), "-std=c++17".to_owned(), "-O3".to_owned()];
    if source.exact {
        options.push("-ffp-contract=off".to_owned());
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed::Packed;

    #[test]
    fn the_architecture_is_found_wherever_it_lies() {
        for offset in [1, 300, 1000] {
            let mut properties = vec![0u8; 1472];
            properties[offset..offset + 22].copy_from_slice(b"gfx90a:sramecc+:xnack-");
            assert_eq!(architecture(&properties).as_deref(), Some("gfx90a:sramecc+:xnack-"));
        }
        assert_eq!(architecture(&[0; 1472]), None);
        assert_eq!(architecture(b"gfx is a word\0"), None);
    }

    #[test]
    fn exact_sources_are_compiled_without_contraction() {
        static EXACT: Source = Source::new("x", "", true, false, Packed::NONE);
        static FAST: Source = Source::new("y", "", false, false, Packed::NONE);
        let off = "-ffp-contract=off".to_owned();
        assert!(
            options(&EXACT, "gfx90a").contains(&off) && !options(&FAST, "gfx90a").contains(&off)
        );
    }
}
