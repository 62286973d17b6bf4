//! AVX-512: 64 elements at a time, in four vectors of 16.

use super::{BEFORE_HALF, DOUBT, DynamicTables, FRACTION, PIECE_SHIFT, STEEP, piece};
use crate::Code8;
#[allow(clippy::wildcard_imports)] // the instruction set
use std::arch::x86_64::*;

/// Encodes groups of 64 elements.
pub(crate) trait Encode64 {
    /// The index of the nearest code for each lane, in order.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW, DQ and VL.
    unsafe fn encode64(&self, y: [__m512; 4]) -> __m512i;
}

/// The low bytes of four vectors of 32-bit lanes (numbers below 2^16), interleaved as two levels of
/// packing within 128-bit lanes leave them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn low_bytes([a, b, c, d]: [__m512i; 4]) -> __m512i {
    let byte = _mm512_set1_epi16(0xFF);
    let ab = _mm512_and_si512(_mm512_packus_epi32(a, b), byte);
    let cd = _mm512_and_si512(_mm512_packus_epi32(c, d), byte);
    _mm512_packus_epi16(ab, cd)
}

/// The signs of four vectors, interleaved as by [`low_bytes`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn signs(y: [__m512; 4]) -> __mmask64 {
    let [a, b, c, d] = y.map(|y| _mm512_castps_si512(y));
    let saturated = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    _mm512_movepi8_mask(saturated)
}

/// Undoes that interleaving.
#[inline]
#[target_feature(enable = "avx512f")]
fn in_order(packed: __m512i) -> __m512i {
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_permutexvar_epi32(order, packed)
}

/// The search tree, in registers.
pub(crate) struct Search512 {
    /// `tree[16 * i..]`: levels 0-4 in the first two, level 5 in the next two, level 6 in four,
    /// level 7 in eight.
    tree: [__m512; 16],
    /// 1, which the compiler does not know: of a known 1 it makes three instructions in place of
    /// one masked one.
    one: __m512i,
}

impl Search512 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(crate) fn new(code: &Code8) -> Self {
        let tree = code.tree();
        // SAFETY: the tree holds 256 = 16 * 16 entries.
        let row = |i: usize| unsafe { _mm512_loadu_ps(tree.as_ptr().add(16 * i)) };
        Self { tree: std::array::from_fn(row), one: std::hint::black_box(_mm512_set1_epi32(1)) }
    }

    /// As [`Encode64::encode64`], one vector of 16 and its indices in 32-bit lanes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn encode16(&self, y: __m512) -> __m512i {
        let t = &self.tree;
        let descend = |h: __m512i, border: __m512| {
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(y, border);
            let child = _mm512_add_epi32(h, h);
            _mm512_mask_or_epi32(child, above, child, self.one)
        };
        let bit = |h: __m512i, i: u32| _mm512_test_epi32_mask(h, _mm512_set1_epi32(1 << i));
        let pick = |h: __m512i, i: usize| _mm512_permutex2var_ps(t[i], h, t[i + 1]);
        let mut h = _mm512_set1_epi32(1);
        for _ in 0..5 {
            h = descend(h, pick(h, 0));
        }
        h = descend(h, pick(h, 2));
        h = descend(h, _mm512_mask_mov_ps(pick(h, 4), bit(h, 5), pick(h, 6)));
        let (b5, b6) = (bit(h, 5), bit(h, 6));
        let lower = _mm512_mask_mov_ps(pick(h, 8), b5, pick(h, 10));
        let upper = _mm512_mask_mov_ps(pick(h, 12), b5, pick(h, 14));
        descend(h, _mm512_mask_mov_ps(lower, b6, upper)) // 256 + the index
    }
}

impl Encode64 for Search512 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn encode64(&self, y: [__m512; 4]) -> __m512i {
        in_order(low_bytes(y.map(|y| self.encode16(y))))
    }
}

/// Arithmetic for the default dynamic maps; lanes must be numbers in [-1, 1], give or take an ulp.
pub(crate) struct Dynamic512<const SIGNED: bool> {
    tables: &'static DynamicTables,
    slope: __m512,
    offset: __m512,
    first: __m512,
}

