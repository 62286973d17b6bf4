//! The nearest of 256 codes, many lanes at a time: what `quantize_blockwise` and the 8-bit
//! optimizers share.
//!
//! Two encoders per instruction set, each equal to [`nearest`] for every y that is a number.
//! `Search` walks the code's search tree and takes any code. `Dynamic` takes the two default maps:
//!
//! ```text
//! a = max(|y|, FLOOR)                       signed; max(y, FLOOR) unsigned
//! d = piece(a)                              from the exponent and the top of the mantissa
//! t = a * slope[d] + offset[d]              borders of decade d lie at whole numbers ...
//! t = min(t, t * STEEP + first[d])          ... (1) but for its first, a fifth of a cell up ...
//! t = max(t, a * last.0 + last.1)           ... (2) and the very last (unsigned)
//! n = floor(t)                              how many borders lie between 0 and a
//! i = 127 + n, or 127 - n for y < 0         signed; i = n unsigned
//! ```
//!
//! In decade d a dynamic map is a straight line of codes, hence so are its borders. Between two
//! decades lies one code interval of mixed width; lengthening the upper decade's line downwards
//! with a steeper slope, (1), meets its border. `piece` may change anywhere between the last border
//! of one decade and the power of ten, so a linear function of the float's bits (a logarithm good
//! to 0.09 octaves) is precise enough. The signed map's last two borders are on a line of their
//! own, piece 7; the unsigned map's last one takes (2).
//!
//! The maps themselves are rounded to float32, so the borders are off the line by some ulps. Hence
//! a lane with t very close to a whole number is in [`DOUBT`]: its whole group is settled by
//! comparing each y with the border nearest to it. That happens to one group of 64 in a hundred
//! (normally distributed float32; one in ten of bfloat16, whose ratios often are borders), and the
//! result is exact for all: `dynamic_encoders_equal_the_definition_everywhere` tries every float32
//! from 2^-24 to 1.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
#[cfg(test)]
mod tests;

use super::Code8;
use std::sync::OnceLock;

/// The definition: the number of borders strictly below y (none is below NaN).
pub(crate) fn nearest(code: &Code8, y: f32) -> u8 {
    code.midpoints().partition_point(|&m| y > m) as u8
}

/// `t` is computed as `256 + t`, a float32 whose low [`FRACTION`] mantissa bits are the fraction.
const ORIGIN: f32 = 256.0;
/// Bits of the fraction of `t`.
const FRACTION: u32 = 15;
/// Units of 2^-15 that are in doubt around each whole number.
const DOUBT_WIDTH: u32 = 4;
/// `t` is moved up by half of that width, so that it is in doubt when these bits are zero.
const DOUBT: i32 = 0x7FFF & !(DOUBT_WIDTH as i32 - 1);
/// Less this, and shifted by [`FRACTION`], the bits of `t` are the number of the border nearest to
/// it, the first above the code of 0 being number 0: `floor(t - 1/2)`.
#[cfg(target_arch = "x86_64")]
const BEFORE_HALF: i32 = ORIGIN.to_bits() as i32 + DOUBT_WIDTH as i32 / 2 + (1 << (FRACTION - 1));
/// The slope of the lengthened line (1), in terms of the decade's own.
const STEEP: f32 = 1.375;

/// Constants of `Dynamic` for one map.
pub(crate) struct DynamicTables {
    code: &'static Code8,
    slope: [f32; 8],
    offset: [f32; 8],
    first: [f32; 8],
    last: (f32, f32),
    /// Lies in piece 0 and below the first border, away from it.
    floor: f32,
}

/// `piece(a) = (high 16 bits of a * PIECE.0 + PIECE.1) >> PIECE_SHIFT`, less 32: 0 to 7. Found by
/// search over all multipliers: it changes between the last border of a decade and the next power
/// of ten, for all decades, with the most room to either side.
const fn piece(signed: bool) -> (i32, i32) {
    if signed { (19441, 11_234_693) } else { (19726, 6_726_314) }
}
const PIECE_SHIFT: u32 = 23;

impl DynamicTables {
    pub(crate) fn get(signed: bool) -> &'static Self {
        static SIGNED: OnceLock<DynamicTables> = OnceLock::new();
        static UNSIGNED: OnceLock<DynamicTables> = OnceLock::new();
        let cell = if signed { &SIGNED } else { &UNSIGNED };
        cell.get_or_init(|| Self::new(signed))
    }

    fn new(signed: bool) -> Self {
        let code = Code8::dynamic(signed);
        // Borders between the codes that are not negative: border n - 1 leads to the n-th code.
        let borders = &code.midpoints()[if signed { 127 } else { 0 }..];
        let border = |n: usize| f64::from(borders[n - 1]);
        // Whole numbers of t move to the middle of the doubtful interval.
        let origin = f64::from(ORIGIN) + f64::from(DOUBT_WIDTH / 2) / f64::from(1 << FRACTION);
        let steep = f64::from(STEEP);

        let (mut slope, mut offset, mut first) = ([0.0; 8], [0.0; 8], [0.0; 8]);
        for d in 0..8 {
            let decade = d.min(6);
            let parts = 1 << if signed { decade } else { decade + 1 };
            let codes_below = if signed { parts } else { parts - 1 }; // of all smaller decades, and 0
            let decade_end = 10f64.powi(decade as i32 - 6);
            let s = f64::from(parts) / (0.9 * decade_end);
            let o = f64::from(codes_below) - 0.1 * decade_end * s;
            // The steep line has the value `codes_below` at the border that leads to that code.
            let at_first = border(codes_below as usize) * s + o;
            let f = f64::from(codes_below) - at_first * steep;
            slope[d] = s as f32;
            offset[d] = (o + origin) as f32;
            first[d] = (f + origin - steep * origin) as f32;
        }
        // A line that passes the last border and is below all of `t` before the one before it.
        let line =
            |s: f64| (s as f32, (borders.len() as f64 - border(borders.len()) * s + origin) as f32);
        let last = line(512.0);
        if signed {
            let two_borders = border(borders.len()) - border(borders.len() - 1);
            (slope[7], offset[7]) = line(1.0 / two_borders);
            first[7] = 1e3; // never the smaller
        }
        Self { code, slope, offset, first, last, floor: (border(1) * 0.75) as f32 }
    }
}
