//! A 4-bit tensor that owns its memory: the typed front of the ops.

use crate::blocks::BlockSize;
use crate::code::Code4;
use crate::element::{DType, Element};
use crate::error::{Error, Result, check_len};
use crate::ops::{self, NonFinite, Weight4};
use crate::state::{OwnedScales, QuantState, QuantStorage, numel};

/// A quantized tensor: packed codes and their [`QuantState`].
///
/// ```
/// use halfbyte::{BlockSize, Code4, Params4bit};
///
/// // A weight [out_features = 2, in_features = 64] and one activation row.
/// let weight: Vec<f32> = (0..128).map(|i| (i as f32 * 0.37).sin()).collect();
/// let input = vec![0.5f32; 64];
///
/// let params = Params4bit::quantize(&weight, &[2, 64], Code4::Nf4, BlockSize::B64)?
///     .compress_statistics()?; // double quantization
/// assert_eq!(params.packed().len(), 64);
///
/// let output = params.matmul(&input, 1, None)?; // [1, 2], without decoding the weight to memory
/// let decoded: Vec<f32> = params.dequantize()?;
/// let exact: f32 = decoded[..64].iter().map(|w| 0.5 * w).sum();
/// assert!((output[0] - exact).abs() < 1e-4);
/// # Ok::<(), halfbyte::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Params4bit {
    packed: Vec<u8>,
    storage: QuantStorage,
    state: QuantState,
}

impl Params4bit {
    /// Quantizes `weight` (row-major, of the given shape; any rank).
    ///
    /// # Errors
    /// [`Error::Length`] when `weight` does not have the shape's number of elements,
    /// [`Error::NonFinite`] when it holds NaN or infinity, [`Error::Isa`] for a bad
    /// `HALFBYTE_ISA`.
    pub fn quantize<T: Element>(
        weight: &[T],
        shape: &[usize],
        quant_type: Code4,
        blocksize: BlockSize,
    ) -> Result<Self> {
        check_len("weight", numel(shape), weight.len(), "elements")?;
        let blocks = blocksize.over(weight.len());
        let mut packed = vec![0; blocks.packed_len()];
        let mut absmax = vec![0.0; blocks.count()];
        ops::quantize_4bit(
            weight,
            quant_type,
            blocksize,
            NonFinite::Refuse,
            &mut packed,
            &mut absmax,
        )?;
        let state = QuantState {
            quant_type,
            table: *quant_type.table(),
            blocksize,
            dtype: T::DTYPE,
            shape: shape.to_vec(),
            scales: OwnedScales::Plain(absmax),
        };
        Ok(Self { packed, storage: QuantStorage::default(), state })
    }

    /// Puts together what a checkpoint holds. `tensor` names the weight in error messages.
    ///
    /// `packed` may be longer than `ceil(numel / 2)` by the padding of its storage type.
    ///
    /// # Errors
    /// [`Error::State`] when the bytes or scales do not fit the state's shape.
    pub fn from_parts(
        mut packed: Vec<u8>,
        storage: QuantStorage,
        state: QuantState,
        tensor: &str,
    ) -> Result<Self> {
        let blocks = state.blocksize.over(state.numel());
        let stored = storage.rows(blocks.packed_len()) * storage.size();
        if packed.len() != blocks.packed_len() && packed.len() != stored {
            return Err(Error::State {
                tensor: tensor.to_owned(),
                reason: format!(
                    "shape {:?} needs {} packed bytes, got {}",
                    state.shape,
                    blocks.packed_len(),
                    packed.len()
                ),
            });
        }
        packed.truncate(blocks.packed_len());
        state.scales.as_scales().check(blocks).map_err(|e| Error::State {
            tensor: tensor.to_owned(),
            reason: format!("shape {:?} and the scales disagree: {e}", state.shape),
        })?;
        Ok(Self { packed, storage, state })
    }

