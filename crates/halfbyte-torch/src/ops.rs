//! The ops: arguments from the dispatcher to the core crate's slices and back.
//!
//! Schemas, fakes and autograd formulas are in `python/halfbyte/_ops.py`; the argument lists in
//! [`ops!`] must equal the schemas there, in order and type. Every buffer's length is checked
//! here or by the core before a kernel reads it.

// Kernels own their arguments, whether or not they use them up.
#![allow(clippy::needless_pass_by_value)]

use crate::dtype::{Scalar, ScalarType, with_float};
use crate::error::{Error, Result};
use crate::gpu::Queue;
use crate::memory::{Destination, Source};
use crate::products::expect_shape;
use crate::stack::{Str, ops};
use crate::tensor::Tensor;
use crate::threads::use_torch_threads;
use crate::weight::{Readable, State, Weight, block_size, code4, elements, numbers};
use halfbyte::{BlockSize, Code4, Code8, NonFinite};
use halfbyte_gpu::{DeviceSlice, ops as gpu};
use std::borrow::Cow;

ops! {
    Quantize4bit = c"quantize_4bit" => quantize_4bit(
        a: Tensor, blocksize: i64, quant_type: Str, quant_storage: ScalarType) -> [Tensor; 2];
    Quantize4bitOut = c"quantize_4bit.out" => quantize_4bit_out(
        a: Tensor, blocksize: i64, quant_type: Str, out: Tensor, absmax: Tensor) -> ();
    Quantize4bitNested = c"quantize_4bit.nested" => quantize_4bit_nested(
        a: Tensor, blocksize: i64, quant_type: Str, quant_storage: ScalarType, blocksize2: i64)
        -> [Tensor; 4];
    Dequantize4bit = c"dequantize_4bit" => dequantize_4bit(
        weight: Weight, dtype: ScalarType) -> Tensor;
    Dequantize4bitOut = c"dequantize_4bit.out" => dequantize_4bit_out(
        weight: Weight, dtype: ScalarType, out: Tensor) -> ();
    Dequantize4bitState = c"dequantize_4bit.state" => dequantize_4bit_state(
        weight: Weight, dtype: ScalarType, state: State) -> Tensor;
    Dequantize4bitStateOut = c"dequantize_4bit.state_out" => dequantize_4bit_state_out(
        weight: Weight, state: State, out: Tensor) -> ();
    QuantizeBlockwise = c"quantize_blockwise" => quantize_blockwise(
        a: Tensor, code: Tensor, blocksize: i64) -> [Tensor; 2];
    QuantizeBlockwiseOut = c"quantize_blockwise.out" => quantize_blockwise_out(
        a: Tensor, code: Tensor, blocksize: i64, out: Tensor, absmax: Tensor) -> ();
    DequantizeBlockwise = c"dequantize_blockwise" => dequantize_blockwise(
        a: Tensor, absmax: Tensor, code: Tensor, blocksize: i64, dtype: ScalarType) -> Tensor;
    DequantizeBlockwiseOut = c"dequantize_blockwise.out" => dequantize_blockwise_out(
        a: Tensor, absmax: Tensor, code: Tensor, blocksize: i64, dtype: ScalarType, out: Tensor)
        -> ();
    QuantizeAbsmax = c"quantize_absmax" => quantize_absmax(
        absmax: Tensor, blocksize: i64) -> [Tensor; 3];
}

/// Bytes of the packed buffer: two codes a byte, zero-padded to whole storage elements.
fn packed_elements(elements: usize, storage: ScalarType) -> Result<(usize, usize)> {
    let bytes = elements.div_ceil(2);
    let Some(item) = storage.size().filter(|_| storage.name() != "bool") else {
        return Err(Error::Value(format!(
            "quant_storage must be a dtype of 1, 2, 4 or 8 bytes such as uint8, bfloat16, float16 \
             or float32, got {}",
            storage.name()
        )));
    };
    Ok((bytes, bytes.div_ceil(item)))
}

// ---- 4-bit codes -------------------------------------------------------------------------------

