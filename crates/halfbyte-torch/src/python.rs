//! The functions that `halfbyte._native` exports. Described for Python in `_native.pyi`.

use crate::device::Device;
use crate::error::Error;
use crate::{error, experts, gpu, int8, int8_products, ops, optim, products, shim, weight};
use halfbyte::{Code4, code};
use pyo3::exceptions::{PyImportError, PyNotImplementedError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// Namespaces whose ops have their kernels.
static REGISTERED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

fn runtime(error: impl std::fmt::Display) -> PyErr {
    PyRuntimeError::new_err(error.to_string())
}

fn value(error: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// Binds to the libtorch that is loaded, of which `version` and the folder `libraries` are known.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // pyo3 hands a PathBuf over
pub(crate) fn bind(version: &str, libraries: PathBuf) -> PyResult<()> {
    let import_error = PyImportError::new_err::<String>;
    shim::bind(version, &libraries).map_err(import_error)?;
    halfbyte::isa::selected().map_err(|error| import_error(error.to_string()))?;
    Ok(())
}

/// True when [`register`] has run for the namespace.
#[pyfunction]
pub(crate) fn is_registered(namespace: &str) -> bool {
    REGISTERED.lock().unwrap_or_else(PoisonError::into_inner).contains(namespace)
}

/// Registers the kernels of every op under `namespace`, once: for the CPU, for CUDA (as which torch
/// knows ROCm too) and for XPU. No library of a GPU is loaded for that.
#[pyfunction]
pub(crate) fn register(namespace: &str) -> PyResult<()> {
    let mut registered = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
    if registered.contains(namespace) {
        return Ok(());
    }
    let name = CString::new(namespace).map_err(value)?;
    // One kernel serves every device: it looks where its first tensor is.
    let everywhere =
        [ops::OPS, products::OPS, int8::OPS, int8_products::OPS, experts::OPS, optim::OPS];
    for key in [c"CPU", c"CUDA", c"XPU"] {
        register_for(&name, key, &everywhere)?;
    }
    registered.insert(namespace.to_owned());
    Ok(())
}

fn register_for(namespace: &CStr, key: &CStr, tables: &[&[(&CStr, shim::Boxed)]]) -> PyResult<()> {
    let s = shim::shim();
    let mut library = std::ptr::null_mut();
    // SAFETY: the strings are NUL-terminated and copied by libtorch. `library` is never freed:
    // the kernels stay registered as long as the process lives.
    unsafe {
        let (name, file) = (namespace.as_ptr(), c"halfbyte-torch".as_ptr());
        shim::check((s.aoti_torch_library_init_impl)(
            name,
            key.as_ptr(),
            file,
            0,
            &raw mut library,
        ))
        .map_err(runtime)?;
        for (op, kernel) in tables.iter().copied().flatten() {
            shim::check((s.torch_library_impl)(library, op.as_ptr(), *kernel, shim::ABI_VERSION))
                .map_err(runtime)?;
        }
    }
    Ok(())
}

/// The reason of this thread's last failed op as an exception, once; `None` when there is none.
#[pyfunction]
pub(crate) fn take_error(py: Python<'_>) -> Option<Py<PyAny>> {
    error::take().map(|error| error.into_value(py).into_any())
}

/// Asks for huge pages under memory that is yet to be written to.
#[pyfunction]
pub(crate) fn prefer_huge_pages(address: usize, bytes: usize) {
    crate::tensor::prefer_huge_pages(address, bytes);
}

/// The version of this package.
#[pyfunction]
pub(crate) fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Major and minor version of the libtorch in use.
#[pyfunction]
pub(crate) fn abi_version() -> (u64, u64) {
    shim::torch_version()
}

/// The instruction set that kernels use.
#[pyfunction]
pub(crate) fn isa() -> PyResult<&'static str> {
    Ok(halfbyte::isa::selected().map_err(runtime)?.name())
}

/// The instruction sets of this machine, slowest first.
#[pyfunction]
pub(crate) fn available_isas() -> Vec<&'static str> {
    halfbyte::isa::available().into_iter().map(halfbyte::Isa::name).collect()
}

/// The number of threads that the last op used.
#[pyfunction]
pub(crate) fn num_threads() -> usize {
    halfbyte::threads::num_threads()
}

/// The 16 values of `"nf4"` or `"fp4"`, by index.
#[pyfunction]
pub(crate) fn code4(quant_type: &str) -> PyResult<Vec<f32>> {
    Ok(quant_type.parse::<Code4>().map_err(value)?.table().to_vec())
}

/// The 256 values of a dynamic-tree map.
#[pyfunction]
pub(crate) fn dynamic_map(
    signed: bool,
    max_exponent_bits: u32,
    total_bits: u32,
) -> PyResult<Vec<f32>> {
    map(code::dynamic_map(signed, max_exponent_bits, total_bits))
}

