//! AVX2: 32 elements at a time, in four vectors of 8.

use super::{BEFORE_HALF, DOUBT, DynamicTables, FRACTION, PIECE_SHIFT, STEEP, piece};
use crate::Code8;
#[allow(clippy::wildcard_imports)] // the instruction set
use std::arch::x86_64::*;

/// Encodes groups of 32 elements.
pub(crate) trait Encode32 {
    /// The index of the nearest code for each lane, in order.
    ///
    /// # Safety
    /// The CPU has AVX2 and FMA.
    unsafe fn encode32(&self, y: [__m256; 4]) -> __m256i;
}

/// The low bytes of four vectors of 32-bit lanes (numbers below 2^16), interleaved as two levels of
/// packing within 128-bit lanes leave them.
#[inline]
#[target_feature(enable = "avx2")]
fn low_bytes([a, b, c, d]: [__m256i; 4]) -> __m256i {
    let byte = _mm256_set1_epi16(0xFF);
    let ab = _mm256_and_si256(_mm256_packus_epi32(a, b), byte);
    let cd = _mm256_and_si256(_mm256_packus_epi32(c, d), byte);
    _mm256_packus_epi16(ab, cd)
}

/// The signs of four vectors as bytes, -128 or more below zero and 0 to 127 above, interleaved as
/// by [`low_bytes`].
#[inline]
#[target_feature(enable = "avx2")]
fn signs(y: [__m256; 4]) -> __m256i {
    let [a, b, c, d] = y.map(|y| _mm256_castps_si256(y));
    _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d))
}

/// Undoes that interleaving.
#[inline]
#[target_feature(enable = "avx2")]
fn in_order(packed: __m256i) -> __m256i {
    _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
}

/// The search tree, its first four levels in registers.
pub(crate) struct Search256<'a> {
    tree: &'a [f32; 256],
    levels_0_to_2: __m256,
    level_3: __m256,
}

impl<'a> Search256<'a> {
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(crate) fn new(code: &'a Code8) -> Self {
        let tree = code.tree();
        // SAFETY: the tree holds 256 entries.
        unsafe {
            Self {
                tree,
                levels_0_to_2: _mm256_loadu_ps(tree.as_ptr()),
                level_3: _mm256_loadu_ps(tree.as_ptr().add(8)),
            }
        }
    }

    /// As [`Encode32::encode32`], one vector of 8 and its indices in 32-bit lanes.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn encode8(&self, y: __m256) -> __m256i {
        let descend = |h: __m256i, border: __m256| {
            let above = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(y, border)); // 0 or -1
            _mm256_sub_epi32(_mm256_add_epi32(h, h), above)
        };
        let mut h = _mm256_set1_epi32(1);
        for _ in 0..3 {
            h = descend(h, _mm256_permutevar8x32_ps(self.levels_0_to_2, h));
        }
        h = descend(h, _mm256_permutevar8x32_ps(self.level_3, h));
        for _ in 4..8 {
            // SAFETY: h is below 256 until the last step has doubled it.
            h = descend(h, unsafe { _mm256_i32gather_ps::<4>(self.tree.as_ptr(), h) });
        }
        h // 256 + the index
    }
}

impl Encode32 for Search256<'_> {
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn encode32(&self, y: [__m256; 4]) -> __m256i {
        in_order(low_bytes(y.map(|y| self.encode8(y))))
    }
}

/// Arithmetic for the default dynamic maps; lanes must be numbers in [-1, 1], give or take an ulp.
pub(crate) struct Dynamic256<const SIGNED: bool> {
    tables: &'static DynamicTables,
    slope: __m256,
    offset: __m256,
    first: __m256,
}

impl<const SIGNED: bool> Dynamic256<SIGNED> {
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(crate) fn new() -> Self {
        let tables = DynamicTables::get(SIGNED);
        // SAFETY: each table holds 8 entries.
        let load = |table: &[f32; 8]| unsafe { _mm256_loadu_ps(table.as_ptr()) };
        Self {
            tables,
            slope: load(&tables.slope),
            offset: load(&tables.offset),
            first: load(&tables.first),
        }
    }

