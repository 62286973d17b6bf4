//! The part of Level Zero 1.0 that is used (`ze_api.h`): its functions, structs and errors.

use crate::Runtime;
use crate::error::{Error, Result};
use crate::library::dynlib;
use std::ffi::{c_char, c_void};

pub(super) type Handle = *mut c_void;
/// `ze_result_t`. Zero is success.
pub(super) type Code = u32;

dynlib! {
    /// The loader's functions.
    pub(super) struct Api: "Level Zero 1.0 or newer" {
        init(u32) -> Code = ["zeInit"];
        drivers(*mut u32, *mut Handle) -> Code = ["zeDriverGet"];
        driver_version(Handle, *mut u32) -> Code = ["zeDriverGetApiVersion"];
        devices(Handle, *mut u32, *mut Handle) -> Code = ["zeDeviceGet"];
        device_properties(Handle, *mut DeviceProperties) -> Code = ["zeDeviceGetProperties"];
        compute_properties(Handle, *mut ComputeProperties) -> Code = ["zeDeviceGetComputeProperties"];
        module_properties(Handle, *mut ModuleProperties) -> Code = ["zeDeviceGetModuleProperties"];
        queue_groups(Handle, *mut u32, *mut QueueGroup) -> Code = ["zeDeviceGetCommandQueueGroupProperties"];
        context_create(Handle, *const Description, *mut Handle) -> Code = ["zeContextCreate"];
        list_create(Handle, Handle, *const QueueDescription, *mut Handle) -> Code = ["zeCommandListCreateImmediate"];
        append_launch(Handle, Handle, *const [u32; 3], Handle, u32, *mut Handle) -> Code = ["zeCommandListAppendLaunchKernel"];
        append_copy(Handle, *mut c_void, *const c_void, usize, Handle, u32, *mut Handle) -> Code = ["zeCommandListAppendMemoryCopy"];
        append_fill(Handle, *mut c_void, *const c_void, usize, usize, Handle, u32, *mut Handle) -> Code = ["zeCommandListAppendMemoryFill"];
        append_prefetch(Handle, *const c_void, usize) -> Code = ["zeCommandListAppendMemoryPrefetch"];
        allocate_device(Handle, *const MemoryDescription, usize, usize, Handle, *mut *mut c_void) -> Code = ["zeMemAllocDevice"];
        allocate_shared(Handle, *const MemoryDescription, *const Description, usize, usize, Handle, *mut *mut c_void) -> Code = ["zeMemAllocShared"];
        free(Handle, *mut c_void) -> Code = ["zeMemFree"];
        module_create(Handle, Handle, *const ModuleDescription, *mut Handle, *mut Handle) -> Code = ["zeModuleCreate"];
        build_log(Handle, *mut usize, *mut c_char) -> Code = ["zeModuleBuildLogGetString"];
        build_log_destroy(Handle) -> Code = ["zeModuleBuildLogDestroy"];
        kernel_create(Handle, *const KernelDescription, *mut Handle) -> Code = ["zeKernelCreate"];
        kernel_group_size(Handle, u32, u32, u32) -> Code = ["zeKernelSetGroupSize"];
        kernel_argument(Handle, u32, usize, *const c_void) -> Code = ["zeKernelSetArgumentValue"];
        kernel_indirect_access(Handle, u32) -> Code = ["zeKernelSetIndirectAccess"];
    }
}

pub(super) const DEVICE_TYPE_GPU: u32 = 1;
pub(super) const DEVICE_INTEGRATED: u32 = 1;
pub(super) const FP_ROUNDED_DIVIDE_SQRT: u32 = 1 << 6;
pub(super) const QUEUE_GROUP_COMPUTE: u32 = 1;
pub(super) const MODE_SYNCHRONOUS: u32 = 1;
pub(super) const FORMAT_SPIRV: u32 = 0;
/// Kernels may follow addresses into host, device and shared allocations.
pub(super) const INDIRECT_ACCESS_ALL: u32 = 0b111;

