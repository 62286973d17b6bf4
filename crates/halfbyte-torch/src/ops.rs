//! The ops: arguments from the dispatcher to the core crate's slices and back.
//!
//! Schemas, fakes and autograd formulas are in `python/halfbyte/_ops.py`; the argument lists in
//! [`ops!`] must equal the schemas there, in order and type. Every buffer's length is checked
//! here or by the core before a kernel reads it.

use crate::error::{Error, Result};
use crate::shim::shim;
use crate::stack::{Ints, Str, ops};
use crate::tensor::{Destination, Scalar, ScalarType, Source, Tensor, with_float};
use halfbyte::{BlockSize, Code4, Code8, NestedScales, NonFinite, Scales, Weight4};
use std::borrow::Cow;
use std::sync::atomic::{AtomicU32, Ordering};

ops! {
    Quantize4bit = c"quantize_4bit" => quantize_4bit(
        a: Tensor, blocksize: i64, quant_type: Str, quant_storage: ScalarType) -> [Tensor; 2];
    Quantize4bitOut = c"quantize_4bit.out" => quantize_4bit_out(
        a: Tensor, blocksize: i64, quant_type: Str, out: Tensor, absmax: Tensor) -> ();
    Quantize4bitNested = c"quantize_4bit.nested" => quantize_4bit_nested(
        a: Tensor, blocksize: i64, quant_type: Str, quant_storage: ScalarType, blocksize2: i64)
        -> [Tensor; 4];
    Dequantize4bit = c"dequantize_4bit" => dequantize_4bit(
        a: Tensor, absmax: Tensor, blocksize: i64, quant_type: Str, shape: Ints,
        dtype: ScalarType) -> Tensor;
    Dequantize4bitOut = c"dequantize_4bit.out" => dequantize_4bit_out(
        a: Tensor, absmax: Tensor, blocksize: i64, quant_type: Str, shape: Ints,
        dtype: ScalarType, out: Tensor) -> ();
    Dequantize4bitState = c"dequantize_4bit.state" => dequantize_4bit_state(
        a: Tensor, absmax: Tensor, blocksize: i64, quant_type: Str, shape: Ints,
        dtype: ScalarType, code: Option<Tensor>, absmax2: Option<Tensor>, code2: Option<Tensor>,
        offset: Option<Tensor>, blocksize2: i64) -> Tensor;
    Dequantize4bitStateOut = c"dequantize_4bit.state_out" => dequantize_4bit_state_out(
        a: Tensor, absmax: Tensor, blocksize: i64, quant_type: Str, code: Option<Tensor>,
        absmax2: Option<Tensor>, code2: Option<Tensor>, offset: Option<Tensor>, blocksize2: i64,
        out: Tensor) -> ();
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
    Gemv4bit = c"gemv_4bit" => gemv_4bit(
        a: Tensor, b: Tensor, shape: Ints, absmax: Tensor, code: Tensor, blocksize: i64) -> Tensor;
    Gemv4bitOut = c"gemv_4bit.out" => gemv_4bit_out(
        a: Tensor, b: Tensor, shape: Ints, absmax: Tensor, code: Tensor, blocksize: i64,
        out: Tensor) -> ();
    Gemm4bit = c"gemm_4bit" => gemm_4bit(
        a: Tensor, b: Tensor, shape: Ints, absmax: Tensor, blocksize: i64, quant_type: Str,
        bias: Option<Tensor>, absmax_8bit: Option<Tensor>, absmax_code: Option<Tensor>,
        absmax_offset: Option<Tensor>) -> Tensor;
    Matmul4bit = c"matmul_4bit" => matmul_4bit(
        a: Tensor, packed: Tensor, absmax: Tensor, blocksize: i64, quant_type: Str, shape: Ints,
        bias: Option<Tensor>, code: Option<Tensor>, absmax2: Option<Tensor>,
        code2: Option<Tensor>, offset: Option<Tensor>, blocksize2: i64) -> Tensor;
    Matmul4bitOut = c"matmul_4bit.out" => matmul_4bit_out(
        a: Tensor, packed: Tensor, absmax: Tensor, blocksize: i64, quant_type: Str, shape: Ints,
        bias: Option<Tensor>, code: Option<Tensor>, absmax2: Option<Tensor>,
        code2: Option<Tensor>, offset: Option<Tensor>, blocksize2: i64, out: Tensor) -> ();
    Matmul4bitGradInput = c"matmul_4bit_grad_input" => matmul_4bit_grad_input(
        grad_output: Tensor, packed: Tensor, absmax: Tensor, blocksize: i64, quant_type: Str,
        shape: Ints, code: Option<Tensor>, absmax2: Option<Tensor>, code2: Option<Tensor>,
        offset: Option<Tensor>, blocksize2: i64) -> Tensor;
}

