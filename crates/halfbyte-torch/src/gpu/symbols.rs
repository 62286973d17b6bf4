//! The C symbols of upstream's library that clients call through ctypes, over device pointers.
//!
//! The device is the one that is current for torch on the calling thread, the stream is the
//! caller's (null is the legacy default stream). A symbol cannot raise: it returns 1 and leaves its
//! output alone, and `cextension.lib` raises what [`take_symbol_error`] holds.

use super::streams;
use crate::error::{Error, Result};
use halfbyte::{BlockSize, Code4, DType};
use halfbyte_gpu::ops::{self, Scales, Table4, Weight4};
use halfbyte_gpu::{DeviceSlice, Floats, Stream};
use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static LAST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Why this thread's last call of a symbol failed, once.
pub(crate) fn take_symbol_error() -> Option<String> {
    LAST.with(|last| last.borrow_mut().take())
}

/// Runs a symbol's body; 0 when it succeeded. Never unwinds.
fn status(symbol: &str, body: impl FnOnce() -> Result<()>) -> c_int {
    let result = catch_unwind(AssertUnwindSafe(body))
        .unwrap_or_else(|_| Err(Error::Panic("a panic in a C symbol".into())));
    match result {
        Ok(()) => 0,
        Err(error) => {
            LAST.with(|last| *last.borrow_mut() = Some(format!("{symbol}: {error}")));
            1
        }
    }
}

fn count(what: &str, n: c_int) -> Result<usize> {
    usize::try_from(n).map_err(|_| Error::Value(format!("{what} must not be negative, got {n}")))
}

/// # Safety
/// `len` elements of `T` lie at `pointer` on the current device, until the stream has run.
unsafe fn slice<T>(what: &str, pointer: *const c_void, len: usize) -> Result<DeviceSlice<T>> {
    check(what, pointer, len, align_of::<T>())?;
    // SAFETY: by the caller's contract; the alignment was checked.
    Ok(unsafe { DeviceSlice::new(pointer as u64, len) })
}

/// # Safety
/// As [`slice`].
unsafe fn floats(what: &str, at: *const c_void, len: usize, dtype: DType) -> Result<Floats> {
    check(what, at, len, dtype.size())?;
    // SAFETY: by the caller's contract; the alignment was checked.
    Ok(unsafe { Floats::new(at as u64, len, dtype) })
}

fn check(what: &str, pointer: *const c_void, len: usize, alignment: usize) -> Result<()> {
    if pointer.is_null() && len > 0 {
        return Err(Error::Value(format!("{what} must hold {len} elements, got a null pointer")));
    }
    if (pointer as usize).is_multiple_of(alignment) {
        return Ok(());
    }
    Err(Error::Value(format!("{what} must be aligned to {alignment} bytes, got {pointer:p}")))
}

/// A stream of the current device.
///
/// # Safety
/// `raw` is null or a stream of the device that is current for torch.
unsafe fn stream(raw: *mut c_void) -> Result<Stream> {
    // SAFETY: by the caller's contract.
    Ok(unsafe { Stream::from_raw(streams::current_device()?, raw) })
}

/// `out[i] = table[code i of packed] * absmax[i / blocksize]`, `n` elements.
///
/// # Safety
/// The pointers hold what `n` elements need on the current device, until the stream has run.
unsafe fn dequantize_4bit(
    (code, dtype): (Code4, DType),
    (packed, absmax, out): (*const c_void, *const c_void, *mut c_void),
    (blocksize, n): (c_int, c_int),
    raw: *mut c_void,
) -> Result<()> {
    let n = count("n", n)?;
    let blocksize = BlockSize::new(count("blocksize", blocksize)?)?;
    // SAFETY: by the caller's contract.
    unsafe {
        let packed = slice("A", packed, n.div_ceil(2))?;
        let scales = Scales::Plain(slice("absmax", absmax, blocksize.over(n).count())?);
        let (stream, out) = (stream(raw)?, floats("out", out, n, dtype)?);
        let table = Table4::Standard(code);
        Ok(ops::dequantize_4bit(&stream, packed, &scales, &table, blocksize, out)?)
    }
}

/// `out[i] = code[codes[i]] * absmax[i / blocksize]`, `n` elements.
///
/// # Safety
/// As [`dequantize_4bit`]; `code` holds 256 values.
unsafe fn dequantize_blockwise(
    dtype: DType,
    code: *const c_void,
    (codes, absmax, out): (*const c_void, *const c_void, *mut c_void),
    (blocksize, n): (c_int, c_int),
    raw: *mut c_void,
) -> Result<()> {
    let n = count("n", n)?;
    let blocksize = BlockSize::new(count("blocksize", blocksize)?)?;
    // SAFETY: by the caller's contract.
    unsafe {
        let (code, codes) = (slice("code", code, 256)?, slice("A", codes, n)?);
        let absmax = slice("absmax", absmax, blocksize.over(n).count())?;
        let (stream, out) = (stream(raw)?, floats("out", out, n, dtype)?);
        Ok(ops::dequantize_blockwise(&stream, codes, absmax, code, blocksize, out)?)
    }
}

