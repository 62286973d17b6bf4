//! Buffers at chosen distances from an aligned address, with guards before them, and what the
//! quantization tests share.

#![allow(dead_code, unreachable_pub)] // each test file takes what it needs

use halfbyte::{Element, bf16, f16};
use halfbyte_gpu::{DeviceBuffer, DeviceSlice, Floats, Stream};

/// Elements before the buffer, of which `shift` are cut off: the guard. Behind the buffer lies
/// what the device itself guards.
const GUARD: usize = 16;

/// A type that has a bit pattern to compare.
pub trait Bits: halfbyte_gpu::Plain + PartialEq + std::fmt::Debug {
    /// What guards and unwritten results hold; no expected result does.
    const FILLER: Self;
}

macro_rules! bits {
    ($($t:ty: $filler:expr),*) => { $(impl Bits for $t { const FILLER: Self = $filler; })* };
}
bits!(u8: 0x5A, f32: -123.5, f16: f16::from_bits(0xD7B8), bf16: bf16::from_bits(0xC2F7));

/// `len` elements of device memory that begin `shift` elements behind an aligned address.
pub struct Placed<T> {
    buffer: DeviceBuffer<T>,
    shift: usize,
    len: usize,
}

impl<T: Bits> Placed<T> {
    pub fn new(stream: &Stream, values: &[T], shift: usize) -> Self {
        assert!(shift <= GUARD);
        let mut all = vec![T::FILLER; GUARD + shift];
        all.extend_from_slice(values);
        let buffer = DeviceBuffer::from_slice(stream, &all).unwrap();
        Self { buffer, shift, len: values.len() }
    }

    /// For a result.
    pub fn unwritten(stream: &Stream, len: usize, shift: usize) -> Self {
        Self::new(stream, &vec![T::FILLER; len], shift)
    }

    pub fn slice(&self) -> DeviceSlice<T> {
        let start = ((GUARD + self.shift) * size_of::<T>()) as u64;
        // SAFETY: the buffer holds `len` elements from there on, and outlives the launches.
        unsafe { DeviceSlice::new(self.buffer.slice().pointer() + start, self.len) }
    }

    /// The elements, once the stream has run; the guard must be as it was.
    pub fn read(&self, stream: &Stream) -> Vec<T> {
        let mut all = self.buffer.to_vec(stream).unwrap();
        let values = all.split_off(GUARD + self.shift);
        assert!(all.iter().all(|guard| *guard == T::FILLER), "written before the buffer");
        values
    }
}

impl<T: Bits + Element> Placed<T> {
    pub fn floats(&self) -> Floats {
        self.slice().into()
    }
}

/// A slice for calls that are refused.
pub fn nowhere<T>(len: usize) -> DeviceSlice<T> {
    // SAFETY: nothing is launched with it.
    unsafe { DeviceSlice::new(16, len) }
}

/// Panics unless all are equal bit for bit, any NaN being equal to any other.
pub fn assert_same<T: Element>(got: &[T], expected: &[T], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let (a, b) = (got.to_f32(), expected.to_f32());
        let same = a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        assert!(same, "{what}: element {i} is {got:?}, not {expected:?}");
    }
}

/// A linear congruential generator: the cases are the same on every run.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 32) as u32
    }

    /// Uniform in -0.5..0.5.
    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 8) as f32 / (1 << 24) as f32 - 0.5
    }

    pub fn below(&mut self, end: usize) -> usize {
        self.bits() as usize % end
    }

    /// Up to `longest` values: mostly ordinary, some zeros, some with any bits.
    pub fn values(&mut self, longest: usize) -> Vec<f32> {
        let len = self.below(longest + 1);
        let value = |random: &mut Self| match random.below(10) {
            0 => 0.0,
            1 => f32::from_bits(random.bits()),
            _ => 2.0 * random.uniform(),
        };
        (0..len).map(|_| value(self)).collect()
    }
}

/// Bell-shaped values.
pub fn weights(len: usize) -> Vec<f32> {
    let mut random = Random(1);
    (0..len).map(|_| 0.02 * (0..4).map(|_| random.uniform()).sum::<f32>()).collect()
}

/// Any bytes.
pub fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u32).wrapping_mul(2654435761).rotate_left(11) as u8).collect()
}

pub fn cast<T: Element>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&x| T::from_f32(x)).collect()
}

/// `$check::<T>($arguments)` for each of the three dtypes.
#[macro_export]
macro_rules! for_all_dtypes {
    ($check:ident($($argument:expr),* $(,)?)) => {{
        $check::<f32>($($argument),*);
        $check::<halfbyte::f16>($($argument),*);
        $check::<halfbyte::bf16>($($argument),*);
    }};
}

/// Lengths around the ends of blocks, of the 8 elements of a thread and of the 4096 of a group.
pub fn lengths(block: usize) -> Vec<usize> {
    let mut all = vec![0, 1, 2, 7, 8, 9, 31, 33, 65, 130, block - 1, block + 1, 3 * block + 33];
    all.extend([4095, 4096, 4097, 8192, 12_345]);
    all
}

/// Blocks that need care: one special value among others, at the start, in the middle, at the end.
pub fn extreme_blocks() -> Vec<Vec<f32>> {
    let smallest = f32::from_bits(1 << 21); // 2^-128, the largest absmax without a reciprocal
    let specials = [
        0.0,
        -0.0,
        f32::from_bits(1),
        smallest.next_down(),
        smallest,
        smallest.next_up(),
        f32::MIN_POSITIVE,
        6e-8,
        65504.0,
        f32::MAX,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        -f32::NAN,
    ];
    let mut all = vec![];
    for special in specials {
        for len in [1, 65, 129] {
            for at in [0, len / 2, len - 1] {
                // Alone, among zeros, among values of its own size and among ordinary ones.
                for filler in [0.0, -0.0, special * 0.4, -special, 1.0] {
                    let mut values = vec![filler; len];
                    values[at] = special;
                    all.push(values);
                }
            }
        }
    }
    all
}

/// All of `blocks`, each padded with zeros to a multiple of `multiple` except for the last.
pub fn padded(blocks: &[Vec<f32>], multiple: usize) -> Vec<f32> {
    let mut all: Vec<f32> = vec![];
    for block in blocks {
        all.resize(all.len().next_multiple_of(multiple), 0.0);
        all.extend(block);
    }
    all
}
