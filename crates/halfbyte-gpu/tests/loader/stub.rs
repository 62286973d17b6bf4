//! A driver in C that does nothing: contexts, capture, and what a launch costs.

use crate::child::REFUSED;
use crate::{Case, shared_library};
use halfbyte_gpu::{
    Arg, DeviceBuffer, Grid, ManagedBuffer, Packed, Result, Source, Stream, cuda_device,
    cuda_device_of,
};
use std::env;
use std::ffi::{CStr, c_char};
use std::path::Path;
use std::ptr;
use std::time::Instant;

/// Machine code that the stub does not look at (four bytes, packed).
static CODE: Source = Source::new("stub", "text", true, false, Packed::new(REFUSED, &[(80, 4)]));

/// The same many times: a source is loaded once.
static CODES: [Source; 32] =
    [const { Source::new("stub", "text", true, false, Packed::new(REFUSED, &[(80, 4)])) }; 32];

/// Functions of the driver in the order of their first use, and whether their failure is an error:
/// where it is not, there is nothing that a caller could do, or a later call reports it.
const CALLS: [(&CStr, bool); 22] = [
    (c"cuDeviceGet", true),
    (c"cuDeviceGetName", true),
    (c"cuDeviceGetAttribute", true),
    (c"cuDevicePrimaryCtxRetain", true),
    (c"cuCtxGetCurrent", true),
    (c"cuCtxPushCurrent_v2", true),
    (c"cuStreamCreate", true),
    (c"cuMemAlloc_v2", true),
    (c"cuMemcpyHtoDAsync_v2", true),
    (c"cuStreamSynchronize", true),
    (c"cuMemsetD8Async", true),
    (c"cuModuleLoadData", true),
    (c"cuModuleGetFunction", true),
    (c"cuFuncGetAttribute", false),
    (c"cuFuncSetAttribute", false),
    (c"cuLaunchKernel", true),
    (c"cuStreamIsCapturing", true),
    (c"cuMemcpyDtoHAsync_v2", true),
    (c"cuMemAllocManaged", true),
    (c"cuMemPrefetchAsync", true),
    (c"cuMemFree_v2", false),
    (c"cuPointerGetAttribute", true),
];

