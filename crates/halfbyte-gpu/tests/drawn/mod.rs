//! Random choices: sizes near the borders where kernels change what they do, values of every kind,
//! buffers at any address. And graphs.

#![allow(dead_code)] // each test file takes what it needs

use crate::common;
use crate::placed::{Bits, Placed, Random};
use halfbyte::code::linear_map;
use halfbyte::{Code8, DType, Element};
use halfbyte_gpu::{Result, Stream};
use libloading::Library;
use std::ffi::{c_int, c_void};
use std::mem::ManuallyDrop;
use std::sync::OnceLock;

/// A source of choices; the same ones for the same seed.
pub(crate) struct Draw {
    random: Random,
    /// What leads here again, for messages.
    pub(crate) at: String,
}

impl Draw {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5DEE_CE66);
        random.bits();
        Self { random, at: String::new() }
    }

    /// Calls a launcher; sometimes into a graph, which then runs twice.
    pub(crate) fn run(&mut self, stream: &Stream, call: impl FnOnce() -> Result<()>) {
        if common::on_hardware() || self.below(4) > 0 {
            return call().unwrap_or_else(|error| panic!("{}: {error}", self.at));
        }
        self.at.push_str(" captured");
        let graph = Graph::record(stream, call);
        let graph = graph.unwrap_or_else(|error| panic!("{}: {error}", self.at));
        for _ in 0..2 {
            graph.replay(stream);
        }
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.random.below(end)
    }

    pub(crate) fn coin(&mut self) -> bool {
        self.below(2) == 0
    }

    pub(crate) fn one<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    /// A length of at most `most`: small, near a multiple of `block` or of a tile, or any.
    pub(crate) fn len(&mut self, block: usize, most: usize) -> usize {
        let len = match self.below(4) {
            0 => self.below(40),
            1 => (block * self.below(5) + self.below(5)).saturating_sub(2),
            2 => (4096 * (1 + self.below(3)) + self.below(19)).saturating_sub(9),
            _ => self.below(most + 1),
        };
        len.min(most)
    }

    /// Rows, columns and depth of a product that the emulator does in a moment.
    pub(crate) fn product(&mut self) -> (usize, usize, usize) {
        let rows = self.one(&[0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 33, 64, 65, 129, 260]);
        let depth =
            self.one(&[0, 1, 3, 4, 15, 16, 17, 32, 48, 63, 64, 65, 100, 128, 272, 513, 1040]);
        let most = 250_000 / (rows * depth).max(1);
        let columns = self.one(&[0, 1, 2, 7, 8, 9, 16, 31, 33, 64, 65, 130, 257]).min(most);
        (rows, columns, depth)
    }

    /// Ordinary values, of magnitude below a half, some of them zero.
    pub(crate) fn tame(&mut self, len: usize) -> Vec<f32> {
        let zeros = self.coin();
        let value = |random: &mut Random| match random.below(9) {
            0 if zeros => 0.0,
            _ => random.uniform(),
        };
        (0..len).map(|_| value(&mut self.random)).collect()
    }

    /// Values of one kind: ordinary, any bits, tiny, huge, all equal, with one outlier, special.
    pub(crate) fn values(&mut self, len: usize) -> Vec<f32> {
        const SPECIAL: [f32; 12] = [
            0.0,
            -0.0,
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::MAX,
            f32::MIN,
            f32::MIN_POSITIVE,
            1e-45,
            -1e-45,
            65504.0,
            1.0,
        ];
        let kind = self.below(9);
        let scale = self.one(&[1e-44, 1e-39, 3e-38, 1e-20, 1e-7, 1e4, 1e30, 3e38]);
        let same = self.one(&SPECIAL);
        let rare = 2 + self.below(300);
        let mut all: Vec<f32> = (0..len)
            .map(|_| {
                let x = self.random.uniform();
                match kind {
                    0 => f32::from_bits(self.random.bits()),
                    1 => x * scale,
                    2 => same,
                    3 => SPECIAL[self.random.below(12)],
                    4 | 5 if self.random.below(rare) == 0 => SPECIAL[self.random.below(12)],
                    _ => x,
                }
            })
            .collect();
        if kind == 6 && len > 0 {
            let at = self.below(len);
            all[at] = self.one(&[1e3, -1e20, f32::MAX]);
        }
        all
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.random.bits() as u8).collect()
    }

    pub(crate) fn codes(&mut self, len: usize) -> Vec<i8> {
        let extreme = self.below(3) == 0;
        let code = |random: &mut Random| match random.bits() as i8 {
            code if extreme => [-128, 127][usize::from(code > 100)],
            code => code,
        };
        (0..len).map(|_| code(&mut self.random)).collect()
    }

    /// An 8-bit code: one that is used, or 256 values in ascending order.
    pub(crate) fn code8(&mut self) -> Code8 {
        match self.below(4) {
            0 => Code8::dynamic(true).clone(),
            1 => Code8::dynamic(false).clone(),
            2 => Code8::new(&linear_map(true, 8, true).unwrap()).unwrap(),
            _ => {
                let mut values = self.tame(256);
                values.sort_by(f32::total_cmp);
                Code8::new(&fixed::<256>(&values)).unwrap()
            }
        }
    }

    /// `values` on the device, at any address that their type allows; at an aligned one half of
    /// the time.
    pub(crate) fn place<T: Bits>(&mut self, stream: &Stream, values: &[T]) -> Placed<T> {
        let shift = if self.coin() { 0 } else { self.below(9) };
        Placed::new(stream, values, shift)
    }

    /// The same for a result.
    pub(crate) fn room<T: Bits>(&mut self, stream: &Stream, len: usize) -> Placed<T> {
        let shift = if self.coin() { 0 } else { self.below(9) };
        Placed::unwritten(stream, len, shift)
    }
}

