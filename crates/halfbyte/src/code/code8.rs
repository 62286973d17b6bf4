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
    /// below `y`. Each is the midpoint rounded to float32, as everywhere else that these codes are
    /// used: it decides as the exact midpoint would for every float32 but itself, which goes to
    /// the lower code.
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

/// `(a + b) / 2`, rounded once; the sum is exact in float64 or far from a tie, and cannot overflow.
fn midpoint(a: f32, b: f32) -> f32 {
    (f64::midpoint(a.into(), b.into())) as f32
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

    proptest! {
        /// Beside the border itself, comparing with it decides by distance.
        #[test]
        fn borders_decide_by_distance(x in -1.0f32..1.0, y in -1.0f32..1.0) {
            let (a, b) = (x.min(y), x.max(y));
            let border = midpoint(a, b);
            let twice = f64::from(a) + f64::from(b);
            for y in [border.next_down(), border.next_up(), a, b] {
                if y != border {
                    prop_assert_eq!(y > border, 2.0 * f64::from(y) > twice, "{} {} {}", a, b, y);
                }
            }
        }
    }

    #[test]
    fn borders_of_neighbours_and_of_far_apart_values() {
        assert_eq!(midpoint(1.0, 1.0f32.next_up()), 1.0); // a tie of the rounding, to even
        assert_eq!(midpoint(0.5, 0.5), 0.5);
        assert_eq!(midpoint(-1.0, 1.0), 0.0);
        assert_eq!(midpoint(1e-45, 1.0), 0.5);
        assert_eq!(midpoint(f32::MIN, f32::MAX), 0.0);
        assert_eq!(midpoint(f32::MAX, f32::MAX), f32::MAX);
    }
}