/// What every struct starts with: its type and the next one's address.
#[repr(C)]
pub(super) struct Head {
    kind: u32,
    next: *const c_void,
}

impl Head {
    pub(super) const fn new(kind: u32) -> Self {
        Self { kind, next: std::ptr::null() }
    }

    /// With an extension's struct behind it.
    pub(super) fn followed_by(kind: u32, next: &Description) -> Self {
        Self { kind, next: std::ptr::from_ref(next).cast() }
    }
}

/// Descriptions that hold flags alone: of contexts, host memory, relaxed limits.
#[repr(C)]
pub(super) struct Description {
    pub(super) head: Head,
    pub(super) flags: u32,
}

impl Description {
    pub(super) const fn context() -> Self {
        Self { head: Head::new(0xd), flags: 0 }
    }

    pub(super) const fn host_memory() -> Self {
        Self { head: Head::new(0x16), flags: 0 }
    }

    /// Allocations past the size that a device likes best.
    pub(super) const fn relaxed_limits() -> Self {
        Self { head: Head::new(0x0002_0001), flags: 1 }
    }
}

#[repr(C)]
pub(super) struct DeviceProperties {
    head: Head,
    pub(super) device_type: u32,
    pub(super) vendor: u32,
    pub(super) device: u32,
    pub(super) flags: u32,
    subdevice: u32,
    clock: u32,
    pub(super) max_allocation: u64,
    contexts: u32,
    priority: u32,
    threads_per_unit: u32,
    width: u32,
    units_per_subslice: u32,
    pub(super) subslices_per_slice: u32,
    pub(super) slices: u32,
    timer: u64,
    timestamp_bits: [u32; 2],
    uuid: [u8; 16],
    pub(super) name: [u8; 256],
}
const _: () = assert!(size_of::<DeviceProperties>() == 368);

#[repr(C)]
pub(super) struct ComputeProperties {
    head: Head,
    pub(super) max_threads: u32,
    group_size: [u32; 3],
    pub(super) max_groups: [u32; 3],
    pub(super) max_shared: u32,
    subgroup_sizes: u32,
    subgroup_size: [u32; 8],
}
const _: () = assert!(size_of::<ComputeProperties>() == 88);

#[repr(C)]
pub(super) struct ModuleProperties {
    head: Head,
    pub(super) spirv_version: u32,
    flags: u32,
    fp16: u32,
    pub(super) fp32: u32,
    fp64: u32,
    pub(super) max_arguments: u32,
    printf_buffer: u32,
    uuid: [u8; 16],
}
const _: () = assert!(size_of::<ModuleProperties>() == 64);

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct QueueGroup {
    kind: u32,
    next: usize,
    pub(super) flags: u32,
    max_fill_pattern: usize,
    pub(super) queues: u32,
}
const _: () = assert!(size_of::<QueueGroup>() == 40);

impl QueueGroup {
    pub(super) const EMPTY: Self =
        Self { kind: 0x6, next: 0, flags: 0, max_fill_pattern: 0, queues: 0 };
}

#[repr(C)]
pub(super) struct QueueDescription {
    pub(super) head: Head,
    pub(super) ordinal: u32,
    pub(super) index: u32,
    pub(super) flags: u32,
    pub(super) mode: u32,
    pub(super) priority: u32,
}
const _: () = assert!(size_of::<QueueDescription>() == 40);

#[repr(C)]
pub(super) struct MemoryDescription {
    pub(super) head: Head,
    pub(super) flags: u32,
    pub(super) ordinal: u32,
}
const _: () = assert!(size_of::<MemoryDescription>() == 24);

#[repr(C)]
pub(super) struct ModuleDescription {
    pub(super) head: Head,
    pub(super) format: u32,
    pub(super) size: usize,
    pub(super) code: *const u8,
    pub(super) flags: *const c_char,
    pub(super) constants: *const c_void,
}
const _: () = assert!(size_of::<ModuleDescription>() == 56);

