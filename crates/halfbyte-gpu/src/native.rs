//! What CUDA's driver interface and HIP have in common, call for call: modules, launches,
//! streams, memory. Each adds what differs as a [`Platform`]: contexts, names of errors, and where
//! machine code comes from.

use crate::device::{Driver, Function, Module, Runtime};
use crate::error::{Error, Result};
use crate::launch::{Arg, Grid};
use crate::library::dynlib;
use crate::module::Source;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::MaybeUninit;
use std::ptr;

pub(crate) type Handle = *mut c_void;

/// Most arguments a kernel takes.
const MAX_ARGS: usize = 64;
/// A stream that does not wait for the default stream (`CU_STREAM_NON_BLOCKING`).
const NON_BLOCKING: c_uint = 1;
/// Managed memory that every stream may use (`CU_MEM_ATTACH_GLOBAL`).
const ATTACH_GLOBAL: c_uint = 1;
/// The host, as a place to prefetch to (`CU_DEVICE_CPU`).
const HOST: c_int = -1;
/// Calls that cannot be recorded do not spoil a capture that is going on
/// (`CU_STREAM_CAPTURE_MODE_RELAXED`).
const RELAXED: c_int = 2;

/// Which column of [`Calls`] holds CUDA's names.
pub(crate) const CUDA: usize = 0;
/// Which column of [`Calls`] holds HIP's names.
pub(crate) const HIP: usize = 1;

dynlib! {
    /// The calls that both have, in the same form.
    pub(crate) struct Calls: "CUDA 12.0 or newer, or ROCm 5.6 or newer" {
        module_load(*mut Handle, *const c_void) -> c_int = ["cuModuleLoadData", "hipModuleLoadData"];
        module_function(*mut Handle, Handle, *const c_char) -> c_int = ["cuModuleGetFunction", "hipModuleGetFunction"];
        launch(
            Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint,
            Handle, *mut *const c_void, *mut *const c_void,
        ) -> c_int = ["cuLaunchKernel", "hipModuleLaunchKernel"];
        stream_create(*mut Handle, c_uint) -> c_int = ["cuStreamCreate", "hipStreamCreateWithFlags"];
        stream_synchronize(Handle) -> c_int = ["cuStreamSynchronize", "hipStreamSynchronize"];
        stream_is_capturing(Handle, *mut c_int) -> c_int = ["cuStreamIsCapturing", "hipStreamIsCapturing"];
        allocate(*mut u64, usize) -> c_int = ["cuMemAlloc_v2", "hipMalloc"];
        allocate_managed(*mut u64, usize, c_uint) -> c_int = ["cuMemAllocManaged", "hipMallocManaged"];
        free(u64) -> c_int = ["cuMemFree_v2", "hipFree"];
        upload(u64, *const c_void, usize, Handle) -> c_int = ["cuMemcpyHtoDAsync_v2", "hipMemcpyHtoDAsync"];
        download(*mut c_void, u64, usize, Handle) -> c_int = ["cuMemcpyDtoHAsync_v2", "hipMemcpyDtoHAsync"];
        fill(u64, u8, usize, Handle) -> c_int = ["cuMemsetD8Async", "hipMemsetD8Async"];
    }
    optional {
        prefetch(u64, usize, c_int, Handle) -> c_int = ["cuMemPrefetchAsync", "hipMemPrefetchAsync"];
        exchange_capture_mode(*mut c_int) -> c_int = ["cuThreadExchangeStreamCaptureMode", "hipThreadExchangeStreamCaptureMode"];
    }
}

/// What differs between CUDA and HIP, for one device.
pub(crate) trait Platform: Send + Sync {
    /// What [`Platform::enter`] leaves behind for [`Platform::leave`].
    type Previous: Copy;

    fn runtime(&self) -> Runtime;
    fn ordinal(&self) -> c_int;
    fn calls(&self) -> &'static Calls;

    /// The runtime's name and text for an error.
    fn describe(&self, code: c_int) -> (String, String);

