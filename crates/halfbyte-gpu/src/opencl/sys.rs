//! The part of the OpenCL 2.0 API that is used, taken from a shared library.
//!
//! A loader (`libOpenCL`) exports the functions. A platform's own library (`PoCL`'s from `PyPI`)
//! may export nothing but `clGetExtensionFunctionAddress`: the functions are then in the dispatch
//! table that each of its objects starts with, whose layout is frozen (`cl_icd.h`).

use crate::error::{Error, Result};
use crate::library::Library;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::path::Path;

pub(super) type Handle = *mut c_void;
pub(super) const SUCCESS: c_int = 0;
pub(super) const DEVICE_TYPE_ALL: u64 = 0xFFFF_FFFF;
pub(super) const DEVICE_MAX_COMPUTE_UNITS: c_uint = 0x1002;
pub(super) const DEVICE_MAX_WORK_GROUP_SIZE: c_uint = 0x1004;
pub(super) const DEVICE_ADDRESS_BITS: c_uint = 0x100D;
pub(super) const DEVICE_MAX_PARAMETER_SIZE: c_uint = 0x1017;
pub(super) const DEVICE_SINGLE_FP_CONFIG: c_uint = 0x101B;
pub(super) const DEVICE_LOCAL_MEM_SIZE: c_uint = 0x1023;
pub(super) const DEVICE_NAME: c_uint = 0x102B;
pub(super) const DEVICE_VERSION: c_uint = 0x102F;
pub(super) const DEVICE_SVM_CAPABILITIES: c_uint = 0x1053;
pub(super) const FP_CORRECTLY_ROUNDED_DIVIDE_SQRT: u64 = 1 << 7;
pub(super) const SVM_FINE_GRAIN_BUFFER: u64 = 1 << 1;
pub(super) const MEM_READ_WRITE: u64 = 1;
pub(super) const MEM_SVM_FINE_GRAIN_BUFFER: u64 = 1 << 10;
pub(super) const PROGRAM_BUILD_LOG: c_uint = 0x1183;
pub(super) const KERNEL_EXEC_INFO_SVM_PTRS: c_uint = 0x11B6;
pub(super) const TRUE: c_uint = 1;

pub(super) const LIBRARY: &str = "OpenCL";
const EXPECTED: &str = "OpenCL 2.0 or newer";

/// `clIcdGetPlatformIDsKHR`, which has no place in the table.
type GetPlatforms = unsafe extern "C" fn(c_uint, *mut Handle, *mut c_uint) -> c_int;

macro_rules! table {
    ($($field:ident = $symbol:literal, $place:literal: ($($argument:ty),*) -> $result:ty;)*) => {
        /// Functions by name; the number is the place in the dispatch table.
        pub(super) struct Api { $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> $result,)* }

        impl Api {
            /// From a library that exports them.
            fn exported(library: &Library) -> Result<Self> {
                // SAFETY: the signatures are those of cl.h.
                unsafe { Ok(Self { $($field: library.function($symbol, EXPECTED)?,)* }) }
            }

            /// From the dispatch table of a platform.
            ///
            /// # Safety
            /// `table` is a `cl_icd_dispatch` of OpenCL 2.0 or newer.
            unsafe fn dispatched(table: *const *const c_void, path: &Path) -> Result<Self> {
                Ok(Self { $($field: {
                    // SAFETY: by the contract the table goes beyond this place.
                    let function = unsafe { *table.add($place) };
                    if function.is_null() {
                        return Err(missing(path, $symbol));
                    }
                    // SAFETY: the place holds this function; the signature is that of cl.h.
                    unsafe {
                        std::mem::transmute::<*const c_void, unsafe extern "C" fn($($argument),*) -> $result>(
                            function,
                        )
                    }
                },)* })
            }
        }
    };
}

table! {
    get_platforms = "clGetPlatformIDs", 0: (c_uint, *mut Handle, *mut c_uint) -> c_int;
    get_devices = "clGetDeviceIDs", 2: (Handle, u64, c_uint, *mut Handle, *mut c_uint) -> c_int;
    get_device_info = "clGetDeviceInfo", 3: (Handle, c_uint, usize, *mut c_void, *mut usize) -> c_int;
    create_context = "clCreateContext", 4: (*const isize, c_uint, *const Handle, *const c_void, *mut c_void, *mut c_int) -> Handle;
    create_queue = "clCreateCommandQueue", 9: (Handle, Handle, u64, *mut c_int) -> Handle;
    create_program = "clCreateProgramWithSource", 26: (Handle, c_uint, *const *const c_char, *const usize, *mut c_int) -> Handle;
    release_program = "clReleaseProgram", 29: (Handle) -> c_int;
    build_program = "clBuildProgram", 30: (Handle, c_uint, *const Handle, *const c_char, *const c_void, *mut c_void) -> c_int;
    get_build_info = "clGetProgramBuildInfo", 33: (Handle, Handle, c_uint, usize, *mut c_void, *mut usize) -> c_int;
    create_kernel = "clCreateKernel", 34: (Handle, *const c_char, *mut c_int) -> Handle;
    set_argument = "clSetKernelArg", 38: (Handle, c_uint, usize, *const c_void) -> c_int;
    finish = "clFinish", 47: (Handle) -> c_int;
    enqueue = "clEnqueueNDRangeKernel", 59: (Handle, Handle, c_uint, *const usize, *const usize, *const usize, c_uint, *const Handle, *mut Handle) -> c_int;
    allocate = "clSVMAlloc", 126: (Handle, u64, usize, c_uint) -> *mut c_void;
    free = "clSVMFree", 127: (Handle, *mut c_void) -> ();
    copy = "clEnqueueSVMMemcpy", 129: (Handle, c_uint, *mut c_void, *const c_void, usize, c_uint, *const Handle, *mut Handle) -> c_int;
    fill = "clEnqueueSVMMemFill", 130: (Handle, *mut c_void, *const c_void, usize, usize, c_uint, *const Handle, *mut Handle) -> c_int;
    set_pointer = "clSetKernelArgSVMPointer", 134: (Handle, c_uint, *const c_void) -> c_int;
    set_exec_info = "clSetKernelExecInfo", 135: (Handle, c_uint, usize, *const c_void) -> c_int;
}

