//! The one error type of the crate. Every message says what was expected and what was got; what
//! a driver said stands in it with the driver's own name and words.

use crate::Runtime;
use halfbyte::DType;
use std::path::PathBuf;
use std::sync::Arc;

/// Result alias used throughout the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong. Each variant carries the facts; `Display` finishes the sentence.
///
/// Errors can be cloned: what a runtime answered when it was first opened is kept and repeated.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A buffer of the wrong length.
    #[error("{what} must hold {expected} elements, got {got}")]
    Length {
        /// Name of the buffer, for example `packed`.
        what: &'static str,
        /// Required length in elements.
        expected: usize,
        /// Actual length in elements.
        got: usize,
    },
    /// A buffer of the wrong element type.
    #[error("{what} must be of dtype {expected}, got {got}")]
    DType {
        /// Name of the buffer.
        what: &'static str,
        /// Required element type.
        expected: DType,
        /// Actual element type.
        got: DType,
    },
    /// An argument outside of what an op takes.
    #[error("{what} must be {expected}, got {got}")]
    Argument {
        /// Name of the argument.
        what: &'static str,
        /// What it must be.
        expected: String,
        /// What it was.
        got: String,
    },
    /// Arguments that the core refuses for the CPU too.
    #[error(transparent)]
    Core(Arc<halfbyte::Error>),
    /// A library that could not be opened.
    #[error("{library} was not found, tried {}", tried.join("; "))]
    Library {
        /// What the library is, for example `the CUDA driver`.
        library: &'static str,
        /// Each name or path that was tried, with the loader's answer.
        tried: Vec<String>,
    },
    /// A library without a function that every supported version has.
    #[error("{} ({library}) lacks the function {symbol}: expected {expected}", path.display())]
    Symbol {
        /// What the library should be.
        library: &'static str,
        /// The file.
        path: PathBuf,
        /// The missing function.
        symbol: &'static str,
        /// Which version is needed.
        expected: &'static str,
    },
    /// A driver older than what the kernels need.
    #[error("{library} is too old: expected version {expected} or newer, got {got}")]
    Version {
        /// What the library is.
        library: &'static str,
        /// The oldest supported version.
        expected: String,
        /// The version found.
        got: String,
    },
    /// A call that a driver or compiler refused.
    #[error("{}", describe_call(*.runtime, call, *.code, name, text))]
    Call {
        /// Whose call.
        runtime: Runtime,
        /// The function and what it was about, for example `cuLaunchKernel(quantize_4bit_f32)`.
        call: String,
        /// The number it returned.
        code: i32,
        /// The driver's name for that number; empty when it has none.
        name: String,
        /// The driver's text for that number; empty when it has none.
        text: String,
    },
    /// A device number that the runtime does not have.
    #[error("{runtime} device {got} does not exist: expected a number below {count}")]
    Ordinal {
        /// The runtime.
        runtime: Runtime,
        /// The number that was asked for.
        got: usize,
        /// Number of devices.
        count: usize,
    },
    /// A device that no kernel is made for.
    #[error(
        "{runtime} device {ordinal} ({name}) has architecture {architecture}, which has no \
         kernels: expected {expected}"
    )]
    Architecture {
        /// The runtime.
        runtime: Runtime,
        /// The device's number.
        ordinal: usize,
        /// The device's name.
        name: String,
        /// Its architecture, for example `sm_61`.
        architecture: String,
        /// What is supported.
        expected: &'static str,
    },
    /// A kernel that only another runtime has.
    #[error("kernels of {source_name} are written for CUDA only, got a {runtime} device")]
    CudaOnly {
        /// Name of the source.
        source_name: &'static str,
        /// The runtime that was asked to run it.
        runtime: Runtime,
    },
    /// A kernel that the run-time compiler refused.
    #[error("{compiler} could not compile {source_name} for {architecture}: {log}")]
    Compile {
        /// The compiler and its version, for example `NVRTC 13.2`.
        compiler: String,
        /// Name of the source.
        source_name: &'static str,
        /// The architecture it was compiled for.
        architecture: String,
        /// The compiler's log, or its error's name.
        log: String,
    },
    /// A part of this build that cannot be unpacked: the file that it is in has changed.
    #[error("the {what} of {source_name} in this build is damaged: install it again")]
    Damaged {
        /// What it is, for example `text`.
        what: &'static str,
        /// Name of the source.
        source_name: &'static str,
    },
    /// No way to obtain machine code for a kernel: each was tried.
    #[error(
        "no machine code of {source_name} for {architecture}: {}",
        reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    )]
    NoCode {
        /// Name of the source.
        source_name: &'static str,
        /// The device's architecture.
        architecture: String,
        /// Why each way failed: embedded machine code, then the run-time compiler.
        reasons: Vec<String>,
    },
    /// `HALFBYTE_BACKEND` names no back end.
    #[error("HALFBYTE_BACKEND must be one of cpu, cuda, rocm, xpu, got {got:?}")]
    Backend {
        /// The value of the variable.
        got: String,
    },
    /// `HALFBYTE_BACKEND` asks for another back end.
    #[error("HALFBYTE_BACKEND={selected} keeps {runtime} from being used")]
    Deselected {
        /// The value of the variable.
        selected: &'static str,
        /// The runtime that was asked for.
        runtime: Runtime,
    },
    /// Something that a runtime does not offer.
    #[error("{runtime} cannot {what}")]
    Unsupported {
        /// The runtime.
        runtime: Runtime,
        /// What was asked for, as a verb phrase.
        what: &'static str,
    },
}

