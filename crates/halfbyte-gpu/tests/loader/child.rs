//! What the process of a case does, and prints.

use halfbyte::{BlockSize, Code4, NonFinite};
use halfbyte_gpu::{
    Device, DeviceBuffer, Floats, Grid, Packed, Source, Stream, choose, cuda_device, ops, report,
    rocm_device, sources,
};
use std::env;
use std::fs;

/// Machine code that is none: `XXXX`, packed.
pub(crate) const REFUSED: &[u8] =
    b"\x5d\x00\x10\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\x00\x2c\x68\xbd\xff\xff\xff\xff\xe0\0\0\0";
/// What is not packed.
const DAMAGED: &[u8] = b"\xff\xff";

static WITH_REFUSED: Source =
    Source::new("quantize_4bit", "text", true, false, Packed::new(REFUSED, &[(80, 4)]));
static WITH_DAMAGED: Source =
    Source::new("quantize_4bit", "text", true, false, Packed::new(DAMAGED, &[(80, 4)]));
static WITH_OTHER: Source = Source::new(
    "quantize_4bit",
    "text",
    true,
    false,
    Packed::new(REFUSED, &[(75, 1), (86, 2), (90, 4)]),
);
static WITH_NONE: Source = Source::new("quantize_4bit", "text", true, false, Packed::NONE);
static CUDA_ONLY: Source = Source::new("tiles", "text", false, true, Packed::NONE);

#[test]
#[ignore = "a part of the other tests, each of which starts it in a process of its own"]
fn child() {
    match env::var("HALFBYTE_LOADER_CASE").expect("set by the test that starts this").as_str() {
        "nothing" => println!("mapped before first use: {}", is_mapped()),
        "report" => {
            for back_end in report() {
                println!("{back_end}");
            }
        }
        "choose" => match choose() {
            Ok(backend) => println!("chosen: {backend}"),
            Err(error) => println!("refused: {error}"),
        },
        "quantize" => say("CUDA", cuda_device(0).and_then(quantize)),
        "quantize on 1" => {
            say("device 0", cuda_device(0).and_then(quantize));
            say("device 1", cuda_device(1).and_then(quantize));
        }
        "quantize twice" => {
            for turn in ["first", "second"] {
                say(turn, cuda_device(0).and_then(quantize));
            }
        }
        "rocm" => say("ROCm", rocm_device(0).and_then(quantize)),
        "rocm on 1" => {
            for ordinal in [0, 1, 0] {
                say(&format!("device {ordinal}"), rocm_device(ordinal).and_then(quantize));
            }
        }
        "rocm cuda-only" => say("ROCm", rocm_device(0).and_then(|device| load(device, &CUDA_ONLY))),
        "refused code" => {
            say("CUDA", cuda_device(0).and_then(|device| load(device, &WITH_REFUSED)));
        }
        "damaged code" => {
            say("CUDA", cuda_device(0).and_then(|device| load(device, &WITH_DAMAGED)));
        }
        "no code" => say("CUDA", cuda_device(0).and_then(|device| load(device, &WITH_NONE))),
        "other code" => say("CUDA", cuda_device(0).and_then(|device| load(device, &WITH_OTHER))),
        "many threads" => many_threads(),
        "stub" => super::stub::child(),
        "failing stub" => super::stub::failing_child(),
        other => panic!("no such case: {other}"),
    }
    println!("CPU: {}", if cpu_works() { "ok" } else { "wrong" });
}

fn say(what: &str, result: halfbyte_gpu::Result<()>) {
    match result {
        Ok(()) => println!("{what}: ok"),
        Err(error) => println!("{what}: {error}"),
    }
}

fn input() -> Vec<f32> {
    (0..100).map(|i| (i as f32 * 0.37).sin()).collect()
}

fn cpu() -> Vec<u8> {
    let (mut packed, mut absmax) = (vec![0; 50], vec![0.0; 2]);
    halfbyte::quantize_4bit(
        &input(),
        Code4::Nf4,
        BlockSize::B64,
        NonFinite::Propagate,
        &mut packed,
        &mut absmax,
    )
    .expect("the CPU needs no GPU");
    packed
}

/// True when the CPU's kernels give what they must: 1 is code 15, -1 is code 0, 0 is code 7.
fn cpu_works() -> bool {
    let (mut packed, mut absmax) = ([0; 2], [0.0; 1]);
    let input = [1.0f32, -1.0, 0.0, 0.0];
    let (code, blocksize) = (Code4::Nf4, BlockSize::B64);
    halfbyte::quantize_4bit(&input, code, blocksize, NonFinite::Refuse, &mut packed, &mut absmax)
        .is_ok_and(|()| packed == [0xf0, 0x77] && absmax == [1.0])
}

/// Quantizes on a device and compares with the CPU.
pub(super) fn quantize(device: &'static Device) -> halfbyte_gpu::Result<()> {
    let stream = Stream::new(device)?;
    let x = DeviceBuffer::from_slice(&stream, &input())?;
    let packed = DeviceBuffer::<u8>::zeroed(device, 50)?;
    let absmax = DeviceBuffer::<f32>::zeroed(device, 2)?;
    let floats = Floats::from(x.slice());
    ops::quantize_4bit(
        &stream,
        floats,
        Code4::Nf4,
        BlockSize::B64,
        packed.slice(),
        absmax.slice(),
    )?;
    assert_eq!(packed.to_vec(&stream)?, cpu(), "{device}");
    Ok(())
}

/// Loads a source; its kernel has a name that does not exist, so that what is reported is the
/// first failure after loading.
fn load(device: &'static Device, source: &'static Source) -> halfbyte_gpu::Result<()> {
    Stream::new(device)?.launch(source, c"no_such_kernel", Grid::new(1, 32), &[])
}

fn many_threads() {
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| quantize(cuda_device(0).unwrap()).unwrap());
        }
    });
    println!("CUDA: ok");
}

/// True when the library that stands for the driver is in this process.
fn is_mapped() -> bool {
    assert!(!sources::ALL.is_empty());
    let maps = fs::read_to_string("/proc/self/maps").expect("Linux");
    maps.contains("libcuda_emulated")
}
