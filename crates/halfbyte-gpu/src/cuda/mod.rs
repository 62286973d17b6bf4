//! CUDA through the driver interface.
//!
//! Contexts belong to the caller: `PyTorch` and candle use each device's primary context, and so
//! does this crate. It is retained when a device is first used and never released, and it is made
//! current around each call only where it is not current already.
//!
//! Machine code is looked for in this order: in this build (made by `build.rs`), in the disk
//! cache, from NVRTC. It runs on its own compute capability and on later minor versions of the same
//! major one (`sm_80` on 8.6, not on 9.0; `runs` below).
//!
//! Drivers load what compilers of their own major version make, or of an earlier one (NVIDIA's
//! minor version compatibility, except for PTX, which is why there is none here). NVRTC 12.8 writes
//! ELF files of ABI version 7 for architectures before 10.0 and of version 8 from there on, NVRTC
//! 13.2 writes version 8 for all (seen in November 2026). So NVRTC 12.8 makes what this build
//! embeds, and NVRTC 13 is not used under drivers of version 12.

mod device;
mod driver;
mod nvrtc;

use crate::chain::{self, Backend, BackendReport, DeviceReport, Refusal, looked_for};
use crate::device::{Device, Facts, Runtime};
use crate::error::{Error, Result};
use crate::library::{Candidate, Library};
use crate::native::{self, Calls, Native};
use crate::packed::Packed;
use device::CudaDevice;
use driver::Sys;
use std::ffi::{CStr, c_char, c_int};
use std::path::PathBuf;
use std::ptr;
use std::sync::{Mutex, OnceLock, PoisonError};

#[cfg(not(windows))]
const DRIVER: &str = "libcuda.so.1";
#[cfg(windows)]
const DRIVER: &str = "nvcuda.dll";
/// Where systems keep the driver that do not tell their loader: Windows' Linux, `NixOS`.
const ELSEWHERE: [&str; 2] =
    ["/usr/lib/wsl/lib/libcuda.so.1", "/run/opengl-driver/lib/libcuda.so.1"];

/// The oldest driver: machine code that NVRTC 12 makes does not load on drivers of CUDA 11.
const MIN_VERSION: c_int = 12_000;
/// Drivers from here on take [`LARGE_PARAMETERS`] bytes of kernel arguments, older ones
/// [`SMALL_PARAMETERS`].
const LARGE_PARAMETERS_VERSION: c_int = 12_010;
const LARGE_PARAMETERS: usize = 32_764;
const SMALL_PARAMETERS: usize = 4096;
/// Jetson boards (Orin, Thor under two names): NVIDIA promises no machine code between these and
/// others.
const JETSON: [u32; 3] = [87, 101, 110];
/// The oldest compute capability that kernels are written for.
const MIN_CAPABILITY: u32 = 75;

/// The driver, open and initialized.
struct Cuda {
    sys: Sys,
    calls: Calls,
    path: PathBuf,
    version: c_int,
    devices: Box<[OnceLock<&'static Device>]>,
    making: Mutex<()>,
}

/// The CUDA device of that number, in the order of `CUDA_VISIBLE_DEVICES`. The first call opens
/// the driver; the first call for a device retains its primary context.
///
/// # Errors
/// When the driver cannot be used ([`Error::Library`], [`Error::Symbol`], [`Error::Version`],
/// [`Error::Call`]), when it has no such device ([`Error::Ordinal`]), when no kernel is made for
/// the device ([`Error::Architecture`]), and when `HALFBYTE_BACKEND` names something else.
pub fn cuda_device(ordinal: usize) -> Result<&'static Device> {
    let cuda = cuda().map_err(|refusal| refusal.error.clone())?;
    match cuda.devices.get(ordinal) {
        Some(slot) => slot.get().map_or_else(|| cuda.make(ordinal, slot), |device| Ok(*device)),
        None => {
            Err(Error::Ordinal { runtime: Runtime::Cuda, got: ordinal, count: cuda.devices.len() })
        }
    }
}