    /// Makes the device current on this thread.
    fn enter(&self) -> Result<Self::Previous>;

    /// Makes current again what was before.
    fn leave(&self, previous: Self::Previous);

    /// True when the host may use managed memory while kernels run.
    fn shares_managed_memory(&self) -> bool;

    /// Finds or makes machine code of `source`, and hands it to `load` until one is accepted.
    fn code(
        &self,
        source: &'static Source,
        load: &dyn Fn(&[u8]) -> Result<Module>,
    ) -> Result<Module>;

    /// Called once for each function, with the device current.
    fn prepare(&self, function: Handle) {
        let _ = function;
    }
}

/// What loading answers to machine code that it does not take: `CUDA_ERROR_INVALID_IMAGE`,
/// `NO_BINARY_FOR_GPU`, `INVALID_PTX`, `UNSUPPORTED_PTX_VERSION`, `INVALID_SOURCE`, `NOT_SUPPORTED`.
/// HIP has the same numbers.
pub(crate) const IMAGE_ERRORS: [c_int; 6] = [200, 209, 218, 222, 300, 801];

/// What a prefetch answers where pages move only when they are touched, as on virtual GPUs and in
/// sandboxes: an invalid value, an invalid device, not supported. The same numbers in CUDA and HIP.
const REFUSED_HINTS: [c_int; 3] = [1, 101, 801];

/// A [`Platform`] as a [`Driver`].
pub(crate) struct Native<P>(pub(crate) P);

impl<P: Platform> Native<P> {
    fn check(&self, code: c_int, call: impl FnOnce() -> String) -> Result<()> {
        check(&self.0, code, call)
    }

    /// The call's own name, as messages show it.
    fn named(&self, cuda: &'static str, hip: &'static str) -> String {
        if self.0.runtime() == Runtime::Cuda { cuda } else { hip }.to_owned()
    }
}

/// The runtime's answer as a result. `call` says what was called.
pub(crate) fn check<P: Platform>(
    platform: &P,
    code: c_int,
    call: impl FnOnce() -> String,
) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    let (name, text) = platform.describe(code);
    Err(Error::Call { runtime: platform.runtime(), call: call(), code, name, text })
}

/// The device is current while this lives.
struct Current<'a, P: Platform> {
    platform: &'a P,
    previous: P::Previous,
}

impl<'a, P: Platform> Current<'a, P> {
    fn enter(platform: &'a P) -> Result<Self> {
        Ok(Self { platform, previous: platform.enter()? })
    }
}

impl<P: Platform> Drop for Current<'_, P> {
    fn drop(&mut self) {
        self.platform.leave(self.previous);
    }
}

/// This thread may load modules, allocate and free while this lives, even when a stream is being
/// captured into a graph. Without it the call would fail, and the capture with it.
struct Relaxed {
    calls: &'static Calls,
    /// The thread's mode before; none where it was not changed.
    previous: Option<c_int>,
}

impl Relaxed {
    fn enter(calls: &'static Calls) -> Self {
        Self { calls, previous: exchange_capture_mode(calls, RELAXED) }
    }
}

/// Sets this thread's capture mode and gives the one before. A failure changes nothing, and what
/// follows reports it.
fn exchange_capture_mode(calls: &Calls, mut mode: c_int) -> Option<c_int> {
    let exchange = calls.exchange_capture_mode?;
    // SAFETY: the mode is read and written during the call only.
    let code = unsafe { exchange(&raw mut mode) };
    (code == 0).then_some(mode)
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        if let Some(previous) = self.previous {
            exchange_capture_mode(self.calls, previous);
        }
    }
}

impl<P: Platform> Driver for Native<P> {
    fn load(&self, source: &'static Source) -> Result<Module> {
        let calls = self.0.calls();
        let _current = Current::enter(&self.0)?;
        let _relaxed = Relaxed::enter(calls);
        self.0.code(source, &|image| {
            let mut module = ptr::null_mut();
            // SAFETY: `image` is an ELF file in memory; the loader reads what its headers say and
            // refuses what is none.
            let code = unsafe { (calls.module_load)(&raw mut module, image.as_ptr().cast()) };
            self.check(code, || {
                format!("{}({})", self.named("cuModuleLoadData", "hipModuleLoadData"), source.name)
            })?;
            Ok(Module(module))
        })
    }

