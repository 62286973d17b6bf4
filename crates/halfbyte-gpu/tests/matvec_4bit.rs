//! `matvec_4bit` lies within its stated bound of the float64 product, on every device at hand.

mod common;
mod placed;

use halfbyte::{BlockSize, Code4, Code8, DType, Element};
use halfbyte_gpu::ops::{self, NestedScales, Scales, Table4, Weight4};
use halfbyte_gpu::{Error, Floats, Stream};
use placed::{Bits, Placed, Random, assert_same, bytes, cast, nowhere};

/// A case's numbers.
struct Case<T> {
    n: usize,
    features: usize,
    columns: usize,
    code: Code4,
    blocksize: BlockSize,
    nested: bool,
    packed: Vec<u8>,
    absmax: Vec<f32>,
    absmax8: Vec<u8>,
    absmax2: Vec<f32>,
    a: Vec<T>,
    bias: Option<Vec<T>>,
    /// Distance of the buffers from aligned addresses, in elements.
    shift: usize,
}

const OFFSET: f32 = 0.7;

impl<T: Element + Bits> Case<T> {
    fn new([n, features, columns]: [usize; 3], blocksize: BlockSize) -> Self {
        let mut random = Random((n * 31 + features * 17 + columns) as u64);
        let blocks = blocksize.over(features * columns);
        let code = Code4::ALL[(n + columns) % 2];
        let floats = |random: &mut Random, len: usize| -> Vec<f32> {
            (0..len).map(|_| 2.0 * random.uniform()).collect()
        };
        Self {
            n,
            features,
            columns,
            code,
            blocksize,
            nested: (n + features) % 2 == 0,
            packed: bytes(blocks.packed_len()),
            absmax: (0..blocks.count()).map(|_| random.uniform().abs() + 0.01).collect(),
            absmax8: bytes(blocks.count()),
            absmax2: floats(&mut random, blocks.count().div_ceil(256)),
            a: cast(&floats(&mut random, n * columns)),
            bias: (features % 3 != 0).then(|| cast(&floats(&mut random, features))),
            shift: 0,
        }
    }

    fn run(&self, stream: &Stream) -> Vec<T> {
        let packed = Placed::new(stream, &self.packed, self.shift);
        let absmax = Placed::new(stream, &self.absmax, self.shift);
        let absmax8 = Placed::new(stream, &self.absmax8, self.shift);
        let absmax2 = Placed::new(stream, &self.absmax2, self.shift);
        let code2 = Placed::new(stream, Code8::dynamic(true).values(), self.shift);
        let offset = Placed::new(stream, &[OFFSET], self.shift);
        let table = Placed::new(stream, self.code.table(), self.shift);
        let a = Placed::new(stream, &self.a, self.shift);
        let bias = self.bias.as_ref().map(|bias| Placed::new(stream, bias, self.shift));
        let out = Placed::<T>::unwritten(stream, self.n * self.features, self.shift);
        let scales = if self.nested {
            Scales::Nested(NestedScales {
                absmax: absmax8.slice(),
                code: code2.slice(),
                absmax2: absmax2.slice(),
                blocksize: BlockSize::B256,
                offset: offset.slice(),
            })
        } else {
            Scales::Plain(absmax.slice())
        };
        let table = if self.columns.is_multiple_of(3) {
            Table4::Device(table.slice())
        } else {
            Table4::Standard(self.code)
        };
        let weight = Weight4::new(
            packed.slice(),
            scales,
            table,
            self.blocksize,
            self.features,
            self.columns,
        )
        .unwrap();
        let bias = bias.as_ref().map(Placed::floats);
        ops::matvec_4bit(stream, a.floats(), self.n, &weight, bias, out.floats()).unwrap();
        out.read(stream)
    }

    /// For each output, the exact value and how far from it the result may lie.
    fn expected(&self) -> Vec<(f64, f64)> {
        let scale = |block: usize| {
            if self.nested {
                let product = Code8::dynamic(true).values()[self.absmax8[block] as usize]
                    * self.absmax2[block / 256];
                product + OFFSET
            } else {
                self.absmax[block]
            }
        };
        let w: Vec<f64> = (0..self.features * self.columns)
            .map(|i| {
                let byte = self.packed[i / 2];
                let q = if i % 2 == 0 { byte >> 4 } else { byte & 0x0F };
                let value = self.code.table()[q as usize];
                f64::from(value) * f64::from(scale(i / self.blocksize.get()))
            })
            .collect();
        let sum_error = (self.columns / 128 + 32) as f64 * 2f64.powi(-24);
        let (rounding, tiny) = match T::DTYPE {
            DType::F32 => (2f64.powi(-24), 2f64.powi(-140)),
            DType::F16 => (2f64.powi(-11), 2f64.powi(-25)),
            DType::BF16 => (2f64.powi(-8), 2f64.powi(-134)),
        };
        let mut expected = vec![];
        for m in 0..self.n {
            for o in 0..self.features {
                let bias = self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[o].to_f32()));
                let (mut sum, mut size) = (bias, bias.abs());
                for k in 0..self.columns {
                    let a = f64::from(self.a[m * self.columns + k].to_f32());
                    let product = a * w[o * self.columns + k];
                    sum += product;
                    size += product.abs();
                }
                let error = sum_error * size;
                expected.push((sum, error + (sum.abs() + error) * rounding + tiny));
            }
        }
        expected
    }

    fn check(&self) {
        let expected = self.expected();
        for device in common::portable_devices() {
            let stream = Stream::new(device).unwrap();
            for (i, (got, (exact, bound))) in self.run(&stream).iter().zip(&expected).enumerate() {
                let error = (f64::from(got.to_f32()) - exact).abs();
                assert!(
                    error <= *bound,
                    "{device} {} {} {}x{}x{} {:?} nested {} shift {}: output {i} is {got:?}, \
                     expected {exact} within {bound}",
                    T::DTYPE,
                    self.code,
                    self.n,
                    self.features,
                    self.columns,
                    self.blocksize,
                    self.nested,
                    self.shift,
                );
            }
        }
    }
}

