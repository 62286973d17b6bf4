//! Geometry of quantization blocks over a flattened tensor.

use crate::{Error, Result};
use std::ops::Range;

/// A validated block size: a power of two from 32 to 4096.
///
/// Parsed once at the door; below it, kernels are infallible and rely on blocks holding an even
/// number of elements (so a block never starts in the middle of a packed byte).
///
/// ```
/// use halfbyte::BlockSize;
/// assert_eq!(BlockSize::new(64)?.get(), 64);
/// assert!(BlockSize::new(48).unwrap_err().to_string().ends_with("got 48"));
/// # Ok::<(), halfbyte::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockSize(u16);

impl BlockSize {
    /// Every supported size, ascending.
    pub const ALL: [Self; 8] =
        [Self(32), Self(64), Self(128), Self(256), Self(512), Self(1024), Self(2048), Self(4096)];
    /// The default for 4-bit weights.
    pub const B64: Self = Self(64);
    /// The block of double quantization and of the 8-bit optimizers.
    pub const B256: Self = Self(256);
    /// The default of upstream's `quantize_blockwise`.
    pub const B4096: Self = Self(4096);

    /// Accepts 32, 64, 128, 256, 512, 1024, 2048 or 4096.
    ///
    /// # Errors
    /// [`Error::BlockSize`] for anything else.
    pub fn new(blocksize: usize) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|b| b.get() == blocksize)
            .ok_or(Error::BlockSize { got: blocksize })
    }

    /// The number of elements in a full block.
    #[must_use]
    pub const fn get(self) -> usize {
        self.0 as usize
    }

    /// Splits `len` flattened elements into blocks.
    #[must_use]
    pub const fn over(self, len: usize) -> Blocks {
        Blocks { len, blocksize: self }
    }
}

/// The blocks of a flattened tensor of `len` elements: all full, but the last may be short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    len: usize,
    blocksize: BlockSize,
}

impl Blocks {
    /// Number of elements covered.
    #[must_use]
    pub const fn len(self) -> usize {
        self.len
    }

    /// True when there is nothing to quantize.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The size of a full block.
    #[must_use]
    pub const fn blocksize(self) -> BlockSize {
        self.blocksize
    }

    /// Number of blocks, which is the number of scales (`absmax`): `ceil(len / blocksize)`.
    #[must_use]
    pub const fn count(self) -> usize {
        self.len.div_ceil(self.blocksize.get())
    }

    /// Bytes of the packed 4-bit form: `ceil(len / 2)`.
    #[must_use]
    pub const fn packed_len(self) -> usize {
        self.len.div_ceil(2)
    }

    /// Elements of the blocks `blocks.start..blocks.end`, clipped to the tensor.
    #[must_use]
    pub fn elements(self, blocks: Range<usize>) -> Range<usize> {
        let b = self.blocksize.get();
        blocks.start * b..(blocks.end * b).min(self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_ranges() {
        let blocks = BlockSize::B64.over(130);
        assert_eq!((blocks.count(), blocks.packed_len()), (3, 65));
        assert_eq!(blocks.elements(1..3), 64..130);
        let none = BlockSize::B64.over(0);
        assert!(none.is_empty() && none.count() == 0 && none.packed_len() == 0);
    }

    #[test]
    fn refuses_every_other_size() {
        for n in 0..10_000 {
            let known = BlockSize::ALL.iter().any(|b| b.get() == n);
            assert_eq!(BlockSize::new(n).is_ok(), known, "{n}");
        }
    }
}
