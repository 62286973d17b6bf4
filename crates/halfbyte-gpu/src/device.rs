//! Devices: what is known about one, and the seam behind which its runtime lies.

use crate::error::Result;
use crate::launch::{Arg, Grid};
use crate::module::{Kernels, Source};
use std::ffi::{CStr, c_void};
use std::fmt;

/// Who drives a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Runtime {
    /// NVIDIA's driver.
    Cuda,
    /// AMD's HIP runtime.
    Rocm,
    /// Intel's Level Zero.
    Xpu,
    /// An OpenCL 2 platform with shared virtual memory: how the portable kernels are tested.
    OpenCl,
}

impl Runtime {
    /// The name `HALFBYTE_BACKEND` takes (OpenCL cannot be chosen there).
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::Rocm => "rocm",
            Self::Xpu => "xpu",
            Self::OpenCl => "opencl",
        }
    }
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cuda => "CUDA",
            Self::Rocm => "ROCm",
            Self::Xpu => "XPU",
            Self::OpenCl => "OpenCL",
        })
    }
}

/// What a runtime tells about one of its devices.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) runtime: Runtime,
    pub(crate) ordinal: usize,
    pub(crate) name: String,
    /// `sm_80`, `gfx90a`, ...
    pub(crate) architecture: String,
    pub(crate) capability: u32,
    pub(crate) multiprocessors: u32,
    pub(crate) max_shared_bytes: u32,
    pub(crate) parameter_bytes: usize,
}

/// A kernel as its runtime knows it: `CUfunction`, `hipFunction_t`, `cl_kernel`, ...
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function(pub(crate) *mut c_void);

/// Loaded machine code as its runtime knows it: `CUmodule`, `cl_program`, ...
#[derive(Clone, Copy, Debug)]
pub(crate) struct Module(pub(crate) *mut c_void);

// SAFETY: both are handles that the runtimes allow every thread to use.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}
// SAFETY: as above.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// What a runtime does for one device: the seam between this crate and a driver. Calls may come
/// from any thread.
pub(crate) trait Driver: Send + Sync {
    /// Machine code of `source`: found, or compiled. Called once per source under a lock.
    fn load(&self, source: &'static Source) -> Result<Module>;

    /// The kernel of that name.
    fn function(&self, module: Module, kernel: &CStr) -> Result<Function>;

    /// Enqueues one launch. `kernel` is the function's name, for messages. The grid has no zero
    /// and its shared memory fits the device.
    ///
    /// # Safety
    /// `stream` is null or a stream of this device; `args` are what the kernel's parameter list
    /// says, and their pointers hold what the kernel accesses.
    unsafe fn launch(
        &self,
        function: Function,
        kernel: &CStr,
        stream: *mut c_void,
        grid: &Grid,
        args: &[Arg<'_>],
    ) -> Result<()>;

    /// A new stream, ordered with no other.
    fn create_stream(&self) -> Result<*mut c_void>;

    /// Waits until the stream has run all that was enqueued.
    ///
    /// # Safety
    /// `stream` is null or a stream of this device.
    unsafe fn synchronize(&self, stream: *mut c_void) -> Result<()>;

    /// True while launches on the stream are recorded into a graph.
    ///
    /// # Safety
    /// `stream` is null or a stream of this device.
    unsafe fn is_capturing(&self, stream: *mut c_void) -> Result<bool> {
        let _ = stream;
        Ok(false)
    }

    /// `bytes` bytes (more than zero) of the device's memory.
    fn allocate(&self, bytes: usize) -> Result<u64>;

    /// `bytes` bytes (more than zero) that the host and the device share by address, and that
    /// move between them by page.
    fn allocate_managed(&self, bytes: usize) -> Result<u64>;

    /// Frees either kind.
    ///
    /// # Safety
    /// `pointer` came from this driver and nothing uses it any more.
    unsafe fn free(&self, pointer: u64);

    /// Sets bytes to zero, and returns when that is done.
    ///
    /// # Safety
    /// `bytes` bytes at `pointer` belong to the caller.
    unsafe fn zero(&self, pointer: u64, bytes: usize) -> Result<()>;

    /// Copies to the device in the stream's order, and returns when that is done.
    ///
    /// # Safety
    /// As many bytes as `from` has belong to the caller at `to`; `stream` is null or a stream of
    /// this device.
    unsafe fn upload(&self, stream: *mut c_void, from: &[u8], to: u64) -> Result<()>;

    /// Copies from the device in the stream's order, and returns when that is done.
    ///
    /// # Safety
    /// As many bytes as `to` has lie at `from`; `stream` is null or a stream of this device.
    unsafe fn download(&self, stream: *mut c_void, from: u64, to: &mut [u8]) -> Result<()>;

    /// Asks for managed memory to be moved to the device (or to the host) in the stream's order.
    /// Where a runtime cannot, this does nothing: the pages move when they are touched.
    ///
    /// # Safety
    /// `bytes` bytes at `pointer` came from [`Driver::allocate_managed`]; `stream` is null or a
    /// stream of this device.
    unsafe fn prefetch(
        &self,
        stream: *mut c_void,
        pointer: u64,
        bytes: usize,
        to_device: bool,
    ) -> Result<()>;
}

/// A device that kernels can run on. There is one per runtime and number, for the process's life.
pub struct Device {
    facts: Facts,
    kernels: Kernels,
    driver: Box<dyn Driver>,
}

impl Device {
    pub(crate) fn new(facts: Facts, driver: Box<dyn Driver>) -> Self {
        Self { facts, kernels: Kernels::new(), driver }
    }

    pub(crate) fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    pub(crate) fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// Who drives it.
    #[must_use]
    pub fn runtime(&self) -> Runtime {
        self.facts.runtime
    }

    /// Compute capability on CUDA, as 75, 80, 90, 100, 120; zero elsewhere.
    #[must_use]
    pub fn capability(&self) -> u32 {
        self.facts.capability
    }

    /// The architecture by its maker's name: `sm_80`, `gfx90a`.
    #[must_use]
    pub fn architecture(&self) -> &str {
        &self.facts.architecture
    }

    /// Number of multiprocessors (compute units).
    #[must_use]
    pub fn multiprocessors(&self) -> u32 {
        self.facts.multiprocessors
    }

    /// Most shared memory that one group can have, in bytes.
    #[must_use]
    pub fn max_shared_bytes(&self) -> u32 {
        self.facts.max_shared_bytes
    }

    /// Most bytes that the arguments of one kernel can take: 4096, or 32764 on CUDA with a driver
    /// of version 12.1 or newer.
    #[must_use]
    pub fn parameter_bytes(&self) -> usize {
        self.facts.parameter_bytes
    }

    /// The name its driver gives.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.facts.name
    }

    /// Its number within the runtime.
    #[must_use]
    pub fn ordinal(&self) -> usize {
        self.facts.ordinal
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.facts, f)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} device {} ({})", self.runtime(), self.ordinal(), self.name())
    }
}
