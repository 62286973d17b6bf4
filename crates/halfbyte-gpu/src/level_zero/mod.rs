//! Intel GPUs through Level Zero.
//!
//! Never run on hardware: what is known about it is Level Zero's specification, and that every
//! call below is made in the right order against a stand-in for the driver (the emulator).
//!
//! Kernels are the portable ones as SPIR-V (`code.rs` says where from); the driver compiles them.
//! Division and square root are asked to be correctly rounded where results must be exact.
//! `PyTorch`'s streams are SYCL queues (`sycl.rs`); `driver.rs` says how launches keep their order.

mod code;
mod driver;
mod sycl;
mod sys;

use crate::chain::{self, Backend, BackendReport, DeviceReport, looked_for};
use crate::device::Facts;
use crate::error::{Error, Result};
use crate::library::{Candidate, Library};
use crate::{Device, Runtime};
use driver::LevelZero;
use std::env;
use std::path::PathBuf;
use std::ptr;
use std::sync::{Mutex, OnceLock};
use sys::{Api, Code, Handle, check};

/// Names a loader in place of the system's.
const VARIABLE: &str = "HALFBYTE_LEVEL_ZERO";
#[cfg(windows)]
const SYSTEM: &str = "ze_loader.dll";
#[cfg(not(windows))]
const SYSTEM: &str = "libze_loader.so.1";
/// Either asks SYCL for its second adapter for Level Zero.
const IN_ORDER_VARIABLES: [&str; 2] = ["SYCL_UR_USE_LEVEL_ZERO_V2", "UR_LOADER_USE_LEVEL_ZERO_V2"];
const INTEL: u32 = 0x8086;

/// The loader, open and initialized.
struct Runtimes {
    api: Api,
    path: PathBuf,
    /// Of the first driver: major and minor.
    version: (u32, u32),
    found: Vec<Found>,
    devices: Box<[OnceLock<Result<Device>>]>,
}

/// A GPU and its driver.
struct Found {
    driver: Handle,
    device: Handle,
    properties: Box<sys::DeviceProperties>,
}

// SAFETY: driver and device handles may be used from any thread.
unsafe impl Send for Found {}
// SAFETY: as above.
unsafe impl Sync for Found {}

impl Found {
    fn name(&self) -> String {
        let name = &self.properties.name;
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
        String::from_utf8_lossy(&name[..end]).into()
    }

    /// Level Zero has no names for architectures; the PCI number tells them apart.
    fn architecture(&self) -> String {
        format!("PCI {:04x}:{:04x}", self.properties.vendor, self.properties.device)
    }

    fn is_integrated(&self) -> bool {
        self.properties.flags & sys::DEVICE_INTEGRATED != 0
    }
}

/// The Intel GPU of that number. As in `PyTorch`, integrated GPUs count only where there is no
/// other. The first call opens Level Zero (`libze_loader.so.1`, or what the environment variable
/// `HALFBYTE_LEVEL_ZERO` names).
///
/// # Errors
/// When Level Zero cannot be used ([`Error::Library`], [`Error::Symbol`], [`Error::Call`]), when
/// it has no such device ([`Error::Ordinal`]), when the device takes no SPIR-V
/// ([`Error::Architecture`]), and when `HALFBYTE_BACKEND` names something else.
pub fn xpu_device(ordinal: usize) -> Result<&'static Device> {
    let runtimes = runtimes()?;
    let (runtime, count) = (Runtime::Xpu, runtimes.devices.len());
    let slot =
        runtimes.devices.get(ordinal).ok_or(Error::Ordinal { runtime, got: ordinal, count })?;
    slot.get_or_init(|| runtimes.make(ordinal)).as_ref().map_err(Clone::clone)
}

/// What was looked for, found and refused.
pub(crate) fn probe() -> BackendReport {
    let looked_for = looked_for(VARIABLE, SYSTEM);
    let runtimes = match runtimes() {
        Ok(runtimes) => runtimes,
        Err(error) => return BackendReport::refused(Backend::Xpu, looked_for, &error),
    };
    let describe = |(ordinal, found): (usize, &Found)| DeviceReport {
        ordinal,
        name: found.name(),
        architecture: found.architecture(),
        refused: xpu_device(ordinal).err().map(|error| error.to_string()),
    };
    let (major, minor) = runtimes.version;
    BackendReport {
        backend: Backend::Xpu,
        looked_for,
        found: Some(format!("{} (Level Zero {major}.{minor})", runtimes.path.display())),
        kernels: if runtimes.found.is_empty() { String::new() } else { code::describe() },
        devices: runtimes.found.iter().enumerate().map(describe).collect(),
        refused: None,
    }
    .judged()
}

fn runtimes() -> Result<&'static Runtimes> {
    static RUNTIMES: OnceLock<Result<Runtimes>> = OnceLock::new();
    RUNTIMES.get_or_init(open).as_ref().map_err(Clone::clone)
}