/// Launches that the emulated driver has recorded.
pub(crate) struct Graph(*mut c_void);

impl Graph {
    /// What `call` launches on `stream`; none of it runs.
    pub(crate) fn record(stream: &Stream, call: impl FnOnce() -> Result<()>) -> Result<Self> {
        let driver = GraphCalls::of_emulator();
        let mut recorded = std::ptr::null_mut();
        // SAFETY: the functions are the emulated driver's, of these types, and `stream` is its.
        unsafe {
            assert_eq!((driver.begin)(stream.raw(), 0), 0);
            let called = call();
            assert_eq!((driver.end)(stream.raw(), &raw mut recorded), 0);
            called.map(|()| Self(recorded))
        }
    }

    pub(crate) fn replay(&self, stream: &Stream) {
        // SAFETY: as above; the graph is one that the driver made.
        unsafe { assert_eq!((GraphCalls::of_emulator().launch)(self.0, stream.raw()), 0) }
    }
}

/// The emulated driver's functions for graphs, of which this crate uses none.
struct GraphCalls {
    begin: unsafe extern "C" fn(*mut c_void, c_int) -> c_int,
    end: unsafe extern "C" fn(*mut c_void, *mut *mut c_void) -> c_int,
    launch: unsafe extern "C" fn(*mut c_void, *mut c_void) -> c_int,
}

impl GraphCalls {
    fn of_emulator() -> &'static Self {
        static CALLS: OnceLock<GraphCalls> = OnceLock::new();
        CALLS.get_or_init(|| {
            // SAFETY: the library is open already, as the driver, and stays open; the types are
            // those of cuda.h.
            unsafe {
                let library = Library::new(halfbyte_gpu_emulator::path()).unwrap();
                let library = ManuallyDrop::new(library);
                GraphCalls {
                    begin: *library.get("cuStreamBeginCapture_v2").unwrap(),
                    end: *library.get("cuStreamEndCapture").unwrap(),
                    launch: *library.get("cuGraphLaunch").unwrap(),
                }
            }
        })
    }
}

pub(crate) fn fixed<const N: usize>(values: &[f32]) -> [f32; N] {
    values.try_into().expect("as many values")
}

/// Panics unless `got` is within the launchers' bound of the sum of the products of `terms`, and
/// of `bias`. `rounded`: weights may have been rounded to `T`.
pub(crate) fn assert_near<T: Element>(
    got: T,
    terms: impl Iterator<Item = (f32, f32)>,
    bias: f32,
    rounded: bool,
    at: &str,
) {
    let (mut exact, mut size, mut inputs, mut depth) = (f64::from(bias), 0.0, 0.0, 2.0);
    for (a, w) in terms {
        exact += f64::from(a) * f64::from(w);
        size += (f64::from(a) * f64::from(w)).abs();
        inputs += f64::from(a).abs();
        depth += 1.0;
    }
    let (unit, subnormal) = match T::DTYPE {
        DType::F32 => (2f64.powi(-24), 0.0),
        DType::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        DType::BF16 => (2f64.powi(-8), 0.0),
    };
    let sums = 2f64.powi(-22) * depth;
    let weight = if rounded && T::DTYPE != DType::F32 { unit } else { 0.0 };
    let bound = unit * (exact.abs() + (size + f64::from(bias.abs())) * sums)
        + size * (weight * (1.0 + sums) + sums)
        + f64::from(bias.abs()) * sums
        + inputs * subnormal
        + subnormal
        + 1e-30;
    let off = (f64::from(got.to_f32()) - exact).abs();
    assert!(off <= bound, "{at} is {got:?}, exactly {exact}: {off} off, beyond {bound}");
}
