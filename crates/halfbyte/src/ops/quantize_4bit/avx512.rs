//! AVX-512.
//!
//! ```text
//! for each 32 elements (16 bytes of packed codes):
//!     E, O = the elements at even and odd places, as 16 float32 each
//!     for v in E, O:
//!         y    = v * reciprocal
//!         cell = floor(15 * y)
//!         rank = cell_rank[cell] + (y > cell_border[cell])
//!     byte = rank(E) << 4 | rank(O)
//! FP4: byte = codes[byte >> 4] << 4 | codes[byte & 15]
//! ```
//!
//! Liberties taken with it:
//! 1. `floor(15 y)` is one multiply-add rounding down onto 1.5 * 2^23: the cell is then in the low
//!    mantissa bits, and the two-register permutes read just the low five.
//! 2. The shift of E's rank is in a second copy of its table.
//! 3. Four vectors of 32-bit lanes are narrowed to 64 bytes at once, by two levels of in-lane
//!    packing and one permute that undoes the lanes.
//! 4. bfloat16 needs no shuffle to part even from odd: each 32-bit lane holds one of both.
//! 5. The chunk after this one is prefetched while this one is encoded.

use super::chunked::{CHUNK, GROUP, ROW, Variant};
use super::staircase::{Cells, Staircase};
use crate::blocks::BlockSize;
use crate::code::Code4;
use crate::{DType, Element};
#[allow(clippy::wildcard_imports)] // the instruction set
use std::arch::x86_64::*;

pub(super) struct Avx512;

impl Variant for Avx512 {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn absmax<T: Element>(x: &[T], blocksize: BlockSize, absmax: &mut [f32]) {
        for (block, scale) in x.chunks(blocksize.get()).zip(absmax) {
            // SAFETY: a block of whole rows is whole vectors of 32 16-bit or 16 32-bit elements.
            *scale = unsafe {
                match T::DTYPE {
                    DType::F32 => absmax32(block.as_ptr().cast(), block.len()),
                    DType::F16 => {
                        let half = _mm_cvtsi32_si128(absmax16(block.as_ptr().cast(), block.len()));
                        _mm_cvtss_f32(_mm_cvtph_ps(half))
                    }
                    DType::BF16 => {
                        let half = absmax16(block.as_ptr().cast(), block.len());
                        f32::from_bits((half as u32) << 16)
                    }
                }
            };
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn encode<T: Element>(
        x: &[T],
        code: Code4,
        blocksize: BlockSize,
        reciprocal: &[f32],
        packed: &mut [u8],
    ) {
        let shift = blocksize.get().trailing_zeros();
        let encoder = Encoder::new(code);
        for (i, (group, bytes)) in
            x.chunks_exact(GROUP).zip(packed.chunks_exact_mut(GROUP / 2)).enumerate()
        {
            let mut words = [_mm512_setzero_si512(); 4];
            for (row, word) in words.iter_mut().enumerate() {
                let r = _mm512_set1_ps(reciprocal[(i * GROUP + row * ROW) >> shift]);
                // SAFETY: a group holds four rows of 32 elements.
                let (even, odd) = unsafe { load_pairs(group.as_ptr().add(row * ROW)) };
                *word = encoder.bytes(_mm512_mul_ps(even, r), _mm512_mul_ps(odd, r));
                prefetch_row(group.as_ptr().wrapping_add(CHUNK + row * ROW));
            }
            let codes = encoder.codes(narrow(words));
            // SAFETY: `bytes` holds 64 bytes.
            unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), codes) };
        }
    }
}

/// The elements at even and at odd places among 32.
///
/// # Safety
/// `x` is valid for reading 32 elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn load_pairs<T: Element>(x: *const T) -> (__m512, __m512) {
    // SAFETY: the caller guarantees 32 readable elements.
    unsafe {
        if T::DTYPE == DType::BF16 {
            let pairs = _mm512_loadu_si512(x.cast());
            let even = _mm512_slli_epi32::<16>(pairs);
            let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF_0000u32 as i32));
            return (_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd));
        }
        let (a, b) = (T::load16(x), T::load16(x.add(16)));
        let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        (_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b))
    }
}

/// Asks for the lines of 32 elements at any address.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
#[allow(unused_unsafe)] // a safe function in newer compilers
fn prefetch_row<T: Element>(x: *const T) {
    for line in (0..ROW * size_of::<T>()).step_by(64) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(x.cast::<i8>().wrapping_add(line)) }
    }
}

/// The tables in registers.
#[derive(Clone, Copy)]
struct Encoder {
    border: [__m512; 2],
    rank: [__m512i; 2],
    rank_high: [__m512i; 2],
    /// Codes by rank, in both nibble positions; `None` when they are the ranks (NF4).
    codes: Option<[__m512i; 2]>,
}