fn open() -> Result<Runtimes> {
    chain::permit(Runtime::Xpu)?;
    let candidates = Candidate::from_env(VARIABLE, || vec![Candidate::name(SYSTEM)]);
    let mut library = Library::open("Level Zero's loader", &candidates)?;
    library.resolve_path("zeInit");
    let api = Api::load(&library, 0)?;
    // SAFETY: no flags: all kinds of devices.
    check(unsafe { (api.init)(0) }, || "zeInit".into())?;
    let (mut found, mut version) = (Vec::new(), None);
    // SAFETY: there is room for as many handles as are announced.
    let drivers = list("zeDriverGet", |count, to| unsafe { (api.drivers)(count, to) })?;
    for driver in drivers {
        let mut number = 0u32;
        // SAFETY: a driver just listed; the number is written during the call.
        let code = unsafe { (api.driver_version)(driver, &raw mut number) };
        check(code, || "zeDriverGetApiVersion".into())?;
        version.get_or_insert((number >> 16, number & 0xFFFF));
        // SAFETY: as above, of a driver just listed.
        let all = list("zeDeviceGet", |count, to| unsafe { (api.devices)(driver, count, to) })?;
        for device in all {
            let mut properties = Box::new(sys::DeviceProperties::empty());
            // SAFETY: a device just listed; the struct is filled during the call.
            let code = unsafe { (api.device_properties)(device, &raw mut *properties) };
            check(code, || "zeDeviceGetProperties".into())?;
            if properties.device_type == sys::DEVICE_TYPE_GPU && properties.vendor == INTEL {
                found.push(Found { driver, device, properties });
            }
        }
    }
    if found.iter().any(|one| !one.is_integrated()) {
        found.retain(|one| !one.is_integrated());
    }
    let devices = found.iter().map(|_| OnceLock::new()).collect();
    let (path, version) = (library.path().to_owned(), version.unwrap_or_default());
    Ok(Runtimes { api, path, version, found, devices })
}

/// All handles of a kind.
fn list(what: &str, get: impl Fn(*mut u32, *mut Handle) -> Code) -> Result<Vec<Handle>> {
    let mut count = 0;
    check(get(&raw mut count, ptr::null_mut()), || what.into())?;
    let mut handles = vec![ptr::null_mut(); count as usize];
    if count > 0 {
        check(get(&raw mut count, handles.as_mut_ptr()), || what.into())?;
    }
    handles.truncate(count as usize);
    Ok(handles)
}

impl Runtimes {
    fn make(&'static self, ordinal: usize) -> Result<Device> {
        let (api, found) = (&self.api, &self.found[ordinal]);
        let mut compute = sys::ComputeProperties::empty();
        let mut modules = sys::ModuleProperties::empty();
        // SAFETY: a device that was listed; the struct is filled during the call.
        let code = unsafe { (api.compute_properties)(found.device, &raw mut compute) };
        check(code, || "zeDeviceGetComputeProperties".into())?;
        // SAFETY: as above.
        let code = unsafe { (api.module_properties)(found.device, &raw mut modules) };
        check(code, || "zeDeviceGetModuleProperties".into())?;
        if modules.spirv_version == 0 {
            return Err(Error::Architecture {
                runtime: Runtime::Xpu,
                ordinal,
                name: found.name(),
                architecture: found.architecture(),
                expected: "a device that takes SPIR-V",
            });
        }
        let (description, mut context) = (sys::Description::context(), ptr::null_mut());
        // SAFETY: a driver that was listed; the handle is written during the call.
        let code =
            unsafe { (api.context_create)(found.driver, &raw const description, &raw mut context) };
        check(code, || "zeContextCreate".into())?;
        let facts = Facts {
            runtime: Runtime::Xpu,
            ordinal,
            name: found.name(),
            architecture: found.architecture(),
            capability: 0,
            multiprocessors: found.properties.slices * found.properties.subslices_per_slice,
            max_shared_bytes: compute.max_shared,
            parameter_bytes: modules.max_arguments as usize,
        };
        let asked_for = |name| env::var(name).is_ok_and(|value| value.trim() == "1");
        let driver = LevelZero {
            api,
            device: found.device,
            context,
            ordinal: self.compute_group(found.device)?,
            max_allocation: found.properties.max_allocation as usize,
            max_threads: compute.max_threads,
            rounds_division: modules.fp32 & sys::FP_ROUNDED_DIVIDE_SQRT != 0,
            sycl_in_order: IN_ORDER_VARIABLES.into_iter().any(asked_for),
            lists: Mutex::new(Vec::new()),
        };
        Ok(Device::new(facts, Box::new(driver)))
    }

    /// The number of the first group of engines that run kernels.
    fn compute_group(&self, device: Handle) -> Result<u32> {
        let call = || "zeDeviceGetCommandQueueGroupProperties".into();
        let mut count = 0;
        // SAFETY: a device that was listed; only the number of groups is asked for.
        let code = unsafe { (self.api.queue_groups)(device, &raw mut count, ptr::null_mut()) };
        check(code, call)?;
        let mut groups = vec![sys::QueueGroup::EMPTY; count as usize];
        // SAFETY: there is room for as many groups as are announced.
        let code = unsafe { (self.api.queue_groups)(device, &raw mut count, groups.as_mut_ptr()) };
        check(code, call)?;
        let runs = |group: &sys::QueueGroup| {
            group.flags & sys::QUEUE_GROUP_COMPUTE != 0 && group.queues > 0
        };
        let what = "run kernels on this device: it has no compute engines";
        let place = groups.iter().position(runs);
        place.map(|place| place as u32).ok_or(Error::Unsupported { runtime: Runtime::Xpu, what })
    }
}
