//! The tiny seam between the rules and the instruction sets: float32 lanes.
//!
//! Every operation is one IEEE operation, rounded once, so that a rule gives the same bits whatever
//! carries its lanes. `f32` is itself a vector, of one lane: the definition.

use crate::Element;

/// float32 lanes. A value is a proof that the CPU has the instruction set: `splat` and `load`,
/// which make the first one, are `unsafe`; what is computed from it is safe.
pub(super) trait Vector: Copy {
    const LANES: usize;

    /// # Safety
    /// The CPU has this instruction set.
    unsafe fn splat(x: f32) -> Self;
    /// Loads and widens.
    ///
    /// # Safety
    /// As [`splat`](Self::splat); there are `LANES` elements to read.
    unsafe fn load<T: Element>(from: *const T) -> Self;
    /// Rounds to nearest even and stores.
    ///
    /// # Safety
    /// There is room for `LANES` elements.
    unsafe fn store<T: Element>(self, to: *mut T);

    /// The same number in every lane.
    #[inline(always)]
    fn like(self, x: f32) -> Self {
        // SAFETY: `self` proves the instruction set.
        unsafe { Self::splat(x) }
    }
    fn add(self, b: Self) -> Self;
    fn mul(self, b: Self) -> Self;
    fn div(self, b: Self) -> Self;
    fn sqrt(self) -> Self;
    /// `self * b + c`, rounded once.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// -1, 0 or 1; NaN for NaN.
    fn sign(self) -> Self;
    /// The larger magnitude by the order of bits, which puts infinity above numbers and NaN on top;
    /// without sign. `self` is such a maximum already.
    fn max_magnitude(self, b: Self) -> Self;
    /// As [`max_magnitude`](Self::max_magnitude), of lanes that have no sign or are NaN.
    fn max_bits(self, b: Self) -> Self;
    /// The largest lane of such a maximum.
    fn largest(self) -> f32;
    /// `max(self, floor)` where `s` is above zero, else 0.
    fn at_least(self, floor: Self, s: Self) -> Self;
}

impl Vector for f32 {
    const LANES: usize = 1;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        x
    }
    #[inline(always)]
    unsafe fn load<T: Element>(from: *const T) -> Self {
        // SAFETY: by the caller's contract.
        unsafe { from.read() }.to_f32()
    }
    #[inline(always)]
    unsafe fn store<T: Element>(self, to: *mut T) {
        // SAFETY: by the caller's contract.
        unsafe { to.write(T::from_f32(self)) }
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        self + b
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        self * b
    }
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        self / b
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        Self::sqrt(self)
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        Self::mul_add(self, b, c)
    }
    #[inline(always)]
    fn sign(self) -> Self {
        if self == 0.0 || self.is_nan() { self } else { 1.0f32.copysign(self) }
    }
    #[inline(always)]
    fn max_magnitude(self, b: Self) -> Self {
        Self::from_bits(self.to_bits().max(b.to_bits() & 0x7FFF_FFFF))
    }
    #[inline(always)]
    fn max_bits(self, b: Self) -> Self {
        Self::from_bits(self.to_bits().max(b.to_bits()))
    }
    #[inline(always)]
    fn at_least(self, floor: Self, s: Self) -> Self {
        if s > 0.0 { self.max(floor) } else { 0.0 }
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        self
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks)] // one reason for all, stated once
mod x86 {
    use super::Vector;
    use crate::Element;
    #[allow(clippy::wildcard_imports)] // the instruction sets
    use std::arch::x86_64::*;

    /// 8 lanes: AVX2, FMA, F16C.
    #[derive(Clone, Copy)]
    pub(in crate::optim) struct Avx2(pub(in crate::optim) __m256);

    /// 16 lanes: AVX-512 F, BW, DQ, VL.
    #[derive(Clone, Copy)]
    pub(in crate::optim) struct Avx512(pub(in crate::optim) __m512);

