//! OpenCL 2 platforms with shared virtual memory: where the portable kernels are tested without a
//! GPU (`PoCL`), and the form of them that Intel's compilers read.
//!
//! | here | OpenCL |
//! |---|---|
//! | a device pointer | the address of fine-grained shared virtual memory (`clSVMAlloc`) |
//! | a stream | an in-order `cl_command_queue` |
//! | a module | a `cl_program` built from the text; the platform caches the result (`PoCL`: `POCL_CACHE_DIR`) |
//!
//! Not part of the chain of back ends: nothing chooses OpenCL by itself.

mod sys;

use crate::device::{Driver, Facts, Function, Module};
use crate::error::{Error, Result};
use crate::launch::{Arg, Grid};
use crate::library::{Candidate, Library};
use crate::{Device, Runtime, Source};
use std::collections::BTreeSet;
use std::ffi::{CStr, c_int, c_uint, c_void};
use std::ptr;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use sys::{Api, Handle, SUCCESS};

/// Names an OpenCL library: a loader (`libOpenCL.so.1`) or a platform's own (`libpocl.so`).
const VARIABLE: &str = "HALFBYTE_OPENCL";
#[cfg(windows)]
const SYSTEM: &str = "OpenCL.dll";
#[cfg(not(windows))]
const SYSTEM: &str = "libOpenCL.so.1";

/// The OpenCL device of that number, counting those of all platforms that have fine-grained
/// shared virtual memory. The library is the one that the environment variable `HALFBYTE_OPENCL`
/// names, else the system's `libOpenCL.so.1`; it is opened at the first call and kept.
///
/// # Errors
/// [`Error::Library`] without a library, [`Error::Symbol`] for one before OpenCL 2.0,
/// [`Error::Ordinal`] for a number that is not there, else what the platform reports.
pub fn opencl_device(ordinal: usize) -> Result<&'static Device> {
    static DEVICES: OnceLock<Result<Vec<Device>>> = OnceLock::new();
    let devices = DEVICES.get_or_init(open);
    let devices = devices.as_ref().map_err(Clone::clone)?;
    let (runtime, count) = (Runtime::OpenCl, devices.len());
    devices.get(ordinal).ok_or(Error::Ordinal { runtime, got: ordinal, count })
}

fn open() -> Result<Vec<Device>> {
    let candidates = Candidate::from_env(VARIABLE, || vec![Candidate::name(SYSTEM)]);
    let library = Library::open(sys::LIBRARY, &candidates)?;
    let api: &'static Api = Box::leak(Box::new(Api::new(&library)?));
    let platforms = list("clGetPlatformIDs", |count, to, found| {
        // SAFETY: `to` has room for `count` handles.
        unsafe { (api.get_platforms)(count, to, found) }
    })?;
    let mut devices = Vec::new();
    for platform in platforms {
        let all = list("clGetDeviceIDs", |count, to, found| {
            // SAFETY: as above, of a platform just listed.
            unsafe { (api.get_devices)(platform, sys::DEVICE_TYPE_ALL, count, to, found) }
        })?;
        for handle in all {
            let wide = number(api, handle, sys::DEVICE_ADDRESS_BITS)? == 64;
            // A platform before 2.0 does not know the question: no shared memory either.
            let shared = number(api, handle, sys::DEVICE_SVM_CAPABILITIES).unwrap_or(0);
            if wide && shared & sys::SVM_FINE_GRAIN_BUFFER != 0 {
                devices.push(device(api, handle, devices.len())?);
            }
        }
    }
    Ok(devices)
}

/// All handles of a kind. None is an answer, whether the platform calls it an error or not.
fn list(
    what: &str,
    get: impl Fn(c_uint, *mut Handle, *mut c_uint) -> c_int,
) -> Result<Vec<Handle>> {
    const NONE: [c_int; 2] = [-1, -1001]; // CL_DEVICE_NOT_FOUND, CL_PLATFORM_NOT_FOUND_KHR
    let mut count = 0;
    match get(0, ptr::null_mut(), &raw mut count) {
        code if NONE.contains(&code) => return Ok(Vec::new()),
        SUCCESS if count == 0 => return Ok(Vec::new()),
        SUCCESS => {}
        code => return Err(sys::call(what, code)),
    }
    let mut handles = vec![ptr::null_mut(); count as usize];
    check(what, get(count, handles.as_mut_ptr(), ptr::null_mut()))?;
    Ok(handles)
}

