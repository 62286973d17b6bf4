//! What a kernel can fail with, and how it reaches Python.
//!
//! The dispatcher knows one exception, `c10::Error`, which Python sees as `RuntimeError`. The
//! failure is therefore also kept per thread, with its kind, for the Python front functions: they
//! catch the `RuntimeError` and raise what [`take`] holds. Success costs nothing.

use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use std::cell::RefCell;
use std::ffi::{CStr, CString};

pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a kernel did not run to its end.
#[derive(Debug)]
pub(crate) enum Error {
    /// An argument of the right type with a value that does not fit: `ValueError`.
    Value(String),
    /// A tensor of a dtype that the op does not take: `TypeError`.
    Type(String),
    /// Something that is not the caller's argument's fault: `RuntimeError`.
    Torch(String),
    /// The device has no memory left: `torch.OutOfMemoryError`.
    Memory(String),
    /// The core crate refused.
    Core(halfbyte::Error),
    /// A launcher refused, or a driver.
    Gpu(halfbyte_gpu::Error),
    /// A bug of ours, kept from crossing into C++.
    Panic(String),
}

impl From<halfbyte::Error> for Error {
    fn from(error: halfbyte::Error) -> Self {
        Self::Core(error)
    }
}

impl From<halfbyte_gpu::Error> for Error {
    /// Lengths in the core's words: an op says the same on every device.
    fn from(error: halfbyte_gpu::Error) -> Self {
        match error {
            halfbyte_gpu::Error::Length { what: buffer, expected, got } => {
                let unit = match buffer {
                    "packed" => "bytes",
                    "absmax" | "absmax1" | "absmax2" => "float32 scales",
                    _ => "elements",
                };
                Self::Core(halfbyte::Error::Length { buffer, expected, got, unit })
            }
            error => Self::Gpu(error),
        }
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Value(message)
            | Self::Type(message)
            | Self::Torch(message)
            | Self::Memory(message) => f.write_str(message),
            Self::Core(error) => error.fmt(f),
            Self::Gpu(error) => error.fmt(f),
            Self::Panic(message) => write!(f, "internal error, please report it: {message}"),
        }
    }
}

/// The Python exception that a failure becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Value,
    Type,
    Memory,
    Runtime,
}

impl Error {
    fn kind(&self) -> Kind {
        use halfbyte_gpu::Error as Gpu;
        match self {
            Self::Value(_) | Self::Gpu(Gpu::Argument { .. }) => Kind::Value,
            Self::Type(_) | Self::Gpu(Gpu::DType { .. }) => Kind::Type,
            Self::Core(error) => of_core(error),
            Self::Gpu(Gpu::Core(error)) => of_core(error),
            Self::Memory(_) | Self::Gpu(Gpu::Call { code: OUT_OF_MEMORY, .. }) => Kind::Memory,
            Self::Torch(_) | Self::Panic(_) | Self::Gpu(_) => Kind::Runtime,
        }
    }
}

/// `CUDA_ERROR_OUT_OF_MEMORY`, `hipErrorOutOfMemory`.
const OUT_OF_MEMORY: i32 = 2;

fn of_core(error: &halfbyte::Error) -> Kind {
    use halfbyte::Error as Core;
    match error {
        Core::DTypeMismatch { .. } | Core::TensorDType { .. } => Kind::Type,
        Core::Isa { .. } | Core::Io { .. } => Kind::Runtime,
        _ => Kind::Value,
    }
}

struct Failure {
    kind: Kind,
    message: CString,
}

thread_local! {
    static LAST: RefCell<Option<Failure>> = const { RefCell::new(None) };
}

/// Keeps a failure of the op `name` for [`message`] and [`take`].
pub(crate) fn keep(name: &CStr, error: &Error) {
    let name = name.to_string_lossy();
    let op = name.split('.').next().unwrap_or_default(); // without the overload
    let message = format!("{op}: {error}").replace('\0', " ");
    let message = CString::new(message).unwrap_or_default(); // no NUL is left
    LAST.with(|last| *last.borrow_mut() = Some(Failure { kind: error.kind(), message }));
}

/// Calls `f` with the kept message, NUL-terminated. The pointer stays valid until the next
/// failure on this thread.
pub(crate) fn message() -> *const std::ffi::c_char {
    LAST.with(|last| {
        last.borrow().as_ref().map_or(c"unknown error".as_ptr(), |f| f.message.as_ptr())
    })
}

/// What PyTorch raises when a device has no memory left: training loops catch that type.
fn out_of_memory(message: String) -> PyErr {
    Python::attach(|py| {
        let raised = py
            .import("torch")
            .and_then(|torch| torch.getattr("OutOfMemoryError"))
            .and_then(|kind| kind.call1((&message,)));
        raised.map_or_else(|_| PyRuntimeError::new_err(message), PyErr::from_value)
    })
}

/// The kept failure of this thread as an exception, once.
pub(crate) fn take() -> Option<PyErr> {
    let failure = LAST.with(|last| last.borrow_mut().take())?;
    let message = failure.message.to_string_lossy().into_owned();
    Some(match failure.kind {
        Kind::Value => PyValueError::new_err(message),
        Kind::Type => PyTypeError::new_err(message),
        Kind::Memory => out_of_memory(message),
        Kind::Runtime => PyRuntimeError::new_err(message),
    })
}