/// Lets the core use as many threads as torch does now.
fn use_torch_threads() {
    static CURRENT: AtomicU32 = AtomicU32::new(0);
    let Some(get) = shim().torch_get_num_threads else { return };
    let mut threads = 0;
    // SAFETY: writes one u32.
    let status = unsafe { get(&raw mut threads) };
    if status == 0 && threads > 0 && CURRENT.swap(threads, Ordering::Relaxed) != threads {
        halfbyte::threads::set_num_threads(threads as usize);
    }
}

/// A block size as Python passes it.
pub(crate) fn block_size(blocksize: i64) -> Result<BlockSize> {
    let parsed = usize::try_from(blocksize).ok().map(BlockSize::new);
    parsed.transpose()?.ok_or_else(|| {
        let message = halfbyte::Error::BlockSize { got: 0 }.to_string();
        Error::Value(format!("{}{blocksize}", message.trim_end_matches('0')))
    })
}

fn code4(quant_type: &Str) -> Result<Code4> {
    match quant_type.bytes()? {
        b"nf4" => Ok(Code4::Nf4),
        b"fp4" => Ok(Code4::Fp4),
        other => {
            let got = String::from_utf8_lossy(other).into_owned();
            Err(halfbyte::Error::QuantType { got }.into())
        }
    }
}

/// The number of elements of a shape, refusing negative sizes and overflow.
fn elements(shape: &[i64]) -> Result<usize> {
    shape
        .iter()
        .try_fold(1usize, |n, &size| n.checked_mul(usize::try_from(size).ok()?))
        .filter(|&n| n <= i64::MAX as usize / 8)
        .ok_or_else(|| Error::Value(format!("shape must be a tensor's shape, got {shape:?}")))
}

