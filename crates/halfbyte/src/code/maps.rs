//! The maps of bitsandbytes' public API (`create_dynamic_map` and so on): same arguments, same
//! float32 values bit for bit. Shorter maps are padded to 256 entries with zeros.

use crate::{Error, Result};
use std::f64::consts::FRAC_1_SQRT_2;

/// The dynamic-tree map (8-Bit Approximations for Parallelism, arXiv 1511.04561).
///
/// There are `max_exponent_bits` decades below 1. In each, the interval from a tenth to the whole
/// of it is cut into equal parts, twice as many as in the one before, and the middle of each part
/// is a value (and, if `signed`, its negative); 0 and 1 are added. Bits left over by few exponents
/// cut the last decade once more. The default is `(signed, 7, 8)`.
///
/// # Errors
/// [`Error::MapArgument`] unless `total_bits` is 1 to 8 and the values are `2^total_bits`: any
/// `max_exponent_bits` from 1 will do if `signed`, only `total_bits - 1` otherwise.
///
/// ```
/// let map = halfbyte::code::dynamic_map(true, 7, 8)?;
/// assert_eq!(&map, halfbyte::Code8::dynamic(true).values());
/// assert_eq!(map[127], 0.0);
/// # Ok::<(), halfbyte::Error>(())
/// ```
pub fn dynamic_map(signed: bool, max_exponent_bits: u32, total_bits: u32) -> Result<[f32; 256]> {
    check_total_bits("dynamic", total_bits)?;
    let wrong = |expected| Error::MapArgument {
        map: "dynamic",
        argument: "max_exponent_bits",
        expected,
        got: max_exponent_bits.to_string(),
    };
    if !signed && max_exponent_bits != total_bits - 1 {
        return Err(wrong("total_bits - 1 for an unsigned map"));
    }
    if max_exponent_bits == 0 && total_bits > 1 {
        return Err(wrong("1 or more"));
    }
    let values = dynamic_values(signed, max_exponent_bits, total_bits);
    debug_assert_eq!(values.len(), 1 << total_bits);
    Ok(padded_and_sorted(values))
}

/// `dynamic_map(signed, 7, 8)`.
pub(super) fn default_dynamic_map(signed: bool) -> [f32; 256] {
    padded_and_sorted(dynamic_values(signed, 7, 8))
}

fn dynamic_values(signed: bool, max_exponent_bits: u32, total_bits: u32) -> Vec<f32> {
    let mut values = vec![0.0, 1.0];
    let mut add_decade = |exponent: i32, parts: usize| {
        let scale = 10f64.powi(exponent) as f32;
        let borders = linspace(0.1, 1.0, parts + 1);
        for pair in borders.windows(2) {
            let middle = 0.5 * (pair[0] + pair[1]);
            values.push(scale * middle);
            if signed {
                values.push(-(scale * middle));
            }
        }
    };
    // Bits that say which part of the last decade; one fewer in each decade before.
    let last = total_bits as i32 - if signed { 2 } else { 1 };
    let decades = max_exponent_bits.min(total_bits) as i32; // more would have no part
    for exponent in (1 - decades).max(-last)..=0 {
        add_decade(exponent, 1 << (last + exponent));
    }
    if max_exponent_bits + 1 < total_bits {
        add_decade(0, (1 << (total_bits - 1 - max_exponent_bits)) - 1);
    }
    values
}

/// Evenly spaced values: `2^total_bits` from -1 (0 if not `signed`) to 1.
///
/// A `signed` map of fewer than 8 bits, or one with `add_zero`, has one value fewer, so that 0 is
/// one of them. Zeros that pad a map stand after the first half of its values: a short unsigned map
/// does not ascend, as in bitsandbytes, and [`Code8::new`](crate::Code8::new) refuses it.
///
/// # Errors
/// [`Error::MapArgument`] unless `total_bits` is 1 to 8.
pub fn linear_map(signed: bool, total_bits: u32, add_zero: bool) -> Result<[f32; 256]> {
    check_total_bits("linear", total_bits)?;
    let steps = (1 << total_bits) - usize::from(signed && (add_zero || total_bits < 8));
    let values = linspace(if signed { -1.0 } else { 0.0 }, 1.0, steps);
    let (lower, upper) = values.split_at(steps / 2);
    let mut map = [0.0; 256];
    map[..lower.len()].copy_from_slice(lower);
    map[256 - upper.len()..].copy_from_slice(upper);
    Ok(map)
}

