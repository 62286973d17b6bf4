//! `kernels/codes.h` and `kernels/cells8.h` hold what the core's tables say: they are written by
//! this test (with `HALFBYTE_WRITE_CODES=1`) and compared with what it would write.

use halfbyte::{Code4, Code8};
use std::fmt::Write as _;
use std::path::PathBuf;

const CELLS_PER_UNIT: f32 = 15.0;
const TO_QUARTERS: f32 = 3_145_728.0;

/// The cell of `y`: what `cell_offset` in `kernels/quantize_4bit.cu` computes, in words.
fn cell(y: f32) -> usize {
    (y.mul_add(CELLS_PER_UNIT, TO_QUARTERS).to_bits() & 0x7C) as usize / 4
}

/// The same without the wrap-around.
fn signed_cell(y: f32) -> i64 {
    i64::from(y.mul_add(CELLS_PER_UNIT, TO_QUARTERS).to_bits()) / 4
}

fn midpoints(ascending: &[f32]) -> Vec<f32> {
    ascending.windows(2).map(|pair| (pair[0] + pair[1]) * 0.5).collect()
}

/// For each cell the border inside it (or infinity) and the number of borders below it.
fn cells(borders: &[f32], lowest: f32) -> ([f32; 32], [usize; 32]) {
    let (mut inside, mut below) = ([f32::INFINITY; 32], [0; 32]);
    for number in signed_cell(lowest)..=signed_cell(1.0) {
        let at = (number & 31) as usize;
        let here: Vec<f32> =
            borders.iter().copied().filter(|&m| signed_cell(m) == number).collect();
        assert!(here.len() <= 1, "cell {number} holds the borders {here:?}");
        inside[at] = here.first().copied().unwrap_or(f32::INFINITY);
        below[at] = borders.iter().filter(|&&m| signed_cell(m) < number).count();
    }
    (inside, below)
}

/// FP4's indices of non-negative values, by value.
fn fp4_ascending() -> Vec<usize> {
    let table = Code4::Fp4.table();
    let mut indices: Vec<usize> = (0..8).collect();
    indices.sort_by(|&a, &b| table[a].total_cmp(&table[b]));
    indices
}

fn nf4_cells() -> ([f32; 32], [u32; 32]) {
    let (inside, below) = cells(&midpoints(Code4::Nf4.table()), -1.0);
    (inside, below.map(|rank| rank as u32))
}

fn fp4_cells() -> ([f32; 32], [u32; 32]) {
    let ascending = fp4_ascending();
    let values: Vec<f32> = ascending.iter().map(|&i| Code4::Fp4.table()[i]).collect();
    let (inside, below) = cells(&midpoints(&values), 0.0);
    let code = |rank: usize| ascending[rank.min(7)] as u32;
    (inside, below.map(|rank| code(rank) | code(rank + 1) << 16))
}

fn floats(out: &mut String, comment: &str, name: &str, values: &[f32]) {
    words(out, comment, "float", name, values.iter().map(|value| format!("{value:?}f")));
}

fn words(
    out: &mut String,
    comment: &str,
    kind: &str,
    name: &str,
    values: impl ExactSizeIterator<Item = String>,
) {
    let _ = write!(out, "\n// {comment}\nCONSTANT {kind} {name}[{}] = {{", values.len());
    let mut width = 100;
    for value in values {
        if width + value.len() + 2 > 98 {
            out.push_str("\n   ");
            width = 3;
        }
        width += value.len() + 2;
        let _ = write!(out, " {value},");
    }
    out.push_str("\n};\n");
}

/// The cells of `kernels/encode8.h`: which bits of `z` number them, and the magnitude that smaller
/// ones become.
struct Cells {
    signed: bool,
    shift: u32,
    lowest: f32,
}

/// Twelve of the upper bits of `z` are the place of a cell. Places before this one are not stored.
const CELLS8_FIRST: usize = 60;
const PLACES: usize = 4036;

const CELLS8: [Cells; 2] = [
    Cells { signed: true, shift: 17, lowest: 1.0 / 4_194_304.0 },
    Cells { signed: false, shift: 16, lowest: 1.0 / 8_388_608.0 },
];

impl Cells {
    /// What is looked up and added to: ascends with `y` on either side of zero.
    fn z(&self, y: f32) -> u32 {
        let bits = if self.signed { y.abs() } else { y }.max(self.lowest).to_bits();
        if self.signed && y.is_sign_negative() { !bits } else { bits }
    }

    /// The smallest number with this `z`.
    fn y(z: u32) -> f32 {
        if z >> 31 == 0 { f32::from_bits(z) } else { -f32::from_bits(!z) }
    }

    fn place(&self, z: u32) -> usize {
        (z >> self.shift & 0xFFF) as usize
    }

