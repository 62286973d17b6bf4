//! The operations. One folder per op: `mod.rs` is the contract (documentation, checks, table of
//! variants, threading), `scalar.rs` the definition that every other file must equal.

use crate::blocks::{BlockSize, Blocks};
use crate::error::{Error, Result, check_len};

mod ahead;
mod dequantize_4bit;
mod dequantize_blockwise;
mod double_quant;
mod experts;
mod gemm;
mod int8;
mod matmul_4bit;
pub(crate) mod normalize;
mod quantize_4bit;
mod quantize_blockwise;

pub use dequantize_4bit::dequantize_4bit;
pub use dequantize_blockwise::dequantize_blockwise;
pub use double_quant::quantize_absmax;
pub use experts::{
    Experts4, Experts8, Routing, TokenRows, experts_matmul_4bit, experts_matmul_4bit_grad_input,
    experts_matmul_8bit_grad_input,
};
pub use int8::{
    INT8_MAX_DEPTH, Weight8, experts_matmul_8bit, int8_double_quant, int8_linear,
    int8_linear_grad_input, int8_linear_matmul, int8_mixed_scaled_mm, int8_mm_dequant,
    int8_scaled_mm, int8_vectorwise_dequant, int8_vectorwise_quant,
};
pub use matmul_4bit::{Weight4, matmul_4bit, matmul_4bit_grad_input};
pub use quantize_4bit::quantize_4bit;
pub use quantize_blockwise::quantize_blockwise;

/// What a quantize op does with NaN or infinity in its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NonFinite {
    /// [`Error::NonFinite`], naming the first such block. Found from the scales, without a second
    /// pass over the input.
    Refuse,
    /// The block's `absmax` becomes NaN or infinity (as in PyTorch's bitsandbytes ops).
    Propagate,
}

impl NonFinite {
    fn check(self, absmax: &[f32], blocks: Blocks) -> Result<()> {
        if self == Self::Propagate {
            return Ok(());
        }
        match absmax.iter().position(|a| !a.is_finite()) {
            None => Ok(()),
            Some(block) => {
                let elements = blocks.elements(block..block + 1);
                Err(Error::NonFinite { block, start: elements.start, end: elements.end })
            }
        }
    }
}

/// The scales of a 4-bit tensor, one per block.
#[derive(Clone, Copy, Debug)]
pub enum Scales<'a> {
    /// float32 `absmax`.
    Plain(&'a [f32]),
    /// Double-quantized `absmax`.
    Nested(NestedScales<'a>),
}

/// Double-quantized scales: scale `i` is `code[absmax[i]] * absmax2[i / blocksize] + offset`,
/// each operation rounded to float32.
#[derive(Clone, Copy, Debug)]
pub struct NestedScales<'a> {
    /// One 8-bit index per block of the weight.
    pub absmax: &'a [u8],
    /// The 8-bit code of `absmax`.
    pub code: &'a [f32; 256],
    /// One float32 scale per `blocksize` entries of `absmax`.
    pub absmax2: &'a [f32],
    /// Block size of the second level (256 in every known checkpoint).
    pub blocksize: BlockSize,
    /// The mean that was subtracted before quantizing.
    pub offset: f32,
}

impl Scales<'_> {
    /// Number of scales.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::Plain(absmax) => absmax.len(),
            Self::Nested(nested) => nested.absmax.len(),
        }
    }

    /// True when there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Checks both levels' lengths against the weight's blocks.
    pub(crate) fn check(&self, blocks: Blocks) -> Result<()> {
        match self {
            Self::Plain(absmax) => {
                check_len("absmax", blocks.count(), absmax.len(), "float32 scales")
            }
            Self::Nested(n) => {
                check_len("absmax", blocks.count(), n.absmax.len(), "8-bit scales")?;
                let second = n.blocksize.over(n.absmax.len()).count();
                check_len("absmax2", second, n.absmax2.len(), "float32 scales")
            }
        }
    }

    /// Scales `start..start + out.len()` as float32.
    ///
    /// # Panics
    /// When the range passes the end; callers have run [`check`](Self::check).
    pub(crate) fn decode(&self, start: usize, out: &mut [f32]) {
        match self {
            Self::Plain(absmax) => out.copy_from_slice(&absmax[start..start + out.len()]),
            Self::Nested(n) => {
                let b = n.blocksize.get();
                for (i, (q, o)) in n.absmax[start..].iter().zip(out).enumerate() {
                    *o = n.code[*q as usize] * n.absmax2[(start + i) / b] + n.offset;
                }
            }
        }
    }
}