    fn function(&self, module: Module, kernel: &CStr) -> Result<Function> {
        let calls = self.0.calls();
        let _current = Current::enter(&self.0)?;
        let _relaxed = Relaxed::enter(calls);
        let mut function = ptr::null_mut();
        // SAFETY: the module was loaded by this driver; the name is a C string.
        let code = unsafe { (calls.module_function)(&raw mut function, module.0, kernel.as_ptr()) };
        self.check(code, || {
            let call = self.named("cuModuleGetFunction", "hipModuleGetFunction");
            format!("{call}({})", kernel.to_string_lossy())
        })?;
        self.0.prepare(function);
        Ok(Function(function))
    }

    unsafe fn launch(
        &self,
        function: Function,
        kernel: &CStr,
        stream: *mut c_void,
        grid: &Grid,
        args: &[Arg<'_>],
    ) -> Result<()> {
        if args.len() > MAX_ARGS {
            return Err(Error::Argument {
                what: "kernel arguments",
                expected: format!("at most {MAX_ARGS}"),
                got: args.len().to_string(),
            });
        }
        let mut addresses = [MaybeUninit::<*const c_void>::uninit(); MAX_ARGS];
        for (address, arg) in addresses.iter_mut().zip(args) {
            address.write(arg.address());
        }
        let _current = Current::enter(&self.0)?;
        let [x, y, z] = grid.groups;
        // SAFETY: the function is loaded on the current device. The driver reads as many addresses
        // as the kernel has parameters, before it returns; `args` has that many, of those types,
        // and what they point to is as the caller vouches.
        let code = unsafe {
            (self.0.calls().launch)(
                function.0,
                x,
                y,
                z,
                grid.threads,
                1,
                1,
                grid.shared_bytes,
                stream,
                addresses.as_mut_ptr().cast(),
                ptr::null_mut(),
            )
        };
        self.check(code, || {
            let call = self.named("cuLaunchKernel", "hipModuleLaunchKernel");
            format!("{call}({})", kernel.to_string_lossy())
        })
    }

    fn create_stream(&self) -> Result<*mut c_void> {
        let _current = Current::enter(&self.0)?;
        let mut stream = ptr::null_mut();
        // SAFETY: the handle is written during the call.
        let code = unsafe { (self.0.calls().stream_create)(&raw mut stream, NON_BLOCKING) };
        self.check(code, || self.named("cuStreamCreate", "hipStreamCreateWithFlags"))?;
        Ok(stream)
    }

    unsafe fn synchronize(&self, stream: *mut c_void) -> Result<()> {
        let _current = Current::enter(&self.0)?;
        // SAFETY: the caller's stream is null or this device's.
        let code = unsafe { (self.0.calls().stream_synchronize)(stream) };
        self.check(code, || self.named("cuStreamSynchronize", "hipStreamSynchronize"))
    }

    unsafe fn is_capturing(&self, stream: *mut c_void) -> Result<bool> {
        let _current = Current::enter(&self.0)?;
        let mut status = 0;
        // SAFETY: the caller's stream is null or this device's; the status is written.
        let code = unsafe { (self.0.calls().stream_is_capturing)(stream, &raw mut status) };
        self.check(code, || self.named("cuStreamIsCapturing", "hipStreamIsCapturing"))?;
        Ok(status != 0)
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        let _current = Current::enter(&self.0)?;
        let _relaxed = Relaxed::enter(self.0.calls());
        let mut pointer = 0;
        // SAFETY: the address is written during the call.
        let code = unsafe { (self.0.calls().allocate)(&raw mut pointer, bytes) };
        self.check(code, || format!("{}({bytes} bytes)", self.named("cuMemAlloc", "hipMalloc")))?;
        Ok(pointer)
    }

    fn allocate_managed(&self, bytes: usize) -> Result<u64> {
        if !self.0.shares_managed_memory() {
            return Err(Error::Unsupported {
                runtime: self.0.runtime(),
                what: "let the host use managed memory while kernels run on this device",
            });
        }
        let _current = Current::enter(&self.0)?;
        let _relaxed = Relaxed::enter(self.0.calls());
        let mut pointer = 0;
        // SAFETY: the address is written during the call.
        let code =
            unsafe { (self.0.calls().allocate_managed)(&raw mut pointer, bytes, ATTACH_GLOBAL) };
        self.check(code, || {
            format!("{}({bytes} bytes)", self.named("cuMemAllocManaged", "hipMallocManaged"))
        })?;
        Ok(pointer)
    }

    unsafe fn free(&self, pointer: u64) {
        if let Ok(_current) = Current::enter(&self.0) {
            let _relaxed = Relaxed::enter(self.0.calls());
            // SAFETY: the caller's pointer came from `allocate` or `allocate_managed`. An error
            // can only be that of an earlier launch, which the next call reports.
            unsafe { (self.0.calls().free)(pointer) };
        }
    }

    unsafe fn zero(&self, pointer: u64, bytes: usize) -> Result<()> {
        let current = Current::enter(&self.0)?;
        let _relaxed = Relaxed::enter(self.0.calls());
        // SAFETY: the caller owns the bytes.
        let code = unsafe { (self.0.calls().fill)(pointer, 0, bytes, ptr::null_mut()) };
        self.check(code, || self.named("cuMemsetD8Async", "hipMemsetD8Async"))?;
        drop(current);
        // SAFETY: null is the default stream.
        unsafe { self.synchronize(ptr::null_mut()) }
    }

    unsafe fn upload(&self, stream: *mut c_void, from: &[u8], to: u64) -> Result<()> {
        let current = Current::enter(&self.0)?;
        // SAFETY: the caller owns as many bytes at `to`; `from` lives until the copy is done,
        // because this waits for it.
        let code = unsafe { (self.0.calls().upload)(to, from.as_ptr().cast(), from.len(), stream) };
        self.check(code, || self.named("cuMemcpyHtoDAsync", "hipMemcpyHtoDAsync"))?;
        drop(current);
        // SAFETY: by the caller's contract.
        unsafe { self.synchronize(stream) }
    }

    unsafe fn download(&self, stream: *mut c_void, from: u64, to: &mut [u8]) -> Result<()> {
        let current = Current::enter(&self.0)?;
        // SAFETY: as many bytes lie at `from` by the caller's contract; `to` lives until the copy
        // is done, because this waits for it.
        let code =
            unsafe { (self.0.calls().download)(to.as_mut_ptr().cast(), from, to.len(), stream) };
        self.check(code, || self.named("cuMemcpyDtoHAsync", "hipMemcpyDtoHAsync"))?;
        drop(current);
        // SAFETY: by the caller's contract.
        unsafe { self.synchronize(stream) }
    }

    unsafe fn prefetch(
        &self,
        stream: *mut c_void,
        pointer: u64,
        bytes: usize,
        to_device: bool,
    ) -> Result<()> {
        let Some(prefetch) = self.0.calls().prefetch else { return Ok(()) };
        // SAFETY: by the caller's contract.
        if unsafe { self.is_capturing(stream) }.unwrap_or(true) {
            return Ok(()); // a graph cannot hold it, and a refusal would end the capture
        }
        let _current = Current::enter(&self.0)?;
        let place = if to_device { self.0.ordinal() } else { HOST };
        // SAFETY: the range is managed memory by the caller's contract.
        let code = unsafe { prefetch(pointer, bytes, place, stream) };
        if REFUSED_HINTS.contains(&code) {
            return Ok(());
        }
        self.check(code, || self.named("cuMemPrefetchAsync", "hipMemPrefetchAsync"))
    }
}