fn check(what: &str, code: c_int) -> Result<()> {
    if code == SUCCESS { Ok(()) } else { Err(sys::call(what, code)) }
}

fn number(api: &Api, device: Handle, what: c_uint) -> Result<u64> {
    let mut value = 0u64; // the answers are of 4 or 8 bytes, and the machine is little-endian
    // SAFETY: there is room for 8 bytes.
    let code =
        unsafe { (api.get_device_info)(device, what, 8, (&raw mut value).cast(), ptr::null_mut()) };
    check("clGetDeviceInfo", code)?;
    Ok(u64::from_le(value))
}

fn text(api: &Api, device: Handle, what: c_uint) -> Result<String> {
    let mut bytes = vec![0u8; 1024];
    let mut length = 0;
    // SAFETY: there is room for as many bytes as are announced.
    let code = unsafe {
        (api.get_device_info)(device, what, bytes.len(), bytes.as_mut_ptr().cast(), &raw mut length)
    };
    check("clGetDeviceInfo", code)?;
    bytes.truncate(length);
    Ok(trimmed(&bytes))
}

/// Text that a C function wrote, without the NUL and white space at its end.
fn trimmed(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).trim().into()
}

fn device(api: &'static Api, handle: Handle, ordinal: usize) -> Result<Device> {
    let mut code = 0;
    // SAFETY: one device that was just listed.
    let context = unsafe {
        (api.create_context)(
            ptr::null(),
            1,
            &raw const handle,
            ptr::null(),
            ptr::null_mut(),
            &raw mut code,
        )
    };
    check("clCreateContext", code)?;
    // SAFETY: the context was made for the device.
    let queue = unsafe { (api.create_queue)(context, handle, 0, &raw mut code) };
    check("clCreateCommandQueue", code)?;
    let small = |what| number(api, handle, what).map(|value| value.min(i32::MAX as u64) as u32);
    let facts = Facts {
        runtime: Runtime::OpenCl,
        ordinal,
        name: text(api, handle, sys::DEVICE_NAME)?,
        architecture: text(api, handle, sys::DEVICE_VERSION)?,
        capability: 0,
        multiprocessors: small(sys::DEVICE_MAX_COMPUTE_UNITS)?,
        max_shared_bytes: small(sys::DEVICE_LOCAL_MEM_SIZE)?,
        parameter_bytes: small(sys::DEVICE_MAX_PARAMETER_SIZE)? as usize,
    };
    let rounds = number(api, handle, sys::DEVICE_SINGLE_FP_CONFIG)?;
    let driver = OpenCl {
        api,
        device: handle,
        context,
        queue,
        max_threads: number(api, handle, sys::DEVICE_MAX_WORK_GROUP_SIZE)? as usize,
        rounds_division: rounds & sys::FP_CORRECTLY_ROUNDED_DIVIDE_SQRT != 0,
        architecture: facts.architecture.clone(),
        allocations: Mutex::new(BTreeSet::new()),
    };
    Ok(Device::new(facts, Box::new(driver)))
}

struct OpenCl {
    api: &'static Api,
    device: Handle,
    context: Handle,
    /// The one that a null stream stands for.
    queue: Handle,
    max_threads: usize,
    rounds_division: bool,
    architecture: String,
    /// What is allocated, for kernels that find addresses in tables. Also the lock under which
    /// the arguments of a kernel are set and used: they are part of the kernel object.
    allocations: Mutex<BTreeSet<u64>>,
}

// SAFETY: OpenCL's functions may be called from any thread, except that a kernel's arguments are
// set by one at a time: that is done under `allocations`.
unsafe impl Send for OpenCl {}
// SAFETY: as above.
unsafe impl Sync for OpenCl {}

impl OpenCl {
    fn queue(&self, stream: *mut c_void) -> Handle {
        if stream.is_null() { self.queue } else { stream }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.allocations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn options(&self, source: &Source) -> &'static CStr {
        // FP_CONTRACT is off in port.h, and subnormal numbers are kept unless asked otherwise.
        if source.exact && self.rounds_division {
            c"-cl-std=CL1.2 -cl-fp32-correctly-rounded-divide-sqrt"
        } else {
            c"-cl-std=CL1.2"
        }
    }