    /// The word of the cell whose first `z` this is.
    fn word(&self, first: u32) -> u32 {
        let borders = Code8::dynamic(self.signed).midpoints();
        let last = first + ((1 << self.shift) - 1);
        let inside: Vec<u32> = borders
            .iter()
            .filter(|m| m.abs() >= self.lowest)
            .map(|&m| self.z(m))
            .filter(|z| (first..=last).contains(z))
            .collect();
        assert!(inside.len() <= 1, "cell {first:#x} holds the borders {inside:x?}");
        let code = borders.partition_point(|&m| Self::y(first) > m) as u32;
        let border = inside.first().copied().unwrap_or(last);
        ((code << 24) + 0xFF_FFFF).wrapping_sub(border)
    }

    /// The numbers that have cells, below zero and above.
    fn sides(&self) -> Vec<(f32, f32)> {
        let above = (self.lowest, 1.0);
        if self.signed { vec![(-1.0, -self.lowest), above] } else { vec![above] }
    }

    /// Words by place, from `CELLS8_FIRST` on; zero where there is no cell.
    fn table(&self) -> Vec<u32> {
        let mut words = vec![0; PLACES];
        for (first, last) in self.sides() {
            for cell in self.z(first) >> self.shift..=self.z(last) >> self.shift {
                let z = cell << self.shift;
                words[self.place(z)] = self.word(z);
            }
        }
        words.split_off(CELLS8_FIRST)
    }

    /// The parts of the table that hold cells, in whole fours of words.
    fn parts(&self) -> Vec<std::ops::Range<usize>> {
        let at = |y: f32| self.place(self.z(y)) - CELLS8_FIRST;
        let part = |(first, last)| at(first) & !3..(at(last) + 1).next_multiple_of(4);
        self.sides().into_iter().map(part).collect()
    }
}

fn header8() -> String {
    let mut out = String::from(
        "// The default dynamic maps, prepared for encode8.h. Written by tests/codes.rs as codes.h is.\n\
         #ifndef HALFBYTE_CELLS8_H\n#define HALFBYTE_CELLS8_H\n#include \"port.h\"\n\n\
         // A cell's place is twelve bits of z from the shift on; tables begin at place CELLS8_FIRST.\n\
         #define ALIGNED_16 __attribute__((aligned(16)))\n",
    );
    let _ = writeln!(out, "#define CELLS8_FIRST {CELLS8_FIRST}");
    let _ = writeln!(out, "#define CELLS8_WORDS {}", PLACES - CELLS8_FIRST);
    for cells in &CELLS8 {
        let name = if cells.signed { "SIGNED" } else { "UNSIGNED" };
        let (table, parts) = (cells.table(), cells.parts());
        let _ = writeln!(
            out,
            "\n// The {} map. Its {} of the table; the rest is not used.",
            name.to_lowercase(),
            if cells.signed { "two parts" } else { "part" },
        );
        let _ = writeln!(out, "#define {name}_SHIFT8 {}", cells.shift);
        let _ = writeln!(out, "#define {name}_LOWEST8 {:#X}u", cells.lowest.to_bits());
        let ends = if cells.signed { &["BELOW", "ABOVE"][..] } else { &["ABOVE"] };
        for (part, side) in parts.iter().zip(ends) {
            let _ = writeln!(out, "#define {name}_{side}_AT8 {}", part.start);
            let _ = writeln!(out, "#define {name}_{side}_WORDS8 {}", part.len());
        }
        let comment = "Borders between its values.";
        let array = format!("DYNAMIC_{name}_BORDERS");
        floats(&mut out, comment, &array, Code8::dynamic(cells.signed).midpoints());
        let used = parts.into_iter().flat_map(|part| table[part].to_vec());
        let used: Vec<String> =
            used.map(|word| format!("{word:#X}u").replace("0X", "0x")).collect();
        let array = format!("DYNAMIC_{name}_CELLS");
        words(&mut out, "Its cells.", "ALIGNED_16 u32", &array, used.into_iter());
    }
    out.push_str("\n#endif\n");
    out.replace("0X", "0x")
}

fn header() -> String {
    let mut out = String::from(
        "// The codes, as the core has them (crates/halfbyte/src/code). Written by tests/codes.rs, which also\n\
         // compares: HALFBYTE_WRITE_CODES=1 cargo test -p halfbyte-gpu --test codes\n\
         #ifndef HALFBYTE_CODES_H\n#define HALFBYTE_CODES_H\n#include \"port.h\"\n",
    );
    let (nf4, fp4) = (Code4::Nf4.table(), Code4::Fp4.table());
    floats(&mut out, "NF4 by index, ascending.", "NF4", nf4);
    floats(&mut out, "FP4 by index: eight magnitudes, then the same negated.", "FP4", fp4);
    let bits = |values: &[f32]| -> Vec<String> {
        values
            .iter()
            .map(|value| format!("{:#010X}u", value.to_bits()).replace("0X", "0x"))
            .collect()
    };
    let (borders, ranks) = nf4_cells();
    let comment =
        "NF4: the border inside each cell of quantize_4bit.cu, as bits; infinity for none.";
    words(&mut out, comment, "u32", "NF4_CELL_BORDERS", bits(&borders).into_iter());
    let comment = "The code below that border; the one above it is the next.";
    words(&mut out, comment, "u32", "NF4_CELL_CODES", ranks.map(|r| r.to_string()).into_iter());
    let (borders, codes) = fp4_cells();
    let comment = "FP4: the same for magnitudes.";
    words(&mut out, comment, "u32", "FP4_CELL_BORDERS", bits(&borders).into_iter());
    let comment = "The code below that border, and the one above it shifted by 16.";
    let codes = codes.map(|code| format!("{code:#x}"));
    words(&mut out, comment, "u32", "FP4_CELL_CODES", codes.into_iter());
    out.push_str("\n#endif\n");
    out
}

