//! # halfbyte's extension for `PyTorch`
//!
//! Registers kernels with the dispatcher of `PyTorch` straight from Rust, through the C shim of the
//! stable ABI (torch 2.10 and newer), without a line of C++ and without linking against torch.
//!
//! - [`shim`]: the C functions of libtorch, bound at run time;
//! - [`tensor`], [`stack`]: owning handles, checked memory, arguments and results;
//! - [`error`]: how a failure becomes a Python exception;
//! - [`overlap`]: whether tensors share memory;
//! - [`threads`]: the ops on torch's own threads;
//! - [`ops`], [`int8`], [`experts`], [`optim`]: the ops;
//! - [`python`]: the few functions that `halfbyte._native` exports.

mod error;
mod experts;
mod int8;
mod ops;
mod optim;
mod overlap;
mod python;
mod shim;
mod stack;
mod tensor;
mod threads;

/// The extension module: only an export list.
#[pyo3::pymodule]
mod _native {
    #[pymodule_export]
    use crate::python::{
        abi_version, available_isas, bind, check_blocksize, check_quant_type, code4, dynamic_map,
        fp8_map, is_registered, isa, linear_map, normal_map, num_threads, prefer_huge_pages,
        register, take_error, version,
    };
}
