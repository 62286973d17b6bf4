//! Loads, stores and conversions per instruction set: the only seam between a kernel and an
//! element type. Each function is bit-identical to [`Element`](crate::Element)'s scalar
//! conversions (NaN payloads included); the test below compares all 2^16 halves and a sweep of
//! float32 patterns.

#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;

/// Vector loads and stores of one element type, widened to float32 lanes.
///
/// Implementation detail of [`Element`](crate::Element); not part of the public API.
#[doc(hidden)]
pub trait Lanes: Sized {
    /// Loads 8 elements as float32.
    ///
    /// # Safety
    /// `ptr` is valid for reading 8 elements (any alignment); the CPU has AVX2, FMA, F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load8(ptr: *const Self) -> std::arch::x86_64::__m256;
    /// Rounds 8 float32 to nearest even and stores them.
    ///
    /// # Safety
    /// `ptr` is valid for writing 8 elements (any alignment); the CPU has AVX2, FMA, F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn store8(ptr: *mut Self, v: std::arch::x86_64::__m256);
    /// Loads 16 elements as float32.
    ///
    /// # Safety
    /// `ptr` is valid for reading 16 elements (any alignment); the CPU has AVX-512 F, BW, DQ, VL.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load16(ptr: *const Self) -> std::arch::x86_64::__m512;
    /// Rounds 16 float32 to nearest even and stores them.
    ///
    /// # Safety
    /// `ptr` is valid for writing 16 elements (any alignment); the CPU has AVX-512 F, BW, DQ, VL.
    #[cfg(target_arch = "x86_64")]
    unsafe fn store16(ptr: *mut Self, v: std::arch::x86_64::__m512);
    /// Loads 4 elements as float32.
    ///
    /// # Safety
    /// `ptr` is valid for reading 4 elements.
    #[cfg(target_arch = "aarch64")]
    unsafe fn load4(ptr: *const Self) -> std::arch::aarch64::float32x4_t;
    /// Rounds 4 float32 to nearest even and stores them.
    ///
    /// # Safety
    /// `ptr` is valid for writing 4 elements.
    #[cfg(target_arch = "aarch64")]
    unsafe fn store4(ptr: *mut Self, v: std::arch::aarch64::float32x4_t);
}

#[cfg(test)]
mod tests {
    use crate::Element;
    use crate::isa::Isa;
    use half::{bf16, f16};

    /// Widening and rounding through the vectors of one ISA.
    fn through<T: Element>(isa: Isa, input: &[f32; 16]) -> ([T; 16], [f32; 16]) {
        let mut narrow = [T::default(); 16];
        let mut wide = [0.0f32; 16];
        // SAFETY: both arrays hold 16 elements and `isa` comes from `available()`.
        unsafe {
            match isa {
                Isa::Scalar => {
                    for i in 0..16 {
                        narrow[i] = T::from_f32(input[i]);
                        wide[i] = narrow[i].to_f32();
                    }
                }
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => {
                    use std::arch::x86_64::{_mm256_loadu_ps, _mm256_storeu_ps};
                    #[target_feature(enable = "avx2,fma,f16c")]
                    unsafe fn go<T: Element>(i: *const f32, n: *mut T, w: *mut f32) {
                        // SAFETY: the caller passes 16 elements in each.
                        unsafe {
                            for k in [0, 8] {
                                T::store8(n.add(k), _mm256_loadu_ps(i.add(k)));
                                _mm256_storeu_ps(w.add(k), T::load8(n.add(k)));
                            }
                        }
                    }
                    go(input.as_ptr(), narrow.as_mut_ptr(), wide.as_mut_ptr());
                }
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => {
                    use std::arch::x86_64::{_mm512_loadu_ps, _mm512_storeu_ps};
                    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                    unsafe fn go<T: Element>(i: *const f32, n: *mut T, w: *mut f32) {
                        // SAFETY: the caller passes 16 elements in each.
                        unsafe {
                            T::store16(n, _mm512_loadu_ps(i));
                            _mm512_storeu_ps(w, T::load16(n));
                        }
                    }
                    go(input.as_ptr(), narrow.as_mut_ptr(), wide.as_mut_ptr());
                }
                #[cfg(target_arch = "aarch64")]
                Isa::Neon => {
                    use std::arch::aarch64::{vld1q_f32, vst1q_f32};
                    for k in [0, 4, 8, 12] {
                        T::store4(narrow.as_mut_ptr().add(k), vld1q_f32(input.as_ptr().add(k)));
                        vst1q_f32(wide.as_mut_ptr().add(k), T::load4(narrow.as_ptr().add(k)));
                    }
                }
                #[allow(unreachable_patterns)]
                _ => unreachable!("only available ISAs are tested"),
            }
        }
        (narrow, wide)
    }

    fn sweep<T: Element>(bits: fn(T) -> u32, patterns: impl Iterator<Item = u32>) {
        let patterns: Vec<u32> = patterns.collect();
        for chunk in patterns.chunks_exact(16) {
            let input: [f32; 16] = std::array::from_fn(|i| f32::from_bits(chunk[i]));
            let (narrow, wide) = through::<T>(Isa::Scalar, &input);
            for isa in crate::isa::available() {
                let (n, w) = through::<T>(isa, &input);
                for i in 0..16 {
                    let at = format!("{isa} {:?} input {:08x}", T::DTYPE, chunk[i]);
                    assert_eq!(bits(n[i]), bits(narrow[i]), "narrow {at}");
                    assert_eq!(w[i].to_bits(), wide[i].to_bits(), "wide {at}");
                }
            }
        }
    }

    #[test]
    fn conversions_equal_the_scalar_ones_bit_for_bit() {
        // Every half widened (as float32 patterns), and a dense sweep with all roundings.
        // (Sparser where the test is likely to be emulated.)
        let step = if cfg!(target_arch = "x86_64") && !cfg!(miri) { 0xFF1 } else { 0xF_FFF1 };
        let dense = || (0..=u32::MAX).step_by(step).chain((0..1 << 16).map(|h| h << 16));
        sweep::<f32>(f32::to_bits, dense());
        sweep::<f16>(|x| u32::from(x.to_bits()), dense());
        sweep::<bf16>(|x| u32::from(x.to_bits()), dense());
        let halves = (0..=u16::MAX).map(|h| f16::from_bits(h).to_f32_const().to_bits());
        sweep::<f16>(|x| u32::from(x.to_bits()), halves);
    }
}
