//! The ops: arguments from the dispatcher to the core crate's slices and back.
//!
//! Schemas, fakes and autograd formulas are in `python/halfbyte/_ops.py`; the argument lists in
//! [`ops!`] must equal the schemas there, in order and type. Every buffer's length is checked
//! here or by the core before a kernel reads it.

// Kernels own their arguments, whether or not they use them up.
#![allow(clippy::needless_pass_by_value)]

use crate::error::{Error, Result};
use crate::stack::{Ints, Str, group, ops};
use crate::tensor::{Destination, Scalar, ScalarType, Source, Tensor, with_float};
pub(crate) use crate::threads::use_torch_threads;
use halfbyte::{BlockSize, Code4, Code8, NestedScales, NonFinite, Scales, Weight4};
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
    Gemv4bit = c"gemv_4bit" => gemv_4bit(a: Tensor, weight: GemvWeight) -> Tensor;
    Gemv4bitOut = c"gemv_4bit.out" => gemv_4bit_out(
        a: Tensor, weight: GemvWeight, out: Tensor) -> ();
    Gemm4bit = c"gemm_4bit" => gemm_4bit(
        a: Tensor, weight: GemmWeight, bias: Option<Tensor>, nested: GemmNested) -> Tensor;
    Matmul4bit = c"matmul_4bit" => matmul_4bit(
        a: Tensor, weight: Weight, bias: Option<Tensor>, state: State) -> Tensor;
    Matmul4bitOut = c"matmul_4bit.out" => matmul_4bit_out(
        a: Tensor, weight: Weight, bias: Option<Tensor>, state: State, out: Tensor) -> ();
    Matmul4bitGradInput = c"matmul_4bit_grad_input" => matmul_4bit_grad_input(
        grad_output: Tensor, weight: Weight, state: State) -> Tensor;
}

group! {
    /// A quantized tensor.
    Weight { packed: Tensor, absmax: Tensor, blocksize: i64, quant_type: Str, shape: Ints }
}

group! {
    /// What else a quantization state may say.
    State {
        code: Option<Tensor>,
        absmax2: Option<Tensor>,
        code2: Option<Tensor>,
        offset: Option<Tensor>,
        blocksize2: i64,
    }
}

group! {
    /// A weight as upstream's `gemv_4bit` lists it.
    GemvWeight { packed: Tensor, shape: Ints, absmax: Tensor, code: Tensor, blocksize: i64 }
}

group! {
    /// A weight as upstream's `gemm_4bit` lists it.
    GemmWeight { packed: Tensor, shape: Ints, absmax: Tensor, blocksize: i64, quant_type: Str }
}

group! {
    /// Double quantization as upstream's `gemm_4bit` lists it.
    GemmNested { absmax_8bit: Option<Tensor>, code: Option<Tensor>, offset: Option<Tensor> }
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
pub(crate) fn elements(shape: &[i64]) -> Result<usize> {
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

pub(crate) fn numbers(len: usize) -> i64 {
    len as i64 // lengths come from tensors, whose sizes are i64
}

// ---- 4-bit codes -------------------------------------------------------------------------------

/// Quantizes into `packed` and `absmax`, zeroing the padding behind the last code.
fn encode_4bit(
    a: &Source<'_>,
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
    packed.apart_from_output(&scales)?;
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
fn nest(absmax: &Source<'_>, blocksize: BlockSize) -> Result<[Tensor; 3]> {
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

/// A weight with its state, checked and readable.
pub(crate) struct Readable<'a> {
    packed: Source<'a>,
    absmax: Source<'a>,
    pub(crate) table: [f32; 16],
    pub(crate) blocksize: BlockSize,
    nested: Option<Nested<'a>>,
}

struct Nested<'a> {
    absmax2: Source<'a>,
    code2: Source<'a>,
    offset: f32,
    blocksize: BlockSize,
}

impl State {
    /// The standard code and no double quantization.
    const PLAIN: Self =
        Self { code: None, absmax2: None, code2: None, offset: None, blocksize2: 256 };

    /// The 16 values: the state's own, or those of the type.
    fn table(&self, standard: Option<Code4>) -> Result<[f32; 16]> {
        match (&self.code, standard) {
            (None, Some(code)) => Ok(*code.table()),
            (None, None) => Err(Error::Value("code must hold 16 values, got none".into())),
            (Some(code), _) => {
                let code = code.read_as::<f32>("code")?;
                code.slice()?.try_into().map_err(|_| {
                    Error::Value(format!("code must hold 16 values, got {}", code.len()))
                })
            }
        }
    }

    fn nested(&self) -> Result<Option<Nested<'_>>> {
        let (absmax2, code2, offset) = match (&self.absmax2, &self.code2, &self.offset) {
            (None, None, None) => return Ok(None),
            (Some(absmax2), Some(code2), Some(offset)) => (absmax2, code2, offset),
            _ => {
                return Err(Error::Value(
                    "double-quantized scales need all of absmax2, code2 and offset, or none".into(),
                ));
            }
        };
        let offset = offset.read_as::<f32>("offset")?;
        let [offset] = *offset.slice()? else {
            return Err(Error::Value(format!("offset must hold one value, got {}", offset.len())));
        };
        Ok(Some(Nested {
            absmax2: absmax2.read_as::<f32>("absmax2")?,
            code2: code2.read_as::<f32>("code2")?,
            offset,
            blocksize: block_size(self.blocksize2)?,
        }))
    }
}

/// Reads a weight of which the type is known by name, or only by the state's code.
fn read_weight<'a>(
    packed: &'a Tensor,
    absmax: &'a Tensor,
    blocksize: i64,
    quant_type: Option<&Str>,
    state: &'a State,
) -> Result<Readable<'a>> {
    let standard = quant_type.map(code4).transpose()?;
    let nested = state.nested()?;
    Ok(Readable {
        packed: packed.read("packed")?,
        absmax: match &nested {
            None if !absmax.dtype()?.is_float() => {
                return Err(Error::Type(format!(
                    "absmax must be float32 unless it is double-quantized, got {}",
                    absmax.dtype()?.name()
                )));
            }
            None => absmax.read_as::<f32>("absmax")?,
            Some(_) => absmax.read("absmax")?,
        },
        table: state.table(standard)?,
        blocksize: block_size(blocksize)?,
        nested,
    })
}