/// `[out_features, in_features]`.
fn matrix(shape: &Ints) -> Result<(usize, usize)> {
    shape.with(|shape| match *shape {
        [rows, columns] => {
            elements(&[rows, columns])?;
            Ok((rows as usize, columns as usize))
        }
        _ => Err(Error::Value(format!(
            "the weight's shape must be [out_features, in_features], got {shape:?}"
        ))),
    })
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

fn numbers(len: usize) -> i64 {
    len as i64 // lengths come from tensors, whose sizes are i64
}

// ---- 4-bit codes -------------------------------------------------------------------------------

/// Quantizes into `packed` and `absmax`, zeroing the padding behind the last code.
fn encode_4bit(
    a: &Source,
    code: Code4,
    blocksize: BlockSize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    let bytes = a.len().div_ceil(2);
    if packed.len() < bytes {
        return Err(halfbyte::Error::Length {
            buffer: "out",
            expected: bytes,
            got: packed.len(),
            unit: "bytes",
        }
        .into());
    }
    let (codes, padding) = packed.split_at_mut(bytes);
    padding.fill(0);
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
    let packed = Tensor::empty(&[numbers(items), 1], quant_storage)?;
    let blocks = blocksize.over(a.len()).count();
    let absmax = Tensor::empty(&[numbers(blocks)], f32::scalar_type())?;
    encode_4bit(
        &a,
        code,
        blocksize,
        packed.write("packed")?.bytes_mut(),
        absmax.write("absmax")?.slice_mut()?,
    )?;
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
    if packed.bytes_mut().len() != items * (packed.dtype().size().unwrap_or(1)) {
        return Err(Error::Value(format!(
            "out must hold {items} elements of {} ({bytes} bytes of codes), got {}",
            packed.dtype().name(),
            out.numel()?
        )));
    }
    let mut scales = absmax.write("absmax")?;
    packed.apart_from(&a)?;
    scales.apart_from(&a)?;
    encode_4bit(&a, code, blocksize, packed.bytes_mut(), scales.slice_mut()?)?;
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
fn nest(absmax: &Source, blocksize: BlockSize) -> Result<[Tensor; 3]> {
    let n = absmax.len();
    let codes = Tensor::empty(&[numbers(n)], u8::scalar_type())?;
    let absmax2 = Tensor::empty(&[numbers(blocksize.over(n).count())], f32::scalar_type())?;
    use_torch_threads();
    let offset = halfbyte::quantize_absmax(
        absmax.slice()?,
        blocksize,
        codes.write("codes")?.slice_mut()?,
        absmax2.write("absmax2")?.slice_mut()?,
    )?;
    Ok([codes, absmax2, Tensor::scalar(offset)?])
}

/// What a state holds beside the packed codes, as it comes off the stack.
struct State {
    absmax: Tensor,
    blocksize: i64,
    quant_type: Option<Str>,
    code: Option<Tensor>,
    absmax2: Option<Tensor>,
    code2: Option<Tensor>,
    offset: Option<Tensor>,
    blocksize2: i64,
}

/// The same, checked and readable.
struct Readable {
    packed: Source,
    absmax: Source,
    table: [f32; 16],
    blocksize: BlockSize,
    nested: Option<Nested>,
}

struct Nested {
    absmax2: Source,
    code2: Source,
    offset: f32,
    blocksize: BlockSize,
}

impl State {
    /// A state without double quantization or a code of its own.
    fn plain(absmax: Tensor, blocksize: i64, quant_type: Str) -> Self {
        Self {
            absmax,
            blocksize,
            quant_type: Some(quant_type),
            code: None,
            absmax2: None,
            code2: None,
            offset: None,
            blocksize2: 256,
        }
    }

    fn read(&self, packed: &Tensor) -> Result<Readable> {
        let standard = self.quant_type.as_ref().map(code4).transpose()?;
        let blocksize = block_size(self.blocksize)?;
        let table = match (&self.code, standard) {
            (None, Some(code)) => *code.table(),
            (None, None) => return Err(Error::Value("code must hold 16 values, got none".into())),
            (Some(code), _) => {
                let code = code.read_as::<f32>("code")?;
                *<&[f32; 16]>::try_from(code.slice()?).map_err(|_| {
                    Error::Value(format!("code must hold 16 values, got {}", code.len()))
                })?
            }
        };
        let nested = match (&self.absmax2, &self.code2, &self.offset) {
            (None, None, None) => None,
            (Some(absmax2), Some(code2), Some(offset)) => {
                let offset = offset.read_as::<f32>("offset")?;
                let [offset] = *offset.slice()? else {
                    return Err(Error::Value(format!(
                        "offset must hold one value, got {}",
                        offset.len()
                    )));
                };
                Some(Nested {
                    absmax2: absmax2.read_as::<f32>("absmax2")?,
                    code2: code2.read_as::<f32>("code2")?,
                    offset,
                    blocksize: block_size(self.blocksize2)?,
                })
            }
            _ => {
                return Err(Error::Value(
                    "double-quantized scales need all of absmax2, code2 and offset, or none".into(),
                ));
            }
        };
        let absmax = match &nested {
            None => self.absmax.read_as::<f32>("absmax")?,
            Some(_) => self.absmax.read("absmax")?,
        };
        Ok(Readable { packed: packed.read("packed")?, absmax, table, blocksize, nested })
    }
}

impl Readable {
    /// The bytes of `n` codes, without the zeros that fill up the last storage element.
    fn codes(&self, n: usize) -> Result<&[u8]> {
        const WIDEST_STORAGE: usize = 8;
        let (bytes, need) = (self.packed.bytes(), n.div_ceil(2));
        if bytes.len() < need || bytes.len() >= need + WIDEST_STORAGE {
            return Err(Error::Value(format!(
                "packed must hold {need} bytes for {n} elements, got {}",
                bytes.len()
            )));
        }
        Ok(&bytes[..need])
    }

    fn scales(&self) -> Result<Scales<'_>> {
        Ok(match &self.nested {
            None => Scales::Plain(self.absmax.slice()?),
            Some(nested) => Scales::Nested(NestedScales {
                absmax: self.absmax.slice()?,
                code: <&[f32; 256]>::try_from(nested.code2.slice::<f32>()?).map_err(|_| {
                    Error::Value(format!("code2 must hold 256 values, got {}", nested.code2.len()))
                })?,
                absmax2: nested.absmax2.slice()?,
                blocksize: nested.blocksize,
                offset: nested.offset,
            }),
        })
    }

    fn weight(&self, (rows, columns): (usize, usize)) -> Result<Weight4<'_>> {
        let codes = self.codes(rows * columns)?;
        let scales = self.scales()?;
        Ok(Weight4::new(codes, scales, &self.table, self.blocksize, rows, columns)?)
    }

    fn decode(&self, out: &mut Destination<'_>) -> Result<()> {
        out.apart_from(&self.packed)?;
        out.apart_from(&self.absmax)?;
        use_torch_threads();
        with_float!(out.dtype(), "dtype", T => {
            let out = out.slice_mut::<T>()?;
            let codes = self.codes(out.len())?;
            halfbyte::dequantize_4bit(codes, &self.scales()?, &self.table, self.blocksize, out)?;
            Ok(())
        })
    }
}