fn missing(path: &Path, symbol: &'static str) -> Error {
    Error::Symbol { library: LIBRARY, path: path.to_owned(), symbol, expected: EXPECTED }
}

impl Api {
    /// The functions of an opened library.
    pub(super) fn new(library: &Library) -> Result<Self> {
        // SAFETY: only whether there is such a symbol is asked.
        if unsafe { library.optional::<*const c_void>("clGetPlatformIDs") }.is_some() {
            return Self::exported(library);
        }
        let platform = Self::first_platform(library)?;
        // SAFETY: a platform of an ICD starts with the address of its dispatch table; what has
        // clIcdGetPlatformIDsKHR is an ICD. clSVMAlloc's null check tells versions before 2.0.
        unsafe { Self::dispatched(*platform.cast::<*const *const c_void>(), library.path()) }
    }

    fn first_platform(library: &Library) -> Result<Handle> {
        type Find = unsafe extern "C" fn(*const c_char) -> *const c_void;
        // SAFETY: the signature is that of cl.h.
        let find: Find = unsafe { library.function("clGetExtensionFunctionAddress", EXPECTED) }?;
        // SAFETY: the name is a C string.
        let function = unsafe { find(c"clIcdGetPlatformIDsKHR".as_ptr()) };
        if function.is_null() {
            return Err(missing(library.path(), "clIcdGetPlatformIDsKHR"));
        }
        // SAFETY: the signature is that of cl_ext.h.
        let platforms = unsafe { std::mem::transmute::<*const c_void, GetPlatforms>(function) };
        let (mut platform, mut count) = (std::ptr::null_mut(), 0);
        // SAFETY: there is room for one platform.
        let code = unsafe { platforms(1, &raw mut platform, &raw mut count) };
        if code != SUCCESS || count == 0 || platform.is_null() {
            return Err(call("clIcdGetPlatformIDsKHR", code));
        }
        Ok(platform)
    }
}

/// The error for a call that returned `code`.
pub(super) fn call(call: impl Into<String>, code: c_int) -> Error {
    let name = NAMES.iter().find(|(number, _)| *number == code).map_or("", |(_, name)| name);
    Error::Call {
        runtime: crate::Runtime::OpenCl,
        call: call.into(),
        code,
        name: name.into(),
        text: String::new(),
    }
}

/// What cl.h calls the numbers that these functions return.
const NAMES: [(c_int, &str); 23] = [
    (0, "CL_SUCCESS, but nothing was found"),
    (-1, "CL_DEVICE_NOT_FOUND"),
    (-2, "CL_DEVICE_NOT_AVAILABLE"),
    (-3, "CL_COMPILER_NOT_AVAILABLE"),
    (-4, "CL_MEM_OBJECT_ALLOCATION_FAILURE"),
    (-5, "CL_OUT_OF_RESOURCES"),
    (-6, "CL_OUT_OF_HOST_MEMORY"),
    (-11, "CL_BUILD_PROGRAM_FAILURE"),
    (-30, "CL_INVALID_VALUE"),
    (-34, "CL_INVALID_CONTEXT"),
    (-36, "CL_INVALID_COMMAND_QUEUE"),
    (-43, "CL_INVALID_BUILD_OPTIONS"),
    (-45, "CL_INVALID_PROGRAM_EXECUTABLE"),
    (-46, "CL_INVALID_KERNEL_NAME"),
    (-48, "CL_INVALID_KERNEL"),
    (-49, "CL_INVALID_ARG_INDEX"),
    (-50, "CL_INVALID_ARG_VALUE"),
    (-51, "CL_INVALID_ARG_SIZE"),
    (-52, "CL_INVALID_KERNEL_ARGS"),
    (-54, "CL_INVALID_WORK_GROUP_SIZE"),
    (-55, "CL_INVALID_WORK_ITEM_SIZE"),
    (-59, "CL_INVALID_OPERATION"),
    (-1001, "CL_PLATFORM_NOT_FOUND_KHR"),
];
