//! The part of `hip_runtime_api.h` that differs from CUDA: versions, devices, errors.

use crate::library::dynlib;
use std::ffi::{c_char, c_int, c_uint};

dynlib! {
    /// Functions of the runtime.
    pub(super) struct Sys: "ROCm 5.6 or newer" {
        init(c_uint) -> c_int = ["hipInit"];
        version(*mut c_int) -> c_int = ["hipRuntimeGetVersion"];
        error_name(c_int) -> *const c_char = ["hipGetErrorName"];
        error_string(c_int) -> *const c_char = ["hipGetErrorString"];
        device_count(*mut c_int) -> c_int = ["hipGetDeviceCount"];
        device_attribute(*mut c_int, c_int, c_int) -> c_int = ["hipDeviceGetAttribute"];
        current_device(*mut c_int) -> c_int = ["hipGetDevice"];
        set_device(c_int) -> c_int = ["hipSetDevice"];
    }
    optional {
        properties(*mut u8, c_int) -> c_int = ["hipGetDevicePropertiesR0600"];
        properties_5(*mut u8, c_int) -> c_int = ["hipGetDeviceProperties"];
    }
}

/// `hipDeviceAttributeConcurrentManagedAccess`
pub(super) const CONCURRENT_MANAGED_ACCESS: c_int = 9;
/// `hipDeviceAttributeMultiprocessorCount`
pub(super) const MULTIPROCESSORS: c_int = 63;
/// `hipDeviceAttributeMaxSharedMemoryPerBlock`
pub(super) const SHARED: c_int = 74;