    /// The same tensor with its scales quantized to 8 bits (`compress_statistics`, double
    /// quantization): 0.127 instead of 0.5 bits per parameter at block 64.
    ///
    /// # Errors
    /// [`Error::Isa`] for a bad `HALFBYTE_ISA`.
    pub fn compress_statistics(mut self) -> Result<Self> {
        self.state.compress_statistics()?;
        Ok(self)
    }

    /// The same tensor, to be saved under another storage type.
    #[must_use]
    pub fn with_storage(mut self, storage: QuantStorage) -> Self {
        self.storage = storage;
        self
    }

    /// Two codes a byte, the first in the high nibble: `ceil(numel / 2)` bytes.
    #[must_use]
    pub fn packed(&self) -> &[u8] {
        &self.packed
    }

    /// The type that the packed bytes are stored as.
    #[must_use]
    pub const fn storage(&self) -> QuantStorage {
        self.storage
    }

    /// Everything but the packed bytes.
    #[must_use]
    pub const fn state(&self) -> &QuantState {
        &self.state
    }

    /// The shape of the tensor before quantization.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.state.shape
    }

    /// Dtype of the tensor before quantization.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.state.dtype
    }

    /// Bytes in memory: packed codes and scales.
    #[must_use]
    pub fn nbytes(&self) -> usize {
        self.packed.len() + self.state.scales.nbytes()
    }

    /// Decodes the whole tensor, row-major, to any element type.
    ///
    /// # Errors
    /// [`Error::Isa`] for a bad `HALFBYTE_ISA`.
    pub fn dequantize<T: Element>(&self) -> Result<Vec<T>> {
        let mut out = vec![T::default(); self.state.numel()];
        ops::dequantize_4bit(
            &self.packed,
            &self.state.scales.as_scales(),
            &self.state.table,
            self.state.blocksize,
            &mut out,
        )?;
        Ok(out)
    }

    /// The tensor as the weight of a linear layer, `[out_features, in_features]`.
    ///
    /// # Errors
    /// [`Error::State`] unless the shape has two dimensions.
    pub fn weight(&self) -> Result<Weight4<'_>> {
        let &[out_features, in_features] = self.state.shape.as_slice() else {
            return Err(Error::State {
                tensor: "weight".to_owned(),
                reason: format!(
                    "a linear layer's weight has two dimensions, got shape {:?}",
                    self.state.shape
                ),
            });
        };
        Weight4::new(
            &self.packed,
            self.state.scales.as_scales(),
            &self.state.table,
            self.state.blocksize,
            out_features,
            in_features,
        )
    }

    /// `input · weight^T + bias`: `input` is `[rows, in_features]`, `bias` `[out_features]`, the
    /// result `[rows, out_features]`. The weight is never decoded to memory.
    ///
    /// # Errors
    /// [`Error::State`] unless the tensor has two dimensions, [`Error::Length`] when a buffer does
    /// not fit them.
    pub fn matmul<T: Element>(
        &self,
        input: &[T],
        rows: usize,
        bias: Option<&[T]>,
    ) -> Result<Vec<T>> {
        let weight = self.weight()?;
        let mut out = vec![T::default(); rows * weight.out_features()];
        ops::matmul_4bit(input, rows, &weight, bias, &mut out)?;
        Ok(out)
    }

    /// `grad_output · weight`: the gradient of [`matmul`](Self::matmul) for its input.
    /// `grad_output` is `[rows, out_features]`, the result `[rows, in_features]`.
    ///
    /// # Errors
    /// As [`matmul`](Self::matmul).
    pub fn matmul_grad_input<T: Element>(&self, grad_output: &[T], rows: usize) -> Result<Vec<T>> {
        let weight = self.weight()?;
        let mut out = vec![T::default(); rows * weight.in_features()];
        ops::matmul_4bit_grad_input(grad_output, rows, &weight, &mut out)?;
        Ok(out)
    }
}
