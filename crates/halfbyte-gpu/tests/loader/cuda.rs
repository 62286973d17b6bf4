//! The CUDA driver and NVRTC: missing, broken, old, failing.

use crate::{Case, shared_library};
use std::fs;

#[cfg(target_os = "linux")]
#[test]
fn no_library_is_opened_before_the_first_use() {
    Case::emulated("nothing").says(&["mapped before first use: false"]);
}

#[test]
fn a_missing_driver_is_named_with_what_was_tried() {
    let output = Case::new("report").says(&[
        "CUDA: not usable: the CUDA driver was not found, tried ",
        "no-such-library.so",
        "ROCm: not usable: the HIP runtime was not found",
        "CPU: usable",
    ]);
    assert!(!output.contains("found libcuda"), "{output}");
    Case::new("choose").says(&["chosen: CPU"]);
    Case::new("quantize").says(&["CUDA: the CUDA driver was not found, tried "]);
}

#[test]
fn a_file_that_is_no_library_is_refused() {
    let emulator = fs::read(halfbyte_gpu_emulator::path()).unwrap();
    let mut broken = emulator.clone();
    broken[16..4096].fill(0xFF); // past the magic number: headers without sense
    let contents: [&[u8]; 4] = [b"", b"not a library", &emulator[..2000], &broken];
    for content in contents {
        let case = Case::new("quantize");
        let path = case.file("driver.so", content);
        case.set("HALFBYTE_CUDA_DRIVER", path)
            .says(&["CUDA: the CUDA driver was not found, tried ", "driver.so"]);
    }
}

#[test]
fn a_library_without_a_driver_s_functions_is_refused_with_the_first_one_missing() {
    let case = Case::new("report");
    let source = case.file("empty.c", b"int nothing;");
    let library = case.folder.join("empty.so");
    shared_library(&source, &library);
    case.set("HALFBYTE_CUDA_DRIVER", library).says(&[
        "empty.so (the CUDA driver) lacks the function cuInit: expected CUDA 12.0 or newer",
        "found ",
    ]);
}

#[test]
fn an_old_driver_is_named_with_both_versions() {
    let too_old = "the CUDA driver is too old: expected version 12.0 or newer, got 11.4";
    let old = |action| Case::emulated(action).set("HALFBYTE_EMULATOR_DRIVER", "11040");
    old("report").says(&[too_old, "CUDA driver 11.4"]);
    old("quantize").says(&[too_old]);
    old("choose").says(&["chosen: CPU"]);
}

#[test]
fn a_driver_that_cannot_start_is_quoted_with_advice() {
    let cases = [
        (
            "100",
            "cuInit failed with CUDA_ERROR_NO_DEVICE (100): no CUDA-capable device",
            "CUDA_VISIBLE_DEVICES",
        ),
        ("999", "cuInit failed with CUDA_ERROR_UNKNOWN (999): unknown error", "dmesg"),
        ("803", "cuInit failed with CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803)", "reboot"),
        ("35", "cuInit failed with CUDA_ERROR_INSUFFICIENT_DRIVER (35)", "update it"),
        ("12345", "cuInit failed with an error without a name (12345)", ""),
    ];
    for (code, message, advice) in cases {
        let fail = format!("cuInit={code}");
        Case::emulated("report").set("HALFBYTE_EMULATOR_FAIL", &fail).says(&[message, advice]);
        Case::emulated("quantize").set("HALFBYTE_EMULATOR_FAIL", &fail).says(&[message, advice]);
    }
}

#[test]
fn a_driver_without_devices_is_not_used() {
    let none = |action| Case::emulated(action).set("HALFBYTE_EMULATOR_DEVICES", "none");
    none("report").says(&["CUDA: not usable: no devices"]);
    none("choose").says(&["chosen: CPU"]);
    none("quantize").says(&["CUDA device 0 does not exist: expected a number below 0"]);
}

#[test]
fn an_architecture_without_kernels_is_named_and_the_other_device_works() {
    let two = |action| Case::emulated(action).set("HALFBYTE_EMULATOR_DEVICES", "61,80");
    let refused = "has architecture sm_61, which has no kernels: expected compute capability 7.5";
    two("quantize on 1").says(&[refused, "device 1: ok"]);
    two("report").says(&["CUDA: usable", "(sm_61): CUDA device 0", refused, "(sm_80)"]);
    let old = |action| Case::emulated(action).set("HALFBYTE_EMULATOR_DEVICES", "61");
    old("report").says(&["CUDA: not usable: no device that has kernels", refused]);
    old("choose").says(&["chosen: CPU"]);
}

