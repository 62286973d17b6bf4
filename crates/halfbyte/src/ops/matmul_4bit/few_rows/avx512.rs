//! AVX-512. A dword of packed bytes is a unit of 8 codes, a lane of a vector; `vpermps` looks a
//! code up by the low four bits of its lane and ignores the rest, so an index vector needs no
//! masking.

use super::{Kernel, Layout, Line, Product, Sums, finish, pack};
use crate::Element;
#[allow(clippy::wildcard_imports)] // the names say where they come from
use std::arch::x86_64::*;
use std::ops::Range;

pub(super) struct Avx512;

impl Kernel for Avx512 {
    type V = __m512;
    type Table = __m512;
    /// Byte i of each dword lowest.
    type Codes = [__m512i; 4];
    const LANES: usize = 16;
    /// Vector 2 i holds the high nibble of byte i of each lane's dword, 2 i + 1 the low one.
    const CODE_AT: [u8; 128] = {
        let mut code_at = [0; 128];
        let mut i = 0;
        while i < 128 {
            code_at[i] = (i % 16 * 8 + i / 16) as u8;
            i += 1;
        }
        code_at
    };
    const SCALES: usize = 1;
    const WEIGHT_ROWS: usize = 3;
    const ROWS: usize = 8;
    const DIRECT_ROWS: usize = 4;

    #[inline(always)]
    unsafe fn table(table: &[f32; 16]) -> __m512 {
        // SAFETY: 16 floats.
        unsafe { _mm512_loadu_ps(table.as_ptr()) }
    }

    /// Loads at the four byte offsets take the place of three of the seven shifts: shifts compete
    /// with look-ups and multiply-adds for two ports, loads do not.
    #[inline(always)]
    unsafe fn read<const PAST_END: bool>(_: __m512, packed: *const u8) -> [__m512i; 4] {
        // SAFETY: 64 bytes are readable at `packed`, and 3 more if `PAST_END`.
        unsafe {
            let a = _mm512_loadu_si512(packed.cast());
            if PAST_END {
                let b = _mm512_loadu_si512(packed.add(1).cast());
                let c = _mm512_loadu_si512(packed.add(2).cast());
                [a, b, c, _mm512_loadu_si512(packed.add(3).cast())]
            } else {
                let b = _mm512_srli_epi32::<8>(a);
                [a, b, _mm512_srli_epi32::<16>(a), _mm512_srli_epi32::<24>(a)]
            }
        }
    }

    #[inline(always)]
    unsafe fn vector(table: __m512, codes: &[__m512i; 4], i: usize) -> __m512 {
        // SAFETY: see `zero`.
        unsafe {
            let byte = codes[i / 2];
            let nibble = if i.is_multiple_of(2) { _mm512_srli_epi32::<4>(byte) } else { byte };
            _mm512_permutexvar_ps(nibble, table)
        }
    }

    #[inline(always)]
    unsafe fn scale(units: *const f32, _: usize) -> __m512 {
        // SAFETY: 16 units.
        unsafe { _mm512_loadu_ps(units) }
    }

    #[inline(always)]
    unsafe fn halves(low: f32, high: f32) -> __m512 {
        // SAFETY: see `zero`.
        unsafe { _mm512_mask_blend_ps(0xFF00, _mm512_set1_ps(low), _mm512_set1_ps(high)) }
    }

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: inlined where AVX-512 is enabled, as is everything below.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: 16 floats.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m512) {
        // SAFETY: room for 16 floats.
        unsafe { _mm512_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see `zero`.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see `zero`.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see `zero`.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        // SAFETY: see `zero`.
        unsafe {
            let [a, ..] = Self::sum4([v; 4]);
            a
        }
    }
    #[inline(always)]
    unsafe fn sum4([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        let mut sums = [0.0; 4];
        // SAFETY: see `zero`; 4 floats.
        unsafe {
            // Each quarter: a, b, a, b, half summed; then a, b, c, d, summed; then the quarters.
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let low = _mm512_shuffle_ps::<0b01_00_01_00>(ab, cd);
            let high = _mm512_shuffle_ps::<0b11_10_11_10>(ab, cd);
            let all = _mm512_add_ps(low, high);
            let half = _mm512_extractf32x8_ps::<1>(all);
            let all = _mm256_add_ps(_mm512_castps512_ps256(all), half);
            let half = _mm256_extractf128_ps::<1>(all);
            _mm_storeu_ps(sums.as_mut_ptr(), _mm_add_ps(_mm256_castps256_ps128(all), half));
        }
        sums
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn widen<T: Element>(from: *const T) -> __m512 {
        // SAFETY: 16 elements.
        unsafe { T::load16(from) }
    }
    #[inline(always)]
    unsafe fn narrow<T: Element>(to: *mut T, v: __m512) {
        // SAFETY: room for 16 elements.
        unsafe { T::store16(to, v) }
    }

    #[inline(always)]
    unsafe fn splat8(to: *mut f32, scale: f32) {
        // SAFETY: room for 8 floats.
        unsafe { _mm256_storeu_ps(to, _mm256_set1_ps(scale)) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn pack<T: Element>(rows: &[&[T]], layout: Layout, to: &mut [Line]) {
        // SAFETY: the caller's promises.
        unsafe { pack::<T, Self>(rows, layout, to) }
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn block(product: &Product<'_>, features: Range<usize>, sums: &mut Sums) {
        // SAFETY: the caller's promises.
        unsafe { product.block::<Self>(features, sums) }
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn finish<T: Element>(sums: &[f32], bias: Option<&[T]>, out: &mut [T]) {
        // SAFETY: the caller's promises.
        unsafe { finish::<T, Self>(sums, bias, out) }
    }
}