    /// `256 + t`, as its bits.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn position(&self, y: __m256) -> __m256i {
        let floor = _mm256_set1_ps(self.tables.floor);
        let sign = if SIGNED { _mm256_set1_ps(-0.0) } else { _mm256_setzero_ps() };
        let a = _mm256_max_ps(_mm256_andnot_ps(sign, y), floor);
        let (multiplier, bias) = piece(SIGNED);
        let scaled = _mm256_madd_epi16(_mm256_castps_si256(a), _mm256_set1_epi32(multiplier << 16));
        let d = _mm256_srli_epi32::<{ PIECE_SHIFT as i32 }>(_mm256_add_epi32(
            scaled,
            _mm256_set1_epi32(bias),
        ));
        let line = |table| _mm256_permutevar8x32_ps(table, d); // reads the low 3 bits of d
        let t = _mm256_fmadd_ps(a, line(self.slope), line(self.offset));
        let t = _mm256_min_ps(t, _mm256_fmadd_ps(t, _mm256_set1_ps(STEEP), line(self.first)));
        if SIGNED {
            return _mm256_castps_si256(t);
        }
        let (slope, offset) = self.tables.last;
        let last = _mm256_fmadd_ps(a, _mm256_set1_ps(slope), _mm256_set1_ps(offset));
        _mm256_castps_si256(_mm256_max_ps(t, last))
    }

    /// The indices for positions `t` of which some are in doubt: by comparison with the border
    /// nearest to each.
    #[cold]
    #[inline(never)]
    #[target_feature(enable = "avx2,fma")]
    fn settle(&self, y: [__m256; 4], t: [__m256i; 4]) -> __m256i {
        let borders = self.tables.code.midpoints();
        in_order(low_bytes(std::array::from_fn(|i| {
            let rounded = _mm256_sub_epi32(t[i], _mm256_set1_epi32(BEFORE_HALF));
            let n = _mm256_srai_epi32::<{ FRACTION as i32 }>(rounded);
            let border = if SIGNED {
                let sign = _mm256_srai_epi32::<31>(_mm256_castps_si256(y[i]));
                _mm256_add_epi32(_mm256_xor_si256(n, sign), _mm256_set1_epi32(127))
            } else {
                n
            };
            let border = _mm256_max_epi32(border, _mm256_setzero_si256());
            let border = _mm256_min_epi32(border, _mm256_set1_epi32(254));
            // SAFETY: there are 255 borders.
            let value = unsafe { _mm256_i32gather_ps::<4>(borders.as_ptr(), border) };
            let above = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(y[i], value)); // 0 or -1
            _mm256_sub_epi32(border, above)
        })))
    }
}

impl<const SIGNED: bool> Encode32 for Dynamic256<SIGNED> {
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn encode32(&self, y: [__m256; 4]) -> __m256i {
        // Written out: a closure that is not inlined passes its vector through memory.
        let [a, b, c, d] = y;
        let t = [self.position(a), self.position(b), self.position(c), self.position(d)];
        let fraction = |t| _mm256_and_si256(t, _mm256_set1_epi32(DOUBT));
        // Fractions are below 2^15: the minimum is zero when any of the four is.
        let ab = _mm256_min_epi16(fraction(t[0]), fraction(t[1]));
        let cd = _mm256_min_epi16(fraction(t[2]), fraction(t[3]));
        let least = _mm256_min_epi16(ab, cd);
        let doubt = _mm256_cmpeq_epi32(least, _mm256_setzero_si256());
        if _mm256_testz_si256(doubt, doubt) == 0 {
            return self.settle(y, t);
        }
        let n = low_bytes(t.map(|t| _mm256_srli_epi32::<{ FRACTION as i32 }>(t)));
        if !SIGNED {
            return in_order(n);
        }
        // 127 - n for the negative. y = +0 has the sign byte 0, which makes n zero: it is zero
        // already. -1 lies below the last border of |y|, but there is no 128th negative code:
        // -128 saturates.
        let zero = _mm256_set1_epi8(127);
        let negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), signs(y));
        let above = _mm256_add_epi8(zero, n);
        let below = _mm256_subs_epu8(zero, n);
        in_order(_mm256_blendv_epi8(above, below, negative))
    }
}
