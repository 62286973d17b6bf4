//! NVRTC, where it is and what it is asked for.

use crate::compiler::{self, Compiler};
use crate::error::{Error, Result};
use crate::library::{Candidate, Library};
use crate::module::Source;
use std::ffi::c_int;
use std::path::Path;
use std::sync::OnceLock;

#[cfg(not(windows))]
const NAMES_13: &[&str] = &["libnvrtc.so.13"];
#[cfg(not(windows))]
const NAMES_12: &[&str] = &["libnvrtc.so.12"];
#[cfg(windows)]
const NAMES_13: &[&str] = &["nvrtc64_130_0.dll"];
#[cfg(windows)]
const NAMES_12: &[&str] = &["nvrtc64_120_0.dll"];

/// Older ones take kernels with 4 KiB of arguments at most.
const OLDEST: (c_int, c_int) = (12, 1);

/// The compiler, opened on first use: the file `HALFBYTE_NVRTC` names, else one that the process
/// has loaded already (`import torch` does), else the system's, else one in a folder of
/// [`crate::add_library_folder`]. A driver of major version 12 is not given one of version 13,
/// whose machine code it does not load.
pub(super) fn compiler(driver_version: c_int) -> Result<&'static Compiler> {
    static COMPILER: OnceLock<Compiler> = OnceLock::new();
    if let Some(compiler) = COMPILER.get() {
        return Ok(compiler);
    }
    let driver_major = driver_version / 1000;
    let candidates = Candidate::from_env("HALFBYTE_NVRTC", || {
        let names: Vec<&str> =
            if driver_major >= 13 { [NAMES_13, NAMES_12].concat() } else { NAMES_12.to_vec() };
        let mut candidates: Vec<_> = names.iter().map(|name| Candidate::Mapped(name)).collect();
        candidates.extend(names.iter().map(|name| Candidate::name(name)));
        candidates.extend(Candidate::in_folders(&names));
        candidates
    });
    let library = Library::open("the run-time compiler NVRTC", &candidates)?;
    let compiler = Compiler::new(library, compiler::NVRTC, "NVRTC")?;
    let (major, minor) = compiler.version();
    if major > driver_major {
        return Err(Error::Version {
            library: "the CUDA driver",
            expected: format!("{major}.0 (that of {})", compiler.name()),
            got: super::version_text(driver_version),
        });
    }
    if (major, minor) < OLDEST {
        return Err(Error::Version {
            library: "the run-time compiler NVRTC",
            expected: format!("{}.{}", OLDEST.0, OLDEST.1),
            got: format!("{major}.{minor}"),
        });
    }
    load_builtins(compiler.path());
    Ok(COMPILER.get_or_init(|| compiler))
}

/// Opens the file that NVRTC opens by its name alone when it compiles, `libnvrtc-builtins.so.13.0` for
/// example. It finds one that is open already, and not every NVRTC says that it lies beside itself:
/// that of version 13.0.88 does not.
fn load_builtins(nvrtc: &Path) {
    let Some(Ok(files)) = nvrtc.parent().map(std::fs::read_dir) else { return };
    for file in files.flatten() {
        if file.file_name().to_string_lossy().starts_with("libnvrtc-builtins.so.") {
            // Never closed. One that cannot be opened is not needed, or the compiler says that it is.
            let _ = Library::open("a part of NVRTC", &[Candidate::Open(file.path())]);
        }
    }
}

/// The compiler, and the name of the architecture to compile for on a device of this capability;
/// else why there is none.
pub(super) fn compiler_for(
    driver_version: c_int,
    capability: u32,
) -> Result<(&'static Compiler, String), String> {
    let compiler = compiler(driver_version).map_err(|error| error.to_string())?;
    let architecture = architecture(compiler, capability)
        .ok_or_else(|| format!("{} cannot compile for it", compiler.name()))?;
    Ok((compiler, architecture))
}

/// The architecture to compile for, as NVRTC names it: the device's own, or the newest that NVRTC
/// knows and the device runs. On 9.0 it is `sm_90a`, with the instructions that only this
/// architecture has.
fn architecture(compiler: &Compiler, capability: u32) -> Option<String> {
    let known = compiler.architectures();
    let fits = |&&known: &&c_int| super::runs(known as u32, capability);
    let chosen =
        if known.is_empty() { capability } else { *known.iter().filter(fits).max()? as u32 };
    Some(if chosen == 90 { "sm_90a".to_owned() } else { format!("sm_{chosen}") })
}

/// Options for one source. `build.rs` compiles with the same.
pub(super) fn options(source: &Source, architecture: &str) -> Vec<String> {
    let mut options = vec![
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".to_owned(),
        "-default-device".to_owned(),
    ];
    if source.exact {
        options.push("--fmad=false".to_owned());
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed::Packed;

    #[test]
    fn exact_sources_are_compiled_without_contraction() {
        static EXACT: Source = Source::new("x", "", true, false, Packed::NONE);
        static FAST: Source = Source::new("y", "", false, false, Packed::NONE);
        let contracted = |source| !options(source, "sm_80").contains(&"--fmad=false".to_owned());
        assert!(!contracted(&EXACT));
        assert!(contracted(&FAST));
        assert_eq!(options(&EXACT, "sm_90a")[0], "--gpu-architecture=sm_90a");
    }
}
