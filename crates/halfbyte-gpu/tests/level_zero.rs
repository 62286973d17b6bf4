//! Intel GPUs, on a stand-in for Level Zero, SYCL and ocloc (the emulator) that refuses what a
//! driver may refuse: every call is made, in order, with arguments that fit.

mod common;

use halfbyte::{BlockSize, Code4, NonFinite, bf16};
use halfbyte_gpu::{
    Arg, Backend, Device, DeviceBuffer, Error, Grid, ManagedBuffer, Runtime, Stream, ops, report,
    sources, xpu_device,
};
use std::env;
use std::ffi::{c_char, c_int, c_void};
use std::process::Command;
use std::sync::OnceLock;

/// Lets the emulator stand for Intel's libraries. Done before they are first opened.
fn set_up() {
    static DONE: OnceLock<()> = OnceLock::new();
    DONE.get_or_init(|| {
        common::set_up();
        for variable in ["HALFBYTE_LEVEL_ZERO", "HALFBYTE_SYCL", "HALFBYTE_OCLOC"] {
            if env::var_os(variable).is_none() {
                // SAFETY: every test calls this before anything else, and the first caller is
                // alone in here: no other thread reads the environment through C yet.
                unsafe { env::set_var(variable, halfbyte_gpu_emulator::path()) };
            }
        }
    });
}

fn device() -> &'static Device {
    set_up();
    xpu_device(0).unwrap_or_else(|error| panic!("{error}"))
}

/// A `sycl::queue` of the emulator's.
struct Queue(*mut c_void);

/// The emulator's library, for what only tests ask it for.
fn emulator() -> &'static libloading::Library {
    static EMULATOR: OnceLock<libloading::Library> = OnceLock::new();
    EMULATOR.get_or_init(|| {
        // SAFETY: the emulator's initializers have no requirements.
        unsafe { libloading::Library::new(halfbyte_gpu_emulator::path()) }.expect("it is built")
    })
}

impl Queue {
    const LEVEL_ZERO: c_char = 2;
    const OPENCL: c_char = 1;

    fn new(backend: c_char, immediate: bool) -> Self {
        // SAFETY: the signature is that of level_zero.cpp.
        let make = unsafe {
            emulator().get::<unsafe extern "C" fn(c_char, c_int) -> *mut c_void>(
                b"halfbyte_emulated_sycl_queue",
            )
        };
        // SAFETY: the function takes any values.
        Self(unsafe { make.expect("the emulator has it")(backend, immediate.into()) })
    }

    fn waits(&self) -> c_int {
        // SAFETY: the signature is that of level_zero.cpp.
        let waits = unsafe {
            emulator().get::<unsafe extern "C" fn(*const c_void) -> c_int>(
                b"halfbyte_emulated_sycl_waits",
            )
        };
        // SAFETY: the queue was made by the emulator and is never destroyed.
        unsafe { waits.expect("the emulator has it")(self.0) }
    }

    fn stream(&self) -> Stream {
        // SAFETY: the queue stands for a live sycl::queue of the device.
        unsafe { Stream::from_raw(device(), self.0) }
    }
}

/// Quantizes on `stream` and compares with the core.
fn quantize(stream: &Stream) {
    let values: Vec<bf16> = (0..1000).map(|i| bf16::from_f32((i as f32).sin())).collect();
    let (blocksize, rule) = (BlockSize::B64, NonFinite::Propagate);
    let (mut packed, mut absmax) = (vec![0; 500], vec![0.0; 16]);
    let code = Code4::Nf4;
    halfbyte::quantize_4bit(&values, code, blocksize, rule, &mut packed, &mut absmax).unwrap();
    let x = DeviceBuffer::from_slice(stream, &values).unwrap();
    let q = DeviceBuffer::<u8>::zeroed(stream.device(), 500).unwrap();
    let scales = DeviceBuffer::<f32>::zeroed(stream.device(), 16).unwrap();
    let floats = x.slice().into();
    ops::quantize_4bit(stream, floats, code, blocksize, q.slice(), scales.slice()).unwrap();
    assert_eq!(q.to_vec(stream).unwrap(), packed);
    assert_eq!(scales.to_vec(stream).unwrap(), absmax);
}