fn decode_4bit(packed: &Tensor, state: &State, shape: &Ints, dtype: ScalarType) -> Result<Tensor> {
    let state = state.read(packed)?;
    // Allocates only what the packed buffer can fill.
    let out = shape.with(|shape| {
        state.codes(elements(shape)?)?;
        Tensor::empty(shape, check_float(dtype)?)
    })?;
    state.decode(&mut out.write("out")?)?;
    Ok(out)
}

fn check_float(dtype: ScalarType) -> Result<ScalarType> {
    with_float!(dtype, "dtype", T => Ok(T::scalar_type()))
}

fn decode_4bit_into(packed: &Tensor, state: &State, out: &Tensor) -> Result<()> {
    let state = state.read(packed)?;
    let mut out = out.write("out")?;
    state.decode(&mut out)?;
    out.finish()
}

fn dequantize_4bit(
    a: Tensor,
    absmax: Tensor,
    blocksize: i64,
    quant_type: Str,
    shape: Ints,
    dtype: ScalarType,
) -> Result<Tensor> {
    decode_4bit(&a, &State::plain(absmax, blocksize, quant_type), &shape, dtype)
}

fn dequantize_4bit_out(
    a: Tensor,
    absmax: Tensor,
    blocksize: i64,
    quant_type: Str,
    shape: Ints,
    dtype: ScalarType,
    out: Tensor,
) -> Result<()> {
    shape.with(|shape| expect_shape(&out, shape))?;
    if out.dtype()? != dtype {
        return Err(Error::Type(format!(
            "out must be {}, got {}",
            dtype.name(),
            out.dtype()?.name()
        )));
    }
    decode_4bit_into(&a, &State::plain(absmax, blocksize, quant_type), &out)
}

#[allow(clippy::too_many_arguments)] // the schema's arguments
fn dequantize_4bit_state(
    a: Tensor,
    absmax: Tensor,
    blocksize: i64,
    quant_type: Str,
    shape: Ints,
    dtype: ScalarType,
    code: Option<Tensor>,
    absmax2: Option<Tensor>,
    code2: Option<Tensor>,
    offset: Option<Tensor>,
    blocksize2: i64,
) -> Result<Tensor> {
    let quant_type = Some(quant_type);
    let state = State { absmax, blocksize, quant_type, code, absmax2, code2, offset, blocksize2 };
    decode_4bit(&a, &state, &shape, dtype)
}

#[allow(clippy::too_many_arguments)] // the schema's arguments
fn dequantize_4bit_state_out(
    a: Tensor,
    absmax: Tensor,
    blocksize: i64,
    quant_type: Str,
    code: Option<Tensor>,
    absmax2: Option<Tensor>,
    code2: Option<Tensor>,
    offset: Option<Tensor>,
    blocksize2: i64,
    out: Tensor,
) -> Result<()> {
    let quant_type = Some(quant_type);
    let state = State { absmax, blocksize, quant_type, code, absmax2, code2, offset, blocksize2 };
    decode_4bit_into(&a, &state, &out)
}

fn expect_shape(out: &Tensor, shape: &[i64]) -> Result<()> {
    if out.sizes()? == shape {
        return Ok(());
    }
    Err(Error::Value(format!("out must have shape {shape:?}, got {:?}", out.sizes()?)))
}

// ---- 8-bit codes -------------------------------------------------------------------------------

/// A code of up to 256 values, filled up with its last value.
fn code256(code: &Source) -> Result<Cow<'_, [f32; 256]>> {
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

fn encode_blockwise(
    a: &Source,
    code: &Source,
    blocksize: BlockSize,
    out: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
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
        out.iter_mut().for_each(|q| *q = (*q).min(last));
    }
    Ok(())
}

