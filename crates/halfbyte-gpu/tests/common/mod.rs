//! What the tests of the GPU crate share: the devices at hand.
//!
//! Each test file is a program of its own that says `mod common;`.

#![allow(dead_code, reason = "no test file uses all of it")]

use halfbyte::DType;
use halfbyte_gpu::{Device, Runtime, Stream, cuda_device, opencl_device, rocm_device, xpu_device};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Compute capabilities of the emulated CUDA devices, in the order of their numbers.
pub(crate) const EMULATED: [u32; 3] = [75, 80, 90];

/// True when tests run on the GPUs of this machine (`HALFBYTE_TEST_GPU=1`) and nothing is emulated.
pub(crate) fn on_hardware() -> bool {
    env::var("HALFBYTE_TEST_GPU").is_ok_and(|value| value == "1")
}

/// All devices that kernels are tested on. Without `HALFBYTE_TEST_GPU=1`: emulated CUDA devices of
/// compute capability 7.5, 8.0 and 9.0, and the OpenCL device when there is one (where there is
/// none, that is said on the standard error). With it: every GPU of this machine that can be used;
/// there must be one.
pub(crate) fn devices() -> Vec<&'static Device> {
    let mut devices = cuda_devices();
    if on_hardware() {
        for open in [rocm_device, xpu_device] {
            devices.extend((0..).map_while(|ordinal| open(ordinal).ok()));
        }
        assert!(!devices.is_empty(), "HALFBYTE_TEST_GPU=1, but no GPU can be used");
    } else {
        devices.extend(opencl());
    }
    devices
}

/// The CUDA devices among [`devices`].
pub(crate) fn cuda_devices() -> Vec<&'static Device> {
    set_up();
    if on_hardware() {
        return (0..).map_while(|ordinal| cuda_device(ordinal).ok()).collect();
    }
    (0..EMULATED.len()).map(|n| cuda_device(n).expect("the emulator is always there")).collect()
}

/// One device per runtime: for what does not depend on the compute capability.
pub(crate) fn portable_devices() -> Vec<&'static Device> {
    let mut devices = devices();
    let newest = devices.iter().map(|device| device.capability()).filter(|&c| c <= 80).max();
    let mut taken = false;
    devices.retain(|device| {
        let wanted = device.capability() == 0 || Some(device.capability()) == newest && !taken;
        taken |= wanted && device.capability() != 0;
        wanted || on_hardware()
    });
    devices
}

/// Whether 4-bit products of `dtype` may take the way of tensor cores on `device`.
pub(crate) fn on_tensor_cores(device: &Device, dtype: DType) -> bool {
    let least = match dtype {
        DType::F16 => 75,
        DType::BF16 => 80,
        DType::F32 => return false,
    };
    device.runtime() == Runtime::Cuda && device.capability() >= least
}

/// A stream of ours on `device`.
pub(crate) fn stream(device: &'static Device) -> Stream {
    Stream::new(device).unwrap_or_else(|error| panic!("{device}: {error}"))
}

/// The OpenCL device, if there is a platform.
fn opencl() -> Option<&'static Device> {
    static OPENCL: OnceLock<Option<&'static Device>> = OnceLock::new();
    *OPENCL.get_or_init(|| {
        opencl_device(0).inspect_err(|error| eprintln!("not tested on OpenCL: {error}")).ok()
    })
}

/// Lets the emulator stand for the driver and the compiler. Done before either is first opened.
pub(crate) fn set_up() {
    static DONE: OnceLock<()> = OnceLock::new();
    DONE.get_or_init(|| {
        if on_hardware() {
            return;
        }
        let emulator = halfbyte_gpu_emulator::path();
        let devices = EMULATED.map(|capability| capability.to_string()).join(",");
        // SAFETY: every test calls this before anything else, and the first caller is alone in
        // here: no other thread reads the environment through C yet.
        unsafe {
            env::set_var("HALFBYTE_CUDA_DRIVER", emulator);
            env::set_var("HALFBYTE_NVRTC", emulator);
            env::set_var("HALFBYTE_EMULATOR_DEVICES", devices);
            env::set_var("HALFBYTE_CACHE_DIR", "");
            env::remove_var("HALFBYTE_BACKEND");
            // Groups run at the same time, on no more threads than every machine has.
            if env::var_os("POCL_MAX_PTHREAD_COUNT").is_none() {
                env::set_var("POCL_MAX_PTHREAD_COUNT", "2");
            }
            // Two accesses that nothing orders are named and end the process.
            if env::var_os("HALFBYTE_EMULATOR_RACES").is_none() {
                env::set_var("HALFBYTE_EMULATOR_RACES", "1");
            }
            if let (None, Some(pocl)) = (env::var_os("HALFBYTE_OPENCL"), pocl()) {
                env::set_var("HALFBYTE_OPENCL", pocl);
            }
        }
    });
}

/// PoCL of the Python package that `requirements/dev.txt` names, in the repository's environment.
fn pocl() -> Option<PathBuf> {
    let inside = |folder: PathBuf, prefix: &str| {
        let entries = fs::read_dir(folder).ok()?;
        let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.sort();
        paths.into_iter().find(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))
        })
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/lib");
    let packages = inside(root, "python3")?.join("site-packages");
    inside(packages.join("pyopencl/.libs"), "libpocl")
}