#[test]
fn the_device_is_the_one_that_is_not_integrated() {
    let device = device();
    assert_eq!(device.runtime(), Runtime::Xpu);
    assert_eq!(device.name(), "halfbyte emulator e20b");
    assert_eq!(device.architecture(), "PCI 8086:e20b");
    assert_eq!((device.multiprocessors(), device.max_shared_bytes()), (20, 64 << 10));
    assert_eq!((device.parameter_bytes(), device.capability()), (2048, 0));
    let error = xpu_device(1).unwrap_err();
    assert!(matches!(error, Error::Ordinal { got: 1, count: 1, .. }), "{error}");
}

#[test]
fn streams_of_ours_quantize() {
    quantize(&Stream::new(device()).unwrap());
    // SAFETY: null is the device's default stream.
    quantize(&unsafe { Stream::from_raw(device(), std::ptr::null_mut()) });
}

/// What SYCL sets when its queues are in-order command lists.
const IN_ORDER: &str = "SYCL_UR_USE_LEVEL_ZERO_V2";

/// An upload, a launch and two downloads: each waits for the queue, except that a launch does not
/// where the queue is known to be in order.
#[test]
fn queues_of_sycl_quantize() {
    let in_order = env::var(IN_ORDER).is_ok_and(|value| value == "1");
    for immediate in [true, false] {
        let queue = Queue::new(Queue::LEVEL_ZERO, immediate);
        quantize(&queue.stream());
        assert_eq!(queue.waits(), if in_order && immediate { 3 } else { 4 });
        let before = queue.waits();
        queue.stream().synchronize().unwrap();
        assert_eq!(queue.waits(), before + 1);
    }
}

#[test]
fn queues_of_sycl_that_are_in_order_quantize() {
    run("queues_of_sycl_quantize", &[(IN_ORDER, "1")]);
}

/// Runs one of these tests in a process of its own, as libraries stay for a process's life.
fn run(test: &str, variables: &[(&str, &str)]) {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture"]).envs(variables.iter().copied());
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{variables:?}: {said}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{variables:?}");
}

#[test]
fn a_queue_of_another_backend_is_refused() {
    let queue = Queue::new(Queue::OPENCL, true);
    let error = DeviceBuffer::from_slice(&queue.stream(), &[1u8]).unwrap_err().to_string();
    assert_eq!(error, "XPU cannot use a sycl::queue of another backend than level_zero");
}

#[test]
fn shared_memory_is_the_hosts_too() {
    let stream = Stream::new(device()).unwrap();
    let buffer = ManagedBuffer::zeroed(device(), 4096).unwrap();
    buffer.prefetch_to_device(&stream).unwrap();
    buffer.prefetch_to_host(&stream).unwrap();
    // SAFETY: 4096 bytes that no launch uses.
    let bytes = unsafe { std::slice::from_raw_parts(buffer.pointer() as *const u8, 4096) };
    assert_eq!(bytes, [0; 4096]);
}

