//! AVX2. `vpshufb` looks a nibble up in 16 bytes: once for each byte of a float32, the four
//! results interleaved.

use super::{GROUP_VECTORS, Kernel, Layout, Line, Product, Sums, finish, pack};
use crate::Element;
#[allow(clippy::wildcard_imports)] // the names say where they come from
use std::arch::x86_64::*;
use std::ops::Range;

pub(super) struct Avx2;

impl Kernel for Avx2 {
    type V = __m256;
    /// Byte i of the 16 table entries, in both halves of register i.
    type Table = [__m256i; 4];
    type Codes = [__m256; GROUP_VECTORS];
    const LANES: usize = 8;
    /// Vector 2 i holds the high nibbles of bytes 4 i.. (lanes 0 to 3) and 16 + 4 i.. (lanes 4 to
    /// 7), vector 2 i + 1 the low ones.
    const CODE_AT: [u8; 128] = {
        let mut code_at = [0; 128];
        let mut i = 0;
        while i < 64 {
            let (vector, lane) = (i / 8, i % 8);
            let byte = lane / 4 * 16 + vector / 2 * 4 + lane % 4;
            code_at[i] = (byte * 2 + vector % 2) as u8;
            i += 1;
        }
        code_at
    };
    const SCALES: usize = 4;
    const WEIGHT_ROWS: usize = 3;
    const ROWS: usize = 4;
    const DIRECT_ROWS: usize = 1;

    #[inline(always)]
    unsafe fn table(table: &[f32; 16]) -> [__m256i; 4] {
        // SAFETY: 16 bytes each; see `zero`.
        unsafe {
            let mut planes = [_mm256_setzero_si256(); 4];
            for (i, plane) in planes.iter_mut().enumerate() {
                let mut bytes = [0u8; 16];
                for (byte, value) in bytes.iter_mut().zip(table) {
                    *byte = value.to_le_bytes()[i];
                }
                *plane = _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().cast()));
            }
            planes
        }
    }

    #[inline(always)]
    unsafe fn read<const PAST_END: bool>(
        table: [__m256i; 4],
        packed: *const u8,
    ) -> [__m256; GROUP_VECTORS] {
        // SAFETY: 32 bytes are readable at `packed`.
        unsafe {
            let v = _mm256_loadu_si256(packed.cast());
            let low_nibble = _mm256_set1_epi8(0x0F);
            let nibbles = [
                _mm256_and_si256(_mm256_srli_epi16::<4>(v), low_nibble),
                _mm256_and_si256(v, low_nibble),
            ];
            let mut codes = [_mm256_setzero_ps(); GROUP_VECTORS];
            for (i, q) in nibbles.into_iter().enumerate() {
                let byte0 = _mm256_shuffle_epi8(table[0], q);
                let byte1 = _mm256_shuffle_epi8(table[1], q);
                let byte2 = _mm256_shuffle_epi8(table[2], q);
                let byte3 = _mm256_shuffle_epi8(table[3], q);
                let low = [_mm256_unpacklo_epi8(byte0, byte1), _mm256_unpackhi_epi8(byte0, byte1)];
                let high = [_mm256_unpacklo_epi8(byte2, byte3), _mm256_unpackhi_epi8(byte2, byte3)];
                for half in 0..2 {
                    let (low, high) = (low[half], high[half]);
                    codes[half * 4 + i] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high));
                    codes[half * 4 + 2 + i] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high));
                }
            }
            codes
        }
    }

    #[inline(always)]
    unsafe fn vector(_: [__m256i; 4], codes: &[__m256; GROUP_VECTORS], i: usize) -> __m256 {
        codes[i]
    }

    #[inline(always)]
    unsafe fn scale(units: *const f32, i: usize) -> __m256 {
        // SAFETY: 8 units.
        unsafe {
            let units = _mm256_loadu_ps(units);
            match i {
                0 => _mm256_permute_ps::<0x00>(units),
                1 => _mm256_permute_ps::<0x55>(units),
                2 => _mm256_permute_ps::<0xAA>(units),
                _ => _mm256_permute_ps::<0xFF>(units),
            }
        }
    }

    #[inline(always)]
    unsafe fn halves(low: f32, _: f32) -> __m256 {
        // SAFETY: see `zero`.
        unsafe { _mm256_set1_ps(low) }
    }

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: inlined where AVX2 is enabled, as is everything below.
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        // SAFETY: 8 floats.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m256) {
        // SAFETY: room for 8 floats.
        unsafe { _mm256_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: see `zero`.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see `zero`.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: see `zero`.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sum(v: __m256) -> f32 {
        // SAFETY: see `zero`.
        unsafe {
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn widen<T: Element>(from: *const T) -> __m256 {
        // SAFETY: 8 elements.
        unsafe { T::load8(from) }
    }
    #[inline(always)]
    unsafe fn narrow<T: Element>(to: *mut T, v: __m256) {
        // SAFETY: room for 8 elements.
        unsafe { T::store8(to, v) }
    }

    #[inline(always)]
    unsafe fn splat8(to: *mut f32, scale: f32) {
        // SAFETY: room for 8 floats.
        unsafe { _mm256_storeu_ps(to, _mm256_set1_ps(scale)) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn pack<T: Element>(rows: &[&[T]], layout: Layout, to: &mut [Line]) {
        // SAFETY: the caller's promises.
        unsafe { pack::<T, Self>(rows, layout, to) }
    }
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn block(product: &Product<'_>, features: Range<usize>, sums: &mut Sums) {
        // SAFETY: the caller's promises.
        unsafe { product.block::<Self>(features, sums) }
    }
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn finish<T: Element>(sums: &[f32], bias: Option<&[T]>, out: &mut [T]) {
        // SAFETY: the caller's promises.
        unsafe { finish::<T, Self>(sums, bias, out) }
    }
}
