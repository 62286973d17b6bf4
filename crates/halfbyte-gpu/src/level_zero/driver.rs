//! One GPU as a [`Driver`].
//!
//! Streams are of two kinds. Ours are immediate command lists that wait: a launch returns when it
//! has run. `PyTorch`'s are `sycl::queue`s, of which two cases are known to be in order:
//!
//! - The queue is made by SYCL's second adapter for Level Zero (`SYCL_UR_USE_LEVEL_ZERO_V2=1`): it
//!   has one in-order command list, and launches are appended to that. Nothing waits. As SYCL does
//!   not know of the launch, only one thread at a time may use the queue, as with `PyTorch`'s ops.
//! - Otherwise SYCL may keep the order of its own work (copies on another engine included) with
//!   events that nobody else sees. So the queue is waited for, and the launch as well.
//!
//! The first is as fast as on other GPUs, the second is always right.

use super::code;
use super::sycl::{self, Sycl};
use super::sys::{self, Api, Code, Handle, check};
use crate::Runtime;
use crate::device::{Driver, Function, Module};
use crate::error::{Error, Result};
use crate::launch::{Arg, Grid};
use crate::module::Source;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Set in the address of a stream of ours, clear in that of a `sycl::queue`.
const OURS: usize = 1;
/// Alignment of memory, as CUDA's.
const ALIGNMENT: usize = 256;

pub(super) struct LevelZero {
    pub(super) api: &'static Api,
    pub(super) device: Handle,
    /// Ours: of memory and streams that no framework made.
    pub(super) context: Handle,
    /// Group of engines that run kernels.
    pub(super) ordinal: u32,
    pub(super) max_allocation: usize,
    pub(super) max_threads: u32,
    /// Whether the driver can be told to round division and square root correctly.
    pub(super) rounds_division: bool,
    /// Whether SYCL's queues are in-order command lists.
    pub(super) sycl_in_order: bool,
    /// A waiting command list per context. Also the lock under which kernels get their arguments
    /// and command lists their work: neither may be done by two threads at once.
    pub(super) lists: Mutex<Vec<(Handle, Handle)>>,
}

// SAFETY: Level Zero's objects may be used from any thread, one thread at a time: launches and
// copies are done under `lists`.
unsafe impl Send for LevelZero {}
// SAFETY: as above.
unsafe impl Sync for LevelZero {}

/// What a [`Module`] points to: SPIR-V, and the module it became in each context.
struct Loaded {
    source: &'static Source,
    spirv: Vec<u8>,
    modules: Mutex<Vec<(Handle, Handle)>>,
}

/// What a [`Function`] points to: a kernel's name, and the kernel it became in each context.
struct Kernel {
    loaded: &'static Loaded,
    name: CString,
    kernels: Mutex<Vec<(Handle, Handle)>>,
}

/// Where a launch goes: `list`, once `queue` (if any) has been waited for.
struct Target {
    context: Handle,
    list: Handle,
    queue: Option<(&'static Sycl, *const c_void)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The value for `context`, made the first time.
fn of_context(
    known: &Mutex<Vec<(Handle, Handle)>>,
    context: Handle,
    make: impl FnOnce() -> Result<Handle>,
) -> Result<Handle> {
    let mut known = lock(known);
    if let Some((_, handle)) = known.iter().find(|(of, _)| *of == context) {
        return Ok(*handle);
    }
    let handle = make()?;
    known.push((context, handle));
    Ok(handle)
}

impl LevelZero {
    fn new_list(&self, context: Handle) -> Result<Handle> {
        let description = sys::QueueDescription {
            head: sys::Head::new(0xe),
            ordinal: self.ordinal,
            index: 0,
            flags: 0,
            mode: sys::MODE_SYNCHRONOUS,
            priority: 0,
        };
        let mut list = ptr::null_mut();
        // SAFETY: a context and a device of one driver; the handle is written during the call.
        let code = unsafe {
            (self.api.list_create)(context, self.device, &raw const description, &raw mut list)
        };
        check(code, || "zeCommandListCreateImmediate".into())?;
        Ok(list)
    }

    /// # Safety
    /// `stream` is null, from [`Driver::create_stream`], or a live `sycl::queue` of this device.
    unsafe fn target(&self, stream: *mut c_void) -> Result<Target> {
        let ours = |context| of_context(&self.lists, context, || self.new_list(context));
        if stream.is_null() {
            return Ok(Target { context: self.context, list: ours(self.context)?, queue: None });
        }
        if stream.addr() & OURS != 0 {
            let list = stream.map_addr(|address| address & !OURS);
            return Ok(Target { context: self.context, list, queue: None });
        }
        let sycl = sycl::sycl()?;
        // SAFETY: what is neither null nor ours is a queue, by the contract.
        let (context, list) = unsafe { (sycl.context(stream)?, sycl.list(stream)) };
        Ok(match list.filter(|_| self.sycl_in_order) {
            Some(list) => Target { context, list, queue: None },
            None => Target { context, list: ours(context)?, queue: Some((sycl, stream)) },
        })
    }

    /// Waits for what must have run before the target's list may go on, and locks all lists.
    fn ready(&self, target: &Target) -> MutexGuard<'_, Vec<(Handle, Handle)>> {
        if let Some((sycl, queue)) = target.queue {
            // SAFETY: `target` had the queue from its caller, who vouches for it.
            unsafe { sycl.wait(queue) };
        }
        lock(&self.lists)
    }

    fn flags(&self, source: &Source) -> &'static CStr {
        if source.exact && self.rounds_division {
            c"-ze-opt-greater-than-4GB-buffer-required -ze-fp32-correctly-rounded-divide-sqrt"
        } else {
            c"-ze-opt-greater-than-4GB-buffer-required"
        }
    }

