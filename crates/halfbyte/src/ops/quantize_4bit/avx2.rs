//! AVX2.
//!
//! ```text
//! for each 16 elements (8 bytes of packed codes):
//!     E, O = the elements at even and odd places, as 8 float32 each
//!     for v in E, O:
//!         y    = v * reciprocal
//!         rank = binary search for y among the 15 borders
//!     byte = rank(E) << 4 | rank(O)
//! FP4: byte = codes[byte >> 4] << 4 | codes[byte & 15]
//! ```
//!
//! Liberties taken with it:
//! 1. The path through the search is kept negated, since a comparison gives 0 or -1: after level
//!    k it is `-(borders passed)`, whose low three bits choose the next border by `vpermps`.
//! 2. Ranks become positive again after packing to 16 bits, by an absolute value.
//! 3. Four vectors of 32-bit lanes are narrowed to 32 bytes at once, by two levels of in-lane
//!    packing and one permute that undoes the lanes.
//! 4. bfloat16 needs no shuffle to part even from odd: each 32-bit lane holds one of both.
//! 5. The chunk after this one is prefetched while this one is encoded.

use super::chunked::{CHUNK, GROUP, ROW, Variant};
use super::staircase::Staircase;
use crate::blocks::BlockSize;
use crate::code::Code4;
use crate::{DType, Element};
#[allow(clippy::wildcard_imports)] // the instruction set
use std::arch::x86_64::*;

/// Elements whose codes fill a vector.
const SIXTY_FOUR: usize = GROUP / 2;

pub(super) struct Avx2;

impl Variant for Avx2 {
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn absmax<T: Element>(x: &[T], blocksize: BlockSize, absmax: &mut [f32]) {
        for (block, scale) in x.chunks(blocksize.get()).zip(absmax) {
            // SAFETY: a block of whole rows is whole vectors of 16 16-bit or 8 32-bit elements.
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

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn encode<T: Element>(
        x: &[T],
        code: Code4,
        blocksize: BlockSize,
        reciprocal: &[f32],
        packed: &mut [u8],
    ) {
        let shift = blocksize.get().trailing_zeros();
        let encoder = Encoder::new(code);
        for (i, (part, bytes)) in
            x.chunks_exact(SIXTY_FOUR).zip(packed.chunks_exact_mut(SIXTY_FOUR / 2)).enumerate()
        {
            let mut words = [_mm256_setzero_si256(); 4];
            for (j, word) in words.iter_mut().enumerate() {
                let at = i * SIXTY_FOUR + j / 2 * ROW;
                let r = _mm256_set1_ps(reciprocal[at >> shift]);
                // SAFETY: the part holds four times 16 elements.
                let (even, odd) = unsafe { load_pairs(part.as_ptr().add(j * 16)) };
                *word = encoder.bytes(_mm256_mul_ps(even, r), _mm256_mul_ps(odd, r));
                if T::DTYPE != DType::BF16 {
                    // Undoes the in-lane shuffle of `load_pairs`.
                    *word = _mm256_permute4x64_epi64::<0b11_01_10_00>(*word);
                }
                prefetch_sixteen(part.as_ptr().wrapping_add(CHUNK + j * 16));
            }
            let codes = encoder.codes(narrow(words));
            // SAFETY: `bytes` holds 32 bytes.
            unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), codes) };
        }
    }
}

/// The elements at even and at odd places among 16; for all but bfloat16, with the middle two
/// quarters of the result exchanged.
///
/// # Safety
/// `x` is valid for reading 16 elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_pairs<T: Element>(x: *const T) -> (__m256, __m256) {
    // SAFETY: the caller guarantees 16 readable elements.
    unsafe {
        if T::DTYPE == DType::BF16 {
            let pairs = _mm256_loadu_si256(x.cast());
            let even = _mm256_slli_epi32::<16>(pairs);
            let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(0xFFFF_0000u32 as i32));
            return (_mm256_castsi256_ps(even), _mm256_castsi256_ps(odd));
        }
        let (a, b) = (T::load8(x), T::load8(x.add(8)));
        (_mm256_shuffle_ps::<0b10_00_10_00>(a, b), _mm256_shuffle_ps::<0b11_01_11_01>(a, b))
    }
}

/// Asks for the line in which 16 elements at any address begin.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
#[allow(unused_unsafe)] // a safe function in newer compilers
fn prefetch_sixteen<T: Element>(x: *const T) {
    // SAFETY: a prefetch never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(x.cast::<i8>()) }
}

/// The tables in registers.
#[derive(Clone, Copy)]
struct Encoder {
    root: __m256,
    /// The borders of the search tree's other levels, by the low bits of a negated path.
    levels: [__m256; 3],
    /// Codes by rank, in both nibble positions; `None` when they are the ranks (NF4).
    codes: Option<[__m256i; 2]>,
}

