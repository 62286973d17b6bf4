//! A driver in C that does nothing: contexts, capture, and what a launch costs.

use crate::{Case, shared_library};
use halfbyte_gpu::{Arg, DeviceBuffer, Grid, Source, Stream, cuda_device};
use std::env;
use std::path::Path;
use std::time::Instant;

/// Machine code that the stub does not look at (four bytes, deflated as one stored block).
static CODE: Source =
    Source::new("stub", "text", true, false, &[(80, b"\x01\x04\x00\xfb\xffXXXX")]);

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