fn check<T: Element + Bits>(shape: [usize; 3], blocksize: BlockSize, shift: usize) {
    Case::<T> { shift, ..Case::new(shape, blocksize) }.check();
}

/// Multiples of a word and not, odd, of fewer and of more words than threads.
const COLUMNS: [usize; 14] = [0, 1, 2, 7, 8, 9, 31, 64, 65, 96, 516, 1000, 1032, 2056];

#[test]
fn every_shape_lies_within_the_bound() {
    for (i, columns) in COLUMNS.into_iter().enumerate() {
        for n in 0..=8 {
            let features = [1, 4, 5, 11][(i + n) % 4];
            let blocksize = BlockSize::ALL[(i + 3 * n + features) % 8];
            for_all_dtypes!(check([n, features, columns], blocksize, 0));
        }
    }
}

#[test]
fn every_block_size_lies_within_the_bound() {
    for (b, blocksize) in BlockSize::ALL.into_iter().enumerate() {
        for (i, columns) in [64, 96, 100, 4096, 4104].into_iter().enumerate() {
            let (n, features) = [(1, 5), (1, 6), (3, 4), (7, 6)][(b + i) % 4];
            for_all_dtypes!(check([n, features, columns], blocksize, 0));
        }
    }
}

#[test]
fn any_alignment() {
    for shift in 0..=9 {
        for_all_dtypes!(check([2, 6, 264], BlockSize::B64, shift));
    }
}

#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    fn check<T: Element + Bits>(columns: usize) {
        let case = Case::<T>::new([8, 6, columns], BlockSize::B64);
        for device in common::portable_devices() {
            let stream = Stream::new(device).unwrap();
            let all = case.run(&stream);
            assert_same(&case.run(&stream), &all, "a second run");
            for n in 1..8 {
                let mut few = Case::<T>::new([8, 6, columns], BlockSize::B64);
                few.n = n;
                few.a = case.a[(8 - n) * columns..].to_vec();
                let at = format!("{device} {n} rows of {columns}");
                assert_same(&few.run(&stream), &all[(8 - n) * 6..], &at);
            }
        }
    }
    for columns in [1000, 1001] {
        for_all_dtypes!(check(columns));
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    for columns in [256, 261] {
        let mut case = Case::<f32>::new([3, 5, columns], BlockSize::B64);
        (case.nested, case.bias) = (false, None);
        for device in common::portable_devices() {
            let stream = Stream::new(device).unwrap();
            case.a[3 * columns - 1] = f32::NAN;
            for (i, x) in case.run(&stream).iter().enumerate() {
                assert_eq!(x.is_nan(), i / 5 == 2, "{device} {columns} columns, output {i}");
            }
            case.a[3 * columns - 1] = 0.5;
            case.absmax[0] = f32::INFINITY; // within row 0 of the weight
            for (i, x) in case.run(&stream).iter().enumerate() {
                assert_eq!(!x.is_finite(), i % 5 == 0, "{device} {columns} columns, output {i}");
            }
            case.absmax[0] = 1.0;
        }
    }
}

#[test]
fn wrong_arguments_are_refused() {
    let stream = Stream::new(common::portable_devices()[0]).unwrap();
    // SAFETY: nothing is launched with them.
    let floats = |len, dtype| unsafe { Floats::new(16, len, dtype) };
    let weight = |bytes, scales| {
        let (packed, absmax) = (nowhere(bytes), nowhere(scales));
        let table = Table4::Standard(Code4::Nf4);
        Weight4::new(packed, Scales::Plain(absmax), table, BlockSize::B64, 5, 33)
    };
    assert!(matches!(weight(82, 3), Err(Error::Length { what: "packed", expected: 83, .. })));
    assert!(matches!(weight(83, 2), Err(Error::Length { what: "absmax", expected: 3, .. })));
    let weight = weight(83, 3).unwrap();
    let (f32, f16) = (DType::F32, DType::F16);
    for (n, a, bias, out, what) in [
        (9, floats(9 * 33, f32), None, floats(45, f32), "n"),
        (2, floats(65, f32), None, floats(10, f32), "a"),
        (2, floats(66, f32), None, floats(9, f32), "out"),
        (2, floats(66, f32), None, floats(10, f16), "out"),
        (2, floats(66, f32), Some(floats(4, f32)), floats(10, f32), "bias"),
        (2, floats(66, f32), Some(floats(5, f16)), floats(10, f32), "bias"),
    ] {
        let result = ops::matvec_4bit(&stream, a, n, &weight, bias, out);
        let named = match &result {
            Err(
                Error::Length { what, .. }
                | Error::Argument { what, .. }
                | Error::DType { what, .. },
            ) => *what,
            _ => panic!("{what}: {result:?}"),
        };
        assert_eq!(named, what, "{result:?}");
    }
}
