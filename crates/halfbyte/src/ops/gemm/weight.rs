//! What a weight is to the product, and runs of 4-bit codes.

use super::{Ahead, LANES, Line, Micro};
use std::ops::Range;

/// A quantized weight `[out_features, in_features]`, decoded to float32 on its way into blocks and
/// panels. Ranges of columns are not empty, and at most [`MAX_RUN`](super::MAX_RUN) long.
pub(in crate::ops) trait Weight: Copy + Sync {
    fn out_features(&self) -> usize;
    fn in_features(&self) -> usize;
    /// Row `o`, by the definition that every other way must equal.
    fn decode_row(&self, o: usize, row: &mut [f32]);
    /// Decodes columns `columns` of row `o`, 16 to a line, lines `stride` apart; the last is
    /// filled up with zeros.
    fn decode<M: Micro>(&self, o: usize, columns: Range<usize>, out: &mut [Line], stride: usize);
    /// Starts bringing what `decode` will read into the cache. There need be no such row.
    fn fetch(&self, o: usize, columns: Range<usize>, ahead: &mut Ahead);
}

/// A run of codes in one row of the weight.
pub(in crate::ops) struct Run<'a> {
    /// The whole weight's bytes.
    pub(in crate::ops) packed: &'a [u8],
    /// Index of the run's first code in the flattened weight.
    pub(in crate::ops) first: usize,
    pub(in crate::ops) len: usize,
    /// The scales from `first`'s block on.
    pub(in crate::ops) scales: &'a [f32],
    /// `log2` of the block size.
    pub(in crate::ops) shift: u32,
    pub(in crate::ops) table: &'a [f32; 16],
}

/// Up to 16 codes of a run that start anywhere, even within a byte.
pub(super) struct Group {
    /// The first code is in the highest nibble.
    pub(super) codes: u64,
    pub(super) len: usize,
    /// Lanes from `border` on have the second scale.
    pub(super) border: usize,
    pub(super) scales: [f32; 2],
}

impl Run<'_> {
    /// Full lines that a kernel may read straight from the bytes, 8 each: all of them if the
    /// run starts at a multiple of 16 (then a line lies within a block), else none.
    pub(super) fn aligned_lines(&self) -> usize {
        if self.first.is_multiple_of(LANES) { self.len / LANES } else { 0 }
    }

    /// The bytes of those lines, a block or less at a time, and the scale of each.
    #[inline]
    pub(super) fn aligned(&self) -> impl Iterator<Item = (&[[u8; 8]], f32)> {
        let start = self.first / 2;
        let mut left = self.packed[start..start + self.aligned_lines() * 8].as_chunks::<8>().0;
        let block = (1 << self.shift) / LANES;
        let mut now = block - self.first / LANES % block;
        self.scales.iter().map_while(move |scale| {
            let (lines, rest) = left.split_at(now.min(left.len()));
            (now, left) = (block, rest);
            (!lines.is_empty()).then_some((lines, *scale))
        })
    }

    /// Codes `16 * i ..` of the run.
    #[inline]
    pub(super) fn group(&self, i: usize) -> Group {
        let at = self.first + i * LANES;
        let len = (self.len - i * LANES).min(LANES);
        let byte = at / 2;
        let nine: [u8; 9] = self.packed.get(byte..byte + 9).map_or_else(
            || {
                let mut end = [0; 9];
                let bytes = &self.packed[byte..(at + len).div_ceil(2)];
                end[..bytes.len()].copy_from_slice(bytes);
                end
            },
            |bytes| bytes.try_into().expect("nine bytes"),
        );
        let [first @ .., last] = nine;
        let mut codes = u64::from_be_bytes(first);
        if at % 2 == 1 {
            codes = codes << 4 | u64::from(last >> 4);
        }
        let block = at >> self.shift;
        let scale = block - (self.first >> self.shift);
        Group {
            codes,
            len,
            border: ((block + 1) << self.shift) - at,
            scales: [self.scales[scale], *self.scales.get(scale + 1).unwrap_or(&0.0)],
        }
    }
}