impl<const SIGNED: bool> Dynamic512<SIGNED> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(crate) fn new() -> Self {
        let tables = DynamicTables::get(SIGNED);
        let twice = |table: &[f32; 8]| {
            // SAFETY: the table holds 8 entries.
            _mm512_broadcast_f32x8(unsafe { _mm256_loadu_ps(table.as_ptr()) })
        };
        Self {
            tables,
            slope: twice(&tables.slope),
            offset: twice(&tables.offset),
            first: twice(&tables.first),
        }
    }

    /// `256 + t`, as its bits.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn position(&self, y: __m512) -> __m512i {
        let floor = _mm512_set1_ps(self.tables.floor);
        let a = if SIGNED {
            _mm512_range_ps::<0b1011>(y, floor) // the larger magnitude, without sign
        } else {
            _mm512_max_ps(y, floor)
        };
        let (multiplier, bias) = piece(SIGNED);
        let scaled = _mm512_madd_epi16(_mm512_castps_si512(a), _mm512_set1_epi32(multiplier << 16));
        let d = _mm512_srli_epi32::<PIECE_SHIFT>(_mm512_add_epi32(scaled, _mm512_set1_epi32(bias)));
        let line = |table| _mm512_permutexvar_ps(d, table); // reads the low 4 bits of d
        let t = _mm512_fmadd_ps(a, line(self.slope), line(self.offset));
        let t = _mm512_min_ps(t, _mm512_fmadd_ps(t, _mm512_set1_ps(STEEP), line(self.first)));
        if SIGNED {
            return _mm512_castps_si512(t);
        }
        let (slope, offset) = self.tables.last;
        let last = _mm512_fmadd_ps(a, _mm512_set1_ps(slope), _mm512_set1_ps(offset));
        _mm512_castps_si512(_mm512_max_ps(t, last))
    }

    /// The indices for positions `t` of which some are in doubt: by comparison with the border
    /// nearest to each.
    #[cold]
    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn settle(&self, y: [__m512; 4], t: [__m512i; 4]) -> __m512i {
        let borders = self.tables.code.midpoints();
        in_order(low_bytes(std::array::from_fn(|i| {
            let rounded = _mm512_sub_epi32(t[i], _mm512_set1_epi32(BEFORE_HALF));
            let n = _mm512_srai_epi32::<FRACTION>(rounded);
            let border = if SIGNED {
                let sign = _mm512_srai_epi32::<31>(_mm512_castps_si512(y[i]));
                _mm512_add_epi32(_mm512_xor_si512(n, sign), _mm512_set1_epi32(127))
            } else {
                n
            };
            let border = _mm512_max_epi32(border, _mm512_setzero_si512());
            let border = _mm512_min_epi32(border, _mm512_set1_epi32(254));
            // SAFETY: there are 255 borders.
            let value = unsafe { _mm512_i32gather_ps::<4>(border, borders.as_ptr()) };
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(y[i], value);
            _mm512_mask_add_epi32(border, above, border, _mm512_set1_epi32(1))
        })))
    }
}

impl<const SIGNED: bool> Encode64 for Dynamic512<SIGNED> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn encode64(&self, y: [__m512; 4]) -> __m512i {
        // Written out: a closure that is not inlined passes its vector through memory.
        let [a, b, c, d] = y;
        let t = [self.position(a), self.position(b), self.position(c), self.position(d)];
        let doubt = |t| _mm512_testn_epi32_mask(t, _mm512_set1_epi32(DOUBT));
        if doubt(t[0]) | doubt(t[1]) | doubt(t[2]) | doubt(t[3]) != 0 {
            return self.settle(y, t);
        }
        let n = low_bytes(t.map(|t| _mm512_srli_epi32::<FRACTION>(t)));
        if !SIGNED {
            return in_order(n);
        }
        let zero = _mm512_set1_epi8(127);
        // Saturating: -1 lies below the last border of |y|, but there is no 128th negative code.
        in_order(_mm512_mask_subs_epu8(_mm512_add_epi8(zero, n), signs(y), zero, n))
    }
}