    fn module(&self, loaded: &Loaded, context: Handle) -> Result<Handle> {
        let description = sys::ModuleDescription {
            head: sys::Head::new(0x1b),
            format: sys::FORMAT_SPIRV,
            size: loaded.spirv.len(),
            code: loaded.spirv.as_ptr(),
            flags: self.flags(loaded.source).as_ptr(),
            constants: ptr::null(),
        };
        let (mut module, mut log) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the code is as long as said; both handles are written during the call.
        let code = unsafe {
            (self.api.module_create)(
                context,
                self.device,
                &raw const description,
                &raw mut module,
                &raw mut log,
            )
        };
        let said = self.take_log(log);
        if code == 0 {
            return Ok(module);
        }
        Err(Error::Compile {
            compiler: "Level Zero".into(),
            source_name: loaded.source.name,
            architecture: "this device".into(),
            log: format!("{}: {said}", sys::failed(code, "zeModuleCreate".into())),
        })
    }

    /// The text of a build log, which is then destroyed.
    fn take_log(&self, log: Handle) -> String {
        if log.is_null() {
            return String::new();
        }
        let mut length = 0;
        // SAFETY: the log came from zeModuleCreate; with null only its length is asked for.
        let code = unsafe { (self.api.build_log)(log, &raw mut length, ptr::null_mut()) };
        let mut text = vec![0u8; if code == 0 { length } else { 0 }];
        // SAFETY: there is room for as many bytes as are announced; destroyed once, after that.
        unsafe {
            (self.api.build_log)(log, &raw mut length, text.as_mut_ptr().cast::<c_char>());
            (self.api.build_log_destroy)(log);
        }
        String::from_utf8_lossy(&text).trim_end_matches('\0').trim().into()
    }

    fn kernel(&self, kernel: &Kernel, context: Handle) -> Result<Handle> {
        of_context(&kernel.kernels, context, || {
            let loaded = kernel.loaded;
            let module = of_context(&loaded.modules, context, || self.module(loaded, context))?;
            let description = sys::KernelDescription {
                head: sys::Head::new(0x1d),
                flags: 0,
                name: kernel.name.as_ptr(),
            };
            let mut made = ptr::null_mut();
            // SAFETY: the module was made above; the handle is written during the call.
            let code =
                unsafe { (self.api.kernel_create)(module, &raw const description, &raw mut made) };
            let call = |name| move || format!("{name}({})", kernel.name.to_string_lossy());
            check(code, call("zeKernelCreate"))?;
            // SAFETY: the kernel was just made. Tables in memory hold addresses that the driver
            // does not see among the arguments.
            let code = unsafe { (self.api.kernel_indirect_access)(made, sys::INDIRECT_ACCESS_ALL) };
            check(code, call("zeKernelSetIndirectAccess"))?;
            Ok(made)
        })
    }

