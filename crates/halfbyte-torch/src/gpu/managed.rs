//! Memory that the host and a GPU share by page, as tensors: paged optimizer states.
//!
//! A tensor over it is made through `DLPack`, whose deleter frees the buffer when the last tensor
//! that shares it is gone. Freeing waits for what the device still does with the memory.

use super::Queue;
use crate::device::Device;
use crate::error::{Error, Result};
use halfbyte_gpu::ManagedBuffer;
use pyo3::prelude::*;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// `DLDeviceType::kDLCUDA`; torch knows CUDA's managed memory by no other number.
const DL_CUDA: i32 = 2;
/// `DLDeviceType::kDLROCM`.
const DL_ROCM: i32 = 10;
/// `DLDeviceType::kDLOneAPI`.
const DL_ONE_API: i32 = 14;
/// `DLDataTypeCode::kDLUInt`.
const DL_UINT: u8 = 1;

/// `DLManagedTensor` of `dlpack.h`, with its `DLTensor` written out.
#[repr(C)]
struct ManagedTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
    manager: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut ManagedTensor)>,
}
const _: () = assert!(size_of::<ManagedTensor>() == 64);

/// What a tensor over a buffer keeps alive.
struct Owner {
    tensor: ManagedTensor,
    shape: i64,
    buffer: Arc<ManagedBuffer>,
}

/// The buffers that tensors are over, by address.
static BUFFERS: Mutex<BTreeMap<u64, Arc<ManagedBuffer>>> = Mutex::new(BTreeMap::new());

fn buffers() -> MutexGuard<'static, BTreeMap<u64, Arc<ManagedBuffer>>> {
    BUFFERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A `DLPack` capsule of a uint8 vector of `bytes` zeros that the device and the host share.
///
/// # Errors
/// When the device has no such memory, or none is left.
pub(crate) fn managed_zeros(py: Python<'_>, bytes: usize, device: Device) -> Result<Py<PyAny>> {
    let queue = Queue::at(device, "the tensor".into())?
        .ok_or_else(|| Error::Value(format!("device must be a GPU, got {device}")))?;
    let zeroed = py.detach(|| ManagedBuffer::zeroed(queue.device(), bytes))?;
    let buffer = Arc::new(zeroed);
    buffers().insert(buffer.pointer(), Arc::clone(&buffer));
    let device_type = match queue.device().runtime() {
        halfbyte_gpu::Runtime::Rocm => DL_ROCM,
        halfbyte_gpu::Runtime::Xpu => DL_ONE_API,
        _ => DL_CUDA,
    };
    let tensor = ManagedTensor {
        data: buffer.pointer() as usize as *mut c_void,
        device_type,
        device_id: device.index,
        ndim: 1,
        code: DL_UINT,
        bits: 8,
        lanes: 1,
        shape: std::ptr::null_mut(),
        strides: std::ptr::null_mut(),
        byte_offset: 0,
        manager: std::ptr::null_mut(),
        deleter: Some(delete),
    };
    let owner = Box::into_raw(Box::new(Owner { tensor, shape: bytes as i64, buffer }));
    // SAFETY: the box was made just now; it stays where it is until `delete`.
    let tensor = unsafe {
        (*owner).tensor.shape = &raw mut (*owner).shape;
        (*owner).tensor.manager = owner.cast();
        &raw mut (*owner).tensor
    };
    // SAFETY: the name outlives the capsule; `unused` knows what it points to.
    let capsule = unsafe {
        let new = pyo3::ffi::PyCapsule_New(tensor.cast(), UNUSED.as_ptr(), Some(unused));
        Bound::from_owned_ptr_or_err(py, new)
    };
    match capsule {
        Ok(capsule) => Ok(capsule.unbind()),
        Err(error) => {
            // SAFETY: nobody else has the tensor.
            unsafe { delete(tensor) };
            Err(Error::Torch(error.to_string()))
        }
    }
}

/// The name of a capsule whose tensor nobody has taken yet.
const UNUSED: &std::ffi::CStr = c"dltensor";

/// The end of a capsule: frees a tensor that was never taken.
unsafe extern "C" fn unused(capsule: *mut pyo3::ffi::PyObject) {
    // SAFETY: Python calls this with the capsule made above, whose pointer is a `ManagedTensor`.
    unsafe {
        if pyo3::ffi::PyCapsule_IsValid(capsule, UNUSED.as_ptr()) == 1 {
            delete(pyo3::ffi::PyCapsule_GetPointer(capsule, UNUSED.as_ptr()).cast());
        }
    }
}

/// The end of the last tensor over the memory.
unsafe extern "C" fn delete(tensor: *mut ManagedTensor) {
    // SAFETY: the manager is the box that `managed_zeros` leaked; this is called once.
    let owner = unsafe { Box::from_raw((*tensor).manager.cast::<Owner>()) };
    buffers().remove(&owner.buffer.pointer());
    drop(owner); // frees the memory, unless a prefetch holds it for a moment
}

/// The buffer that holds an address.
fn find(address: u64) -> Option<Arc<ManagedBuffer>> {
    let buffers = buffers();
    let (&start, buffer) = buffers.range(..=address).next_back()?;
    (address < start + buffer.bytes() as u64).then(|| Arc::clone(buffer))
}

/// Whether a tensor's memory is shared by page.
pub(crate) fn is_managed(address: u64) -> bool {
    find(address).is_some()
}

/// Asks for the pages of the buffer at `address` to be moved to the device, or to the host, in the
/// order of the device's current stream. Memory of other kinds: nothing.
///
/// # Errors
/// What the driver reports.
pub(crate) fn prefetch(address: u64, device: Device, to_host: bool) -> Result<()> {
    let Some(buffer) = find(address) else { return Ok(()) };
    let Some(queue) = Queue::at(device, "the tensor".into())? else { return Ok(()) };
    if to_host {
        buffer.prefetch_to_host(queue.stream())?;
    } else {
        buffer.prefetch_to_device(queue.stream())?;
    }
    Ok(())
}