/// Quantizes into `packed` and `absmax`, zeroing the padding behind the last code.
fn encode_4bit(
    a: &Source<'_>,
    code: Code4,
    blocksize: BlockSize,
    packed: &mut Destination<'_>,
    absmax: &mut Destination<'_>,
) -> Result<()> {
    let bytes = a.len().div_ceil(2);
    if packed.nbytes() < bytes {
        return Err(halfbyte::Error::Length {
            buffer: "out",
            expected: bytes,
            got: packed.nbytes(),
            unit: "bytes",
        }
        .into());
    }
    if let Some(queue) = Queue::of(a)? {
        let (input, absmax) = (a.floats_on(&queue, "A")?, absmax.on(&queue)?);
        let codes = packed.bytes_on(&queue)?.part("packed", 0, bytes)?;
        if packed.nbytes() > bytes {
            packed.zero()?;
        }
        return Ok(gpu::quantize_4bit(queue.stream(), input, code, blocksize, codes, absmax)?);
    }
    let (codes, padding) = packed.bytes_mut()?.split_at_mut(bytes);
    padding.fill(0);
    let absmax = absmax.slice_mut()?;
    use_torch_threads();
    with_float!(a.dtype(), "A", T => {
        halfbyte::quantize_4bit(
            a.slice::<T>()?, code, blocksize, NonFinite::Propagate, codes, absmax,
        )?;
        Ok(())
    })
}

fn quantize_4bit(
    a: Tensor,
    blocksize: i64,
    quant_type: Str,
    quant_storage: ScalarType,
) -> Result<[Tensor; 2]> {
    let (code, blocksize) = (code4(&quant_type)?, block_size(blocksize)?);
    let a = a.read("A")?;
    let (_, items) = packed_elements(a.len(), quant_storage)?;
    let packed = Tensor::empty(&[numbers(items), 1], quant_storage, a.device())?;
    let blocks = blocksize.over(a.len()).count();
    let absmax = Tensor::empty(&[numbers(blocks)], f32::scalar_type(), a.device())?;
    let (mut codes, mut scales) = (packed.write("packed")?, absmax.write("absmax")?);
    encode_4bit(&a, code, blocksize, &mut codes, &mut scales)?;
    drop((codes, scales));
    Ok([packed, absmax])
}

fn quantize_4bit_out(
    a: Tensor,
    blocksize: i64,
    quant_type: Str,
    out: Tensor,
    absmax: Tensor,
) -> Result<()> {
    let (code, blocksize) = (code4(&quant_type)?, block_size(blocksize)?);
    let a = a.read("A")?;
    let mut packed = out.write("out")?;
    let (bytes, items) = packed_elements(a.len(), packed.dtype())?;
    if packed.nbytes() != items * (packed.dtype().size().unwrap_or(1)) {
        return Err(Error::Value(format!(
            "out must hold {items} elements of {} ({bytes} bytes of codes), got {}",
            packed.dtype().name(),
            out.numel()?
        )));
    }
    let mut scales = absmax.write("absmax")?;
    packed.apart_from(&a)?;
    scales.apart_from(&a)?;
    packed.apart_from_output(&scales)?;
    encode_4bit(&a, code, blocksize, &mut packed, &mut scales)?;
    packed.finish()?;
    scales.finish()
}

fn quantize_4bit_nested(
    a: Tensor,
    blocksize: i64,
    quant_type: Str,
    quant_storage: ScalarType,
    blocksize2: i64,
) -> Result<[Tensor; 4]> {
    let blocksize2 = block_size(blocksize2)?;
    let [packed, absmax] = quantize_4bit(a, blocksize, quant_type, quant_storage)?;
    let [codes, absmax2, offset] = nest(&absmax.read("absmax")?, blocksize2)?;
    Ok([packed, codes, absmax2, offset])
}

fn quantize_absmax(absmax: Tensor, blocksize: i64) -> Result<[Tensor; 3]> {
    nest(&absmax.read("absmax")?, block_size(blocksize)?)
}

/// Double quantization: 8-bit codes of the scales, their scales, and the mean that was taken off.
fn nest(absmax: &Source<'_>, blocksize: BlockSize) -> Result<[Tensor; 3]> {
    let (n, device) = (absmax.len(), absmax.device());
    let codes = Tensor::empty(&[numbers(n)], u8::scalar_type(), device)?;
    let blocks = numbers(blocksize.over(n).count());
    let absmax2 = Tensor::empty(&[blocks], f32::scalar_type(), device)?;
    let offset = Tensor::empty(&[], f32::scalar_type(), device)?;
    let (mut c, mut a, mut o) =
        (codes.write("codes")?, absmax2.write("absmax2")?, offset.write("offset")?);
    if let Some(queue) = Queue::of(absmax)? {
        // The offset, a mean, stays on the device: nothing waits for it.
        let scratch = queue.workspace(gpu::quantize_absmax_workspace(n))?;
        gpu::quantize_absmax(
            queue.stream(),
            absmax.on(&queue)?,
            blocksize,
            c.on(&queue)?,
            a.on(&queue)?,
            o.on(&queue)?,
            scratch.slice(),
        )?;
    } else {
        use_torch_threads();
        let (c, a) = (c.slice_mut()?, a.slice_mut()?);
        o.slice_mut()?[0] = halfbyte::quantize_absmax(absmax.slice()?, blocksize, c, a)?;
    }
    drop((c, a, o));
    Ok([codes, absmax2, offset])
}