impl Encoder {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new(code: Code4) -> Self {
        let Staircase { borders: m, codes } = Staircase::of(code);
        let root = _mm256_set1_ps(m[7]);
        let levels = [
            _mm256_setr_ps(m[3], 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, m[11]),
            _mm256_setr_ps(m[1], 0.0, 0.0, 0.0, 0.0, m[13], m[9], m[5]),
            _mm256_setr_ps(m[0], m[14], m[12], m[10], m[8], m[6], m[4], m[2]),
        ];
        let codes = (code == Code4::Fp4).then(|| {
            // SAFETY: `codes` holds 16 bytes.
            let low = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
            let low = _mm256_broadcastsi128_si256(low);
            [low, _mm256_slli_epi16::<4>(low)]
        });
        Self { root, levels, codes }
    }

    /// One byte of two ranks in each 32-bit lane, negated.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn bytes(self, even: __m256, odd: __m256) -> __m256i {
        _mm256_add_epi32(_mm256_slli_epi32::<4>(self.rank(even)), self.rank(odd))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn rank(self, y: __m256) -> __m256i {
        let mut path = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(y, self.root));
        for level in self.levels {
            let border = _mm256_permutevar8x32_ps(level, path);
            let above = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(y, border));
            path = _mm256_add_epi32(_mm256_add_epi32(path, path), above);
        }
        path
    }

    /// Ranks to codes, two a byte.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn codes(self, ranks: __m256i) -> __m256i {
        let Some([low_codes, high_codes]) = self.codes else { return ranks };
        let nibble = _mm256_set1_epi8(0x0F);
        let low = _mm256_and_si256(ranks, nibble);
        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(ranks), nibble);
        _mm256_or_si256(_mm256_shuffle_epi8(low_codes, low), _mm256_shuffle_epi8(high_codes, high))
    }
}

/// 32 32-bit lanes, each in -255..=0, to 32 bytes without the sign.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn narrow(words: [__m256i; 4]) -> __m256i {
    let low = _mm256_abs_epi16(_mm256_packs_epi32(words[0], words[1]));
    let high = _mm256_abs_epi16(_mm256_packs_epi32(words[2], words[3]));
    // 32-bit lane 4 i + j now holds the i-th half of words[j].
    let halves = _mm256_packus_epi16(low, high);
    _mm256_permutevar8x32_epi32(halves, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
}

/// The largest 15-bit magnitude, found as the smallest complement: `vphminposuw` ends the
/// reduction, and there is no such instruction for the largest.
///
/// # Safety
/// `x` is valid for reading `len` 16-bit elements, a multiple of 32.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn absmax16(x: *const u16, len: usize) -> i32 {
    let magnitude = _mm256_set1_epi16(0x7FFF);
    let mut least = [magnitude; 2];
    for i in (0..len).step_by(32) {
        for (half, least) in least.iter_mut().enumerate() {
            // SAFETY: `i + 32 <= len`.
            let x = unsafe { _mm256_loadu_si256(x.add(i + half * 16).cast()) };
            *least = _mm256_min_epu16(*least, _mm256_andnot_si256(x, magnitude));
        }
    }
    let least = _mm256_min_epu16(least[0], least[1]);
    let least = _mm_min_epu16(_mm256_castsi256_si128(least), _mm256_extracti128_si256::<1>(least));
    0x7FFF - (_mm_cvtsi128_si32(_mm_minpos_epu16(least)) & 0xFFFF)
}

/// The largest magnitude of float32 bits.
///
/// # Safety
/// `x` is valid for reading `len` 32-bit elements, a multiple of 32.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn absmax32(x: *const u32, len: usize) -> f32 {
    let magnitude = _mm256_set1_epi32(0x7FFF_FFFF);
    let mut most = [_mm256_setzero_si256(); 4];
    for i in (0..len).step_by(32) {
        for (quarter, most) in most.iter_mut().enumerate() {
            // SAFETY: `i + 32 <= len`.
            let x = unsafe { _mm256_loadu_si256(x.add(i + quarter * 8).cast()) };
            *most = _mm256_max_epu32(*most, _mm256_and_si256(x, magnitude));
        }
    }
    let most =
        _mm256_max_epu32(_mm256_max_epu32(most[0], most[1]), _mm256_max_epu32(most[2], most[3]));
    let most = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256::<1>(most));
    let most = _mm_max_epu32(most, _mm_unpackhi_epi64(most, most));
    let most = _mm_max_epu32(most, _mm_shuffle_epi32::<1>(most));
    f32::from_bits(_mm_cvtsi128_si32(most) as u32)
}