    /// Copies in the stream's order and returns when that is done.
    ///
    /// # Safety
    /// `bytes` bytes lie at both addresses; `stream` is as [`Driver`] says.
    unsafe fn copy(
        &self,
        stream: *mut c_void,
        to: *mut c_void,
        from: *const c_void,
        bytes: usize,
    ) -> Result<()> {
        // SAFETY: by the contract.
        let target = unsafe { self.waiting(stream) }?;
        let _locked = self.ready(&target);
        let (list, none) = (target.list, ptr::null_mut());
        // SAFETY: by the contract; the list waits, so both stay alive during the copy.
        let code =
            unsafe { (self.api.append_copy)(list, to, from, bytes, none, 0, ptr::null_mut()) };
        check(code, || format!("zeCommandListAppendMemoryCopy({bytes} bytes)"))
    }

    /// As [`LevelZero::target`], with a list that waits even where the queue has one that does not.
    ///
    /// # Safety
    /// As [`LevelZero::target`].
    unsafe fn waiting(&self, stream: *mut c_void) -> Result<Target> {
        // SAFETY: by the contract.
        let mut target = unsafe { self.target(stream) }?;
        if !stream.is_null() && stream.addr() & OURS == 0 {
            let context = target.context;
            target.list = of_context(&self.lists, context, || self.new_list(context))?;
            target.queue = Some((sycl::sycl()?, stream));
        }
        Ok(target)
    }

    fn allocated(code: Code, call: &str, bytes: usize, pointer: *mut c_void) -> Result<u64> {
        check(code, || format!("{call}({bytes} bytes)"))?;
        Ok(pointer.expose_provenance() as u64)
    }

    fn head(&self, bytes: usize, relaxed: &sys::Description) -> sys::MemoryDescription {
        const KIND: u32 = 0x15;
        let head = if bytes > self.max_allocation {
            sys::Head::followed_by(KIND, relaxed)
        } else {
            sys::Head::new(KIND)
        };
        sys::MemoryDescription { head, flags: 0, ordinal: 0 }
    }
}

impl Driver for LevelZero {
    fn load(&self, source: &'static Source) -> Result<Module> {
        if source.cuda_only {
            return Err(Error::CudaOnly { source_name: source.name, runtime: Runtime::Xpu });
        }
        let spirv = code::spirv(source)?;
        let loaded = Box::new(Loaded { source, spirv, modules: Mutex::new(Vec::new()) });
        Ok(Module(Box::into_raw(loaded).cast()))
    }

    fn function(&self, module: Module, kernel: &CStr) -> Result<Function> {
        // SAFETY: modules come from `load`, which leaks them.
        let loaded: &'static Loaded = unsafe { &*module.0.cast::<Loaded>() };
        let made = Kernel { loaded, name: kernel.to_owned(), kernels: Mutex::new(Vec::new()) };
        Ok(Function(Box::into_raw(Box::new(made)).cast()))
    }