/// Quantiles of the normal distribution, scaled to [-1, 1] (as in arXiv 2305.14314): 8 above zero
/// (7 without `use_extra_value`), 7 below, and zeros. The outermost lies at the probability
/// `offset`, 0.9677083 by default, which gives NF4's values.
///
/// # Errors
/// [`Error::MapArgument`] unless `offset` lies between 0 and 1 and is not 0.5.
pub fn normal_map(offset: f64, use_extra_value: bool) -> Result<[f32; 256]> {
    let outermost = offset as f32;
    if !(outermost > 0.0 && outermost < 1.0 && outermost != 0.5) {
        return Err(Error::MapArgument {
            map: "normal",
            argument: "offset",
            expected: "between 0 and 1 and not 0.5",
            got: offset.to_string(),
        });
    }
    let quantiles = |count: usize| {
        let probabilities = linspace(outermost, 0.5, count + 1);
        probabilities.into_iter().take(count).map(|p| normal_quantile(f64::from(p)) as f32)
    };
    let above = quantiles(if use_extra_value { 8 } else { 7 });
    let map = padded_and_sorted(above.chain(quantiles(7).map(|q| -q)).collect());
    Ok(map.map(|value| value / map[255]))
}

/// 8-bit floats scaled to a maximum of 1: a sign if `signed`, `exponent_bits` and
/// `precision_bits`. `(true, 5, 2, 8)` is the format E5M2, `(true, 4, 3, 8)` is E4M3, except that no pattern
/// is spent on infinity or NaN and that values without the implicit leading 1 (exponent bits zero)
/// are a quarter of what IEEE 754 makes of them, as in bitsandbytes.
///
/// # Errors
/// [`Error::MapArgument`] unless `total_bits` is 1 to 8 and the sum of the others, and
/// `exponent_bits` at most 7 and, for a signed map, at least 1.
pub fn fp8_map(
    signed: bool,
    exponent_bits: u32,
    precision_bits: u32,
    total_bits: u32,
) -> Result<[f32; 256]> {
    check_total_bits("fp8", total_bits)?;
    let wrong = |argument, expected, got: u32| {
        Err(Error::MapArgument { map: "fp8", argument, expected, got: got.to_string() })
    };
    let sum = exponent_bits.saturating_add(precision_bits).saturating_add(u32::from(signed));
    if total_bits != sum {
        return wrong("total_bits", "the sum of sign, exponent and precision bits", total_bits);
    }
    if exponent_bits > 7 || signed && exponent_bits == 0 {
        return wrong("exponent_bits", "0 (1 if signed) to 7", exponent_bits);
    }
    let one = 1 << precision_bits;
    let largest_exponent = (1 << exponent_bits) - 1;
    // With no exponent bits the bias, half of 2^exponent_bits, is half a bit. It cancels out, but
    // for its rounding.
    let unit = if exponent_bits == 0 { FRAC_1_SQRT_2 } else { 1.0 };
    let mut values = Vec::with_capacity(256);
    for exponent in 0..=largest_exponent {
        for fraction in 0..one {
            let magnitude = match exponent {
                0 => f64::from(fraction) * 0.25,
                _ => f64::from(one + fraction) * 0.5,
            };
            // Relative to the largest exponent; exact in float64 where `unit` is 1.
            let value = unit * magnitude * 0.5f64.powi(largest_exponent - exponent);
            values.push(value as f32);
            if signed {
                values.push(-value as f32);
            }
        }
    }
    let map = padded_and_sorted(values);
    Ok(map.map(|value| value / map[255]))
}