#[test]
fn two_devices_of_different_architectures_both_work() {
    Case::emulated("quantize on 1")
        .set("HALFBYTE_EMULATOR_DEVICES", "75,90")
        .says(&["device 0: ok", "device 1: ok"]);
}

#[test]
fn machine_code_that_the_driver_refuses_is_replaced_by_compiling() {
    // The name of the kernel is wrong on purpose: getting as far as that shows a loaded module.
    let loaded = "cuModuleGetFunction(no_such_kernel) failed with CUDA_ERROR_NOT_FOUND (500)";
    for action in ["refused code", "damaged code", "other code"] {
        let case = Case::emulated(action);
        let log = case.folder.join("log");
        let mut case = case.set("HALFBYTE_EMULATOR_LOG", &log);
        let output = case.command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains(loaded), "{action}: {text}");
        let log = fs::read_to_string(&log).unwrap();
        let options = " --gpu-architecture=sm_80 --std=c++17 -default-device --fmad=false";
        assert!(log.contains(&format!("nvrtcCompileProgram{options}")), "{action}: {log}");
    }
}

#[test]
fn without_machine_code_and_compiler_every_reason_is_told() {
    let without = |action| {
        let case = Case::emulated(action);
        let nowhere = case.folder.join("no-nvrtc.so");
        case.set("HALFBYTE_NVRTC", nowhere)
    };
    without("refused code").says(&[
        "no machine code of quantize_4bit for sm_80: that for sm_80 in this build was refused \
         (CUDA_ERROR_INVALID_IMAGE); the run-time compiler NVRTC was not found, tried ",
    ]);
    without("damaged code")
        .says(&["that for sm_80 in this build is damaged; the run-time compiler"]);
    without("other code").says(&["this build holds none for this architecture; the run-time"]);
    without("no code").says(&["this build holds none; the run-time compiler NVRTC was not found"]);
    without("report").says(&["the run-time compiler NVRTC was not found"]);
}

#[test]
fn an_architecture_that_nothing_makes_code_for_is_not_chosen() {
    // The emulated NVRTC compiles for anything, so there is none.
    let future = |action| {
        let case = Case::emulated(action).set("HALFBYTE_EMULATOR_DEVICES", "990");
        let nowhere = case.folder.join("no-nvrtc.so");
        case.set("HALFBYTE_NVRTC", nowhere)
    };
    let reason = "no machine code of any kernel for sm_990: this build holds none; the run-time";
    future("report").says(&["CUDA: not usable: no device that has kernels", reason]);
    future("choose").says(&["chosen: CPU"]);
}

#[test]
fn a_compiler_newer_than_the_driver_is_refused() {
    Case::emulated("other code").set("HALFBYTE_EMULATOR_DRIVER", "12080").says(&[
        "the CUDA driver is too old: expected version 13.0 (that of NVRTC 13.0) or newer, got 12.8",
    ]);
}

#[test]
fn a_compiler_that_takes_few_arguments_is_refused() {
    let old = || Case::emulated("no code").set("HALFBYTE_EMULATOR_NVRTC", "12000");
    old().says(&[
        "the run-time compiler NVRTC is too old: expected version 12.1 or newer, got 12.0",
    ]);
    let fits = old().set("HALFBYTE_EMULATOR_NVRTC", "12010");
    fits.says(&["cuModuleGetFunction(no_such_kernel)"]);
}

#[test]
fn a_failed_compilation_is_quoted_with_its_log() {
    Case::emulated("refused code")
        .set("HALFBYTE_EMULATOR_FAIL", "nvrtcCompileProgram=6")
        .says(&["NVRTC 13.0 could not compile quantize_4bit for sm_80: NVRTC_ERROR_COMPILATION\n\
         kernel.cu(1): error: the emulator was told to fail"]);
    Case::emulated("refused code").set("HALFBYTE_EMULATOR_FAIL", "nvrtcCreateProgram=11").says(&[
        "NVRTC 13.0 could not compile quantize_4bit for sm_80: NVRTC_ERROR_INTERNAL_ERROR",
    ]);
}

