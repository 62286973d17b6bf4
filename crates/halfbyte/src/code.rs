//! The codes: which real numbers the 4-bit and 8-bit indices stand for. The only copy of the
//! tables in the project; every back end takes them from here.

use crate::{Error, Result};
use std::sync::OnceLock;

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

/// An 8-bit code: 256 float32 values in ascending order.
#[derive(Clone, Debug, PartialEq)]
pub struct Code8 {
    values: [f32; 256],
    /// `midpoints[i]` lies between entries `i` and `i + 1`.
    midpoints: [f32; 255],
}

impl Code8 {
    /// Takes any ascending table (equal neighbours are allowed: short maps are padded with zeros).
    ///
    /// # Errors
    /// [`Error::Length`] unless there are 256 entries, [`Error::CodeOrder`] unless they ascend and
    /// are finite.
    pub fn new(values: &[f32]) -> Result<Self> {
        let values: &[f32; 256] = values.try_into().map_err(|_| Error::Length {
            buffer: "code",
            expected: 256,
            got: values.len(),
            unit: "float32 values",
        })?;
        for (index, &value) in values.iter().enumerate() {
            let previous = if index == 0 { f32::MIN } else { values[index - 1] };
            if !value.is_finite() || value < previous {
                return Err(Error::CodeOrder { index, value, previous });
            }
        }
        Ok(Self::from_ascending(*values))
    }

    fn from_ascending(values: [f32; 256]) -> Self {
        // Halves are added, so that large entries do not overflow; exact for all but subnormals.
        let midpoints = std::array::from_fn(|i| values[i] * 0.5 + values[i + 1] * 0.5);
        Self { values, midpoints }
    }

    /// The dynamic-tree map: signed for weights and first moments, unsigned for second moments
    /// (8-Bit Approximations for Parallelism, arXiv 1511.04561; 8-bit Optimizers, 2110.02861).
    #[must_use]
    pub fn dynamic(signed: bool) -> &'static Self {
        static SIGNED: OnceLock<Code8> = OnceLock::new();
        static UNSIGNED: OnceLock<Code8> = OnceLock::new();
        let cell = if signed { &SIGNED } else { &UNSIGNED };
        cell.get_or_init(|| Self::from_ascending(dynamic_values(signed)))
    }

    /// The value of each index.
    #[must_use]
    pub const fn values(&self) -> &[f32; 256] {
        &self.values
    }

    /// The borders: index `i` is the nearest code of `y` when exactly `i` midpoints lie strictly
    /// below `y`.
    #[must_use]
    pub const fn midpoints(&self) -> &[f32; 255] {
        &self.midpoints
    }
}

/// For decade `i` of 7, the fraction interval [0.1, 1] is cut into `2^i` (signed) or `2^(i+1)`
/// (unsigned) equal parts, whose midpoints are scaled by `10^(i-6)`; plus 0 and 1.
fn dynamic_values(signed: bool) -> [f32; 256] {
    let mut values = Vec::with_capacity(256);
    for i in 0..7i32 {
        let parts = 1usize << if signed { i } else { i + 1 };
        let border = linspace(0.1, 1.0, parts + 1);
        let scale = 10f64.powi(i - 6) as f32;
        for pair in border.windows(2) {
            let value = scale * ((pair[0] + pair[1]) / 2.0);
            values.push(value);
            if signed {
                values.push(-value);
            }
        }
    }
    values.push(0.0);
    values.push(1.0);
    values.sort_by(f32::total_cmp);
    values.try_into().expect("127 + 127 or 254 parts, 0 and 1 are 256 values")
}

/// `steps` evenly spaced float32 values, each computed from the nearer end (as `torch.linspace`).
fn linspace(start: f32, end: f32, steps: usize) -> Vec<f32> {
    let step = (end - start) / (steps - 1) as f32;
    (0..steps)
        .map(|i| {
            if i < steps / 2 {
                start + step * i as f32
            } else {
                end - step * (steps - 1 - i) as f32
            }
        })
        .collect()
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