fn check_total_bits(map: &'static str, total_bits: u32) -> Result<()> {
    if (1..=8).contains(&total_bits) {
        return Ok(());
    }
    let got = total_bits.to_string();
    Err(Error::MapArgument { map, argument: "total_bits", expected: "1 to 8", got })
}

fn padded_and_sorted(mut values: Vec<f32>) -> [f32; 256] {
    values.resize(256, 0.0);
    // Stable, and -0 equal to 0: the zeros stay in the order in which they came.
    values.sort_by(|a, b| a.partial_cmp(b).expect("no value is NaN"));
    values.try_into().expect("256 values")
}

/// `steps` evenly spaced float32 values, each by one fused operation from the nearer end, which is
/// what `torch.linspace` computes.
fn linspace(start: f32, end: f32, steps: usize) -> Vec<f32> {
    let step = (end - start) / (steps - 1) as f32;
    let value = |i| {
        if steps == 1 {
            start
        } else if i < steps / 2 {
            step.mul_add(i as f32, start)
        } else {
            (-step).mul_add((steps - 1 - i) as f32, end)
        }
    };
    (0..steps).map(value).collect()
}

/// The inverse of the normal distribution function, to 16 digits: Wichura, "Algorithm AS 241: The
/// Percentage Points of the Normal Distribution", Applied Statistics 37 (1988), PPND16.
fn normal_quantile(p: f64) -> f64 {
    let polynomial = |coefficients: &[f64; 8], x| coefficients.iter().fold(0.0, |y, c| y * x + c);
    let ratio = |[p, q]: &[[f64; 8]; 2], x| polynomial(p, x) / polynomial(q, x);
    let q = p - 0.5;
    if q.abs() <= 0.425 {
        return q * ratio(&CENTRE, 0.180625 - q * q);
    }
    let r = (-p.min(1.0 - p).ln()).sqrt();
    let magnitude = if r <= 5.0 { ratio(&MIDDLE, r - 1.6) } else { ratio(&TAIL, r - 5.0) };
    magnitude.copysign(q)
}

