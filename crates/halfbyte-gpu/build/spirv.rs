//! Compiles portable kernels to SPIR-V when `SPIRV_CLANG` names a clang that can (LLVM 22 or newer, or
//! the command `zig clang` of the `PyPI` package ziglang). Without it Intel GPUs compile the text at
//! run time, for which users need Intel's `ocloc`.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The compiler and its first arguments, if there is one.
pub(crate) fn compiler() -> Option<Vec<String>> {
    println!("cargo::rerun-if-env-changed=SPIRV_CLANG");
    println!("cargo::rerun-if-changed=build");
    let command: Vec<String> =
        env::var("SPIRV_CLANG").ok()?.split_whitespace().map(str::to_owned).collect();
    (!command.is_empty()).then_some(command)
}

/// Compiles the expanded text in `file` and returns its SPIR-V.
///
/// The GPU's compiler optimizes again, so little is asked for here; but not every level works: with
/// `-O1` LLVM 22 makes code that spirv-val refuses of the optimizers, with `-O2` it gives up on 64 by
/// 64 bit products in `optim_norms`. Where spirv-val is at hand it decides.
pub(crate) fn compile(compiler: &[String], here: &Path, file: &Path) -> Vec<u8> {
    let out: PathBuf = file.with_extension("spv");
    let mut said = String::new();
    for level in ["-O2", "-O1"] {
        let mut command = Command::new(&compiler[0]);
        command.args(&compiler[1..]);
        command.args(["-target", "spirv64v1.2-unknown-unknown", "-x", "cl", "-cl-std=CL2.0"]);
        command.args(["-cl-no-stdinc", "-Xclang", "-fdeclare-opencl-builtins", "-include"]);
        command.arg(here.join("build/opencl.h")).args([level, "-c", "-o"]).arg(&out).arg(file);
        let done = command.output().unwrap_or_else(|error| {
            panic!("SPIRV_CLANG must name a clang for SPIR-V, got {compiler:?}: {error}")
        });
        said += &String::from_utf8_lossy(&done.stderr);
        if !done.status.success() {
            continue;
        }
        match Command::new("spirv-val").arg(&out).output() {
            Ok(checked) if !checked.status.success() => {
                said += &String::from_utf8_lossy(&checked.stdout);
                said += &String::from_utf8_lossy(&checked.stderr);
            }
            // Valid, or nobody here can tell.
            _ => {
                return std::fs::read(&out)
                    .unwrap_or_else(|error| panic!("{}: {error}", out.display()));
            }
        }
    }
    panic!("{compiler:?} makes no SPIR-V of {}:\n{said}", file.display())
}
