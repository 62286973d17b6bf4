//! The C shim of libtorch's stable ABI, bound at run time to the libtorch that Python has loaded.
//!
//! Nothing links against torch: one binary serves every torch from 2.10 on. Functions that came
//! later, or that only some platforms export, are `Option`s.

use libloading::Library;
use std::ffi::{CStr, c_char, c_void};
use std::path::Path;
use std::sync::OnceLock;

/// One slot of the boxed stack (`StableIValue`).
pub(crate) type Value = u64;
/// `AtenTensorHandle`, `StringHandle`, `StableListHandle`, `TorchLibraryHandle`.
pub(crate) type Handle = *mut c_void;
/// `AOTITorchError`: 0 is success.
pub(crate) type Status = i32;
/// A kernel as the dispatcher calls it: stack, number of inputs, number of outputs.
pub(crate) type Boxed = unsafe extern "C-unwind" fn(*mut Value, u64, u64);
/// What [`torch_parallel_for`](Shim) calls with a range and its last argument (`ParallelFunc`).
pub(crate) type ForRange = unsafe extern "C" fn(i64, i64, *mut c_void);
/// `aoti_torch_check`, the one function of the shim that throws.
type Check = unsafe extern "C-unwind" fn(bool, *const c_char, *const c_char, u32, *const c_char);

/// The stable ABI this extension is written against: torch 2.10. libtorch translates from it.
pub(crate) const ABI_VERSION: u64 = (2 << 56) | (10 << 48);

macro_rules! shim {
    (
        required { $(fn $name:ident($($arg:ty),*) -> $ret:ty;)* }
        optional { $(fn $opt:ident($($opt_arg:ty),*) -> $opt_ret:ty;)* }
    ) => {
        /// Every function of the shim that this crate calls.
        #[allow(non_snake_case)] // torch's names
        pub(crate) struct Shim {
            $(pub(crate) $name: unsafe extern "C" fn($($arg),*) -> $ret,)*
            $(pub(crate) $opt: Option<unsafe extern "C" fn($($opt_arg),*) -> $opt_ret>,)*
            pub(crate) aoti_torch_check: Check,
            /// Makes optionals before torch 2.13 (`::operator new(size_t)`).
            pub(crate) operator_new: Option<unsafe extern "C" fn(usize) -> *mut c_void>,
            /// Frees optionals before torch 2.13 (`::operator delete(void*)`).
            pub(crate) operator_delete: Option<unsafe extern "C" fn(*mut c_void)>,
        }

        impl Shim {
            /// Resolves every symbol, or names the first required one that is missing.
            ///
            /// # Safety
            /// `library` is `libtorch_cpu`, whose C functions have the signatures above.
            unsafe fn resolve(library: &Library) -> Result<Self, &'static str> {
                // SAFETY: the signatures are those of torch's `shim.h`.
                unsafe {
                    Ok(Self {
                        $($name: symbol(library, stringify!($name))?,)*
                        $($opt: symbol(library, stringify!($opt)).ok(),)*
                        aoti_torch_check: symbol(library, "aoti_torch_check")?,
                        operator_new: symbol(library, "_Znwm").ok(),
                        operator_delete: symbol(library, "_ZdlPv").ok(),
                    })
                }
            }
        }
    };
}

shim! {
    required {
        fn aoti_torch_abi_version() -> u64;
        fn aoti_torch_library_init_impl(*const c_char, *const c_char, *const c_char, u32, *mut Handle) -> Status;
        fn torch_library_impl(Handle, *const c_char, Boxed, u64) -> Status;
        fn aoti_torch_delete_tensor_object(Handle) -> Status;
        fn aoti_torch_get_dim(Handle, *mut i64) -> Status;
        fn aoti_torch_get_numel(Handle, *mut i64) -> Status;
        fn aoti_torch_get_sizes(Handle, *mut *mut i64) -> Status;
        fn aoti_torch_get_strides(Handle, *mut *mut i64) -> Status;
        fn aoti_torch_get_storage_offset(Handle, *mut i64) -> Status;
        fn aoti_torch_get_storage_size(Handle, *mut i64) -> Status;
        fn aoti_torch_get_dtype(Handle, *mut i32) -> Status;
        fn aoti_torch_get_device_type(Handle, *mut i32) -> Status;
        fn aoti_torch_get_device_index(Handle, *mut i32) -> Status;
        fn aoti_torch_device_type_cpu() -> i32;
        fn aoti_torch_device_type_cuda() -> i32;
        fn aoti_torch_device_type_xpu() -> i32;
        fn aoti_torch_device_type_meta() -> i32;
        fn aoti_torch_zero_(Handle) -> Status;
        fn aoti_torch__reinterpret_tensor(Handle, i64, *const i64, *const i64, i64, *mut Handle) -> Status;
        fn aoti_torch_copy_(Handle, Handle, i32) -> Status;
        fn aoti_torch_grad_mode_is_enabled() -> bool;
        fn aoti_torch_grad_mode_set_enabled(bool) -> ();
        fn aoti_torch_empty_strided(i64, *const i64, *const i64, i32, i32, i32, *mut Handle) -> Status;
        fn torch_get_const_data_ptr(Handle, *mut *const c_void) -> Status;
        fn torch_get_mutable_data_ptr(Handle, *mut *mut c_void) -> Status;
        fn torch_list_size(Handle, *mut usize) -> Status;
        fn torch_list_get_item(Handle, usize, *mut Value) -> Status;
        fn torch_delete_list(Handle) -> Status;
        fn torch_string_length(Handle, *mut usize) -> Status;
        fn torch_string_c_str(Handle, *mut *const c_char) -> Status;
        fn torch_delete_string(Handle) -> Status;
        fn aoti_torch_dtype_float32() -> i32;
        fn aoti_torch_dtype_float16() -> i32;
        fn aoti_torch_dtype_bfloat16() -> i32;
        fn aoti_torch_dtype_float64() -> i32;
        fn aoti_torch_dtype_uint8() -> i32;
        fn aoti_torch_dtype_int8() -> i32;
        fn aoti_torch_dtype_int16() -> i32;
        fn aoti_torch_dtype_int32() -> i32;
        fn aoti_torch_dtype_int64() -> i32;
        fn aoti_torch_dtype_bool() -> i32;
    }
    optional {
        fn torch_get_num_threads(*mut u32) -> Status;
        fn aoti_torch_get_current_device_index(*mut i32) -> Status;
        fn torch_parallel_for(i64, i64, i64, ForRange, *mut c_void) -> Status;
        fn torch_new_stable_ivalue(*mut *mut Value) -> Status; // 2.13
        fn torch_delete_stable_ivalue(*mut Value) -> Status; // 2.13
        fn torch_exception_get_what_without_backtrace() -> *const c_char; // 2.13
    }
}

