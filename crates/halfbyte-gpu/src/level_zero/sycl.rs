//! What is needed of SYCL: `PyTorch`'s XPU stream is a `sycl::queue*`.
//!
//! The library is the one that is in the process already (torch's). Its functions are C++ members,
//! known by their mangled names (Itanium ABI, inline namespace `_V1`: `libsycl.so.7` to `.9`). A
//! C++ exception in one of them ends the process, as it does in any C program.

use crate::Runtime;
use crate::error::{Error, Result};
use crate::library::{Candidate, Library, dynlib};
use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

/// Names a SYCL library in place of the one in the process.
const VARIABLE: &str = "HALFBYTE_SYCL";
/// `sycl::backend::ext_oneapi_level_zero`
const LEVEL_ZERO: i8 = 2;

dynlib! {
    struct Calls: "libsycl of oneAPI 2023.1 or newer" {
        /* backend queue::get_backend() const */
        queue_backend(*const c_void) -> i8 = ["_ZNK4sycl3_V15queue11get_backendEv"];
        /* context queue::get_context() const: a class is returned through the first argument */
        queue_context(*mut Context, *const c_void) -> *mut Context = ["_ZNK4sycl3_V15queue11get_contextEv"];
        /* uintptr_t queue::getNative(int32_t& isImmediateList) const */
        queue_native(*const c_void, *mut c_int) -> usize = ["_ZNK4sycl3_V15queue9getNativeERi"];
        /* uintptr_t context::getNative() const */
        context_native(*const Context) -> usize = ["_ZNK4sycl3_V17context9getNativeEv"];
        /* void queue::wait_proxy(const detail::code_location&) */
        queue_wait(*const c_void, *const Place) -> () = ["_ZN4sycl3_V15queue10wait_proxyERKNS0_6detail13code_locationE"];
    }
}

/// A `sycl::context`: one `shared_ptr`. With room to spare.
#[repr(C, align(16))]
struct Context([usize; 8]);

/// A `sycl::detail::code_location` of nowhere: two null names and two zeros. With room to spare.
#[repr(C, align(16))]
struct Place([usize; 8]);

/// SYCL's functions.
pub(super) struct Sycl(Calls);

/// The library, looked for once there is a queue.
pub(super) fn sycl() -> Result<&'static Sycl> {
    static SYCL: OnceLock<Result<Sycl>> = OnceLock::new();
    let found = SYCL.get_or_init(|| {
        if !cfg!(all(unix, target_pointer_width = "64")) {
            let what = "use PyTorch's stream on this system yet";
            return Err(Error::Unsupported { runtime: Runtime::Xpu, what });
        }
        let candidates = Candidate::from_env(VARIABLE, || {
            ["libsycl.so.9", "libsycl.so.8", "libsycl.so.7"].map(Candidate::Mapped).into()
        });
        let library = Library::open("the SYCL runtime that PyTorch uses", &candidates)?;
        Calls::load(&library, 0).map(Sycl)
    });
    found.as_ref().map_err(Clone::clone)
}

impl Sycl {
    /// The native handle of the queue's context (`ze_context_handle_t`).
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a queue that is not Level Zero's.
    ///
    /// # Safety
    /// `queue` is a live `sycl::queue`.
    pub(super) unsafe fn context(&self, queue: *const c_void) -> Result<*mut c_void> {
        // SAFETY: by the contract; the function returns an enumeration of type char.
        if unsafe { (self.0.queue_backend)(queue) } != LEVEL_ZERO {
            let what = "use a sycl::queue of another backend than level_zero";
            return Err(Error::Unsupported { runtime: Runtime::Xpu, what });
        }
        let mut context = Context([0; 8]);
        // SAFETY: the function constructs a `sycl::context` in the memory given, which is larger.
        // It is not destroyed: its destructor is inline and unknown here. That keeps one more
        // reference to a context which PyTorch keeps for the process's life anyway.
        let native = unsafe {
            (self.0.queue_context)(&raw mut context, queue);
            (self.0.context_native)(&raw const context)
        };
        Ok(std::ptr::with_exposed_provenance_mut(native))
    }

    /// The immediate command list of the queue; none when it has a command queue.
    ///
    /// # Safety
    /// `queue` is a live `sycl::queue` of Level Zero.
    pub(super) unsafe fn list(&self, queue: *const c_void) -> Option<*mut c_void> {
        let mut immediate: c_int = 0;
        // SAFETY: by the contract; the number is written during the call.
        let native = unsafe { (self.0.queue_native)(queue, &raw mut immediate) };
        (immediate != 0).then(|| std::ptr::with_exposed_provenance_mut(native))
    }

    /// Waits for all that was submitted to the queue.
    ///
    /// # Safety
    /// `queue` is a live `sycl::queue`.
    pub(super) unsafe fn wait(&self, queue: *const c_void) {
        let nowhere = Place([0; 8]);
        // SAFETY: by the contract; the place is read during the call.
        unsafe { (self.0.queue_wait)(queue, &raw const nowhere) }
    }
}
