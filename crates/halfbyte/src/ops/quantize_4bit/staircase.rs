//! A 4-bit code as an ascending staircase: the one form in which the vector kernels search both
//! codes.
//!
//! ```text
//! rank(y) = number of borders with y > border
//! code(y) = codes[rank(y)]
//! ```

use crate::code::{Code4, FP4_ASCENDING, FP4_MIDPOINTS, FP4_SIGN, NF4_MIDPOINTS};

/// For any `y` but NaN, `codes[rank(y)]` is the code that the definition gives.
pub(super) struct Staircase {
    /// Ascending; `y` goes up only when strictly above.
    pub(super) borders: [f32; 15],
    /// The code of each rank.
    pub(super) codes: [u8; 16],
}

impl Staircase {
    pub(super) const fn of(code: Code4) -> &'static Self {
        match code {
            Code4::Nf4 => &NF4,
            Code4::Fp4 => &FP4,
        }
    }
}

static NF4: Staircase = Staircase {
    borders: NF4_MIDPOINTS,
    codes: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
};

/// FP4 searches magnitudes, and a tie goes to the smaller one. Below zero that means upwards:
/// `y >= -m`, which is `y > (-m).next_down()`. The same with m = 0 parts the two zeros.
static FP4: Staircase = {
    let mut borders = [0.0; 15];
    let mut codes = [0; 16];
    borders[7] = (-0.0f32).next_down();
    let mut i = 0;
    while i < 7 {
        borders[8 + i] = FP4_MIDPOINTS[i];
        borders[6 - i] = (-FP4_MIDPOINTS[i]).next_down();
        i += 1;
    }
    let mut i = 0;
    while i < 8 {
        codes[8 + i] = FP4_ASCENDING[i];
        codes[7 - i] = FP4_ASCENDING[i] | FP4_SIGN;
        i += 1;
    }
    Staircase { borders, codes }
};

/// The staircase cut into 32 cells of width 1/15, none of which holds more than one step: two
/// look-ups and one comparison find a rank.
///
/// ```text
/// cell = floor(15 * y)                      in -16..=15 for |y| <= 1 (and one ulp beyond)
/// rank(y) = rank[cell & 31] + (y > border[cell & 31])
/// ```
#[cfg(target_arch = "x86_64")]
pub(super) struct Cells {
    /// The border inside the cell, or infinity.
    pub(super) border: [f32; 32],
    /// The rank at the lower edge of the cell.
    pub(super) rank: [i32; 32],
}

#[cfg(target_arch = "x86_64")]
impl Cells {
    /// Cells per unit of `y`.
    pub(super) const PER_UNIT: f32 = 15.0;

    pub(super) const fn of(code: Code4) -> &'static Self {
        match code {
            Code4::Nf4 => &NF4_CELLS,
            Code4::Fp4 => &FP4_CELLS,
        }
    }

    const fn cut(stairs: &Staircase) -> Self {
        let mut cells = Self { border: [f32::INFINITY; 32], rank: [0; 32] };
        let mut cell = -16;
        while cell < 16 {
            let (lower, upper) = (cell as f64, (cell + 1) as f64);
            let at = (cell & 31) as usize;
            let mut i = 0;
            while i < 15 {
                // float64 products are exact here.
                let last_below = stairs.borders[i] as f64 * Self::PER_UNIT as f64;
                let first_above = stairs.borders[i].next_up() as f64 * Self::PER_UNIT as f64;
                if last_below < lower {
                    cells.rank[at] += 1;
                } else if first_above < upper {
                    assert!(cells.border[at] == f32::INFINITY, "two steps in one cell");
                    cells.border[at] = stairs.borders[i];
                }
                i += 1;
            }
            cell += 1;
        }
        cells
    }
}

#[cfg(target_arch = "x86_64")]
static NF4_CELLS: Cells = Cells::cut(&NF4);
#[cfg(target_arch = "x86_64")]
static FP4_CELLS: Cells = Cells::cut(&FP4);