#[test]
fn each_function_that_fails_is_named_and_the_next_call_works() {
    let case = Case::new("failing stub");
    let library = case.folder.join("stub.so");
    shared_library(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/loader/stub.c"), &library);
    case.set("HALFBYTE_CUDA_DRIVER", library).says(&["failing stub: ok"]);
}

/// In a process of its own: everything that the driver is asked for, each time with another
/// function that fails, and once more without.
pub(super) fn failing_child() {
    let path = env::var_os("HALFBYTE_CUDA_DRIVER").unwrap();
    // SAFETY: the stub has no initializers.
    let stub = unsafe { libloading::Library::new(path) }.unwrap();
    // SAFETY: the functions have these types in stub.c, and no requirements.
    let (fail, current, mode) = unsafe {
        (
            stub.get::<unsafe extern "C" fn(*const c_char)>("stub_fail").unwrap(),
            stub.get::<unsafe extern "C" fn() -> usize>("stub_current").unwrap(),
            stub.get::<unsafe extern "C" fn() -> i32>("stub_mode").unwrap(),
        )
    };
    for (source, (function, is_error)) in CODES.iter().zip(CALLS) {
        let name = function.to_str().unwrap();
        // SAFETY: the stub keeps the address of a constant.
        unsafe { fail(function.as_ptr()) };
        let result = everything(source);
        // SAFETY: null is for none.
        unsafe { fail(ptr::null()) };
        match result {
            Ok(()) => assert!(!is_error, "{name} failed, and nobody said so"),
            Err(error) => {
                let (error, name) = (error.to_string(), name.trim_end_matches("_v2"));
                assert!(is_error && error.starts_with(name), "{name}: {error}");
                assert!(error.contains(" failed with an error without a name (999)"), "{error}");
            }
        }
        // SAFETY: both only answer.
        assert_eq!(unsafe { (current(), mode()) }, (0, 0), "after {name} failed");
        // The first four are called until the device is made, and never again.
        if name.starts_with("cuDevice") && name != "cuDevicePrimaryCtxRetain" {
            continue;
        }
        everything(source).unwrap_or_else(|error| panic!("after {name} failed: {error}"));
    }
    // A capture mode that cannot be changed is left as it is, and loading says why it fails.
    // SAFETY: as above.
    unsafe { fail(c"cuThreadExchangeStreamCaptureMode".as_ptr()) };
    let error = everything(&CODE).unwrap_err().to_string();
    // SAFETY: as above.
    unsafe { fail(ptr::null()) };
    assert!(error.contains("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED (900)"), "{error}");
    everything(&CODE).unwrap();
    println!("failing stub: ok");
}

fn everything(source: &'static Source) -> Result<()> {
    let device = cuda_device(0)?;
    let stream = Stream::new(device)?;
    let buffer = DeviceBuffer::from_slice(&stream, &[1u8, 2, 3])?;
    assert_eq!(DeviceBuffer::<u8>::zeroed(device, 2)?.to_vec(&stream)?, [0, 0]);
    stream.launch(source, c"kernel", Grid::new(1, 32), &[buffer.slice().into()])?;
    stream.is_capturing()?;
    assert_eq!(buffer.to_vec(&stream)?, [1, 2, 3]);
    let managed = ManagedBuffer::zeroed(device, 64)?;
    // Every stream of the stub is being captured, but for the default one: no prefetch there.
    // SAFETY: null is the default stream.
    managed.prefetch_to_device(&unsafe { Stream::from_raw(device, ptr::null_mut()) })?;
    stream.synchronize()?;
    cuda_device_of(buffer.slice().pointer())?;
    Ok(())
}

#[test]
fn contexts_and_capture_modes_are_put_back_and_a_launch_is_quick() {
    let case = Case::new("stub");
    let library = case.folder.join("stub.so");
    shared_library(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/loader/stub.c"), &library);
    let output = case.set("HALFBYTE_CUDA_DRIVER", library).says(&["stub: ok"]);
    println!("{output}");
}

/// In a process of its own, with the stub as the driver.
pub(super) fn child() {
    let path = env::var_os("HALFBYTE_CUDA_DRIVER").unwrap();
    // SAFETY: the stub has no initializers.
    let stub = unsafe { libloading::Library::new(path) }.unwrap();
    // SAFETY: the three functions have these types in stub.c, and no requirements.
    let (current, set_current, mode) = unsafe {
        (
            stub.get::<unsafe extern "C" fn() -> usize>("stub_current").unwrap(),
            stub.get::<unsafe extern "C" fn(i32)>("stub_set_current").unwrap(),
            stub.get::<unsafe extern "C" fn() -> i32>("stub_mode").unwrap(),
        )
    };
    // SAFETY: as above.
    let state = || unsafe { (current(), mode()) };

    // Whatever is current, also nothing: it is current again after each call.
    for before in [-1, 0] {
        // SAFETY: as above.
        unsafe { set_current(before) };
        let (context, _) = state();
        for ordinal in [0, 1] {
            if before == 0 && ordinal == 1 {
                continue; // the stub's stack is one deep
            }
            let stream = Stream::new(cuda_device(ordinal).unwrap()).unwrap();
            // The stub loads modules in the relaxed mode only.
            stream.launch(&CODE, c"kernel", Grid::new(1, 32), &[]).unwrap();
            assert!(stream.is_capturing().unwrap());
            let buffer = DeviceBuffer::from_slice(&stream, &[1u8, 2, 3]).unwrap();
            assert_eq!(buffer.to_vec(&stream).unwrap(), [1, 2, 3]);
            drop(buffer);
            assert_eq!(state(), (context, 0), "device {ordinal} with {before} current before");
        }
    }

    // SAFETY: as above.
    unsafe { set_current(0) };
    let device = cuda_device(0).unwrap();
    let stream = Stream::new(device).unwrap();
    let args = [Arg::Pointer(1), Arg::Pointer(2), Arg::U64(3), Arg::U32(4), Arg::F32(5.0)];
    let (batches, launches) = (20, 10_000);
    let once = || {
        let device = cuda_device(0).unwrap();
        // SAFETY: the stub looks at no stream.
        let stream = unsafe { Stream::from_raw(device, stream.raw()) };
        stream.launch(&CODE, c"quantize_4bit_nf4_bfloat16", Grid::new(7, 256), &args).unwrap();
    };
    once();
    // The quickest of many batches: what the machine does beside is not the question.
    let time = |_| {
        let start = Instant::now();
        (0..launches).for_each(|_| once());
        start.elapsed().as_nanos() / launches
    };
    let nanoseconds = (0..batches).map(time).min().unwrap();
    println!("a launch costs {nanoseconds} ns beside the driver");
    assert!(nanoseconds < 1000, "{nanoseconds} ns");
    println!("stub: ok");
}