impl Readable<'_> {
    fn decode(&self, out: &mut Destination<'_>) -> Result<()> {
        self.keep_apart(out)?;
        let n = out.len();
        if let Some(queue) = Queue::of(self.packed())? {
            let (codes, scales) = (self.codes_on(&queue, n)?, self.scales_on(&queue, n)?);
            let (table, out) = (self.table_on(&queue)?, out.floats_on(&queue, "dtype")?);
            let stream = queue.stream();
            return Ok(gpu::dequantize_4bit(stream, codes, &scales, &table, self.blocksize, out)?);
        }
        let (codes, scales, table) = (self.codes(n)?, self.scales()?, self.table()?);
        use_torch_threads();
        with_float!(out.dtype(), "dtype", T => {
            let out = out.slice_mut::<T>()?;
            halfbyte::dequantize_4bit(codes, &scales, &table, self.blocksize, out)?;
            Ok(())
        })
    }
}

pub(crate) fn check_float(dtype: ScalarType) -> Result<ScalarType> {
    with_float!(dtype, "dtype", T => Ok(T::scalar_type()))
}

fn dequantize_4bit(weight: Weight, dtype: ScalarType) -> Result<Tensor> {
    dequantize_4bit_state(weight, dtype, State::PLAIN)
}

fn dequantize_4bit_state(weight: Weight, dtype: ScalarType, state: State) -> Result<Tensor> {
    let readable = weight.read(&state)?;
    let out = weight.shape.with(|shape| {
        // Allocates only what the packed buffer can fill.
        readable.code_bytes(elements(shape)?)?;
        Tensor::empty(shape, check_float(dtype)?, readable.packed().device())
    })?;
    readable.decode(&mut out.write("out")?)?;
    Ok(out)
}

fn dequantize_4bit_out(weight: Weight, dtype: ScalarType, out: Tensor) -> Result<()> {
    expect_dtype(&out, dtype)?;
    dequantize_4bit_state_out(weight, State::PLAIN, out)
}

fn dequantize_4bit_state_out(weight: Weight, state: State, out: Tensor) -> Result<()> {
    weight.shape.with(|shape| expect_shape(&out, shape))?;
    let mut destination = out.write("out")?;
    weight.read(&state)?.decode(&mut destination)?;
    destination.finish()
}

fn expect_dtype(out: &Tensor, dtype: ScalarType) -> Result<()> {
    let got = out.dtype()?;
    if got == dtype {
        return Ok(());
    }
    Err(Error::Type(format!("out must be {}, got {}", dtype.name(), got.name())))
}

// ---- 8-bit codes -------------------------------------------------------------------------------

/// A code of up to 256 values, filled up with its last value.
fn code256<'a>(code: &'a Source<'_>) -> Result<Cow<'a, [f32; 256]>> {
    let values = code.slice::<f32>()?;
    if let Ok(values) = <&[f32; 256]>::try_from(values) {
        return Ok(Cow::Borrowed(values));
    }
    match values.last() {
        Some(&last) if values.len() < 256 => {
            let mut filled = [last; 256];
            filled[..values.len()].copy_from_slice(values);
            Ok(Cow::Owned(filled))
        }
        _ => Err(Error::Value(format!("code must hold 1 to 256 values, got {}", values.len()))),
    }
}

/// As [`code256`], filled up by the kernel. That the values ascend, which the CPU checks, would have
/// to be waited for.
fn code256_on(code: &Source<'_>, queue: &Queue) -> Result<DeviceSlice<f32>> {
    if (1..=256).contains(&code.len()) {
        return code.on(queue);
    }
    Err(Error::Value(format!("code must hold 1 to 256 values, got {}", code.len())))
}