impl Weight {
    pub(crate) fn read<'a>(&'a self, state: &'a State) -> Result<Readable<'a>> {
        read_weight(&self.packed, &self.absmax, self.blocksize, Some(&self.quant_type), state)
    }
}

impl Readable<'_> {
    /// Refuses an output that lies over any part of the state.
    fn keep_apart(&self, out: &Destination<'_>) -> Result<()> {
        out.apart_from(&self.packed)?;
        out.apart_from(&self.absmax)?;
        if let Some(nested) = &self.nested {
            out.apart_from(&nested.absmax2)?;
            out.apart_from(&nested.code2)?;
        }
        Ok(())
    }

    /// The bytes of `n` codes, without the zeros that fill up the last storage element.
    pub(crate) fn codes(&self, n: usize) -> Result<&[u8]> {
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

    pub(crate) fn scales(&self) -> Result<Scales<'_>> {
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

    fn matrix(&self, rows: usize, columns: usize) -> Result<Weight4<'_>> {
        let codes = self.codes(rows * columns)?;
        let scales = self.scales()?;
        Ok(Weight4::new(codes, scales, &self.table, self.blocksize, rows, columns)?)
    }

    fn decode(&self, out: &mut Destination<'_>) -> Result<()> {
        self.keep_apart(out)?;
        use_torch_threads();
        with_float!(out.dtype(), "dtype", T => {
            let out = out.slice_mut::<T>()?;
            let codes = self.codes(out.len())?;
            halfbyte::dequantize_4bit(codes, &self.scales()?, &self.table, self.blocksize, out)?;
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
        readable.codes(elements(shape)?)?;
        Tensor::empty(shape, check_float(dtype)?)
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

pub(crate) fn expect_shape(out: &Tensor, shape: &[i64]) -> Result<()> {
    if out.sizes()? == shape {
        return Ok(());
    }
    Err(Error::Value(format!("out must have shape {shape:?}, got {:?}", out.sizes()?)))
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

fn encode_blockwise(
    a: &Source<'_>,
    code: &Source<'_>,
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
        for q in out {
            *q = (*q).min(last);
        }
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
    let code = code.read_as::<f32>("code")?;
    for input in [&a, &code] {
        out.apart_from(input)?;
        absmax.apart_from(input)?;
    }
    out.apart_from_output(&absmax)?;
    encode_blockwise(&a, &code, blocksize, out.slice_mut()?, absmax.slice_mut()?)?;
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
    expect_dtype(&out, dtype)?;
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

/// The shape of the product: the leading dimensions of `a`, which messages call `what`, then the
/// features.
pub(crate) fn product_shape<R>(
    a: &Tensor,
    what: &str,
    (inner, outer): (usize, usize),
    f: impl FnOnce(&[i64], usize) -> Result<R>,
) -> Result<R> {
    let sizes = a.sizes()?;
    let Some((&last, leading)) = sizes.split_last() else {
        return Err(Error::Value(format!("{what} must have at least one dimension, got none")));
    };
    if last as usize != inner {
        return Err(Error::Value(format!(
            "the last dimension of {what} must be {inner}, got {what} of shape {sizes:?}"
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

/// Multiplies into `out`, or into a tensor of its own, which it returns.
fn product(
    kind: Product,
    a: &Tensor,
    weight: &Readable<'_>,
    shape: &Ints,
    bias: Option<&Tensor>,
    out: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let (rows, columns) = matrix(shape)?;
    let operand = weight.matrix(rows, columns)?;
    let sides = if kind == Product::Forward { (columns, rows) } else { (rows, columns) };
    let dtype = a.dtype()?;
    let what = if kind == Product::Forward { "A" } else { "grad_output" };
    product_shape(a, what, sides, |result_shape, n| {
        let fresh = match out {
            Some(out) => {
                expect_shape(out, result_shape)?;
                None
            }
            None => Some(Tensor::empty(result_shape, dtype)?),
        };
        let Some(result) = fresh.as_ref().or(out) else { unreachable!("one of the two is there") };
        let input = a.read("A")?;
        let bias = bias.map(|bias| bias.read("bias")).transpose()?;
        let mut destination = result.write("out")?;
        destination.apart_from(&input)?;
        weight.keep_apart(&destination)?;
        if let Some(bias) = &bias {
            destination.apart_from(bias)?;
        }
        use_torch_threads();
        with_float!(dtype, "A", T => {
            let (input, output) = (input.slice::<T>()?, destination.slice_mut::<T>()?);
            match kind {
                Product::Forward => {
                    let bias = bias.as_ref().map(Source::slice::<T>).transpose()?;
                    halfbyte::matmul_4bit(input, n, &operand, bias, output)?;
                }
                Product::GradInput => {
                    halfbyte::matmul_4bit_grad_input(input, n, &operand, output)?;
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
    weight: &Readable<'_>,
    shape: &Ints,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    product(kind, a, weight, shape, bias, None)?
        .ok_or_else(|| Error::Torch("the product was not returned".into()))
}

fn gemv(a: &Tensor, weight: GemvWeight, out: Option<&Tensor>) -> Result<Option<Tensor>> {
    let GemvWeight { packed, shape, absmax, code, blocksize } = weight;
    // The table is given, so no type is named.
    let state = State { code: Some(code), ..State::PLAIN };
    let weight = read_weight(&packed, &absmax, blocksize, None, &state)?;
    product(Product::Forward, a, &weight, &shape, None, out)
}

fn gemv_4bit(a: Tensor, weight: GemvWeight) -> Result<Tensor> {
    gemv(&a, weight, None)?.ok_or_else(|| Error::Torch("the product was not returned".into()))
}

fn gemv_4bit_out(a: Tensor, weight: GemvWeight, out: Tensor) -> Result<()> {
    gemv(&a, weight, Some(&out)).map(drop)
}

fn gemm_4bit(
    a: Tensor,
    weight: GemmWeight,
    bias: Option<Tensor>,
    nested: GemmNested,
) -> Result<Tensor> {
    let GemmWeight { packed, shape, absmax, blocksize, quant_type } = weight;
    // Upstream's convention: with double quantization `absmax` is the second level.
    let (absmax, absmax2) = match nested.absmax_8bit {
        None => (absmax, None),
        Some(first) => (first, Some(absmax)),
    };
    let state = State { absmax2, code2: nested.code, offset: nested.offset, ..State::PLAIN };
    let weight = read_weight(&packed, &absmax, blocksize, Some(&quant_type), &state)?;
    fresh_product(Product::Forward, &a, &weight, &shape, bias.as_ref())
}

fn matmul_4bit(a: Tensor, weight: Weight, bias: Option<Tensor>, state: State) -> Result<Tensor> {
    fresh_product(Product::Forward, &a, &weight.read(&state)?, &weight.shape, bias.as_ref())
}

fn matmul_4bit_out(
    a: Tensor,
    weight: Weight,
    bias: Option<Tensor>,
    state: State,
    out: Tensor,
) -> Result<()> {
    let (readable, bias) = (weight.read(&state)?, bias.as_ref());
    product(Product::Forward, &a, &readable, &weight.shape, bias, Some(&out)).map(drop)
}

fn matmul_4bit_grad_input(grad_output: Tensor, weight: Weight, state: State) -> Result<Tensor> {
    fresh_product(Product::GradInput, &grad_output, &weight.read(&state)?, &weight.shape, None)
}
