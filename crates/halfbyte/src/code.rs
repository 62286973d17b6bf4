//! The codes: which real numbers the 4-bit and 8-bit indices stand for. The only copy of the
//! tables in the project; every back end takes them from here.

mod code8;
pub(crate) mod encode8;
mod maps;

use crate::{Error, Result};

pub use code8::Code8;
pub(crate) use code8::Kind;
pub use maps::{dynamic_map, fp8_map, linear_map, normal_map};

/// A 4-bit data type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code4 {
    /// 4-bit NormalFloat: quantiles of N(0, 1) with an exact zero (QLoRA, arXiv 2305.14314).
    Nf4,
    /// 4-bit float: sign, two exponent bits, one mantissa bit, scaled to [-1, 1].
    Fp4,
}

/// NF4 by index, ascending.
const NF4: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// FP4 by index: eight magnitudes, then the same negated (index 8 is -0.0).
const FP4: [f32; 16] = [
    0.0,
    0.0625 / 12.0,
    8.0 / 12.0,
    1.0,
    4.0 / 12.0,
    6.0 / 12.0,
    2.0 / 12.0,
    3.0 / 12.0,
    -0.0,
    -0.0625 / 12.0,
    -8.0 / 12.0,
    -1.0,
    -4.0 / 12.0,
    -6.0 / 12.0,
    -2.0 / 12.0,
    -3.0 / 12.0,
];

/// FP4's magnitude bits (the low three) in ascending order of magnitude.
pub(crate) const FP4_ASCENDING: [u8; 8] = [0, 1, 6, 7, 4, 5, 2, 3];
/// The top bit of an FP4 index is its sign.
pub(crate) const FP4_SIGN: u8 = 0b1000;

/// Float32 midpoints between neighbours: a value goes up only when strictly above.
const fn midpoints<const N: usize>(ascending: &[f32]) -> [f32; N] {
    let mut mid = [0.0; N];
    let mut i = 0;
    while i < N {
        mid[i] = (ascending[i] + ascending[i + 1]) * 0.5;
        i += 1;
    }
    mid
}

/// The 15 borders between NF4 codes.
pub(crate) const NF4_MIDPOINTS: [f32; 15] = midpoints(&NF4);
/// The 7 borders between FP4 magnitudes, in ascending order of magnitude.
pub(crate) const FP4_MIDPOINTS: [f32; 7] = {
    let mut ascending = [0.0; 8];
    let mut i = 0;
    while i < 8 {
        ascending[i] = FP4[FP4_ASCENDING[i] as usize];
        i += 1;
    }
    midpoints(&ascending)
};

impl Code4 {
    /// Both data types.
    pub const ALL: [Self; 2] = [Self::Nf4, Self::Fp4];

    /// The name used in checkpoints and configurations: `"nf4"` or `"fp4"`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    /// The value of each index, scaled to [-1, 1].
    #[must_use]
    pub const fn table(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
        }
    }

    /// The index of 0.0.
    #[must_use]
    pub const fn zero(self) -> u8 {
        match self {
            Self::Nf4 => 7,
            Self::Fp4 => 0,
        }
    }
}

impl std::fmt::Display for Code4 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Code4 {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "nf4" => Ok(Self::Nf4),
            "fp4" => Ok(Self::Fp4),
            _ => Err(Error::QuantType { got: s.to_owned() }),
        }
    }
}