#[test]
fn what_does_not_fit_is_refused_with_the_call() {
    let stream = Stream::new(device()).unwrap();
    let launch = |kernel, grid, args: &[Arg<'_>]| {
        stream.launch(&sources::QUANTIZE_4BIT, kernel, grid, args).unwrap_err().to_string()
    };
    let error = launch(c"no_such_kernel", Grid::new(1, 256), &[]);
    assert!(error.contains("zeKernelCreate(no_such_kernel)"), "{error}");
    assert!(error.contains("ZE_RESULT_ERROR_INVALID_KERNEL_NAME"), "{error}");
    let name = c"quantize_4bit_nf4_f32";
    let error = launch(name, Grid::new(1, 256).shared(16), &[]);
    assert_eq!(error, "XPU cannot give a kernel more shared memory than it declares");
    let error = launch(name, Grid::new(1, 256), &[Arg::Bytes(&[0; 8])]);
    assert_eq!(error, "XPU cannot take structs by value");
    let error = launch(name, Grid::new(1, 256), &[Arg::U32(0)]);
    assert!(error.contains("zeKernelSetArgumentValue(quantize_4bit_nf4_f32, 0)"), "{error}");
    assert!(error.contains("ZE_RESULT_ERROR_INVALID_KERNEL_ARGUMENT_SIZE"), "{error}");
    let matmul = sources::ALL.iter().find(|source| source.cuda_only).expect("one for CUDA only");
    let error = stream.launch(matmul, c"any", Grid::new(1, 32), &[]).unwrap_err();
    assert!(matches!(error, Error::CudaOnly { .. }), "{error}");
}

/// What this process says about Intel GPUs; with a sentence in `HALFBYTE_TEST_EXPECT`, that it says
/// that (see below), and with `HALFBYTE_TEST_LAUNCH`, that a launch says it.
#[test]
fn the_report_says_why() {
    set_up();
    let report = report().into_iter().find(|one| one.backend == Backend::Xpu).unwrap();
    let Ok(expected) = env::var("HALFBYTE_TEST_EXPECT") else {
        assert!(report.is_usable(), "{report}");
        assert!(report.to_string().contains("(Level Zero 1.6)"), "{report}");
        assert!(report.kernels.contains("SPIR-V"), "{report}");
        return;
    };
    let said = if env::var_os("HALFBYTE_TEST_LAUNCH").is_some() {
        let stream = Stream::new(device()).unwrap();
        let launch = |kernel| {
            stream.launch(&sources::QUANTIZE_4BIT, kernel, Grid::new(1, 256), &[Arg::U32(0)])
        };
        launch(c"quantize_4bit_nf4_f32").unwrap_err().to_string()
    } else {
        assert!(!report.is_usable(), "{report}");
        report.to_string()
    };
    assert!(said.contains(&expected), "expected {expected:?} in: {said}");
}

#[test]
fn failures_are_sentences() {
    const LOADER: &str = "HALFBYTE_LEVEL_ZERO";
    const FAIL: &str = "HALFBYTE_EMULATOR_ZE_FAIL";
    let reports = [
        (LOADER, "/no/such/libze.so", "Level Zero's loader was not found, tried /no/such/libze.so"),
        (LOADER, "libc.so.6", "lacks the function zeInit: expected Level Zero 1.0"),
        (FAIL, "zeInit", "zeInit failed with ZE_RESULT_ERROR_UNINITIALIZED"),
        (FAIL, "zeDeviceGet", "zeDeviceGet failed with ZE_RESULT_ERROR_UNINITIALIZED"),
        (FAIL, "zeContextCreate", "zeContextCreate failed"),
        (FAIL, "spirv", "expected a device that takes SPIR-V"),
    ];
    for (variable, value, expected) in reports {
        run("the_report_says_why", &[("HALFBYTE_TEST_EXPECT", expected), (variable, value)]);
    }
    let mut launches = vec![(FAIL, "zeModuleCreate", "Level Zero could not compile quantize_4bit")];
    device();
    if report().iter().any(|one| one.kernels.starts_with("no SPIR-V in this build")) {
        let no = "this build has no SPIR-V; Intel's offline compiler was not found";
        launches.push(("HALFBYTE_OCLOC", "/no/such/ocloc.so", no));
        let refused =
            "could not compile quantize_4bit for spirv: status -43: the emulator was told";
        launches.push((FAIL, "oclocInvoke", refused));
    }
    for (variable, value, expected) in launches {
        let expect = ("HALFBYTE_TEST_EXPECT", expected);
        let launch = ("HALFBYTE_TEST_LAUNCH", "1");
        run("the_report_says_why", &[expect, launch, (variable, value)]);
    }
}