/// Why [`cuda_device`] would refuse the device of that number, or None. Opens the driver, but makes
/// no context: that takes hundreds of megabytes of the device.
#[must_use]
pub fn cuda_refusal(ordinal: usize) -> Option<Error> {
    let cuda = match cuda() {
        Ok(cuda) => cuda,
        Err(refusal) => return Some(refusal.error.clone()),
    };
    if ordinal >= cuda.devices.len() {
        return cuda_device(ordinal).err();
    }
    match cuda.facts(ordinal) {
        Ok((_, facts)) => cuda.refuse(&facts),
        Err(error) => Some(error),
    }
}

/// The CUDA device on which memory lies.
///
/// # Errors
/// As [`cuda_device`], and [`Error::Call`] when the address is unknown to the driver.
pub fn cuda_device_of(pointer: u64) -> Result<&'static Device> {
    let cuda = cuda().map_err(|refusal| refusal.error.clone())?;
    let mut ordinal: c_int = 0;
    // SAFETY: the attribute is a c_int, written during the call; any address may be asked about.
    let code = unsafe {
        (cuda.sys.pointer_attribute)((&raw mut ordinal).cast(), driver::POINTER_DEVICE, pointer)
    };
    cuda.check(code, || format!("cuPointerGetAttribute({pointer:#x})"))?;
    cuda_device(ordinal.max(0) as usize)
}

/// What was looked for, found and refused.
pub(crate) fn probe() -> BackendReport {
    let looked_for = looked_for("HALFBYTE_CUDA_DRIVER", DRIVER);
    let cuda = match cuda() {
        Ok(cuda) => cuda,
        Err(refusal) => {
            let found = refusal.found.clone();
            let report = BackendReport::refused(Backend::Cuda, looked_for, &refusal.error);
            return BackendReport { found, ..report };
        }
    };
    let devices: Vec<_> =
        (0..cuda.devices.len()).map(|ordinal| cuda.describe_device(ordinal)).collect();
    let kernels = if devices.is_empty() { String::new() } else { cuda.describe_kernels() };
    let found = Some(cuda.describe());
    BackendReport { backend: Backend::Cuda, looked_for, found, kernels, devices, refused: None }
        .judged()
}

fn cuda() -> Result<&'static Cuda, &'static Refusal> {
    static CUDA: OnceLock<Result<Cuda, Refusal>> = OnceLock::new();
    CUDA.get_or_init(open).as_ref()
}

fn open() -> Result<Cuda, Refusal> {
    let missing = |error| Refusal { found: None, error };
    chain::permit(Runtime::Cuda).map_err(missing)?;
    let candidates = Candidate::from_env("HALFBYTE_CUDA_DRIVER", || {
        let elsewhere = ELSEWHERE.iter().map(PathBuf::from).filter(|path| path.exists());
        [Candidate::name(DRIVER)].into_iter().chain(elsewhere.map(Candidate::Open)).collect()
    });
    let mut library = Library::open("the CUDA driver", &candidates).map_err(missing)?;
    library.resolve_path("cuInit");
    let path = library.path().to_owned();
    let broken = |error| Refusal { found: Some(path.display().to_string()), error };
    let sys = Sys::load(&library, 0).map_err(broken)?;
    let calls = Calls::load(&library, native::CUDA).map_err(broken)?;
    let mut cuda = Cuda {
        sys,
        calls,
        path: path.clone(),
        version: 0,
        devices: Box::default(),
        making: Mutex::new(()),
    };
    // The version first: an old driver says so even where it cannot start.
    // SAFETY: the number is written during the call.
    let code = unsafe { (cuda.sys.version)(&raw mut cuda.version) };
    cuda.check(code, || "cuDriverGetVersion".to_owned()).map_err(broken)?;
    let named = |error| Refusal { found: Some(cuda.describe()), error };
    if cuda.version < MIN_VERSION {
        return Err(named(Error::Version {
            library: "the CUDA driver",
            expected: version_text(MIN_VERSION),
            got: version_text(cuda.version),
        }));
    }
    // SAFETY: flags must be zero.
    let code = unsafe { (cuda.sys.init)(0) };
    cuda.check(code, || "cuInit".to_owned()).map_err(named)?;
    let mut count = 0;
    // SAFETY: the number is written during the call.
    let code = unsafe { (cuda.sys.device_count)(&raw mut count) };
    cuda.check(code, || "cuDeviceGetCount".to_owned()).map_err(named)?;
    cuda.devices = (0..count).map(|_| OnceLock::new()).collect();
    Ok(cuda)
}