#[repr(C)]
pub(super) struct KernelDescription {
    pub(super) head: Head,
    pub(super) flags: u32,
    pub(super) name: *const c_char,
}
const _: () = assert!(size_of::<KernelDescription>() == 32);

macro_rules! properties {
    ($($name:ident = $kind:literal),*) => { $(
        impl $name {
            /// Zeros, for a call that fills them.
            pub(super) fn empty() -> Self {
                // SAFETY: integers, arrays of them and a null pointer: all zeros are a value.
                let mut zeros: Self = unsafe { std::mem::zeroed() };
                zeros.head.kind = $kind;
                zeros
            }
        }
    )* };
}
properties!(DeviceProperties = 0x3, ComputeProperties = 0x4, ModuleProperties = 0x5);

/// The answer of a call as a result. `call` says what was called.
pub(super) fn check(code: Code, call: impl FnOnce() -> String) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(failed(code, call())) }
}

/// The error for a call that returned `code`.
pub(super) fn failed(code: Code, call: String) -> Error {
    let (_, name, text) = NAMES.iter().find(|(known, ..)| *known == code).unwrap_or(&(0, "", ""));
    Error::Call {
        runtime: Runtime::Xpu,
        call,
        code: code as i32,
        name: (*name).into(),
        text: (*text).into(),
    }
}

/// What `ze_api.h` calls the numbers that these functions return, and what that means here.
const NAMES: [(Code, &str, &str); 22] = [
    (0x1, "ZE_RESULT_NOT_READY", ""),
    (0x7000_0001, "ZE_RESULT_ERROR_DEVICE_LOST", "the device hung, was reset or was removed"),
    (0x7000_0002, "ZE_RESULT_ERROR_OUT_OF_HOST_MEMORY", ""),
    (0x7000_0003, "ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY", "the device's memory is full"),
    (0x7000_0004, "ZE_RESULT_ERROR_MODULE_BUILD_FAILURE", "the driver's compiler refused the code"),
    (0x7000_0005, "ZE_RESULT_ERROR_MODULE_LINK_FAILURE", ""),
    (0x7001_0000, "ZE_RESULT_ERROR_INSUFFICIENT_PERMISSIONS", "see the groups render and video"),
    (0x7001_0001, "ZE_RESULT_ERROR_NOT_AVAILABLE", ""),
    (
        0x7002_0000,
        "ZE_RESULT_ERROR_DEPENDENCY_UNAVAILABLE",
        "a library that the driver needs is missing",
    ),
    (0x7800_0001, "ZE_RESULT_ERROR_UNINITIALIZED", "no driver of a GPU was found"),
    (0x7800_0002, "ZE_RESULT_ERROR_UNSUPPORTED_VERSION", ""),
    (0x7800_0003, "ZE_RESULT_ERROR_UNSUPPORTED_FEATURE", ""),
    (0x7800_0004, "ZE_RESULT_ERROR_INVALID_ARGUMENT", ""),
    (0x7800_0005, "ZE_RESULT_ERROR_INVALID_NULL_HANDLE", ""),
    (0x7800_0007, "ZE_RESULT_ERROR_INVALID_NULL_POINTER", ""),
    (
        0x7800_0009,
        "ZE_RESULT_ERROR_UNSUPPORTED_SIZE",
        "the device does not allocate that much at once",
    ),
    (0x7800_000f, "ZE_RESULT_ERROR_INVALID_NATIVE_BINARY", ""),
    (0x7800_0011, "ZE_RESULT_ERROR_INVALID_KERNEL_NAME", ""),
    (0x7800_0013, "ZE_RESULT_ERROR_INVALID_GROUP_SIZE_DIMENSION", ""),
    (0x7800_0015, "ZE_RESULT_ERROR_INVALID_KERNEL_ARGUMENT_INDEX", ""),
    (0x7800_0016, "ZE_RESULT_ERROR_INVALID_KERNEL_ARGUMENT_SIZE", ""),
    (0x7fff_fffe, "ZE_RESULT_ERROR_UNKNOWN", ""),
];