fn quantize_blockwise(a: Tensor, code: Tensor, blocksize: i64) -> Result<[Tensor; 2]> {
    let blocksize = block_size(blocksize)?;
    let source = a.read("A")?;
    let out = Tensor::empty(a.sizes()?, u8::scalar_type())?;
    let blocks = blocksize.over(source.len()).count();
    let absmax = Tensor::empty(&[numbers(blocks)], f32::scalar_type())?;
    encode_blockwise(
        &source,
        &code.read_as::<f32>("code")?,
        blocksize,
        out.write("out")?.slice_mut()?,
        absmax.write("absmax")?.slice_mut()?,
    )?;
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
    out.apart_from(&a)?;
    absmax.apart_from(&a)?;
    let code = code.read_as::<f32>("code")?;
    encode_blockwise(&a, &code, blocksize, out.slice_mut()?, absmax.slice_mut()?)?;
    out.finish()?;
    absmax.finish()
}

fn decode_blockwise(
    a: &Source,
    absmax: &Tensor,
    code: &Tensor,
    blocksize: i64,
    out: &mut Destination<'_>,
) -> Result<()> {
    let blocksize = block_size(blocksize)?;
    let (absmax, code) = (absmax.read_as::<f32>("absmax")?, code.read_as::<f32>("code")?);
    out.apart_from(a)?;
    out.apart_from(&absmax)?;
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
    let out = Tensor::empty(a.sizes()?, check_float(dtype)?)?;
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
    if out.dtype()? != dtype {
        return Err(Error::Type(format!(
            "out must be {}, got {}",
            dtype.name(),
            out.dtype()?.name()
        )));
    }
    let mut destination = out.write("out")?;
    decode_blockwise(&a.read("A")?, &absmax, &code, blocksize, &mut destination)?;
    destination.finish()
}

// ---- products ----------------------------------------------------------------------------------

/// The two products that a quantized weight takes part in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Product {
    /// `A [.., in] · W^T → [.., out]`.
    Forward,
    /// `A [.., out] · W → [.., in]`: the gradient of the other.
    GradInput,
}

/// The shape of the product: the leading dimensions of `a`, then the features.
fn product_shape<R>(
    a: &Tensor,
    (inner, outer): (usize, usize),
    f: impl FnOnce(&[i64], usize) -> Result<R>,
) -> Result<R> {
    let sizes = a.sizes()?;
    let Some((&last, leading)) = sizes.split_last() else {
        return Err(Error::Value("A must have at least one dimension, got none".into()));
    };
    if last as usize != inner {
        return Err(Error::Value(format!(
            "the last dimension of A must be {inner}, the weight's other one being {outer}, got \
             A of shape {sizes:?}"
        )));
    }
    let rows = elements(leading)?;
    let mut few = [0; 8];
    if sizes.len() <= few.len() {
        few[..leading.len()].copy_from_slice(leading);
        few[leading.len()] = numbers(outer);
        return f(&few[..sizes.len()], rows);
    }
    let mut many = sizes.to_vec();
    *many.last_mut().expect("not empty") = numbers(outer);
    f(&many, rows)
}

/// Multiplies into `out`, or into a tensor of its own.
fn product(
    kind: Product,
    a: &Tensor,
    packed: &Tensor,
    state: &State,
    shape: &Ints,
    bias: Option<&Tensor>,
    out: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let (rows, columns) = matrix(shape)?;
    let state = state.read(packed)?;
    let weight = state.weight((rows, columns))?;
    let sides = if kind == Product::Forward { (columns, rows) } else { (rows, columns) };
    let dtype = a.dtype()?;
    product_shape(a, sides, |result_shape, n| {
        let fresh = match out {
            Some(out) => {
                expect_shape(out, result_shape)?;
                None
            }
            None => Some(Tensor::empty(result_shape, dtype)?),
        };
        let input = a.read("A")?;
        let bias = bias.map(|bias| bias.read("bias")).transpose()?;
        let mut destination = match (&fresh, out) {
            (Some(fresh), _) | (None, Some(fresh)) => fresh.write("out")?,
            (None, None) => unreachable!("one of the two is there"),
        };
        destination.apart_from(&input)?;
        destination.apart_from(&state.packed)?;
        use_torch_threads();
        with_float!(dtype, "A", T => {
            let (input, output) = (input.slice::<T>()?, destination.slice_mut::<T>()?);
            match kind {
                Product::Forward => {
                    let bias = bias.as_ref().map(Source::slice::<T>).transpose()?;
                    halfbyte::matmul_4bit(input, n, &weight, bias, output)?;
                }
                Product::GradInput => {
                    halfbyte::matmul_4bit_grad_input(input, n, &weight, output)?;
                }
            }
            Ok(())
        })?;
        destination.finish()?;
        Ok(fresh)
    })
}