impl Encoder {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn new(code: Code4) -> Self {
        let cells = Cells::of(code);
        // SAFETY: both tables hold 32 entries of 4 bytes, `codes` 16 of 1.
        unsafe {
            let border = [0, 16].map(|at| _mm512_loadu_ps(cells.border.as_ptr().add(at)));
            let rank = [0, 16].map(|at| _mm512_loadu_si512(cells.rank.as_ptr().add(at).cast()));
            let rank_high = rank.map(|r| _mm512_slli_epi32::<4>(r));
            let codes = (code == Code4::Fp4).then(|| {
                let low = _mm_loadu_si128(Staircase::of(code).codes.as_ptr().cast());
                let low = _mm512_broadcast_i32x4(low);
                [low, _mm512_slli_epi16::<4>(low)]
            });
            Self { border, rank, rank_high, codes }
        }
    }

    /// One byte of two ranks in each 32-bit lane.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn bytes(self, even: __m512, odd: __m512) -> __m512i {
        let high = self.rank(even, self.rank_high, 16);
        let low = self.rank(odd, self.rank, 1);
        _mm512_or_si512(high, low)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn rank(self, y: __m512, rank: [__m512i; 2], step: i32) -> __m512i {
        const DOWN: i32 = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
        let per_unit = _mm512_set1_ps(Cells::PER_UNIT);
        let integers = _mm512_set1_ps(1.5 * (1 << 23) as f32);
        let cell = _mm512_castps_si512(_mm512_fmadd_round_ps::<DOWN>(y, per_unit, integers));
        let border = _mm512_permutex2var_ps(self.border[0], cell, self.border[1]);
        let base = _mm512_permutex2var_epi32(rank[0], cell, rank[1]);
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(y, border);
        _mm512_mask_add_epi32(base, above, base, _mm512_set1_epi32(step))
    }

    /// Ranks to codes, two a byte.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn codes(self, ranks: __m512i) -> __m512i {
        let Some([low_codes, high_codes]) = self.codes else { return ranks };
        let nibble = _mm512_set1_epi8(0x0F);
        let low = _mm512_and_si512(ranks, nibble);
        let high = _mm512_and_si512(_mm512_srli_epi16::<4>(ranks), nibble);
        _mm512_or_si512(_mm512_shuffle_epi8(low_codes, low), _mm512_shuffle_epi8(high_codes, high))
    }
}

/// 64 32-bit lanes, each below 256, to 64 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn narrow(words: [__m512i; 4]) -> __m512i {
    let low = _mm512_packus_epi32(words[0], words[1]);
    let high = _mm512_packus_epi32(words[2], words[3]);
    // 32-bit lane 4 i + j now holds the i-th quarter of words[j].
    let quarters = _mm512_packus_epi16(low, high);
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_permutexvar_epi32(order, quarters)
}

/// The largest 15-bit magnitude, found as the smallest complement: `vphminposuw` ends the
/// reduction, and there is no such instruction for the largest.
///
/// # Safety
/// `x` is valid for reading `len` 16-bit elements, a multiple of 32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn absmax16(x: *const u16, len: usize) -> i32 {
    let magnitude = _mm512_set1_epi16(0x7FFF);
    let mut least = magnitude;
    for i in (0..len).step_by(32) {
        // SAFETY: `i + 32 <= len`.
        let x = unsafe { _mm512_loadu_si512(x.add(i).cast()) };
        least = _mm512_min_epu16(least, _mm512_andnot_si512(x, magnitude));
    }
    let least =
        _mm256_min_epu16(_mm512_castsi512_si256(least), _mm512_extracti64x4_epi64::<1>(least));
    let least = _mm_min_epu16(_mm256_castsi256_si128(least), _mm256_extracti128_si256::<1>(least));
    0x7FFF - (_mm_cvtsi128_si32(_mm_minpos_epu16(least)) & 0xFFFF)
}

/// The largest magnitude of float32 bits.
///
/// # Safety
/// `x` is valid for reading `len` 32-bit elements, a multiple of 32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn absmax32(x: *const u32, len: usize) -> f32 {
    let magnitude = _mm512_set1_epi32(0x7FFF_FFFF);
    let mut most = [_mm512_setzero_si512(); 2];
    for i in (0..len).step_by(32) {
        for (half, most) in most.iter_mut().enumerate() {
            // SAFETY: `i + 32 <= len`.
            let x = unsafe { _mm512_loadu_si512(x.add(i + half * 16).cast()) };
            *most = _mm512_max_epu32(*most, _mm512_and_si512(x, magnitude));
        }
    }
    f32::from_bits(_mm512_reduce_max_epu32(_mm512_max_epu32(most[0], most[1])))
}
