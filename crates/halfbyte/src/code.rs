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

#[cfg(test)]
mod tests {
    use super::*;

    /// The standard normal distribution function, by its Taylor series around 0 (exact to 1e-14
    /// for |x| < 3).
    fn normal_cdf(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..60 {
            term *= -x * x / f64::from(2 * n);
            sum += term / f64::from(2 * n + 1);
        }
        0.5 + sum / std::f64::consts::TAU.sqrt()
    }

    /// The `p`-quantile of N(0, 1), by bisection.
    fn normal_quantile(p: f64) -> f64 {
        let (mut low, mut high) = (-3.0, 3.0);
        for _ in 0..80 {
            let middle = f64::midpoint(low, high);
            if normal_cdf(middle) < p { low = middle } else { high = middle }
        }
        f64::midpoint(low, high)
    }

    /// arXiv 2305.14314, section 3: quantiles at evenly spaced probabilities from `OFFSET` to 1/2, eight
    /// intervals above zero and seven below, zero shared, scaled to a largest value of 1.
    #[test]
    fn nf4_is_derived_from_quantiles_of_the_normal_distribution() {
        const OFFSET: f64 = 0.9677083;
        let side = |intervals: u32| {
            (1..=intervals).map(move |i| {
                let above_half = (OFFSET - 0.5) * f64::from(i) / f64::from(intervals);
                normal_quantile(0.5 + above_half) / normal_quantile(OFFSET)
            })
        };
        let mut derived: Vec<f64> = side(7).map(|q| -q).collect();
        derived.reverse();
        derived.push(0.0);
        derived.extend(side(8));
        assert_eq!(derived.len(), 16);
        for (derived, value) in derived.iter().zip(Code4::Nf4.table()) {
            assert!((derived - f64::from(*value)).abs() < 1e-6, "{derived} {value}");
        }
    }

    #[test]
    fn nf4_ascends_from_minus_one_to_one_through_an_exact_zero() {
        let table = Code4::Nf4.table();
        assert!(table.is_sorted_by(|a, b| a < b));
        assert_eq!((table[0], table[15]), (-1.0, 1.0));
        assert_eq!(table[Code4::Nf4.zero() as usize].to_bits(), 0);
        assert!(NF4_MIDPOINTS.iter().zip(table.windows(2)).all(|(m, v)| v[0] < *m && *m < v[1]));
    }

    /// Sign, two exponent bits, one mantissa bit, in twelfths; the smallest is 1/16 of a twelfth.
    #[test]
    fn fp4_is_a_tiny_float() {
        let table = Code4::Fp4.table();
        for index in 0..8u8 {
            let (exponent, mantissa) = (index >> 1, f32::from(index & 1));
            let twelfths = match exponent {
                0 => mantissa / 16.0,
                1 => 8.0 + 4.0 * mantissa,
                2 => 4.0 + 2.0 * mantissa,
                _ => 2.0 + mantissa,
            };
            assert_eq!(table[index as usize], twelfths / 12.0, "{index}");
            let negative = table[(index | FP4_SIGN) as usize];
            assert_eq!(negative.to_bits(), (-table[index as usize]).to_bits(), "{index}");
        }
        assert_eq!(table[Code4::Fp4.zero() as usize].to_bits(), 0);
        let magnitudes = FP4_ASCENDING.map(|index| table[index as usize]);
        assert!(magnitudes.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn names_round_trip() {
        for code in Code4::ALL {
            assert_eq!(code.to_string().parse::<Code4>().unwrap(), code);
        }
        assert!("NF4".parse::<Code4>().is_err());
    }
}
