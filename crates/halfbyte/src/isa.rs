//! Which instruction set the kernels use: detected once, overridden by `HALFBYTE_ISA`.

use crate::{Error, Result};
use std::sync::OnceLock;

/// An instruction set that kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust: the definition that every other variant must equal.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C (Haswell, Zen 1 and later).
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL beside AVX2 (Skylake-X, Zen 4 and later).
    Avx512,
    /// AArch64 Advanced SIMD.
    Neon,
}

impl Isa {
    /// Every instruction set, whether or not this machine has it.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Neon];

    /// The name that `HALFBYTE_ISA` takes.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
        }
    }

    /// True when this machine can run it.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => true, // part of the base architecture
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The instruction sets this machine can run, slowest first.
#[must_use]
pub fn available() -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
}

/// The fastest instruction set this machine can run.
#[must_use]
pub fn detect() -> Isa {
    *available().last().unwrap_or(&Isa::Scalar)
}

/// The instruction set in use: `HALFBYTE_ISA` when set (read once per process), else [`detect`].
///
/// # Errors
/// [`Error::Isa`] when the variable names something this machine cannot run; the message lists
/// what it can.
pub fn selected() -> Result<Isa> {
    static SELECTED: OnceLock<std::result::Result<Isa, String>> = OnceLock::new();
    SELECTED
        .get_or_init(|| match std::env::var("HALFBYTE_ISA") {
            Err(_) => Ok(detect()),
            Ok(name) => parse(&name).ok_or(name),
        })
        .clone()
        .map_err(|got| Error::Isa { got, available: available() })
}

fn parse(name: &str) -> Option<Isa> {
    let name = name.trim();
    available().into_iter().find(|isa| isa.name().eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalar_is_always_there_and_names_round_trip() {
        assert_eq!(available()[0], Isa::Scalar);
        for isa in available() {
            assert_eq!(parse(&isa.name().to_uppercase()), Some(isa));
        }
        assert_eq!(parse("sse9"), None);
    }

    #[test]
    fn the_error_lists_what_can_be_chosen() {
        let e = Error::Isa { got: "sse9".into(), available: vec![Isa::Scalar, Isa::Avx2] };
        assert!(e.to_string().ends_with("choose one of scalar, avx2"), "{e}");
    }
}
