use super::nearest;
use crate::code::{Kind, maps};
use crate::isa::{self, Isa};
use crate::{Code8, threads};
use proptest::prelude::*;

/// Encodes groups of 64 floats, given by their bits, with what the kernels use for `code` on `isa`;
/// `check` gets the indices of each group.
fn run(
    isa: Isa,
    code: &Code8,
    groups: u32,
    lanes: impl Fn(u32) -> [u32; 64],
    check: impl FnMut(u32, &[u8; 64]),
) {
    match isa {
        // SAFETY: `isa` comes from `available()`.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { x86::run512(code, groups, lanes, check) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::run256(code, groups, lanes, check) },
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => neon::run128(code, groups, lanes, check),
        _ => unreachable!("only the vector ISAs of this machine are tested"),
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Code8, Kind};
    use crate::code::encode8::avx2::{Dynamic256, Encode32, Search256};
    use crate::code::encode8::avx512::{Dynamic512, Encode64, Search512};
    #[allow(clippy::wildcard_imports)] // the instruction set
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(super) fn run512(
        code: &Code8,
        groups: u32,
        lanes: impl Fn(u32) -> [u32; 64],
        check: impl FnMut(u32, &[u8; 64]),
    ) {
        match code.kind() {
            Kind::DynamicSigned => all512(&Dynamic512::<true>::new(), groups, lanes, check),
            Kind::DynamicUnsigned => all512(&Dynamic512::<false>::new(), groups, lanes, check),
            Kind::Other => all512(&Search512::new(code), groups, lanes, check),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn all512(
        encoder: &impl Encode64,
        groups: u32,
        lanes: impl Fn(u32) -> [u32; 64],
        mut check: impl FnMut(u32, &[u8; 64]),
    ) {
        for g in 0..groups {
            let (y, mut i) = (lanes(g), [0u8; 64]);
            // SAFETY: the loads and the store stay inside arrays of 64; the features are enabled.
            unsafe {
                let y = std::array::from_fn(|k| _mm512_loadu_ps(y.as_ptr().add(16 * k).cast()));
                _mm512_storeu_si512(i.as_mut_ptr().cast(), encoder.encode64(y));
            }
            check(g, &i);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn run256(
        code: &Code8,
        groups: u32,
        lanes: impl Fn(u32) -> [u32; 64],
        check: impl FnMut(u32, &[u8; 64]),
    ) {
        match code.kind() {
            Kind::DynamicSigned => all256(&Dynamic256::<true>::new(), groups, lanes, check),
            Kind::DynamicUnsigned => all256(&Dynamic256::<false>::new(), groups, lanes, check),
            Kind::Other => all256(&Search256::new(code), groups, lanes, check),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn all256(
        encoder: &impl Encode32,
        groups: u32,
        lanes: impl Fn(u32) -> [u32; 64],
        mut check: impl FnMut(u32, &[u8; 64]),
    ) {
        for g in 0..groups {
            let (y, mut i) = (lanes(g), [0u8; 64]);
            for half in [0, 32] {
                // SAFETY: as above.
                unsafe {
                    let y: *const f32 = y.as_ptr().add(half).cast();
                    let y = std::array::from_fn(|k| _mm256_loadu_ps(y.add(8 * k)));
                    _mm256_storeu_si256(i.as_mut_ptr().add(half).cast(), encoder.encode32(y));
                }
            }
            check(g, &i);
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use super::{Code8, Kind};
    use crate::code::encode8::neon::{Dynamic128, Encode16, Search128};
    use std::arch::aarch64::{vld1q_f32, vst1q_u8};

    pub(super) fn run128(
        code: &Code8,
        groups: u32,
        lanes: impl Fn(u32) -> [u32; 64],
        check: impl FnMut(u32, &[u8; 64]),
    ) {
        match code.kind() {
            Kind::DynamicSigned => all128(&Dynamic128::<true>::new(), groups, lanes, check),
            Kind::DynamicUnsigned => all128(&Dynamic128::<false>::new(), groups, lanes, check),
            Kind::Other => all128(&Search128::new(code), groups, lanes, check),
        }
    }

    fn all128(
        encoder: &impl Encode16,
        groups: u32,
        lanes: impl Fn(u32) -> [u32; 64],
        mut check: impl FnMut(u32, &[u8; 64]),
    ) {
        for g in 0..groups {
            let (y, mut i) = (lanes(g).map(f32::from_bits), [0u8; 64]);
            for quarter in [0, 16, 32, 48] {
                let y = &y[quarter..];
                // SAFETY: the loads and the store stay inside arrays of 64.
                unsafe {
                    let y = std::array::from_fn(|k| vld1q_f32(y[4 * k..].as_ptr()));
                    vst1q_u8(i[quarter..].as_mut_ptr(), encoder.encode16(y));
                }
            }
            check(g, &i);
        }
    }
}

fn vector_isas() -> impl Iterator<Item = Isa> {
    isa::available().into_iter().filter(|&isa| isa != Isa::Scalar)
}

/// Checks `encode` for the floats whose bits are `start..end` (of one sign), every `stride / 64`th
/// group of 64.
fn check_range(isa: Isa, code: &Code8, start: u32, end: u32, stride: u32) {
    let lanes = |g| std::array::from_fn(|i| start + g * stride + i as u32);
    // The index is a step function of the bits: it stays `steady` up to `until`, included.
    let (mut steady, mut until) = (0, start);
    run(isa, code, (end - start).div_ceil(stride), lanes, |g, got| {
        let bits = start + g * stride;
        if bits + 63 <= until && *got == [steady; 64] {
            return;
        }
        for (i, got) in got.iter().enumerate() {
            let y = f32::from_bits(bits + i as u32);
            assert_eq!(*got, nearest(code, y), "{isa} {:?} {y:e} {:08x}", code.kind(), y.to_bits());
        }
        steady = got[63];
        let i = steady as usize;
        until = if bits >> 31 == 0 {
            code.midpoints().get(i).map_or(end, |above| above.to_bits())
        } else if i > 0 && code.midpoints()[i - 1] < 0.0 {
            code.midpoints()[i - 1].to_bits() - 1
        } else {
            end
        };
    });
}

/// Every float32 from 2^-24 to 1 and two ulps beyond, of both signs: 400 million. Below, where no
/// border lies, every 64th group; negative numbers of the unsigned map, the same.
#[test]
fn dynamic_encoders_equal_the_definition_everywhere() {
    const NEGATIVE: u32 = 1 << 31;
    let small = (0.5f32.powi(24)).to_bits();
    let end = 1.0f32.to_bits() + 3;
    let task = (end - small).div_ceil(32);
    for isa in vector_isas() {
        for signed in [true, false] {
            let code = Code8::dynamic(signed);
            threads::run(64, |i| {
                let sign = if i % 2 == 0 { 0 } else { NEGATIVE };
                let start = small + i as u32 / 2 * task;
                let stride = if signed || sign == 0 { 64 } else { 4096 };
                check_range(isa, code, sign + start, sign + end.min(start + task), stride);
            });
            check_range(isa, code, 0, small, 4096);
            check_range(isa, code, NEGATIVE, NEGATIVE + small, 4096);
        }
    }
}

/// Codes that no arithmetic knows: from the public maps to crowded and degenerate ones.
fn codes() -> Vec<Code8> {
    let mut tables = vec![
        [0.0; 256],
        [1.0; 256],
        std::array::from_fn(|i| f32::from_bits(i as u32)),
        std::array::from_fn(|i| 1.0 - (255 - i) as f32 * f32::EPSILON / 2.0),
        std::array::from_fn(|i| -1e30 * 0.5f32.powi(i as i32)),
        std::array::from_fn(|i| if i < 128 { -1.0 } else { 1.0 }),
    ];
    tables.push(maps::linear_map(true, 8, true).unwrap());
    tables.iter().map(|table| Code8::new(table).unwrap()).collect()
}

#[test]
fn encoders_equal_the_definition_around_every_border_and_code() {
    let mut codes = codes();
    codes.extend([true, false].map(|signed| Code8::dynamic(signed).clone()));
    for code in &codes {
        let near = |&x: &f32| {
            let up = x.next_up();
            let down = x.next_down();
            [down.next_down(), down, x, up, up.next_up()]
        };
        let mut y: Vec<f32> = code.midpoints().iter().chain(code.values()).flat_map(near).collect();
        y.extend([0.0, -0.0, 1e-45, -1e-45, f32::MIN_POSITIVE, 1.0, -1.0]);
        if code.kind() == Kind::Other {
            y.extend([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN]);
        } else {
            y.retain(|y| y.abs() <= 1.0);
        }
        let lanes = |g| std::array::from_fn(|i| y[(64 * g as usize + i) % y.len()].to_bits());
        for isa in vector_isas() {
            run(isa, code, y.len().div_ceil(64) as u32, lanes, |g, got| {
                for (i, y) in lanes(g).into_iter().map(f32::from_bits).enumerate() {
                    assert_eq!(got[i], nearest(code, y), "{isa} {y:e} among {:?}", code.values());
                }
            });
        }
    }
}

proptest! {
    #[test]
    fn any_ascending_code_is_searched_exactly(mut table in prop::array::uniform32(-1f32..1.0), seed: u32) {
        table.sort_by(f32::total_cmp);
        let code: [f32; 256] = std::array::from_fn(|i| table[i / 8]);
        let code = Code8::new(&code).unwrap();
        let lanes = |_| std::array::from_fn(|i| {
            let random = seed.wrapping_add(i as u32).wrapping_mul(0x9E37_79B9);
            (random as i32 as f32 * 0.5f32.powi(31)).to_bits()
        });
        for isa in vector_isas() {
            run(isa, &code, 1, lanes, |g, got| {
                let want = lanes(g).map(|y| nearest(&code, f32::from_bits(y)));
                assert_eq!(*got, want, "{isa}");
            });
        }
    }
}
