//! 4-bit weights and their states as ops list them, checked and readable.

use crate::error::{Error, Result};
use crate::gpu::Queue;
use crate::memory::{Destination, Source};
use crate::stack::{Ints, Str, group};
use crate::tensor::Tensor;
use halfbyte::{BlockSize, Code4, NestedScales, Scales, Weight4};
use halfbyte_gpu::DeviceSlice;
use halfbyte_gpu::ops as gpu;

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

/// A block size as Python passes it.
pub(crate) fn block_size(blocksize: i64) -> Result<BlockSize> {
    let parsed = usize::try_from(blocksize).ok().map(BlockSize::new);
    parsed.transpose()?.ok_or_else(|| {
        let message = halfbyte::Error::BlockSize { got: 0 }.to_string();
        Error::Value(format!("{}{blocksize}", message.trim_end_matches('0')))
    })
}

pub(crate) fn code4(quant_type: &Str) -> Result<Code4> {
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

pub(crate) fn numbers(len: usize) -> i64 {
    len as i64 // lengths come from tensors, whose sizes are i64
}

/// `[out_features, in_features]`.
pub(crate) fn matrix(shape: &Ints) -> Result<(usize, usize)> {
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

/// A weight with its state, checked and readable.
pub(crate) struct Readable<'a> {
    packed: Source<'a>,
    absmax: Source<'a>,
    table: Table<'a>,
    pub(crate) blocksize: BlockSize,
    nested: Option<Nested<'a>>,
}

/// The 16 values.
enum Table<'a> {
    Standard(Code4),
    /// The state's own, wherever they are.
    Own(Source<'a>),
}

struct Nested<'a> {
    absmax2: Source<'a>,
    code2: Source<'a>,
    offset: Source<'a>,
    blocksize: BlockSize,
}

impl State {
    /// The standard code and no double quantization.
    pub(crate) const PLAIN: Self =
        Self { code: None, absmax2: None, code2: None, offset: None, blocksize2: 256 };

    /// The 16 values: the state's own, or those of the type.
    fn table(&self, standard: Option<Code4>) -> Result<Table<'_>> {
        match (&self.code, standard) {
            (None, Some(code)) => Ok(Table::Standard(code)),
            (None, None) => Err(Error::Value("code must hold 16 values, got none".into())),
            (Some(code), _) => {
                let code = code.read_as::<f32>("code")?;
                if code.len() != 16 {
                    return Err(Error::Value(format!(
                        "code must hold 16 values, got {}",
                        code.len()
                    )));
                }
                Ok(Table::Own(code))
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
        if offset.len() != 1 {
            return Err(Error::Value(format!("offset must hold one value, got {}", offset.len())));
        }
        let code2 = code2.read_as::<f32>("code2")?;
        if code2.len() != 256 {
            return Err(Error::Value(format!("code2 must hold 256 values, got {}", code2.len())));
        }
        Ok(Some(Nested {
            absmax2: absmax2.read_as::<f32>("absmax2")?,
            code2,
            offset,
            blocksize: block_size(self.blocksize2)?,
        }))
    }
}

/// Reads a weight of which the type is known by name, or only by the state's code.
pub(crate) fn read_weight<'a>(
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

impl<'a> Readable<'a> {
    /// The codes, as they lie.
    pub(crate) fn packed(&self) -> &Source<'a> {
        &self.packed
    }

    /// Refuses an output that lies over any part of the state.
    pub(crate) fn keep_apart(&self, out: &Destination<'_>) -> Result<()> {
        out.apart_from(&self.packed)?;
        out.apart_from(&self.absmax)?;
        if let Table::Own(code) = &self.table {
            out.apart_from(code)?;
        }
        if let Some(nested) = &self.nested {
            out.apart_from(&nested.absmax2)?;
            out.apart_from(&nested.code2)?;
            out.apart_from(&nested.offset)?;
        }
        Ok(())
    }

    /// The number of bytes of `n` codes; the zeros that fill up the last storage element come
    /// behind them.
    ///
    /// # Errors
    /// [`Error::Value`] when the buffer holds fewer, or more than that.
    pub(crate) fn code_bytes(&self, n: usize) -> Result<usize> {
        const WIDEST_STORAGE: usize = 8;
        let (bytes, need) = (self.packed.nbytes(), n.div_ceil(2));
        if bytes < need || bytes >= need + WIDEST_STORAGE {
            return Err(Error::Value(format!(
                "packed must hold {need} bytes for {n} elements, got {bytes}"
            )));
        }
        Ok(need)
    }

    // ---- on the CPU ----------------------------------------------------------------------------

    /// The bytes of `n` codes.
    pub(crate) fn codes(&self, n: usize) -> Result<&[u8]> {
        let need = self.code_bytes(n)?;
        Ok(&self.packed.bytes()?[..need])
    }

    pub(crate) fn table(&self) -> Result<[f32; 16]> {
        match &self.table {
            Table::Standard(code) => Ok(*code.table()),
            Table::Own(values) => values.slice()?.try_into().map_err(|_| {
                Error::Value(format!("code must hold 16 values, got {}", values.len()))
            }),
        }
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
                offset: nested.offset.slice()?[0], // one value, see `State::nested`
            }),
        })
    }

    pub(crate) fn matrix<'t>(
        &'t self,
        table: &'t [f32; 16],
        rows: usize,
        columns: usize,
    ) -> Result<Weight4<'t>> {
        let codes = self.codes(rows * columns)?;
        Ok(Weight4::new(codes, self.scales()?, table, self.blocksize, rows, columns)?)
    }

    // ---- on a GPU ------------------------------------------------------------------------------

    /// The bytes of `n` codes.
    pub(crate) fn codes_on(&self, queue: &Queue, n: usize) -> Result<DeviceSlice<u8>> {
        let need = self.code_bytes(n)?;
        Ok(self.packed.bytes_on(queue)?.part("packed", 0, need)?)
    }

    pub(crate) fn table_on(&self, queue: &Queue) -> Result<gpu::Table4> {
        Ok(match &self.table {
            Table::Standard(code) => gpu::Table4::Standard(*code),
            Table::Own(values) => gpu::Table4::Device(values.on(queue)?),
        })
    }

    /// The scales of `n` elements.
    pub(crate) fn scales_on(&self, queue: &Queue, n: usize) -> Result<gpu::Scales> {
        let (expected, got) = (self.blocksize.over(n).count(), self.absmax.len());
        if got != expected {
            let unit = if self.nested.is_some() { "8-bit scales" } else { "float32 scales" };
            let buffer = "absmax";
            return Err(halfbyte::Error::Length { buffer, expected, got, unit }.into());
        }
        Ok(match &self.nested {
            None => gpu::Scales::Plain(self.absmax.on(queue)?),
            Some(nested) => gpu::Scales::Nested(gpu::NestedScales {
                absmax: self.absmax.on(queue)?,
                code: nested.code2.on(queue)?,
                absmax2: nested.absmax2.on(queue)?,
                blocksize: nested.blocksize,
                offset: nested.offset.on(queue)?,
            }),
        })
    }

    pub(crate) fn matrix_on(
        &self,
        queue: &Queue,
        rows: usize,
        columns: usize,
    ) -> Result<gpu::Weight4> {
        let codes = self.codes_on(queue, rows * columns)?;
        let (scales, table) = (self.scales_on(queue, rows * columns)?, self.table_on(queue)?);
        Ok(gpu::Weight4::new(codes, scales, table, self.blocksize, rows, columns)?)
    }
}
