//! # halfbyte's extension for `PyTorch`
//!
//! Registers kernels with the dispatcher of `PyTorch` straight from Rust, through the C shim of the
//! stable ABI (torch 2.10 and newer), without a line of C++ and without linking against torch.
//!
//! - [`shim`]: the C functions of libtorch, bound at run time;
//! - [`tensor`], [`dtype`], [`device`], [`memory`], [`stack`]: owning handles, what is known of
//!   them, checked memory, arguments and results;
//! - [`error`]: how a failure becomes a Python exception;
//! - [`overlap`]: whether tensors share memory;
//! - [`threads`]: the ops on torch's own threads;
//! - [`ops`], [`products`] with [`weight`], [`int8`] with [`int8_products`],
//!   [`experts`], [`optim`] with [`optim_call`]: the ops;
//! - [`gpu`]: what they need on a GPU;
//! - [`python`]: the few functions that `halfbyte._native` exports.

mod device;
mod dtype;
mod error;
mod experts;
mod gpu;
mod int8;
mod int8_products;
mod memory;
mod ops;
mod optim;
mod optim_call;
mod overlap;
mod products;
mod python;
mod shim;
mod stack;
mod tensor;
mod threads;
mod weight;

/// The extension module: only an export list.
#[pyo3::pymodule]
mod _native {
    #[pymodule_export]
    use crate::python::{
        abi_version, add_library_folder, available_isas, bind, check_blocksize, check_quant_type,
        code4, dynamic_map, fp8_map, gpu_error, gpu_report, is_managed, is_registered, isa,
        linear_map, managed_zeros, normal_map, num_threads, prefer_huge_pages, prefetch_managed,
        register, take_error, take_symbol_error, version,
    };
}
