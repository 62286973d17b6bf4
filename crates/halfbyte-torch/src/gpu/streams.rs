//! Torch's current streams, from the library of its GPU build, which is looked up when the first
//! tensor on a GPU arrives: it is loaded then.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::shim::{self, Status};
use halfbyte_gpu::Stream;
use std::ffi::c_void;
use std::sync::OnceLock;

/// `aoti_torch_get_current_{cuda,xpu}_stream`.
type Current = unsafe extern "C" fn(i32, *mut *mut c_void) -> Status;

type Open = fn(usize) -> halfbyte_gpu::Result<&'static halfbyte_gpu::Device>;

/// How the current stream of a kind of device is found, and the runtime that it belongs to.
#[derive(Clone, Copy)]
struct Source {
    current: Current,
    open: Open,
}

/// Torch calls ROCm's devices and streams CUDA; which it was built for shows in its libraries.
fn cuda() -> Option<Source> {
    static SOURCE: OnceLock<Option<Source>> = OnceLock::new();
    *SOURCE.get_or_init(|| {
        const NAME: &str = "aoti_torch_get_current_cuda_stream";
        let libraries: [(&str, Open); 2] =
            [("torch_cuda", halfbyte_gpu::cuda_device), ("torch_hip", halfbyte_gpu::rocm_device)];
        libraries.into_iter().find_map(|(library, open)| {
            // SAFETY: the function has this signature in torch's `shim.h`.
            let current = unsafe { shim::find(library, NAME) }?;
            Some(Source { current, open })
        })
    })
}

fn xpu() -> Option<Source> {
    static SOURCE: OnceLock<Option<Source>> = OnceLock::new();
    *SOURCE.get_or_init(|| {
        // SAFETY: the function has this signature in torch's `shim_xpu.h`.
        let current = unsafe { shim::find("torch_xpu", "aoti_torch_get_current_xpu_stream") }?;
        Some(Source { current, open: halfbyte_gpu::xpu_device })
    })
}

fn source(device: Device) -> Result<Source> {
    if !device.is_served() {
        return Err(Error::Value(format!("there are kernels for CUDA and XPU, got {device}")));
    }
    let found = if device.is_cuda() { cuda() } else { xpu() };
    found.ok_or_else(|| {
        Error::Torch(format!("PyTorch's library for {device} is not loaded in this process"))
    })
}

fn ordinal(device: Device) -> Result<usize> {
    usize::try_from(device.index)
        .map_err(|_| Error::Value(format!("a device with a number is needed, got {device}")))
}

/// The stream that is current for the device on this thread.
pub(super) fn current(device: Device) -> Result<Stream> {
    let Source { current, open } = source(device)?;
    let on = open(ordinal(device)?)?;
    let mut raw = std::ptr::null_mut();
    // SAFETY: writes one pointer.
    shim::check(unsafe { current(device.index, &raw mut raw) })?;
    // SAFETY: torch's streams are the device's and live as long as the process; torch works in the
    // primary context, and CUDA numbers devices for its runtime and its driver alike.
    Ok(unsafe { Stream::from_raw(on, raw) })
}

/// The GPU that is current for torch on this thread.
pub(super) fn current_device() -> Result<&'static halfbyte_gpu::Device> {
    let get = shim::shim().aoti_torch_get_current_device_index;
    let (found, get) = cuda().or_else(xpu).zip(get).ok_or_else(|| {
        Error::Torch("PyTorch's library for GPUs is not loaded in this process".into())
    })?;
    let mut index = 0;
    // SAFETY: writes one i32.
    shim::check(unsafe { get(&raw mut index) })?;
    let index = usize::try_from(index)
        .map_err(|_| Error::Torch(format!("PyTorch has no current device, got {index}")))?;
    Ok((found.open)(index)?)
}
