//! # halfbyte's GPU back ends
//!
//! Kernels in one small C dialect (`kernels/`), launched from Rust on CUDA, ROCm (HIP) and Intel GPUs
//! (Level Zero). Drivers and compilers are opened at run time: nothing vendor-made is needed to
//! build, and a machine without a GPU, or with a broken driver, gets an [`Error`] that says what was
//! looked for and what was found.
//!
//! | on the CPU (`halfbyte`) | here |
//! |---|---|
//! | `&[T]`, `&mut [T]` | [`DeviceSlice`], or [`Floats`] when the dtype is known at run time only |
//! | a function call | a launch on a [`Stream`], done when the stream gets there |
//! | `Vec<T>` | [`DeviceBuffer`] |
//! | an instruction set, detected | a [`Device`] with its architecture |
//! | scratch on the stack | a `workspace` that the caller hands over |
//!
//! The ops in [`ops`] have the names and arguments of the core's. They neither allocate nor
//! synchronize, so that they may be captured in a CUDA graph; contexts and streams may belong to
//! `PyTorch` or candle ([`Stream::from_raw`]) or to this crate ([`Stream::new`]).

mod buffer;
mod cache;
mod chain;
mod compiler;
mod cuda;
mod device;
mod error;
mod hip;
mod launch;
mod level_zero;
mod library;
mod module;
mod native;
mod opencl;
pub mod ops;
mod packed;
mod slice;
pub mod sources;
mod stream;

pub use buffer::{DeviceBuffer, ManagedBuffer, Plain};
pub use chain::{Backend, BackendReport, DeviceReport, choose, report, selected};
pub use cuda::{cuda_device, cuda_device_of, cuda_refusal};
pub use device::{Device, Runtime};
pub use error::{Error, Result};
pub use hip::{rocm_device, rocm_refusal};
pub use launch::{Arg, Grid};
pub use level_zero::xpu_device;
pub use library::add_library_folder;
pub use module::Source;
pub use opencl::opencl_device;
pub use packed::Packed;
pub use slice::{DeviceSlice, Floats};
pub use stream::Stream;