    fn build_log(&self, program: Handle) -> String {
        let mut length = 0;
        let which = sys::PROGRAM_BUILD_LOG;
        // SAFETY: the program was built for this device; only the length is asked for.
        let code = unsafe {
            (self.api.get_build_info)(
                program,
                self.device,
                which,
                0,
                ptr::null_mut(),
                &raw mut length,
            )
        };
        let mut log = vec![0u8; if code == SUCCESS { length } else { 0 }];
        let to = log.as_mut_ptr().cast();
        // SAFETY: there is room for as many bytes as are announced. A failure leaves it empty.
        unsafe {
            (self.api.get_build_info)(program, self.device, which, log.len(), to, ptr::null_mut())
        };
        trimmed(&log)
    }

    /// Lets a kernel reach every allocation, as those whose arguments hold addresses need.
    fn reach(&self, function: Function, allocations: &BTreeSet<u64>) -> Result<()> {
        let all: Vec<u64> = allocations.iter().copied().collect();
        if all.is_empty() {
            return Ok(());
        }
        // SAFETY: a kernel of this device; the addresses are those of live allocations.
        let code = unsafe {
            (self.api.set_exec_info)(
                function.0,
                sys::KERNEL_EXEC_INFO_SVM_PTRS,
                size_of_val(&*all),
                all.as_ptr().cast(),
            )
        };
        check("clSetKernelExecInfo", code)
    }
}

impl Driver for OpenCl {
    fn load(&self, source: &'static Source) -> Result<Module> {
        if source.cuda_only {
            return Err(Error::CudaOnly { source_name: source.name, runtime: Runtime::OpenCl });
        }
        let text = source.text()?;
        let (strings, lengths) = (text.as_ptr().cast(), text.len());
        let mut code = 0;
        // SAFETY: one string of the length given; OpenCL copies it.
        let program = unsafe {
            (self.api.create_program)(
                self.context,
                1,
                &raw const strings,
                &raw const lengths,
                &raw mut code,
            )
        };
        check("clCreateProgramWithSource", code)?;
        let options = self.options(source).as_ptr();
        // SAFETY: the program is of this device's context; without a callback the call waits.
        let code = unsafe {
            (self.api.build_program)(
                program,
                1,
                &raw const self.device,
                options,
                ptr::null(),
                ptr::null_mut(),
            )
        };
        if code != SUCCESS {
            let error = Error::Compile {
                compiler: "OpenCL".into(),
                source_name: source.name,
                architecture: self.architecture.clone(),
                log: format!("{}\n{}", sys::call("clBuildProgram", code), self.build_log(program)),
            };
            // SAFETY: the program was made above and nothing else knows it.
            unsafe { (self.api.release_program)(program) };
            return Err(error);
        }
        Ok(Module(program))
    }

    fn function(&self, module: Module, kernel: &CStr) -> Result<Function> {
        let mut code = 0;
        // SAFETY: the module is a program that `load` built.
        let function =
            unsafe { (self.api.create_kernel)(module.0, kernel.as_ptr(), &raw mut code) };
        check(&format!("clCreateKernel({})", kernel.to_string_lossy()), code)?;
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
        let unsupported = |what| Err(Error::Unsupported { runtime: Runtime::OpenCl, what });
        if grid.shared_bytes > 0 {
            return unsupported("give a kernel more shared memory than it declares");
        }
        if grid.threads as usize > self.max_threads {
            return unsupported("run groups that large");
        }
        let name = || kernel.to_string_lossy();
        let allocations = self.lock();
        for (place, arg) in (0..).zip(args) {
            let code = match arg {
                Arg::Bytes(_) => return unsupported("take structs by value"),
                Arg::Pointer(pointer) => {
                    let pointer = ptr::with_exposed_provenance(*pointer as usize);
                    // SAFETY: by the contract the argument is what the kernel takes.
                    unsafe { (self.api.set_pointer)(function.0, place, pointer) }
                }
                // SAFETY: as above; OpenCL copies the value.
                _ => unsafe {
                    (self.api.set_argument)(function.0, place, arg.size(), arg.address())
                },
            };
            if code != SUCCESS {
                return Err(sys::call(format!("clSetKernelArg({}, {place})", name()), code));
            }
        }
        self.reach(function, &allocations)?;
        let threads = [grid.threads as usize, 1, 1];
        let global: [usize; 3] = std::array::from_fn(|i| grid.groups[i] as usize * threads[i]);
        // SAFETY: the queue is of the kernel's context; all arguments are set; sizes are of three
        // dimensions.
        let code = unsafe {
            (self.api.enqueue)(
                self.queue(stream),
                function.0,
                3,
                ptr::null(),
                global.as_ptr(),
                threads.as_ptr(),
                0,
                ptr::null(),
                ptr::null_mut(),
            )
        };
        if code == SUCCESS {
            return Ok(());
        }
        Err(sys::call(format!("clEnqueueNDRangeKernel({})", name()), code))
    }