#[test]
fn the_headers_hold_the_tables_of_the_core() {
    for (name, expected) in [("codes.h", header()), ("cells8.h", header8())] {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("kernels").join(name);
        if std::env::var_os("HALFBYTE_WRITE_CODES").is_some() {
            std::fs::write(&path, &expected).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap();
        assert!(found == expected, "{} differs from the core's tables", path.display());
    }
}

/// What `nearest_signed` and `nearest_unsigned` in `kernels/encode8.h` do, for every y.
#[test]
fn cells_give_the_nearest_of_256() {
    for cells in &CELLS8 {
        let code = Code8::dynamic(cells.signed);
        let (table, parts) = (cells.table(), cells.parts());
        let one = 1.0f32.next_up();
        let near = |m: f32| [m, m.next_up(), m.next_down(), -m, -m.next_up(), -m.next_down()];
        let borders = code.midpoints().iter().flat_map(|&m| near(m));
        let edges = near(cells.lowest).into_iter().chain(near(1.0)).chain([0.0, -0.0]);
        let bits = (0..=one.to_bits()).step_by(1009).map(f32::from_bits);
        let mut count = 0;
        for y in borders.chain(edges).chain(bits.flat_map(|y| [y, -y])).filter(|y| y.abs() <= one) {
            let z = cells.z(y);
            let at = cells.place(z) - CELLS8_FIRST;
            assert!(parts.iter().any(|part| part.contains(&at)), "{y:e} is in no part");
            let got = table[at].wrapping_add(z) >> 24;
            let expected = code.midpoints().partition_point(|&m| y > m) as u32;
            assert_eq!(got, expected, "signed: {}, y: {y:e}", cells.signed);
            count += 1;
        }
        assert!(count > 1_000_000);
    }
}

/// The nearest code by the definition: the number of borders strictly below, ascending.
fn nf4(y: f32) -> u32 {
    midpoints(Code4::Nf4.table()).iter().filter(|&&m| y > m).count() as u32
}

fn fp4(y: f32) -> u32 {
    let ascending = fp4_ascending();
    let values: Vec<f32> = ascending.iter().map(|&i| Code4::Fp4.table()[i]).collect();
    let rank = midpoints(&values).iter().filter(|&&m| y.abs() > m).count();
    ascending[rank] as u32 | if y < 0.0 { 8 } else { 0 }
}

/// Two look-ups and a comparison, as the kernel does them, give the code for every y.
#[test]
fn cells_give_the_nearest_code() {
    let (nf4_borders, nf4_codes) = nf4_cells();
    let (fp4_borders, fp4_codes) = fp4_cells();
    let near = |borders: [f32; 32]| {
        borders
            .into_iter()
            .filter(|m| m.is_finite())
            .flat_map(|m| [m, m.next_up(), m.next_down(), -m, (-m).next_up(), (-m).next_down()])
    };
    // Values around the edges of cells, where 15 y + 1/8 is whole.
    let edges = (-16..=16).flat_map(|c| {
        let y = (c as f32 - 0.125) / 15.0;
        [y, y.next_up(), y.next_down()]
    });
    let one = 1.0f32.next_up();
    let ends = [0.0, -0.0, 1.0, -1.0, one, -one, f32::from_bits(1), -f32::from_bits(1)];
    let spread = (0..=one.to_bits()).step_by(4099).flat_map(|bits| {
        let y = f32::from_bits(bits);
        [y, -y]
    });
    let all = near(nf4_borders).chain(near(fp4_borders)).chain(edges).chain(ends).chain(spread);
    let mut count = 0;
    for y in all.filter(|y| y.abs() <= one) {
        let at = cell(y);
        assert_eq!(nf4_codes[at] + u32::from(y > nf4_borders[at]), nf4(y), "NF4 of {y:e}");
        let at = cell(y.abs());
        let above = if y.abs() > fp4_borders[at] { 16 } else { 0 };
        let code = fp4_codes[at] >> above & 0xF | if y < 0.0 { 8 } else { 0 };
        assert_eq!(code, fp4(y), "FP4 of {y:e}");
        count += 1;
    }
    assert!(count > 500_000);
}