/// `13020` as `13.2`.
fn version_text(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

impl Cuda {
    fn check(&self, code: c_int, call: impl FnOnce() -> String) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let (name, text) = self.describe_error(code);
        Err(Error::Call { runtime: Runtime::Cuda, call: call(), code, name, text })
    }

    fn describe_error(&self, code: c_int) -> (String, String) {
        let ask = |call: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
            let mut text = ptr::null();
            // SAFETY: the call takes any number and writes a string constant or null.
            unsafe { call(code, &raw mut text) };
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
        format!("{}, CUDA driver {}", self.path.display(), version_text(self.version))
    }

    fn describe_device(&self, ordinal: usize) -> DeviceReport {
        match self.facts(ordinal) {
            Ok((_, facts)) => DeviceReport {
                ordinal,
                refused: self.refuse(&facts).map(|error| error.to_string()),
                name: facts.name,
                architecture: facts.architecture,
            },
            Err(error) => DeviceReport {
                ordinal,
                name: "unknown".to_owned(),
                architecture: "unknown".to_owned(),
                refused: Some(error.to_string()),
            },
        }
    }

    /// Why a device cannot be used, as far as that is known before trying.
    fn refuse(&self, facts: &Facts) -> Option<Error> {
        refuse(facts).or_else(|| self.lacks_code(facts))
    }

    /// Why no kernel could be loaded on a device, when that is known before trying.
    fn lacks_code(&self, facts: &Facts) -> Option<Error> {
        let source = crate::sources::ALL.first()?;
        if device::embedded(&source.cubins, facts.capability).is_some() {
            return None;
        }
        let reason = nvrtc::compiler_for(self.version, facts.capability).err()?;
        let architecture = facts.architecture.clone();
        let reasons = vec!["this build holds none".to_owned(), reason];
        Some(Error::NoCode { source_name: "any kernel", architecture, reasons })
    }

    /// Where machine code comes from.
    fn describe_kernels(&self) -> String {
        let embedded = crate::sources::ALL.first().map_or(Packed::NONE, |source| source.cubins);
        let cache = crate::cache::folder().map_or_else(
            || "kept nowhere".to_owned(),
            |folder| format!("kept in {}", folder.display()),
        );
        let compiler = match nvrtc::compiler(self.version) {
            Ok(compiler) => {
                format!("{} ({}), {cache}", compiler.name(), compiler.path().display())
            }
            Err(error) => error.to_string(),
        };
        if embedded.is_empty() {
            return format!("compiled when first used: {compiler}");
        }
        let list: Vec<_> = embedded.keys().map(|capability| format!("sm_{capability}")).collect();
        format!(
            "machine code for {}; others are compiled when first used: {compiler}",
            list.join(", ")
        )
    }

    fn attribute(&self, attribute: c_int, device: c_int) -> Result<c_int> {
        let mut value = 0;
        // SAFETY: the value is written during the call.
        let code = unsafe { (self.sys.device_attribute)(&raw mut value, attribute, device) };
        self.check(code, || format!("cuDeviceGetAttribute({attribute})"))?;
        Ok(value)
    }

    /// The driver's handle of a device, and what is known about it. Makes no context.
    fn facts(&self, ordinal: usize) -> Result<(c_int, Facts)> {
        let mut device = 0;
        // SAFETY: the handle is written during the call.
        let code = unsafe { (self.sys.device)(&raw mut device, ordinal as c_int) };
        self.check(code, || format!("cuDeviceGet({ordinal})"))?;
        let mut name = [0u8; 256];
        let length = name.len() as c_int - 1; // the last byte stays zero
        // SAFETY: the buffer has more bytes than the call is told.
        let code = unsafe { (self.sys.device_name)(name.as_mut_ptr().cast(), length, device) };
        self.check(code, || format!("cuDeviceGetName({ordinal})"))?;
        let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
        let major = self.attribute(driver::CAPABILITY_MAJOR, device)?;
        let minor = self.attribute(driver::CAPABILITY_MINOR, device)?;
        let large = self.version >= LARGE_PARAMETERS_VERSION;
        let facts = Facts {
            runtime: Runtime::Cuda,
            ordinal,
            name: name.to_string_lossy().trim().to_owned(),
            architecture: format!("sm_{major}{minor}"),
            capability: (10 * major + minor) as u32,
            multiprocessors: self.attribute(driver::MULTIPROCESSORS, device)? as u32,
            max_shared_bytes: self.attribute(driver::SHARED_OPTIN, device)? as u32,
            parameter_bytes: if large { LARGE_PARAMETERS } else { SMALL_PARAMETERS },
        };
        Ok((device, facts))
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
        let (device, facts) = self.facts(ordinal)?;
        if let Some(error) = refuse(&facts) {
            return Err(error);
        }
        let managed = self.attribute(driver::CONCURRENT_MANAGED_ACCESS, device)? != 0;
        let mut context = ptr::null_mut();
        // SAFETY: the handle is written during the call. The context is kept for the process.
        let code = unsafe { (self.sys.primary_context)(&raw mut context, device) };
        self.check(code, || format!("cuDevicePrimaryCtxRetain({ordinal})"))?;
        let platform = CudaDevice {
            cuda: self,
            ordinal: device,
            context,
            capability: facts.capability,
            architecture: facts.architecture.clone(),
            shared: facts.max_shared_bytes as c_int,
            managed,
        };
        let device = Box::leak(Box::new(Device::new(facts, Box::new(Native(platform)))));
        Ok(*slot.get_or_init(|| device))
    }
}