/// # Safety
/// `T` is the function pointer type of the symbol `name`.
unsafe fn symbol<T: Copy>(library: &Library, name: &'static str) -> Result<T, &'static str> {
    // SAFETY: by the caller's contract.
    unsafe { library.get::<T>(name.as_bytes()) }.map(|s| *s).map_err(|_| name)
}

static SHIM: OnceLock<Shim> = OnceLock::new();

/// The bound shim. Kernels only run after [`bind`] has succeeded, because only then are they
/// registered.
pub(crate) fn shim() -> &'static Shim {
    SHIM.get().expect("no kernel is registered before the shim is bound")
}

/// Binds to the libtorch of this process, once.
///
/// # Errors
/// One sentence for the user when torch is not loaded or older than 2.10. `version` and
/// `directory` describe the torch that Python imported.
pub(crate) fn bind(version: &str, directory: &Path) -> Result<(), String> {
    if SHIM.get().is_some() {
        return Ok(());
    }
    let library = open(directory).ok_or_else(|| {
        format!("PyTorch 2.10 or newer is required, but the libtorch_cpu of torch {version} is not loaded in this process")
    })?;
    // SAFETY: the library is libtorch_cpu, which defines the shim.
    let resolved = unsafe { Shim::resolve(&library) };
    let shim = resolved.map_err(|missing| {
        format!("PyTorch 2.10 or newer is required, got torch {version} (its libtorch_cpu has no {missing})")
    })?;
    // The pointers above stay valid because the library is never closed.
    std::mem::forget(library);
    if SHIM.set(shim).is_ok() {
        crate::threads::bind();
    }
    Ok(())
}

/// A handle on the `libtorch_cpu` that is already in the process; never loads a second one.
fn open(directory: &Path) -> Option<Library> {
    // By soname first; a loader that only knows the path (macOS) gets that.
    let name = file_name("torch_cpu");
    [Path::new(&name), &directory.join(&name)].into_iter().find_map(opened)
}

/// A function of another library of torch, if that is in the process. It is never unloaded.
///
/// # Safety
/// `T` is the function pointer type of the symbol `name`.
pub(crate) unsafe fn find<T: Copy>(library: &str, name: &'static str) -> Option<T> {
    let library = opened(Path::new(&file_name(library)))?;
    // SAFETY: by the caller's contract.
    let function = unsafe { symbol(&library, name) }.ok();
    std::mem::forget(library);
    function
}

fn file_name(library: &str) -> String {
    if cfg!(windows) {
        format!("{library}.dll")
    } else if cfg!(target_os = "macos") {
        format!("lib{library}.dylib")
    } else {
        format!("lib{library}.so")
    }
}

#[cfg(unix)]
fn opened(path: &Path) -> Option<Library> {
    use libloading::os::unix;
    let flags = unix::RTLD_NOW | libc::RTLD_NOLOAD;
    // SAFETY: the library is loaded already, so no initializer runs.
    unsafe { unix::Library::open(Some(path), flags) }.ok().map(Library::from)
}

#[cfg(windows)]
fn opened(path: &Path) -> Option<Library> {
    libloading::os::windows::Library::open_already_loaded(path).ok().map(Library::from)
}

/// Turns a status into a `Result`, with libtorch's own words where it can tell them (2.13+).
#[inline]
pub(crate) fn check(status: Status) -> crate::error::Result<()> {
    if status == 0 { Ok(()) } else { Err(last_error()) }
}

/// All there is to say of a failed call before PyTorch 2.13; its own words are on stderr.
pub(crate) const NO_WORDS: &str = "PyTorch reported an error";

#[cold]
fn last_error() -> crate::error::Error {
    let what = shim().torch_exception_get_what_without_backtrace.map(|get| {
        // SAFETY: returns null or a NUL-terminated string that lives until the next exception.
        unsafe {
            let text = get();
            if text.is_null() { None } else { Some(CStr::from_ptr(text).to_string_lossy()) }
        }
    });
    let what = what.flatten().map_or_else(|| NO_WORDS.into(), std::borrow::Cow::into_owned);
    crate::error::Error::Torch(what)
}

/// The major and minor version of the bound libtorch.
pub(crate) fn torch_version() -> (u64, u64) {
    // SAFETY: takes nothing, returns a number.
    let version = unsafe { (shim().aoti_torch_abi_version)() };
    (version >> 56, (version >> 48) & 0xFF)
}
