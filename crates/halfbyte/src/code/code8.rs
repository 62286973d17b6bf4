//! An 8-bit code and the borders between its values.

use super::maps::default_dynamic_map;
use crate::{Error, Result};
use std::sync::OnceLock;

/// An 8-bit code: 256 float32 values in ascending order.
///
/// Cheap to make from values (under a microsecond), so that a caller who is handed a table may do
/// it at every call. A table that equals one of the two default dynamic maps is recognized and
/// encoded by arithmetic; any other is searched, at about half the speed.
#[derive(Clone, Debug, PartialEq)]
pub struct Code8 {
    values: [f32; 256],
    /// `midpoints[i]` lies between entries `i` and `i + 1`.
    midpoints: [f32; 255],
    /// The midpoints as a binary search tree: the root is entry 1, the children of `h` are `2h`
    /// (for y at or below it) and `2h + 1` (above), and the index is 256 less than where one ends.
    tree: [f32; 256],
    kind: Kind,
}

/// How a code is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The default signed dynamic map.
    DynamicSigned,
    /// The default unsigned dynamic map.
    DynamicUnsigned,
    /// Any other table.
    Other,
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
        let kind = if values == &Self::dynamic(true).values {
            Kind::DynamicSigned
        } else if values == &Self::dynamic(false).values {
            Kind::DynamicUnsigned
        } else {
            Kind::Other
        };
        Ok(Self::from_ascending(values, kind))
    }

    fn from_ascending(values: &[f32; 256], kind: Kind) -> Self {
        let midpoints = std::array::from_fn(|i| midpoint(values[i], values[i + 1]));
        let mut tree = [0.0; 256]; // entry 0 is not used
        for level in 0..8 {
            for prefix in 0..1 << level {
                // The tree's node splits the range of 2^(8 - level) indices that share `prefix`.
                let last_of_lower_half = ((2 * prefix + 1) << (7 - level)) - 1;
                tree[(1 << level) + prefix] = midpoints[last_of_lower_half];
            }
        }
        Self { values: *values, midpoints, tree, kind }
    }

    /// The dynamic-tree map: signed for weights and first moments, unsigned for second moments
    /// (8-Bit Approximations for Parallelism, arXiv 1511.04561; 8-bit Optimizers, 2110.02861).
    #[must_use]
    pub fn dynamic(signed: bool) -> &'static Self {
        static SIGNED: OnceLock<Code8> = OnceLock::new();
        static UNSIGNED: OnceLock<Code8> = OnceLock::new();
        let (cell, kind) = if signed {
            (&SIGNED, Kind::DynamicSigned)
        } else {
            (&UNSIGNED, Kind::DynamicUnsigned)
        };
        cell.get_or_init(|| Self::from_ascending(&default_dynamic_map(signed), kind))
    }

    /// The value of each index.
    #[must_use]
    pub const fn values(&self) -> &[f32; 256] {
        &self.values
    }

    /// The borders: index `i` is the nearest code of `y` when exactly `i` midpoints lie strictly
    /// below `y`. Each is the largest float32 that does not exceed the exact midpoint, so that the
    /// comparison of a float32 with it decides as the exact midpoint would.
    #[must_use]
    pub const fn midpoints(&self) -> &[f32; 255] {
        &self.midpoints
    }

    pub(crate) const fn tree(&self) -> &[f32; 256] {
        &self.tree
    }

    pub(crate) const fn kind(&self) -> Kind {
        self.kind
    }
}

/// The largest float32 that does not exceed `(a + b) / 2`, for finite `a <= b`.
fn midpoint(a: f32, b: f32) -> f32 {
    let (a, b) = (f64::from(a), f64::from(b));
    // Knuth's two-sum: sum + error = a + b exactly. The error is not zero only when the exponents
    // lie further apart than float64 is long.
    let sum = a + b;
    let b_part = sum - a;
    let error = (a - (sum - b_part)) + (b - b_part);
    let half = 0.5 * sum;
    let rounded = half as f32;
    let back = f64::from(rounded);
    // `half` is a float64 next to the exact midpoint, `rounded` a float32: when they differ, they
    // differ by more than the error.
    if back > half || (back == half && error < 0.0) { rounded.next_down() } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code::maps;
    use proptest::prelude::*;

    #[test]
    fn tables_that_are_not_codes_are_refused() {
        assert!(matches!(Code8::new(&[0.0; 255]), Err(Error::Length { got: 255, .. })));
        for (index, bad) in [(0, f32::NAN), (255, f32::INFINITY), (7, -0.5)] {
            let mut values = *Code8::dynamic(false).values();
            values[index] = bad;
            match Code8::new(&values) {
                Err(Error::CodeOrder { index: i, .. }) => assert_eq!(i, index),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn default_maps_are_recognized() {
        for signed in [true, false] {
            let dynamic = Code8::dynamic(signed);
            assert_eq!(&Code8::new(dynamic.values()).unwrap(), dynamic);
        }
        assert_eq!(Code8::new(&[0.0; 256]).unwrap().kind(), Kind::Other);
    }

    #[test]
    fn the_tree_finds_every_index() {
        let code = Code8::new(&maps::linear_map(true, 8, true).unwrap()).unwrap();
        for i in 0..256 {
            let y = code.values()[i];
            let mut h = 1;
            for _ in 0..8 {
                h = 2 * h + usize::from(y > code.tree()[h]);
            }
            assert_eq!(h - 256, i);
        }
    }

    /// `y` is above the border exactly when it is strictly nearer to `b` than to `a`; all
    /// distances fit in 300 bits of fixed point, here compared as y + y > a + b in two steps.
    fn strictly_nearer_to_upper(a: f32, b: f32, y: f32) -> bool {
        // y + y and a + b as (head, tail) pairs of float64 without overlap.
        let pair = |p: f32, q: f32| {
            let (p, q) = (f64::from(p), f64::from(q));
            let (big, small) = if p.abs() >= q.abs() { (p, q) } else { (q, p) };
            let head = big + small;
            (head, small - (head - big))
        };
        let (y, m) = (pair(y, y), pair(a, b));
        y.0 > m.0 || (y.0 == m.0 && y.1 > m.1)
    }

    proptest! {
        #[test]
        fn borders_decide_as_exact_midpoints(x: u32, y: u32) {
            let (x, y) = (f32::from_bits(x), f32::from_bits(y));
            prop_assume!(x.is_finite() && y.is_finite());
            let (a, b) = (x.min(y), x.max(y));
            let border = midpoint(a, b);
            for y in [border.next_down(), border, border.next_up(), a, b] {
                prop_assert_eq!(y > border, strictly_nearer_to_upper(a, b, y), "{} {} {}", a, b, y);
            }
        }
    }

    #[test]
    fn borders_of_neighbours_and_of_far_apart_values() {
        assert_eq!(midpoint(1.0, 1.0f32.next_up()), 1.0);
        assert_eq!(midpoint(-(1.0f32.next_up()), -1.0), -(1.0f32.next_up()));
        assert_eq!(midpoint(0.5, 0.5), 0.5);
        assert_eq!(midpoint(-1.0, 1.0), 0.0);
        assert_eq!(midpoint(1e-45, 1.0), 0.5);
        assert_eq!(midpoint(-1e-45, 1.0), 0.5f32.next_down());
        assert_eq!(midpoint(f32::MIN, f32::MAX), 0.0);
        assert_eq!(midpoint(f32::MAX, f32::MAX), f32::MAX);
        assert_eq!(midpoint(0.0, 1e-45), 0.0);
    }
}
