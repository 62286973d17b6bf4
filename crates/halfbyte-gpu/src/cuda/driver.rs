//! The part of `cuda.h` that only CUDA has: versions, devices, contexts, errors.

use crate::library::dynlib;
use crate::native::Handle;
use std::ffi::{c_char, c_int, c_uint};

dynlib! {
    /// Functions of the driver.
    pub(super) struct Sys: "CUDA 12.0 or newer" {
        init(c_uint) -> c_int = ["cuInit"];
        version(*mut c_int) -> c_int = ["cuDriverGetVersion"];
        error_name(c_int, *mut *const c_char) -> c_int = ["cuGetErrorName"];
        error_string(c_int, *mut *const c_char) -> c_int = ["cuGetErrorString"];
        device_count(*mut c_int) -> c_int = ["cuDeviceGetCount"];
        device(*mut c_int, c_int) -> c_int = ["cuDeviceGet"];
        device_name(*mut c_char, c_int, c_int) -> c_int = ["cuDeviceGetName"];
        device_attribute(*mut c_int, c_int, c_int) -> c_int = ["cuDeviceGetAttribute"];
        primary_context(*mut Handle, c_int) -> c_int = ["cuDevicePrimaryCtxRetain"];
        current_context(*mut Handle) -> c_int = ["cuCtxGetCurrent"];
        push_context(Handle) -> c_int = ["cuCtxPushCurrent_v2"];
        pop_context(*mut Handle) -> c_int = ["cuCtxPopCurrent_v2"];
        function_attribute(*mut c_int, c_int, Handle) -> c_int = ["cuFuncGetAttribute"];
        set_function_attribute(Handle, c_int, c_int) -> c_int = ["cuFuncSetAttribute"];
        pointer_attribute(*mut std::ffi::c_void, c_int, u64) -> c_int = ["cuPointerGetAttribute"];
    }
}

/// `CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT`
pub(super) const MULTIPROCESSORS: c_int = 16;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`
pub(super) const CAPABILITY_MAJOR: c_int = 75;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR`
pub(super) const CAPABILITY_MINOR: c_int = 76;
/// `CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS`
pub(super) const CONCURRENT_MANAGED_ACCESS: c_int = 89;
/// `CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN`
pub(super) const SHARED_OPTIN: c_int = 97;
/// `CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES`
pub(super) const FUNCTION_SHARED: c_int = 1;
/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`
pub(super) const FUNCTION_DYNAMIC_SHARED: c_int = 8;
/// `CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL`
pub(super) const POINTER_DEVICE: c_int = 9;