fn encode_blockwise(
    a: &Source<'_>,
    code: &Source<'_>,
    blocksize: BlockSize,
    out: &mut Destination<'_>,
    absmax: &mut Destination<'_>,
) -> Result<()> {
    if let Some(queue) = Queue::of(a)? {
        let (input, code) = (a.floats_on(&queue, "A")?, code256_on(code, &queue)?);
        let (out, absmax) = (out.on(&queue)?, absmax.on(&queue)?);
        return Ok(gpu::quantize_blockwise(queue.stream(), input, code, blocksize, out, absmax)?);
    }
    let (out, absmax) = (out.slice_mut()?, absmax.slice_mut()?);
    let values = code256(code)?;
    let dynamic = Code8::dynamic(true);
    let custom;
    let code8 = if *values == *dynamic.values() {
        dynamic
    } else {
        custom = Code8::new(&values[..])?;
        &custom
    };
    use_torch_threads();
    with_float!(a.dtype(), "A", T => {
        let a = a.slice::<T>()?;
        halfbyte::quantize_blockwise(a, code8, blocksize, NonFinite::Propagate, out, absmax)?;
        Ok(())
    })?;
    // In a short code, values above its last entry count as the entries that fill it up.
    if let Some(last) = u8::try_from(code.len() - 1).ok().filter(|&last| last < u8::MAX) {
        for q in out {
            *q = (*q).min(last);
        }
    }
    Ok(())
}

fn quantize_blockwise(a: Tensor, code: Tensor, blocksize: i64) -> Result<[Tensor; 2]> {
    let blocksize = block_size(blocksize)?;
    let source = a.read("A")?;
    let code = code.read_as::<f32>("code")?;
    let out = Tensor::empty(a.sizes()?, u8::scalar_type(), source.device())?;
    let blocks = blocksize.over(source.len()).count();
    let absmax = Tensor::empty(&[numbers(blocks)], f32::scalar_type(), source.device())?;
    let (mut codes, mut scales) = (out.write("out")?, absmax.write("absmax")?);
    encode_blockwise(&source, &code, blocksize, &mut codes, &mut scales)?;
    drop((codes, scales));
    Ok([out, absmax])
}

fn quantize_blockwise_out(
    a: Tensor,
    code: Tensor,
    blocksize: i64,
    out: Tensor,
    absmax: Tensor,
) -> Result<()> {
    let blocksize = block_size(blocksize)?;
    let a = a.read("A")?;
    let (mut out, mut absmax) = (out.write("out")?, absmax.write("absmax")?);
    let code = code.read_as::<f32>("code")?;
    for input in [&a, &code] {
        out.apart_from(input)?;
        absmax.apart_from(input)?;
    }
    out.apart_from_output(&absmax)?;
    encode_blockwise(&a, &code, blocksize, &mut out, &mut absmax)?;
    out.finish()?;
    absmax.finish()
}

fn decode_blockwise(
    a: &Source<'_>,
    absmax: &Tensor,
    code: &Tensor,
    blocksize: i64,
    out: &mut Destination<'_>,
) -> Result<()> {
    let blocksize = block_size(blocksize)?;
    let (absmax, code) = (absmax.read_as::<f32>("absmax")?, code.read_as::<f32>("code")?);
    for input in [a, &absmax, &code] {
        out.apart_from(input)?;
    }
    if let Some(queue) = Queue::of(a)? {
        let (codes, absmax, code) = (a.on(&queue)?, absmax.on(&queue)?, code256_on(&code, &queue)?);
        let (stream, out) = (queue.stream(), out.floats_on(&queue, "dtype")?);
        return Ok(gpu::dequantize_blockwise(stream, codes, absmax, code, blocksize, out)?);
    }
    let code = code256(&code)?;
    use_torch_threads();
    with_float!(out.dtype(), "dtype", T => {
        let (q, out) = (a.slice()?, out.slice_mut::<T>()?);
        halfbyte::dequantize_blockwise(q, absmax.slice()?, &code, blocksize, out)?;
        Ok(())
    })
}

fn dequantize_blockwise(
    a: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: i64,
    dtype: ScalarType,
) -> Result<Tensor> {
    let out = Tensor::empty(a.sizes()?, check_float(dtype)?, a.device()?)?;
    decode_blockwise(&a.read("A")?, &absmax, &code, blocksize, &mut out.write("out")?)?;
    Ok(out)
}

fn dequantize_blockwise_out(
    a: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: i64,
    dtype: ScalarType,
    out: Tensor,
) -> Result<()> {
    expect_dtype(&out, dtype)?;
    let mut destination = out.write("out")?;
    decode_blockwise(&a.read("A")?, &absmax, &code, blocksize, &mut destination)?;
    destination.finish()
}