/// Why no kernel can run on a device.
fn refuse(facts: &Facts) -> Option<Error> {
    (facts.capability < MIN_CAPABILITY).then(|| Error::Architecture {
        runtime: Runtime::Cuda,
        ordinal: facts.ordinal,
        name: facts.name.clone(),
        architecture: facts.architecture.clone(),
        expected: "compute capability 7.5 (Turing) or newer",
    })
}

/// True when machine code made for one compute capability runs on another: on its own, and on later
/// minor versions of the same major one. Boards with the CPU on the chip are apart in that.
/// (`sm_90a` runs on 9.0 only; there is no other 9.x.)
fn runs(made_for: u32, capability: u32) -> bool {
    let later = made_for / 10 == capability / 10 && made_for < capability;
    let apart = JETSON.contains(&made_for) || JETSON.contains(&capability);
    made_for == capability || later && !apart
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_code_runs_on_later_minor_versions() {
        let yes =
            [(75, 75), (80, 80), (80, 86), (80, 89), (86, 89), (100, 103), (120, 121), (87, 87)];
        let no =
            [(75, 80), (80, 75), (89, 86), (80, 90), (90, 100), (80, 87), (87, 89), (101, 103)];
        for (made_for, capability) in yes {
            assert!(runs(made_for, capability), "sm_{made_for} on {capability}");
        }
        for (made_for, capability) in no {
            assert!(!runs(made_for, capability), "sm_{made_for} on {capability}");
        }
    }

    #[test]
    fn versions_are_written_as_users_know_them() {
        assert_eq!(version_text(13_020), "13.2");
        assert_eq!(version_text(12_000), "12.0");
    }
}