/// As [`product`], for the callers that leave the output to it.
fn fresh_product(
    kind: Product,
    a: &Tensor,
    packed: &Tensor,
    state: &State,
    shape: &Ints,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    product(kind, a, packed, state, shape, bias, None)?
        .ok_or_else(|| Error::Torch("the product was not returned".into()))
}

fn gemv_state(absmax: Tensor, code: Tensor, blocksize: i64) -> State {
    State {
        absmax,
        blocksize,
        quant_type: None,
        code: Some(code),
        absmax2: None,
        code2: None,
        offset: None,
        blocksize2: 256,
    }
}

fn gemv_4bit(
    a: Tensor,
    b: Tensor,
    shape: Ints,
    absmax: Tensor,
    code: Tensor,
    blocksize: i64,
) -> Result<Tensor> {
    let state = gemv_state(absmax, code, blocksize);
    fresh_product(Product::Forward, &a, &b, &state, &shape, None)
}

fn gemv_4bit_out(
    a: Tensor,
    b: Tensor,
    shape: Ints,
    absmax: Tensor,
    code: Tensor,
    blocksize: i64,
    out: Tensor,
) -> Result<()> {
    let state = gemv_state(absmax, code, blocksize);
    product(Product::Forward, &a, &b, &state, &shape, None, Some(&out)).map(drop)
}

#[allow(clippy::too_many_arguments)] // the schema's arguments
fn gemm_4bit(
    a: Tensor,
    b: Tensor,
    shape: Ints,
    absmax: Tensor,
    blocksize: i64,
    quant_type: Str,
    bias: Option<Tensor>,
    absmax_8bit: Option<Tensor>,
    absmax_code: Option<Tensor>,
    absmax_offset: Option<Tensor>,
) -> Result<Tensor> {
    // Upstream's convention: with double quantization `absmax` is the second level.
    let (absmax, absmax2) = match absmax_8bit {
        None => (absmax, None),
        Some(first) => (first, Some(absmax)),
    };
    let state = State {
        absmax,
        blocksize,
        quant_type: Some(quant_type),
        code: None,
        absmax2,
        code2: absmax_code,
        offset: absmax_offset,
        blocksize2: 256,
    };
    fresh_product(Product::Forward, &a, &b, &state, &shape, bias.as_ref())
}

#[allow(clippy::too_many_arguments)] // the schema's arguments
fn matmul_4bit(
    a: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: i64,
    quant_type: Str,
    shape: Ints,
    bias: Option<Tensor>,
    code: Option<Tensor>,
    absmax2: Option<Tensor>,
    code2: Option<Tensor>,
    offset: Option<Tensor>,
    blocksize2: i64,
) -> Result<Tensor> {
    let quant_type = Some(quant_type);
    let state = State { absmax, blocksize, quant_type, code, absmax2, code2, offset, blocksize2 };
    fresh_product(Product::Forward, &a, &packed, &state, &shape, bias.as_ref())
}

#[allow(clippy::too_many_arguments)] // the schema's arguments
fn matmul_4bit_out(
    a: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: i64,
    quant_type: Str,
    shape: Ints,
    bias: Option<Tensor>,
    code: Option<Tensor>,
    absmax2: Option<Tensor>,
    code2: Option<Tensor>,
    offset: Option<Tensor>,
    blocksize2: i64,
    out: Tensor,
) -> Result<()> {
    let quant_type = Some(quant_type);
    let state = State { absmax, blocksize, quant_type, code, absmax2, code2, offset, blocksize2 };
    product(Product::Forward, &a, &packed, &state, &shape, bias.as_ref(), Some(&out)).map(drop)
}

#[allow(clippy::too_many_arguments)] // the schema's arguments
fn matmul_4bit_grad_input(
    grad_output: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: i64,
    quant_type: Str,
    shape: Ints,
    code: Option<Tensor>,
    absmax2: Option<Tensor>,
    code2: Option<Tensor>,
    offset: Option<Tensor>,
    blocksize2: i64,
) -> Result<Tensor> {
    let quant_type = Some(quant_type);
    let state = State { absmax, blocksize, quant_type, code, absmax2, code2, offset, blocksize2 };
    fresh_product(Product::GradInput, &grad_output, &packed, &state, &shape, None)
}