/// `out [n, m] = x [n, k] · weight^T`, the weight being `[m, k]` under 16 values.
///
/// # Safety
/// As [`dequantize_4bit`]; `table` holds 16 values.
unsafe fn gemm_4bit(
    dtype: DType,
    [m, n, k]: [c_int; 3],
    [x, packed, absmax, table]: [*const c_void; 4],
    out: *mut c_void,
    blocksize: c_int,
    raw: *mut c_void,
) -> Result<()> {
    let (m, n, k) = (count("m", m)?, count("n", n)?, count("k", k)?);
    let blocksize = BlockSize::new(count("blocksize", blocksize)?)?;
    // SAFETY: by the caller's contract.
    unsafe {
        let packed = slice("B", packed, (m * k).div_ceil(2))?;
        let scales = Scales::Plain(slice("absmax", absmax, blocksize.over(m * k).count())?);
        let table = Table4::Device(slice("datatype", table, 16)?);
        let weight = Weight4::new(packed, scales, table, blocksize, m, k)?;
        let (x, out) = (floats("A", x, n * k, dtype)?, floats("out", out, n * m, dtype)?);
        Ok(ops::matvec_4bit(&stream(raw)?, x, n, &weight, None, out)?)
    }
}

macro_rules! dequantize_4bit_symbols {
    ($($name:ident: $code:ident, $dtype:ident;)*) => { $(
        /// `table` is not looked at: the code is in the name.
        ///
        /// # Safety
        /// `packed` holds `ceil(n / 2)` bytes, `absmax` `ceil(n / blocksize)` float32 values and
        /// `out` `n` elements on the current device, until `stream` has run.
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            table: *const c_void,
            packed: *const c_void,
            absmax: *const c_void,
            out: *mut c_void,
            blocksize: c_int,
            n: c_int,
            stream: *mut c_void,
        ) -> c_int {
            let _ = table;
            let buffers = (packed, absmax, out);
            let kind = (Code4::$code, DType::$dtype);
            // SAFETY: by the caller's contract.
            let body = || unsafe { dequantize_4bit(kind, buffers, (blocksize, n), stream) };
            status(stringify!($name), body)
        }
    )* };
}

dequantize_4bit_symbols! {
    cdequantize_blockwise_fp16_nf4: Nf4, F16;
    cdequantize_blockwise_bf16_nf4: Nf4, BF16;
    cdequantize_blockwise_fp32_nf4: Nf4, F32;
    cdequantize_blockwise_fp16_fp4: Fp4, F16;
    cdequantize_blockwise_bf16_fp4: Fp4, BF16;
    cdequantize_blockwise_fp32_fp4: Fp4, F32;
}

macro_rules! dequantize_blockwise_symbols {
    ($($name:ident: $dtype:ident;)*) => { $(
        /// # Safety
        /// `code` holds 256 float32 values, `codes` `n` bytes, `absmax` `ceil(n / blocksize)`
        /// float32 values and `out` `n` elements on the current device, until `stream` has run.
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            code: *const c_void,
            codes: *const c_void,
            absmax: *const c_void,
            out: *mut c_void,
            blocksize: c_int,
            n: c_int,
            stream: *mut c_void,
        ) -> c_int {
            let (buffers, sizes) = ((codes, absmax, out), (blocksize, n));
            // SAFETY: by the caller's contract.
            let body = || unsafe {
                dequantize_blockwise(DType::$dtype, code, buffers, sizes, stream)
            };
            status(stringify!($name), body)
        }
    )* };
}

dequantize_blockwise_symbols! {
    cdequantize_blockwise_fp16: F16;
    cdequantize_blockwise_bf16: BF16;
    cdequantize_blockwise_fp32: F32;
}

macro_rules! gemm_4bit_symbols {
    ($($name:ident: $dtype:ident;)*) => { $(
        /// The leading dimensions are not looked at: all matrices are contiguous.
        ///
        /// # Safety
        /// `a` holds `n * k` elements, `b` `ceil(m * k / 2)` bytes, `absmax`
        /// `ceil(m * k / blocksize)` float32 values, `datatype` 16 and `out` `n * m` elements on the
        /// current device, until `stream` has run.
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            m: c_int,
            n: c_int,
            k: c_int,
            a: *const c_void,
            b: *const c_void,
            absmax: *const c_void,
            datatype: *const c_void,
            out: *mut c_void,
            lda: c_int,
            ldb: c_int,
            ldc: c_int,
            blocksize: c_int,
            stream: *mut c_void,
        ) -> c_int {
            let _ = (lda, ldb, ldc);
            let (sizes, inputs) = ([m, n, k], [a, b, absmax, datatype]);
            // SAFETY: by the caller's contract.
            let body = || unsafe {
                gemm_4bit(DType::$dtype, sizes, inputs, out, blocksize, stream)
            };
            status(stringify!($name), body)
        }
    )* };
}

gemm_4bit_symbols! {
    cgemm_4bit_inference_naive_fp16: F16;
    cgemm_4bit_inference_naive_bf16: BF16;
    cgemm_4bit_inference_naive_fp32: F32;
}