    fn create_stream(&self) -> Result<*mut c_void> {
        let mut code = 0;
        // SAFETY: the context was made for the device.
        let queue = unsafe { (self.api.create_queue)(self.context, self.device, 0, &raw mut code) };
        check("clCreateCommandQueue", code)?;
        Ok(queue)
    }

    unsafe fn synchronize(&self, stream: *mut c_void) -> Result<()> {
        // SAFETY: by the contract a queue of this device.
        check("clFinish", unsafe { (self.api.finish)(self.queue(stream)) })
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        let flags = sys::MEM_READ_WRITE | sys::MEM_SVM_FINE_GRAIN_BUFFER;
        // SAFETY: the device has this kind of memory: devices without it were left out.
        let pointer = unsafe { (self.api.allocate)(self.context, flags, bytes, 0) };
        if pointer.is_null() {
            const FAILURE: c_int = -4; // clSVMAlloc gives no number of its own
            return Err(sys::call(format!("clSVMAlloc({bytes} bytes)"), FAILURE));
        }
        let pointer = pointer.expose_provenance() as u64;
        self.lock().insert(pointer);
        Ok(pointer)
    }

    fn allocate_managed(&self, bytes: usize) -> Result<u64> {
        self.allocate(bytes) // all of it is shared
    }

    unsafe fn free(&self, pointer: u64) {
        self.lock().remove(&pointer);
        // SAFETY: by the contract it came from `allocate` and is out of use.
        unsafe {
            (self.api.free)(self.context, ptr::with_exposed_provenance_mut(pointer as usize));
        }
    }

    unsafe fn zero(&self, pointer: u64, bytes: usize) -> Result<()> {
        let (to, zero) = (ptr::with_exposed_provenance_mut(pointer as usize), 0u8);
        // SAFETY: by the contract the bytes are the caller's; the pattern is one byte long.
        let code = unsafe {
            (self.api.fill)(
                self.queue,
                to,
                (&raw const zero).cast(),
                1,
                bytes,
                0,
                ptr::null(),
                ptr::null_mut(),
            )
        };
        check("clEnqueueSVMMemFill", code)?;
        // SAFETY: null stands for the queue just used.
        unsafe { self.synchronize(ptr::null_mut()) }
    }

    unsafe fn upload(&self, stream: *mut c_void, from: &[u8], to: u64) -> Result<()> {
        let to = ptr::with_exposed_provenance_mut(to as usize);
        // SAFETY: by the contract both hold as many bytes; the call waits until they are copied.
        let code = unsafe {
            (self.api.copy)(
                self.queue(stream),
                sys::TRUE,
                to,
                from.as_ptr().cast(),
                from.len(),
                0,
                ptr::null(),
                ptr::null_mut(),
            )
        };
        check("clEnqueueSVMMemcpy", code)
    }

    unsafe fn download(&self, stream: *mut c_void, from: u64, to: &mut [u8]) -> Result<()> {
        let from = ptr::with_exposed_provenance(from as usize);
        // SAFETY: by the contract both hold as many bytes; the call waits until they are copied.
        let code = unsafe {
            (self.api.copy)(
                self.queue(stream),
                sys::TRUE,
                to.as_mut_ptr().cast(),
                from,
                to.len(),
                0,
                ptr::null(),
                ptr::null_mut(),
            )
        };
        check("clEnqueueSVMMemcpy", code)
    }

    unsafe fn prefetch(
        &self,
        _stream: *mut c_void,
        _pointer: u64,
        _bytes: usize,
        _to_device: bool,
    ) -> Result<()> {
        Ok(())
    }
}
