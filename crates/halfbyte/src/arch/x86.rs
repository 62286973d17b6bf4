//! x86-64 loads and stores (AVX2 with F16C, AVX-512).

use super::Lanes;
use half::{bf16, f16};
#[allow(clippy::wildcard_imports)] // the intrinsics
use std::arch::x86_64::*;

/// float32 → bfloat16 bits in the low half of each lane, to nearest even. `vcvtneps2bf16` is not
/// used: it flushes subnormals, and the scalar rounding does not.
#[inline]
#[target_feature(enable = "avx2")]
fn bf16_bits8(v: __m256) -> __m256i {
    let x = _mm256_castps_si256(v);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(x), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    let quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x0040_0000));
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
    _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan))
}

/// As [`bf16_bits8`], 16 lanes.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn bf16_bits16(v: __m512) -> __m512i {
    let x = _mm512_castps_si512(v);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(x), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
    let quiet = _mm512_or_si512(x, _mm512_set1_epi32(0x0040_0000));
    _mm512_srli_epi32::<16>(_mm512_mask_mov_epi32(rounded, nan, quiet))
}

impl Lanes for f32 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load8(ptr: *const Self) -> __m256 {
        // SAFETY: the caller guarantees 8 readable elements.
        unsafe { _mm256_loadu_ps(ptr) }
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store8(ptr: *mut Self, v: __m256) {
        // SAFETY: the caller guarantees 8 writable elements.
        unsafe { _mm256_storeu_ps(ptr, v) }
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn load16(ptr: *const Self) -> __m512 {
        // SAFETY: the caller guarantees 16 readable elements.
        unsafe { _mm512_loadu_ps(ptr) }
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn store16(ptr: *mut Self, v: __m512) {
        // SAFETY: the caller guarantees 16 writable elements.
        unsafe { _mm512_storeu_ps(ptr, v) }
    }
}

impl Lanes for f16 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load8(ptr: *const Self) -> __m256 {
        // SAFETY: the caller guarantees 8 readable elements, 16 bytes.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(ptr.cast()) })
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store8(ptr: *mut Self, v: __m256) {
        let h = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v);
        // SAFETY: the caller guarantees 8 writable elements, 16 bytes.
        unsafe { _mm_storeu_si128(ptr.cast(), h) }
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn load16(ptr: *const Self) -> __m512 {
        // SAFETY: the caller guarantees 16 readable elements, 32 bytes.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(ptr.cast()) })
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn store16(ptr: *mut Self, v: __m512) {
        let h = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v);
        // SAFETY: the caller guarantees 16 writable elements, 32 bytes.
        unsafe { _mm256_storeu_si256(ptr.cast(), h) }
    }
}

impl Lanes for bf16 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load8(ptr: *const Self) -> __m256 {
        // SAFETY: the caller guarantees 8 readable elements, 16 bytes.
        let h = unsafe { _mm_loadu_si128(ptr.cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(h)))
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store8(ptr: *mut Self, v: __m256) {
        let b = bf16_bits8(v);
        let h = _mm_packus_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256::<1>(b));
        // SAFETY: the caller guarantees 8 writable elements, 16 bytes.
        unsafe { _mm_storeu_si128(ptr.cast(), h) }
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn load16(ptr: *const Self) -> __m512 {
        // SAFETY: the caller guarantees 16 readable elements, 32 bytes.
        let h = unsafe { _mm256_loadu_si256(ptr.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(h)))
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn store16(ptr: *mut Self, v: __m512) {
        // SAFETY: the caller guarantees 16 writable elements, 32 bytes.
        unsafe { _mm256_storeu_si256(ptr.cast(), _mm512_cvtepi32_epi16(bf16_bits16(v))) }
    }
}
