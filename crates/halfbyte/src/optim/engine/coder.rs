//! Codes of the two default maps, four vectors at a time.

use crate::code::Code8;
#[cfg(target_arch = "aarch64")]
use crate::code::encode8::neon::{Dynamic128, Encode16};
#[cfg(target_arch = "x86_64")]
use crate::code::encode8::{
    avx2::{Dynamic256, Encode32},
    avx512::{Dynamic512, Encode64},
};
#[cfg(target_arch = "aarch64")]
use crate::optim::vector::Neon;
use crate::optim::vector::Vector;
#[cfg(target_arch = "x86_64")]
use crate::optim::vector::{Avx2, Avx512};
#[cfg(target_arch = "x86_64")]
#[allow(clippy::wildcard_imports)] // the instruction sets
use std::arch::x86_64::*;

/// Decodes and encodes groups of `4 * V::LANES` elements.
pub(super) trait Coder<V: Vector> {
    /// The smallest value above zero, of the unsigned code.
    fn smallest(&self) -> f32;
    /// The values of codes, in order.
    ///
    /// # Safety
    /// There are as many bytes to read; the CPU has the instruction set.
    unsafe fn decode(&self, q: *const u8) -> [V; 4];
    /// The same by other means, if there are any that do not load: beside another `decode`.
    ///
    /// # Safety
    /// As [`decode`](Self::decode).
    #[inline(always)]
    unsafe fn decode_beside(&self, q: *const u8) -> [V; 4] {
        // SAFETY: by the caller's contract.
        unsafe { self.decode(q) }
    }
    /// The nearest codes of numbers in [-1, 1], give or take an ulp.
    ///
    /// # Safety
    /// There is room for as many bytes; the CPU has the instruction set.
    unsafe fn encode(&self, y: [V; 4], q: *mut u8);
}

/// AVX-512.
#[cfg(target_arch = "x86_64")]
pub(super) struct Coder512<const SIGNED: bool> {
    encoder: Dynamic512<SIGNED>,
    values: &'static [f32; 256],
    /// The magnitudes of the signed code: 128 in all, that of code 255 in the place of zero.
    magnitudes: [__m512; 8],
}

#[cfg(target_arch = "x86_64")]
impl<const SIGNED: bool> Coder512<SIGNED> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) fn new() -> Self {
        let values = Code8::dynamic(SIGNED).values();
        let magnitude = |i: usize| values[if i == 0 { 255 } else { 127 + i }];
        let magnitudes = std::array::from_fn(|row| {
            let row: [f32; 16] = std::array::from_fn(|i| magnitude((16 * row + i) % 128));
            // SAFETY: there are 16.
            unsafe { _mm512_loadu_ps(row.as_ptr()) }
        });
        Self { encoder: Dynamic512::new(), values, magnitudes }
    }

    /// The values of 16 codes of the signed map.
    ///
    /// # Safety
    /// There are 16 bytes to read.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn value16(&self, q: *const u8) -> __m512 {
        let m = &self.magnitudes;
        // SAFETY: by the caller's contract.
        let codes = unsafe { _mm_loadu_si128(q.cast()) };
        let distance = _mm512_sub_epi32(_mm512_cvtepu8_epi32(codes), _mm512_set1_epi32(127));
        let k = _mm512_abs_epi32(distance);
        let bit5 = _mm512_test_epi32_mask(k, _mm512_set1_epi32(32));
        let bit6 = _mm512_test_epi32_mask(k, _mm512_set1_epi32(64));
        let (a, b) = (_mm512_permutex2var_ps(m[0], k, m[1]), _mm512_permutex2var_ps(m[2], k, m[3]));
        let (c, d) = (_mm512_permutex2var_ps(m[4], k, m[5]), _mm512_permutex2var_ps(m[6], k, m[7]));
        let (low, high) = (_mm512_mask_mov_ps(a, bit5, b), _mm512_mask_mov_ps(c, bit5, d));
        let magnitude = _mm512_castps_si512(_mm512_mask_mov_ps(low, bit6, high));
        let sign = _mm512_set1_epi32(i32::MIN);
        let signed = _mm512_ternarylogic_epi32::<0b1111_1000>(magnitude, distance, sign);
        let nonzero = _mm512_test_epi32_mask(k, k);
        _mm512_castsi512_ps(_mm512_maskz_mov_epi32(nonzero, signed))
    }
}

#[cfg(target_arch = "x86_64")]
impl<const SIGNED: bool> Coder<Avx512> for Coder512<SIGNED> {
    fn smallest(&self) -> f32 {
        self.values[1]
    }