impl From<halfbyte::Error> for Error {
    fn from(error: halfbyte::Error) -> Self {
        Self::Core(Arc::new(error))
    }
}

/// Checks a buffer's length at the door of an op.
pub(crate) fn check_len(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::Length { what, expected, got }) }
}

/// Checks a buffer's element type at the door of an op.
pub(crate) fn check_dtype(what: &'static str, expected: DType, got: DType) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::DType { what, expected, got }) }
}

fn describe_call(runtime: Runtime, call: &str, code: i32, name: &str, text: &str) -> String {
    let name = if name.is_empty() { "an error without a name" } else { name };
    let mut message = format!("{call} failed with {name} ({code})");
    if !text.is_empty() {
        message.push_str(": ");
        message.push_str(text);
    }
    if let Some(advice) = advice(runtime, code) {
        message.push_str(". ");
        message.push_str(advice);
    }
    message
}

/// What helps, for the failures that users meet. CUDA and HIP share most numbers.
fn advice(runtime: Runtime, code: i32) -> Option<&'static str> {
    if !matches!(runtime, Runtime::Cuda | Runtime::Rocm) {
        return None;
    }
    let common = match code {
        2 => {
            "The device's memory is full: a smaller batch helps, or freeing what PyTorch keeps \
             (torch.cuda.empty_cache())."
        }
        3 => {
            "A process forked after the first use of a GPU cannot use it: start workers with \
             \"spawn\"."
        }
        46 => "Another process holds the device exclusively.",
        209 => "The machine code does not fit the device: remove the kernel cache and try again.",
        700 => {
            "A kernel left its buffers, in this launch or an earlier one; the process cannot use \
             the device any more. CUDA_LAUNCH_BLOCKING=1 and compute-sanitizer show which."
        }
        716 => {
            "A kernel used a misaligned address, in this launch or an earlier one; \
             CUDA_LAUNCH_BLOCKING=1 shows which."
        }
        719 => {
            "A kernel failed, in this launch or an earlier one; CUDA_LAUNCH_BLOCKING=1 shows \
             which."
        }
        900..=908 => "A CUDA graph is being captured: run the op once before the capture starts.",
        _ => "",
    };
    let own = match (runtime, code) {
        (Runtime::Rocm, 100) => "No GPU is visible: see rocm-smi and HIP_VISIBLE_DEVICES.",
        (Runtime::Rocm, _) => "",
        (_, 35) => "The driver is older than the CUDA version it was asked for: update it.",
        (_, 100) => "No GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES.",
        (_, 802) => "The NVSwitch fabric is not up: see nvidia-fabricmanager.",
        (_, 803) => {
            "The kernel module and libcuda.so are of different versions: reboot after a driver \
             update, or mend the container's driver mount."
        }
        (_, 804) => {
            "The forward-compatibility libcuda does not support this GPU: use the system's."
        }
        (_, 999) => "The driver gave no reason; dmesg may name one.",
        _ => "",
    };
    [common, own].into_iter().find(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(runtime: Runtime, code: i32, name: &str, text: &str) -> String {
        let (call, name, text) = ("f".to_owned(), name.to_owned(), text.to_owned());
        Error::Call { runtime, call, code, name, text }.to_string()
    }

    #[test]
    fn a_failed_call_has_the_driver_s_words_and_advice_of_its_runtime() {
        assert_eq!(
            call(Runtime::Cuda, 46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "busy"),
            "f failed with CUDA_ERROR_DEVICE_UNAVAILABLE (46): busy. Another process holds the \
             device exclusively."
        );
        assert!(call(Runtime::Cuda, 100, "", "").contains("nvidia-smi"));
        assert!(call(Runtime::Rocm, 100, "", "").contains("rocm-smi"));
        assert_eq!(call(Runtime::Xpu, 700, "", ""), "f failed with an error without a name (700)");
        assert_eq!(call(Runtime::Cuda, 1, "X", ""), "f failed with X (1)");
    }

    #[test]
    fn every_message_says_what_was_expected_and_what_was_got() {
        let text = |error: Error| error.to_string();
        let length = Error::Length { what: "packed", expected: 32, got: 31 };
        assert_eq!(text(length), "packed must hold 32 elements, got 31");
        let dtype = Error::DType { what: "out", expected: DType::F32, got: DType::F16 };
        assert_eq!(text(dtype), "out must be of dtype float32, got float16");
        let core = Error::from(halfbyte::Error::BlockSize { got: 48 });
        assert!(text(core).ends_with("got 48"));
        let none = Error::Unsupported { runtime: Runtime::Xpu, what: "swim" };
        assert_eq!(text(none), "XPU cannot swim");
        let ordinal = Error::Ordinal { runtime: Runtime::Cuda, got: 3, count: 2 };
        assert_eq!(text(ordinal), "CUDA device 3 does not exist: expected a number below 2");
        let deselected = Error::Deselected { selected: "cpu", runtime: Runtime::Rocm };
        assert_eq!(text(deselected), "HALFBYTE_BACKEND=cpu keeps ROCm from being used");
    }
}