/// The 256 values of a linear map.
#[pyfunction]
pub(crate) fn linear_map(signed: bool, total_bits: u32, add_zero: bool) -> PyResult<Vec<f32>> {
    map(code::linear_map(signed, total_bits, add_zero))
}

/// The 256 values of a map of normal quantiles.
#[pyfunction]
pub(crate) fn normal_map(offset: f64, use_extra_value: bool) -> PyResult<Vec<f32>> {
    map(code::normal_map(offset, use_extra_value))
}

/// The 256 values of an 8-bit float.
#[pyfunction]
pub(crate) fn fp8_map(
    signed: bool,
    exponent_bits: u32,
    precision_bits: u32,
    total_bits: u32,
) -> PyResult<Vec<f32>> {
    map(code::fp8_map(signed, exponent_bits, precision_bits, total_bits))
}

fn map(values: halfbyte::Result<[f32; 256]>) -> PyResult<Vec<f32>> {
    Ok(values.map_err(value)?.to_vec())
}

/// Refuses what no block size is.
#[pyfunction]
pub(crate) fn check_blocksize(blocksize: i64) -> PyResult<()> {
    weight::block_size(blocksize).map(drop).map_err(value)
}

/// Refuses what no 4-bit type is called.
#[pyfunction]
pub(crate) fn check_quant_type(quant_type: &str) -> PyResult<()> {
    quant_type.parse::<Code4>().map(drop).map_err(value)
}

// ---- GPUs --------------------------------------------------------------------------------------

/// Why this thread's last call of a C symbol failed, once; `None` when it did not.
#[pyfunction]
pub(crate) fn take_symbol_error() -> Option<String> {
    gpu::take_symbol_error()
}

/// A `DLPack` capsule of a uint8 vector of `bytes` zeros in memory that the host and the GPU `index`
/// of `kind` (`"cuda"` or `"xpu"`) share by page. `NotImplementedError` where they share none.
#[pyfunction]
pub(crate) fn managed_zeros(
    py: Python<'_>,
    bytes: usize,
    kind: &str,
    index: i32,
) -> PyResult<Py<PyAny>> {
    gpu::managed::managed_zeros(py, bytes, gpu_device(kind, index)?).map_err(|error| match error {
        Error::Gpu(halfbyte_gpu::Error::Unsupported { .. }) => {
            PyNotImplementedError::new_err(error.to_string())
        }
        error => runtime(error),
    })
}

/// Whether the memory at an address came from [`managed_zeros`].
#[pyfunction]
pub(crate) fn is_managed(address: u64) -> bool {
    gpu::managed::is_managed(address)
}

/// Asks for the pages at an address of [`managed_zeros`] to be moved, in the order of the current
/// stream of that GPU.
#[pyfunction]
pub(crate) fn prefetch_managed(
    address: u64,
    kind: &str,
    index: i32,
    to_host: bool,
) -> PyResult<()> {
    gpu::managed::prefetch(address, gpu_device(kind, index)?, to_host).map_err(runtime)
}

/// Why the device of that number of `"cuda"`, `"rocm"` or `"xpu"` cannot be used; `None` when it can.
/// Opens the driver.
#[pyfunction]
pub(crate) fn gpu_error(runtime: &str, index: usize) -> PyResult<Option<String>> {
    let refusal = match runtime {
        "cuda" => halfbyte_gpu::cuda_refusal(index),
        "rocm" => halfbyte_gpu::rocm_refusal(index),
        "xpu" => halfbyte_gpu::xpu_device(index).err(),
        _ => {
            let message = format!("runtime must be cuda, rocm or xpu, got {runtime}");
            return Err(PyValueError::new_err(message));
        }
    };
    Ok(refusal.map(|error| error.to_string()))
}

/// What was looked for, found and refused, in the order in which back ends are considered: name,
/// whether it can be used, and a few lines of text for each. Opens every driver.
#[pyfunction]
pub(crate) fn gpu_report() -> Vec<(&'static str, bool, String)> {
    let reports = halfbyte_gpu::report();
    reports.iter().map(|r| (r.backend.name(), r.is_usable(), r.to_string())).collect()
}

/// A folder to look for NVRTC in, beside the usual ones. Nothing is opened now.
#[pyfunction]
pub(crate) fn add_library_folder(folder: PathBuf) {
    halfbyte_gpu::add_library_folder(folder);
}

fn gpu_device(kind: &str, index: i32) -> PyResult<Device> {
    Device::gpu(kind, index)
        .ok_or_else(|| PyValueError::new_err(format!("device must be cuda or xpu, got {kind}")))
}