    #[inline(always)]
    unsafe fn decode(&self, q: *const u8) -> [Avx512; 4] {
        // SAFETY: 64 bytes by the caller's contract; a byte is an index of 256 values.
        unsafe {
            let value = |i: usize| {
                let index = _mm512_cvtepu8_epi32(_mm_loadu_si128(q.add(16 * i).cast()));
                Avx512(_mm512_i32gather_ps::<4>(index, self.values.as_ptr()))
            };
            [value(0), value(1), value(2), value(3)]
        }
    }

    /// From registers, where a gather keeps the load ports busy (Adam8bit in cache: 3% faster).
    #[inline(always)]
    unsafe fn decode_beside(&self, q: *const u8) -> [Avx512; 4] {
        if !SIGNED {
            // SAFETY: by the caller's contract.
            return unsafe { self.decode(q) };
        }
        // SAFETY: 64 bytes by the caller's contract, as is the instruction set.
        unsafe {
            [
                Avx512(self.value16(q)),
                Avx512(self.value16(q.add(16))),
                Avx512(self.value16(q.add(32))),
                Avx512(self.value16(q.add(48))),
            ]
        }
    }

    #[inline(always)]
    unsafe fn encode(&self, y: [Avx512; 4], q: *mut u8) {
        // SAFETY: 64 bytes by the caller's contract, as is the instruction set.
        unsafe {
            let codes = self.encoder.encode64([y[0].0, y[1].0, y[2].0, y[3].0]);
            _mm512_storeu_si512(q.cast(), codes);
        }
    }
}

/// AVX2.
#[cfg(target_arch = "x86_64")]
pub(super) struct Coder256<const SIGNED: bool> {
    encoder: Dynamic256<SIGNED>,
    values: &'static [f32; 256],
}

#[cfg(target_arch = "x86_64")]
impl<const SIGNED: bool> Coder256<SIGNED> {
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn new() -> Self {
        Self { encoder: Dynamic256::new(), values: Code8::dynamic(SIGNED).values() }
    }
}

#[cfg(target_arch = "x86_64")]
impl<const SIGNED: bool> Coder<Avx2> for Coder256<SIGNED> {
    fn smallest(&self) -> f32 {
        self.values[1]
    }

    #[inline(always)]
    unsafe fn decode(&self, q: *const u8) -> [Avx2; 4] {
        // SAFETY: 32 bytes by the caller's contract; a byte is an index of 256 values.
        unsafe {
            let value = |i: usize| {
                let index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(q.add(8 * i).cast()));
                Avx2(_mm256_i32gather_ps::<4>(self.values.as_ptr(), index))
            };
            [value(0), value(1), value(2), value(3)]
        }
    }

    #[inline(always)]
    unsafe fn encode(&self, y: [Avx2; 4], q: *mut u8) {
        // SAFETY: 32 bytes by the caller's contract, as is the instruction set.
        unsafe {
            let codes = self.encoder.encode32([y[0].0, y[1].0, y[2].0, y[3].0]);
            _mm256_storeu_si256(q.cast(), codes);
        }
    }
}

/// NEON. Without a gather instruction the values are loaded one by one.
#[cfg(target_arch = "aarch64")]
pub(super) struct Coder128<const SIGNED: bool> {
    encoder: Dynamic128<SIGNED>,
    values: &'static [f32; 256],
}

#[cfg(target_arch = "aarch64")]
impl<const SIGNED: bool> Coder128<SIGNED> {
    pub(super) fn new() -> Self {
        Self { encoder: Dynamic128::new(), values: Code8::dynamic(SIGNED).values() }
    }
}

#[cfg(target_arch = "aarch64")]
impl<const SIGNED: bool> Coder<Neon> for Coder128<SIGNED> {
    fn smallest(&self) -> f32 {
        self.values[1]
    }

    #[inline(always)]
    unsafe fn decode(&self, q: *const u8) -> [Neon; 4] {
        // SAFETY: 16 bytes by the caller's contract.
        unsafe {
            let value = |i: usize| {
                let lane = |j: usize| self.values[usize::from(q.add(4 * i + j).read())];
                let lanes = [lane(0), lane(1), lane(2), lane(3)];
                Neon::load(lanes.as_ptr())
            };
            [value(0), value(1), value(2), value(3)]
        }
    }

    #[inline(always)]
    unsafe fn encode(&self, y: [Neon; 4], q: *mut u8) {
        use std::arch::aarch64::vst1q_u8;
        // SAFETY: 16 bytes by the caller's contract.
        unsafe { vst1q_u8(q, self.encoder.encode16([y[0].0, y[1].0, y[2].0, y[3].0])) }
    }
}