#[test]
fn failing_calls_are_named_with_what_they_were_about() {
    let cases = [
        (
            "cuModuleLoadData=209",
            "cuModuleLoadData(quantize_4bit) failed with CUDA_ERROR_NO_BINARY_FOR_GPU (209)",
            "cache",
        ),
        (
            "cuModuleGetFunction=500",
            "cuModuleGetFunction(quantize_4bit_nf4_f32) failed with CUDA_ERROR_NOT_FOUND (500)",
            "",
        ),
        (
            "cuLaunchKernel=700",
            "cuLaunchKernel(quantize_4bit_nf4_f32) failed with CUDA_ERROR_ILLEGAL_ADDRESS (700)",
            "compute-sanitizer",
        ),
        (
            "cuLaunchKernel=719",
            "cuLaunchKernel(quantize_4bit_nf4_f32) failed with CUDA_ERROR_LAUNCH_FAILED (719)",
            "CUDA_LAUNCH_BLOCKING",
        ),
        (
            "cuMemAlloc=2",
            "cuMemAlloc(400 bytes) failed with CUDA_ERROR_OUT_OF_MEMORY (2): out of memory",
            "smaller batch",
        ),
        (
            "cuDevicePrimaryCtxRetain=2",
            "cuDevicePrimaryCtxRetain(0) failed with CUDA_ERROR_OUT_OF_MEMORY (2)",
            "smaller batch",
        ),
        (
            "cuCtxPushCurrent=201",
            "cuCtxPushCurrent failed with CUDA_ERROR_INVALID_CONTEXT (201)",
            "",
        ),
        ("cuStreamCreate=2", "cuStreamCreate failed with CUDA_ERROR_OUT_OF_MEMORY (2)", ""),
        (
            "cuStreamSynchronize=700",
            "cuStreamSynchronize failed with CUDA_ERROR_ILLEGAL_ADDRESS (700)",
            "compute-sanitizer",
        ),
        (
            "cuDeviceGetCount=3",
            "cuDeviceGetCount failed with CUDA_ERROR_NOT_INITIALIZED (3)",
            "spawn",
        ),
        (
            "cuDeviceGetAttribute=101",
            "cuDeviceGetAttribute(75) failed with CUDA_ERROR_INVALID_DEVICE (101)",
            "",
        ),
        ("cuDriverGetVersion=999", "cuDriverGetVersion failed with CUDA_ERROR_UNKNOWN (999)", ""),
    ];
    for (fail, message, advice) in cases {
        Case::emulated("quantize")
            .set("HALFBYTE_EMULATOR_FAIL", fail)
            .says(&[&format!("CUDA: {message}"), advice]);
    }
}

#[test]
fn a_driver_that_works_works_from_many_threads() {
    Case::emulated("quantize").says(&["CUDA: ok"]);
    Case::emulated("many threads").says(&["CUDA: ok"]);
    Case::emulated("choose").says(&["chosen: CUDA"]);
    Case::emulated("report").says(&[
        "CUDA: usable",
        "libcuda_emulated.so, CUDA driver 13.0",
        "device 0: halfbyte emulator 0 (sm_80)",
        "NVRTC 13.0",
    ]);
}

#[test]
fn the_environment_chooses_the_back_end() {
    let set = |action, value| Case::emulated(action).set("HALFBYTE_BACKEND", value);
    set("choose", "cpu").says(&["chosen: CPU"]);
    set("quantize", "cpu").says(&["CUDA: HALFBYTE_BACKEND=cpu keeps CUDA from being used"]);
    set("report", "cpu").says(&["CUDA: not usable: HALFBYTE_BACKEND=cpu keeps CUDA"]);
    set("choose", "CUDA").says(&["chosen: CUDA"]);
    set("choose", "rocm").says(&["refused: the HIP runtime was not found"]);
    set("quantize", "rocm").says(&["HALFBYTE_BACKEND=rocm keeps CUDA from being used"]);
    let bad = "HALFBYTE_BACKEND must be one of cpu, cuda, rocm, xpu, got \"metal\"";
    set("choose", "metal").says(&[bad]);
    set("quantize", "metal").says(&[bad]);
    set("report", "metal").says(&[bad, "CPU: usable"]);
    set("quantize", "").says(&["CUDA: ok"]);
}

#[cfg(unix)]
#[test]
fn a_back_end_that_is_no_text_is_refused() {
    use std::os::unix::ffi::OsStrExt;
    let value = std::ffi::OsStr::from_bytes(b"cud\xff");
    let message = "HALFBYTE_BACKEND must be one of cpu, cuda, rocm, xpu, got \"cud";
    for action in ["choose", "quantize", "report"] {
        Case::emulated(action).set("HALFBYTE_BACKEND", value).says(&[message]);
    }
}
