//! AArch64 loads and stores.

use super::Lanes;
use half::{bf16, f16};
#[allow(clippy::wildcard_imports)] // the intrinsics
use std::arch::aarch64::*;

impl Lanes for f32 {
    #[inline]
    unsafe fn load4(ptr: *const Self) -> float32x4_t {
        // SAFETY: the caller guarantees 4 readable elements.
        unsafe { vld1q_f32(ptr) }
    }
    #[inline]
    unsafe fn store4(ptr: *mut Self, v: float32x4_t) {
        // SAFETY: the caller guarantees 4 writable elements.
        unsafe { vst1q_f32(ptr, v) }
    }
}

// The float16 vector types are not stable in Rust; `half` converts one at a time with the same
// rounding, and on AArch64 compiles to `fcvt`.
impl Lanes for f16 {
    #[inline]
    unsafe fn load4(ptr: *const Self) -> float32x4_t {
        // SAFETY: the caller guarantees 4 readable elements; the array holds 4.
        unsafe {
            let wide: [f32; 4] =
                std::array::from_fn(|i| ptr.add(i).read_unaligned().to_f32_const());
            vld1q_f32(wide.as_ptr())
        }
    }
    #[inline]
    unsafe fn store4(ptr: *mut Self, v: float32x4_t) {
        let mut wide = [0.0f32; 4];
        // SAFETY: the array holds 4 and the caller guarantees 4 writable elements.
        unsafe {
            vst1q_f32(wide.as_mut_ptr(), v);
            for (i, x) in wide.into_iter().enumerate() {
                ptr.add(i).write_unaligned(f16::from_f32_const(x));
            }
        }
    }
}

impl Lanes for bf16 {
    #[inline]
    unsafe fn load4(ptr: *const Self) -> float32x4_t {
        // SAFETY: the caller guarantees 4 readable elements, 8 bytes.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(ptr.cast()))) }
    }
    #[inline]
    unsafe fn store4(ptr: *mut Self, v: float32x4_t) {
        // SAFETY: the caller guarantees 4 writable elements, 8 bytes.
        unsafe {
            let x = vreinterpretq_u32_f32(v);
            let odd = vandq_u32(vshrq_n_u32::<16>(x), vdupq_n_u32(1));
            let rounded = vaddq_u32(x, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
            let number = vceqq_f32(v, v);
            let quiet = vorrq_u32(x, vdupq_n_u32(0x0040_0000));
            vst1_u16(ptr.cast(), vshrn_n_u32::<16>(vbslq_u32(number, rounded, quiet)));
        }
    }
}