    // SAFETY, for every block below: a value of the type proves the instruction set, or the caller
    // of an unsafe function does.
    impl Vector for Avx2 {
        const LANES: usize = 8;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { Self(_mm256_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load<T: Element>(from: *const T) -> Self {
            unsafe { Self(T::load8(from)) }
        }
        #[inline(always)]
        unsafe fn store<T: Element>(self, to: *mut T) {
            unsafe { T::store8(to, self.0) }
        }
        #[inline(always)]
        fn add(self, b: Self) -> Self {
            unsafe { Self(_mm256_add_ps(self.0, b.0)) }
        }
        #[inline(always)]
        fn mul(self, b: Self) -> Self {
            unsafe { Self(_mm256_mul_ps(self.0, b.0)) }
        }
        #[inline(always)]
        fn div(self, b: Self) -> Self {
            unsafe { Self(_mm256_div_ps(self.0, b.0)) }
        }
        #[inline(always)]
        fn sqrt(self) -> Self {
            unsafe { Self(_mm256_sqrt_ps(self.0)) }
        }
        #[inline(always)]
        fn mul_add(self, b: Self, c: Self) -> Self {
            unsafe { Self(_mm256_fmadd_ps(self.0, b.0, c.0)) }
        }
        #[inline(always)]
        fn sign(self) -> Self {
            unsafe {
                let sign = _mm256_and_ps(self.0, _mm256_set1_ps(-0.0));
                let one = _mm256_or_ps(sign, _mm256_set1_ps(1.0));
                let ordinary = _mm256_cmp_ps::<_CMP_NEQ_OQ>(self.0, _mm256_setzero_ps());
                Self(_mm256_blendv_ps(self.0, one, ordinary))
            }
        }
        #[inline(always)]
        fn max_magnitude(self, b: Self) -> Self {
            unsafe { self.max_bits(Self(_mm256_andnot_ps(_mm256_set1_ps(-0.0), b.0))) }
        }
        #[inline(always)]
        fn max_bits(self, b: Self) -> Self {
            unsafe {
                let max = _mm256_max_epu32(_mm256_castps_si256(self.0), _mm256_castps_si256(b.0));
                Self(_mm256_castsi256_ps(max))
            }
        }
        #[inline(always)]
        fn at_least(self, floor: Self, s: Self) -> Self {
            unsafe {
                let positive = _mm256_cmp_ps::<_CMP_GT_OQ>(s.0, _mm256_setzero_ps());
                Self(_mm256_and_ps(positive, _mm256_max_ps(self.0, floor.0)))
            }
        }
        #[inline(always)]
        fn largest(self) -> f32 {
            let mut lanes = [0u32; 8];
            unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), _mm256_castps_si256(self.0)) };
            f32::from_bits(lanes.into_iter().fold(0, u32::max))
        }
    }

    // SAFETY: as above.
    impl Vector for Avx512 {
        const LANES: usize = 16;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { Self(_mm512_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load<T: Element>(from: *const T) -> Self {
            unsafe { Self(T::load16(from)) }
        }
        #[inline(always)]
        unsafe fn store<T: Element>(self, to: *mut T) {
            unsafe { T::store16(to, self.0) }
        }
        #[inline(always)]
        fn add(self, b: Self) -> Self {
            unsafe { Self(_mm512_add_ps(self.0, b.0)) }
        }
        #[inline(always)]
        fn mul(self, b: Self) -> Self {
            unsafe { Self(_mm512_mul_ps(self.0, b.0)) }
        }
        #[inline(always)]
        fn div(self, b: Self) -> Self {
            unsafe { Self(_mm512_div_ps(self.0, b.0)) }
        }
        #[inline(always)]
        fn sqrt(self) -> Self {
            unsafe { Self(_mm512_sqrt_ps(self.0)) }
        }
        #[inline(always)]
        fn mul_add(self, b: Self, c: Self) -> Self {
            unsafe { Self(_mm512_fmadd_ps(self.0, b.0, c.0)) }
        }
        #[inline(always)]
        fn sign(self) -> Self {
            unsafe {
                let sign = _mm512_and_ps(self.0, _mm512_set1_ps(-0.0));
                let one = _mm512_or_ps(sign, _mm512_set1_ps(1.0));
                let ordinary = _mm512_cmp_ps_mask::<_CMP_NEQ_OQ>(self.0, _mm512_setzero_ps());
                Self(_mm512_mask_mov_ps(self.0, ordinary, one))
            }
        }
        #[inline(always)]
        fn max_magnitude(self, b: Self) -> Self {
            unsafe { self.max_bits(Self(_mm512_andnot_ps(_mm512_set1_ps(-0.0), b.0))) }
        }
        #[inline(always)]
        fn max_bits(self, b: Self) -> Self {
            unsafe {
                let max = _mm512_max_epu32(_mm512_castps_si512(self.0), _mm512_castps_si512(b.0));
                Self(_mm512_castsi512_ps(max))
            }
        }
        #[inline(always)]
        fn at_least(self, floor: Self, s: Self) -> Self {
            unsafe {
                let positive = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(s.0, _mm512_setzero_ps());
                Self(_mm512_maskz_max_ps(positive, self.0, floor.0))
            }
        }
        #[inline(always)]
        fn largest(self) -> f32 {
            unsafe { f32::from_bits(_mm512_reduce_max_epu32(_mm512_castps_si512(self.0))) }
        }
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) use neon::Neon;

#[cfg(target_arch = "aarch64")]
#[allow(clippy::undocumented_unsafe_blocks)] // one reason for all, stated once
mod neon {
    use super::Vector;
    use crate::Element;
    #[allow(clippy::wildcard_imports)] // the instruction set
    use std::arch::aarch64::*;

    /// 4 lanes: Advanced SIMD.
    #[derive(Clone, Copy)]
    pub(in crate::optim) struct Neon(pub(in crate::optim) float32x4_t);

    // SAFETY, for every block below: Advanced SIMD is part of the base architecture; pointers are
    // the callers' contract.
    impl Vector for Neon {
        const LANES: usize = 4;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { Self(vdupq_n_f32(x)) }
        }
        #[inline(always)]
        unsafe fn load<T: Element>(from: *const T) -> Self {
            unsafe { Self(T::load4(from)) }
        }
        #[inline(always)]
        unsafe fn store<T: Element>(self, to: *mut T) {
            unsafe { T::store4(to, self.0) }
        }
        #[inline(always)]
        fn add(self, b: Self) -> Self {
            unsafe { Self(vaddq_f32(self.0, b.0)) }
        }
        #[inline(always)]
        fn mul(self, b: Self) -> Self {
            unsafe { Self(vmulq_f32(self.0, b.0)) }
        }
        #[inline(always)]
        fn div(self, b: Self) -> Self {
            unsafe { Self(vdivq_f32(self.0, b.0)) }
        }
        #[inline(always)]
        fn sqrt(self) -> Self {
            unsafe { Self(vsqrtq_f32(self.0)) }
        }
        #[inline(always)]
        fn mul_add(self, b: Self, c: Self) -> Self {
            unsafe { Self(vfmaq_f32(c.0, self.0, b.0)) }
        }
        #[inline(always)]
        fn sign(self) -> Self {
            unsafe {
                let one = vbslq_f32(vdupq_n_u32(1 << 31), self.0, vdupq_n_f32(1.0));
                let zero = vceqzq_f32(self.0);
                let ordinary = vbicq_u32(vceqq_f32(self.0, self.0), zero);
                Self(vbslq_f32(ordinary, one, self.0))
            }
        }
        #[inline(always)]
        fn max_magnitude(self, b: Self) -> Self {
            unsafe { self.max_bits(Self(vabsq_f32(b.0))) }
        }
        #[inline(always)]
        fn max_bits(self, b: Self) -> Self {
            unsafe {
                let (a, b) = (vreinterpretq_u32_f32(self.0), vreinterpretq_u32_f32(b.0));
                Self(vreinterpretq_f32_u32(vmaxq_u32(a, b)))
            }
        }
        #[inline(always)]
        fn at_least(self, floor: Self, s: Self) -> Self {
            unsafe {
                let raised = vreinterpretq_u32_f32(vmaxq_f32(self.0, floor.0));
                Self(vreinterpretq_f32_u32(vandq_u32(vcgtzq_f32(s.0), raised)))
            }
        }
        #[inline(always)]
        fn largest(self) -> f32 {
            unsafe { f32::from_bits(vmaxvq_u32(vreinterpretq_u32_f32(self.0))) }
        }
    }
}