/// Numerator and denominator, highest power first, for |p - 1/2| <= 0.425.
const CENTRE: [[f64; 8]; 2] = [
    [
        2.5090809287301226727e3,
        3.3430575583588128105e4,
        6.7265770927008700853e4,
        4.5921953931549871457e4,
        1.3731693765509461125e4,
        1.9715909503065514427e3,
        1.3314166789178437745e2,
        3.3871328727963666080e0,
    ],
    [
        5.2264952788528545610e3,
        2.8729085735721942674e4,
        3.9307895800092710610e4,
        2.1213794301586595867e4,
        5.3941960214247511077e3,
        6.8718700749205790830e2,
        4.2313330701600911252e1,
        1.0,
    ],
];
/// For tails down to exp(-25).
const MIDDLE: [[f64; 8]; 2] = [
    [
        7.74545014278341407640e-4,
        2.27238449892691845833e-2,
        2.41780725177450611770e-1,
        1.27045825245236838258e0,
        3.64784832476320460504e0,
        5.76949722146069140550e0,
        4.63033784615654529590e0,
        1.42343711074968357734e0,
    ],
    [
        1.05075007164441684324e-9,
        5.47593808499534494600e-4,
        1.51986665636164571966e-2,
        1.48103976427480074590e-1,
        6.89767334985100004550e-1,
        1.67638483018380384940e0,
        2.05319162663775882187e0,
        1.0,
    ],
];
/// For smaller tails.
const TAIL: [[f64; 8]; 2] = [
    [
        2.01033439929228813265e-7,
        2.71155556874348757815e-5,
        1.24266094738807843860e-3,
        2.65321895265761230930e-2,
        2.96560571828504891230e-1,
        1.78482653991729133580e0,
        5.46378491116411436990e0,
        6.65790464350110377720e0,
    ],
    [
        2.04426310338993978564e-15,
        1.42151175831644588870e-7,
        1.84631831751005468180e-5,
        7.86869131145613259100e-4,
        1.48753612908506148525e-2,
        1.36929880922735805310e-1,
        5.99832206555887937690e-1,
        1.0,
    ],
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Code8;

    /// One line of the golden file: a name, its arguments, 256 values.
    fn computed(name: &str, arguments: &str) -> [f32; 256] {
        let a: Vec<&str> = arguments.split(',').collect();
        let flag = |i: usize| a[i].parse().unwrap();
        let number = |i: usize| a[i].parse().unwrap();
        let map = match name {
            "dynamic" => dynamic_map(flag(0), number(1), number(2)),
            "linear" => linear_map(flag(0), number(1), flag(2)),
            "normal" => normal_map(a[0].parse().unwrap(), flag(1)),
            "fp8" => fp8_map(flag(0), number(1), number(2), number(3)),
            _ => panic!("the golden file names an unknown map {name}"),
        };
        map.unwrap()
    }

    #[test]
    fn maps_equal_upstream_bit_for_bit() {
        let golden = include_str!("../../tests/golden/maps.txt");
        let mut maps = 0;
        for line in golden.lines().filter(|line| !line.starts_with('#')) {
            let mut words = line.split(' ');
            let (name, arguments) = (words.next().unwrap(), words.next().unwrap());
            let expected: Vec<u32> = words
                .flat_map(|word| {
                    let (bits, times) = word.split_once('*').unwrap_or((word, "1"));
                    let bits = u32::from_str_radix(bits, 16).unwrap();
                    std::iter::repeat_n(bits, times.parse().unwrap())
                })
                .collect();
            let got = computed(name, arguments).map(f32::to_bits);
            assert_eq!(got[..], expected, "{name}({arguments})");
            maps += 1;
        }
        assert_eq!(maps, 21);
    }

    #[test]
    fn default_maps_are_the_dynamic_codes() {
        for signed in [true, false] {
            assert_eq!(&dynamic_map(signed, 7, 8).unwrap(), Code8::dynamic(signed).values());
        }
    }

    #[test]
    fn arguments_without_a_map_are_refused() {
        let message = |map: Result<[f32; 256]>| map.unwrap_err().to_string();
        assert_eq!(
            message(dynamic_map(true, 7, 9)),
            "dynamic map: total_bits must be 1 to 8, got 9"
        );
        for (map, argument) in [
            (dynamic_map(false, 4, 8), "max_exponent_bits"),
            (dynamic_map(true, 0, 8), "max_exponent_bits"),
            (linear_map(true, 0, true), "total_bits"),
            (normal_map(0.5, true), "offset"),
            (normal_map(1.0, true), "offset"),
            (normal_map(f64::NAN, true), "offset"),
            (fp8_map(true, 5, 3, 8), "total_bits"),
            (fp8_map(true, u32::MAX, u32::MAX, 8), "total_bits"),
            (fp8_map(true, 0, 7, 8), "exponent_bits"),
            (fp8_map(false, 8, 0, 8), "exponent_bits"),
        ] {
            assert!(message(map).contains(argument));
        }
    }

    #[test]
    fn quantiles_are_symmetric_and_known() {
        assert_eq!(normal_quantile(0.5), 0.0);
        // To 16 digits.
        for (p, z) in [
            (0.975, 1.9599639845400543),
            (0.9, 1.2815515655446008),
            (1e-3, -3.090232306167813),
            (1e-20, -9.262340089798408),
        ] {
            assert!((normal_quantile(p) - z).abs() <= 4.0 * f64::EPSILON * z.abs(), "{p}");
            assert!((normal_quantile(1.0 - p) + z).abs() < 1e-11 || p < 1e-10);
        }
    }
}
