//! ROCm, by the emulator under HIP's names.

use crate::Case;

/// No CUDA driver; the emulator is the HIP runtime and hiprtc.
fn rocm(action: &str) -> Case {
    let emulator = halfbyte_gpu_emulator::path();
    Case::new(action).set("HALFBYTE_HIP", emulator).set("HALFBYTE_HIPRTC", emulator)
}

#[test]
fn rocm_follows_cuda_in_the_chain() {
    rocm("choose").says(&["chosen: ROCm"]);
    rocm("rocm").says(&["ROCm: ok"]);
    rocm("report").says(&["ROCm: usable", "HIP 6.0", "(gfx90a", "hiprtc 6.0"]);
}

#[test]
fn kernels_that_only_cuda_has_are_refused_by_name() {
    rocm("rocm cuda-only").says(&["kernels of tiles are written for CUDA only, got a ROCm device"]);
}

#[test]
fn failing_calls_are_named() {
    let cases = [
        (
            "hipGetDeviceCount=100",
            "hipGetDeviceCount failed with hipErrorNoDevice (100): no ROCm-capable device",
        ),
        ("hipGetDevice=999", "hipGetDevice failed with hipErrorUnknown (999)"),
        (
            "hipModuleLaunchKernel=700",
            "hipModuleLaunchKernel(quantize_4bit_nf4_f32) failed with hipErrorUnknown (700)",
        ),
        ("hiprtcCompileProgram=6", "hiprtc 6.0 could not compile quantize_4bit for gfx90a"),
    ];
    for (fail, message) in cases {
        rocm("rocm").set("HALFBYTE_EMULATOR_FAIL", fail).says(&[message]);
    }
}

#[test]
fn the_second_device_works_while_the_first_is_current() {
    let two = || rocm("rocm on 1").set("HALFBYTE_EMULATOR_DEVICES", "80,80");
    two().says(&["device 0: ok", "device 1: ok", "device 0: ok"]);
    two()
        .set("HALFBYTE_EMULATOR_FAIL", "hipSetDevice=999")
        .says(&["device 0: ok", "device 1: hipSetDevice(1) failed with hipErrorUnknown (999)"]);
}

#[test]
fn a_missing_compiler_is_named() {
    let case = rocm("rocm");
    let nowhere = case.folder.join("no-hiprtc.so");
    case.set("HALFBYTE_HIPRTC", nowhere)
        .says(&["no machine code of quantize_4bit for gfx90a", "hiprtc was not found, tried "]);
}