    unsafe fn launch(
        &self,
        function: Function,
        kernel: &CStr,
        stream: *mut c_void,
        grid: &Grid,
        args: &[Arg<'_>],
    ) -> Result<()> {
        let unsupported = |what| Err(Error::Unsupported { runtime: Runtime::Xpu, what });
        if grid.shared_bytes > 0 {
            return unsupported("give a kernel more shared memory than it declares");
        }
        if grid.threads > self.max_threads {
            return unsupported("run groups that large on this device");
        }
        if args.iter().any(|arg| matches!(arg, Arg::Bytes(_))) {
            return unsupported("take structs by value");
        }
        // SAFETY: functions come from `function`, which leaks them.
        let made = unsafe { &*function.0.cast::<Kernel>() };
        // SAFETY: by the contract of Driver::launch.
        let target = unsafe { self.target(stream) }?;
        let handle = self.kernel(made, target.context)?;
        let call = |name| move || format!("{name}({})", kernel.to_string_lossy());
        let _locked = self.ready(&target);
        for (place, arg) in (0..).zip(args) {
            // SAFETY: by the contract the arguments are what the kernel takes; they are copied.
            let code =
                unsafe { (self.api.kernel_argument)(handle, place, arg.size(), arg.address()) };
            check(code, || {
                format!("zeKernelSetArgumentValue({}, {place})", kernel.to_string_lossy())
            })?;
        }
        // SAFETY: the kernel is this device's; groups are one-dimensional.
        let code = unsafe { (self.api.kernel_group_size)(handle, grid.threads, 1, 1) };
        check(code, call("zeKernelSetGroupSize"))?;
        // SAFETY: list and kernel are of one context; the three counts are read during the call.
        let code = unsafe {
            (self.api.append_launch)(
                target.list,
                handle,
                &raw const grid.groups,
                ptr::null_mut(),
                0,
                ptr::null_mut(),
            )
        };
        check(code, call("zeCommandListAppendLaunchKernel"))
    }

    fn create_stream(&self) -> Result<*mut c_void> {
        Ok(self.new_list(self.context)?.map_addr(|address| address | OURS))
    }

    unsafe fn synchronize(&self, stream: *mut c_void) -> Result<()> {
        // Ours have nothing left to wait for.
        if !stream.is_null() && stream.addr() & OURS == 0 {
            // SAFETY: what is neither null nor ours is a queue, by the contract.
            unsafe { sycl::sycl()?.wait(stream) };
        }
        Ok(())
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        let relaxed = sys::Description::relaxed_limits();
        let description = self.head(bytes, &relaxed);
        let mut pointer = ptr::null_mut();
        // SAFETY: context and device are of one driver; the address is written during the call.
        let code = unsafe {
            (self.api.allocate_device)(
                self.context,
                &raw const description,
                bytes,
                ALIGNMENT,
                self.device,
                &raw mut pointer,
            )
        };
        Self::allocated(code, "zeMemAllocDevice", bytes, pointer)
    }

    fn allocate_managed(&self, bytes: usize) -> Result<u64> {
        let relaxed = sys::Description::relaxed_limits();
        let description = self.head(bytes, &relaxed);
        let host = sys::Description::host_memory();
        let mut pointer = ptr::null_mut();
        // SAFETY: as above.
        let code = unsafe {
            (self.api.allocate_shared)(
                self.context,
                &raw const description,
                &raw const host,
                bytes,
                ALIGNMENT,
                self.device,
                &raw mut pointer,
            )
        };
        Self::allocated(code, "zeMemAllocShared", bytes, pointer)
    }

    unsafe fn free(&self, pointer: u64) {
        let pointer = ptr::with_exposed_provenance_mut(pointer as usize);
        // SAFETY: by the contract it came from one of the above and is out of use.
        unsafe { (self.api.free)(self.context, pointer) };
    }

    unsafe fn zero(&self, pointer: u64, bytes: usize) -> Result<()> {
        // SAFETY: null is a stream of ours.
        let target = unsafe { self.target(ptr::null_mut()) }?;
        let _locked = self.ready(&target);
        let (to, zero) = (ptr::with_exposed_provenance_mut(pointer as usize), 0u8);
        // SAFETY: by the contract the bytes are the caller's; the list waits.
        let code = unsafe {
            (self.api.append_fill)(
                target.list,
                to,
                (&raw const zero).cast(),
                1,
                bytes,
                ptr::null_mut(),
                0,
                ptr::null_mut(),
            )
        };
        check(code, || format!("zeCommandListAppendMemoryFill({bytes} bytes)"))
    }

    unsafe fn upload(&self, stream: *mut c_void, from: &[u8], to: u64) -> Result<()> {
        let to = ptr::with_exposed_provenance_mut(to as usize);
        // SAFETY: by the contract as many bytes lie at `to`.
        unsafe { self.copy(stream, to, from.as_ptr().cast(), from.len()) }
    }

    unsafe fn download(&self, stream: *mut c_void, from: u64, to: &mut [u8]) -> Result<()> {
        let from = ptr::with_exposed_provenance(from as usize);
        // SAFETY: by the contract as many bytes lie at `from`.
        unsafe { self.copy(stream, to.as_mut_ptr().cast(), from, to.len()) }
    }

    unsafe fn prefetch(
        &self,
        stream: *mut c_void,
        pointer: u64,
        bytes: usize,
        to_device: bool,
    ) -> Result<()> {
        if !to_device {
            return Ok(()); // Level Zero prefetches to a list's device only
        }
        // SAFETY: by the contract.
        let target = unsafe { self.target(stream) }?;
        let _locked = self.ready(&target);
        let pointer = ptr::with_exposed_provenance(pointer as usize);
        // SAFETY: by the contract the memory is shared and of that size.
        let code = unsafe { (self.api.append_prefetch)(target.list, pointer, bytes) };
        check(code, || format!("zeCommandListAppendMemoryPrefetch({bytes} bytes)"))
    }
}
