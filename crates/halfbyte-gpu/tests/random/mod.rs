//! What the tests of `LLM.int8()` share: random codes and activations, lists of columns.

#![allow(dead_code, unreachable_pub)] // each test file takes what it needs

use crate::placed::{Bits, Placed};
use halfbyte_gpu::ops::Outliers;
use halfbyte_gpu::{Device, DeviceBuffer, Stream};

impl Bits for i8 {
    const FILLER: Self = 0x5A;
}
impl Bits for i32 {
    const FILLER: Self = 0x5A5A_5A5A;
}
impl Bits for i64 {
    const FILLER: Self = 0x5A5A_5A5A_5A5A;
}

/// A small reproducible generator (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn codes(&mut self, len: usize) -> Vec<i8> {
        (0..len).map(|_| self.next() as i8).collect()
    }

    /// Values in [-1, 1).
    pub fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (self.next() as i32) as f32 / 2.0f32.powi(31)).collect()
    }

    /// Activations `[rows, columns]` with outliers in `outliers` columns, spread evenly: an eighth of
    /// their elements are 1000 times as large.
    pub fn activations(&mut self, rows: usize, columns: usize, outliers: usize) -> Vec<f32> {
        let mut all = self.floats(rows * columns);
        for j in 0..outliers.min(columns) {
            let column = j * columns / outliers.min(columns);
            for r in 0..rows {
                if r == j % rows || self.next().is_multiple_of(8) {
                    all[r * columns + column] += 1e3;
                }
            }
        }
        all
    }
}

/// Scratch of exactly the size that is asked for.
pub fn workspace(device: &'static Device, bytes: usize) -> DeviceBuffer<u8> {
    DeviceBuffer::zeroed(device, bytes).unwrap()
}

/// A list of columns on the device, in memory that was written before.
pub struct Columns {
    columns: Placed<i32>,
    count: Placed<i32>,
}

impl Columns {
    pub fn new(stream: &Stream, columns: usize) -> Self {
        Self {
            columns: Placed::unwritten(stream, columns, 1),
            count: Placed::unwritten(stream, 1, 0),
        }
    }

    pub fn outliers(&self) -> Outliers {
        Outliers { columns: self.columns.slice(), count: self.count.slice() }
    }

    pub fn read(&self, stream: &Stream) -> Vec<usize> {
        let count = self.count.read(stream)[0] as usize;
        let list = self.columns.read(stream);
        assert!(list[count..].iter().all(|&c| c == i32::FILLER), "written behind the list");
        list[..count].iter().map(|&c| c as usize).collect()
    }
}
