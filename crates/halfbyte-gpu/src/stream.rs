//! Streams: where launches are enqueued.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::launch::{Arg, Grid};
use crate::module::Source;
use std::ffi::{CStr, c_void};

/// Most groups in x. CUDA and HIP take 2^31 - 1.
const MAX_GROUPS_X: u32 = i32::MAX as u32;
/// Most groups in y and in z.
const MAX_GROUPS_YZ: u32 = 65_535;
/// Most threads per group.
const MAX_THREADS: u32 = 1024;

/// A queue of a device: launches on it run in order. A plain handle, cheap to copy.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    device: &'static Device,
    raw: *mut c_void,
}

// SAFETY: a stream is a handle that the runtimes allow every thread to use.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// The caller's stream: `PyTorch`'s current one, or candle's. Null is the runtime's default
    /// stream.
    ///
    /// # Safety
    /// `raw` is null or a stream of `device` (`CUstream`, `hipStream_t`, ...) in the device's
    /// primary context, and outlives its use here.
    #[must_use]
    pub const unsafe fn from_raw(device: &'static Device, raw: *mut c_void) -> Self {
        Self { device, raw }
    }

    /// A stream of our own, ordered with no other. It is never destroyed: make one per thread of
    /// work, not one per call.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn new(device: &'static Device) -> Result<Self> {
        Ok(Self { device, raw: device.driver().create_stream()? })
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &'static Device {
        self.device
    }

    /// The runtime's handle.
    #[must_use]
    pub fn raw(&self) -> *mut c_void {
        self.raw
    }

    /// Enqueues a kernel. The first launch of a kernel on a device loads it, which can take
    /// seconds when it has to be compiled. A grid with a zero launches nothing.
    ///
    /// The arguments must be those of the kernel's parameter list: launchers in
    /// [`ops`](crate::ops) see to that, and their tests show it.
    ///
    /// # Errors
    /// [`Error::Argument`] for a grid that no device takes; else what loading or the driver
    /// reports. Failures inside a kernel show up in a later call.
    pub fn launch(
        &self,
        source: &'static Source,
        kernel: &CStr,
        grid: Grid,
        args: &[Arg<'_>],
    ) -> Result<()> {
        if grid.groups.contains(&0) {
            return Ok(());
        }
        self.check(&grid, args)?;
        let function = self.device.kernels().get(self.device, source, kernel)?;
        // SAFETY: `raw` is a stream of `device` (from_raw's contract, or made by it). Launchers
        // pass what the kernel's parameter list says, over slices whose makers vouch for them.
        unsafe { self.device.driver().launch(function, kernel, self.raw, &grid, args) }
    }

    /// Waits until all that was enqueued has run.
    ///
    /// # Errors
    /// What the driver reports, failures of earlier launches included.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: `raw` is a stream of `device`.
        unsafe { self.device.driver().synchronize(self.raw) }
    }

    /// True while launches on this stream are recorded into a graph.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn is_capturing(&self) -> Result<bool> {
        // SAFETY: `raw` is a stream of `device`.
        unsafe { self.device.driver().is_capturing(self.raw) }
    }

    fn check(&self, grid: &Grid, args: &[Arg<'_>]) -> Result<()> {
        let refuse = |what, most: usize, got: usize| {
            Err(Error::Argument { what, expected: format!("at most {most}"), got: got.to_string() })
        };
        let [x, y, z] = grid.groups;
        if x > MAX_GROUPS_X {
            return refuse("groups in x", MAX_GROUPS_X as usize, x as usize);
        }
        if y.max(z) > MAX_GROUPS_YZ {
            return refuse("groups in y and z", MAX_GROUPS_YZ as usize, y.max(z) as usize);
        }
        if grid.threads > MAX_THREADS {
            return refuse("threads per group", MAX_THREADS as usize, grid.threads as usize);
        }
        let shared = self.device.max_shared_bytes();
        if grid.shared_bytes > shared {
            return refuse("shared_bytes", shared as usize, grid.shared_bytes as usize);
        }
        let bytes: usize = args.iter().map(Arg::size).sum();
        if bytes > self.device.parameter_bytes() {
            return refuse("bytes of kernel arguments", self.device.parameter_bytes(), bytes);
        }
        Ok(())
    }
}
