//! Every instruction set against the float64 product of the same weight.

use crate::blocks::BlockSize;
use crate::isa::{self, Isa};
use crate::ops::matmul_4bit::Weight4;
use crate::ops::{NestedScales, Scales};
use crate::{Code4, Code8, Element, bf16, f16};
use proptest::prelude::*;

/// A multiplicative generator: the cases are the same on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as u32
    }

    /// Uniform in [-1, 1).
    fn unit(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 30) as f32 - 1.0
    }
}

/// A case's buffers.
struct Case<T> {
    rows: usize,
    out_features: usize,
    in_features: usize,
    code: Code4,
    blocksize: BlockSize,
    nested: bool,
    packed: Vec<u8>,
    absmax: Vec<f32>,
    absmax8: Vec<u8>,
    absmax2: Vec<f32>,
    input: Vec<T>,
    bias: Option<Vec<T>>,
}

impl<T: Element> Case<T> {
    fn new(
        [rows, out_features, in_features]: [usize; 3],
        code: Code4,
        blocksize: BlockSize,
        nested: bool,
        bias: bool,
    ) -> Self {
        let mut random = Random((rows * 31 + out_features * 17 + in_features) as u64);
        let blocks = blocksize.over(out_features * in_features);
        Self {
            rows,
            out_features,
            in_features,
            code,
            blocksize,
            nested,
            packed: (0..blocks.packed_len()).map(|_| random.next() as u8).collect(),
            absmax: (0..blocks.count()).map(|_| random.unit().abs() + 0.01).collect(),
            absmax8: (0..blocks.count()).map(|_| random.next() as u8).collect(),
            absmax2: (0..blocks.count().div_ceil(256)).map(|_| random.unit().abs()).collect(),
            input: (0..rows * in_features).map(|_| T::from_f32(random.unit())).collect(),
            bias: bias.then(|| (0..out_features).map(|_| T::from_f32(random.unit())).collect()),
        }
    }

    fn weight(&self) -> Weight4<'_> {
        let scales = if self.nested {
            Scales::Nested(NestedScales {
                absmax: &self.absmax8,
                code: Code8::dynamic(true).values(),
                absmax2: &self.absmax2,
                blocksize: BlockSize::B256,
                offset: 0.7,
            })
        } else {
            Scales::Plain(&self.absmax)
        };
        Weight4::new(
            &self.packed,
            scales,
            self.code.table(),
            self.blocksize,
            self.out_features,
            self.in_features,
        )
        .unwrap()
    }

    fn run(&self, isa: Isa) -> Vec<T> {
        let mut out = vec![T::from_f32(f32::NAN); self.rows * self.out_features];
        let bias = self.bias.as_deref();
        super::forward(isa, &self.input, self.rows, &self.weight(), bias, &mut out);
        out
    }

    /// For each output, the exact value and how far from it the result may lie.
    fn expected(&self, isa: Isa) -> Vec<(f64, f64)> {
        let weight = self.weight();
        let (n, k) = (self.out_features, self.in_features);
        let mut scales = vec![0.0; weight.scales.len()];
        weight.scales.decode(0, &mut scales);
        let w: Vec<f64> = (0..n * k)
            .map(|i| {
                let byte = self.packed[i / 2];
                let q = if i % 2 == 0 { byte >> 4 } else { byte & 0x0F };
                let scale = f64::from(scales[i / self.blocksize.get()]);
                f64::from(self.code.table()[q as usize]) * scale
            })
            .collect();
        let lanes = match isa {
            Isa::Scalar => 1,
            Isa::Neon => 4,
            Isa::Avx2 => 8,
            Isa::Avx512 => 16,
        };
        // The stated bound; half a unit in the last place of the output dtype, or of a subnormal.
        let sum_error = (k / lanes + 16) as f64 * 2f64.powi(-24);
        let (rounding, tiny) = match T::DTYPE {
            crate::DType::F32 => (2f64.powi(-24), 2f64.powi(-140)),
            crate::DType::F16 => (2f64.powi(-11), 2f64.powi(-25)),
            crate::DType::BF16 => (2f64.powi(-8), 2f64.powi(-134)),
        };
        let mut expected = Vec::with_capacity(self.rows * n);
        for m in 0..self.rows {
            for o in 0..n {
                let bias = self.bias.as_ref().map_or(0.0, |b| f64::from(b[o].to_f32()));
                let (mut sum, mut size) = (bias, bias.abs());
                for i in 0..k {
                    let p = f64::from(self.input[m * k + i].to_f32()) * w[o * k + i];
                    sum += p;
                    size += p.abs();
                }
                let error = sum_error * size;
                expected.push((sum, error + (sum.abs() + error) * rounding + tiny));
            }
        }
        expected
    }

    fn check(&self) {
        for isa in isa::available() {
            let out = self.run(isa);
            for (i, (out, (exact, bound))) in out.iter().zip(self.expected(isa)).enumerate() {
                let error = (f64::from(out.to_f32()) - exact).abs();
                assert!(
                    error <= bound,
                    "{isa} {:?} {} {}x{}x{} block {} nested {}: output {i} is {out:?}, expected {exact} within {bound}",
                    T::DTYPE,
                    self.code,
                    self.rows,
                    self.out_features,
                    self.in_features,
                    self.blocksize.get(),
                    self.nested,
                );
            }
        }
    }
}

fn check(shape: [usize; 3], code: Code4, blocksize: BlockSize, nested: bool, bias: bool) {
    Case::<f32>::new(shape, code, blocksize, nested, bias).check();
    Case::<f16>::new(shape, code, blocksize, nested, bias).check();
    Case::<bf16>::new(shape, code, blocksize, nested, bias).check();
}

/// Multiples of a group, of a unit, of a byte, odd, below and above a tile; 4304 is a vision
/// model's.
const IN_FEATURES: [usize; 24] = [
    0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 96, 127, 128, 136, 192, 516, 1023, 1024, 1025,
    1160, 4304,
];

#[test]
fn every_shape_lies_within_the_bound() {
    for (i, k) in IN_FEATURES.into_iter().enumerate() {
        for (j, rows) in [0, 1, 2, 3, 4, 5, 8, 9, 16, 17].into_iter().enumerate() {
            for (l, n) in [1, 2, 3, 17, 50].into_iter().enumerate() {
                let blocksize = BlockSize::ALL[(i + 3 * j + l) % BlockSize::ALL.len()];
                let code = Code4::ALL[(j + l) % 2];
                check([rows, n, k], code, blocksize, (i + l) % 2 == 0, (i + j) % 3 == 0);
            }
        }
    }
}

#[test]
fn every_block_size_lies_within_the_bound() {
    for blocksize in BlockSize::ALL {
        for code in Code4::ALL {
            for nested in [false, true] {
                for rows in [1, 2, 7] {
                    for k in [64, 96, 100, 200, 4096, 4100] {
                        check([rows, 5, k], code, blocksize, nested, true);
                    }
                }
            }
        }
    }
}

#[test]
fn many_features_and_long_rows() {
    // Several tasks with a ragged end; several second-level blocks; several segments and passes.
    check([1, 301, 1024], Code4::Nf4, BlockSize::B64, true, true);
    check([5, 301, 1024], Code4::Nf4, BlockSize::B64, true, true);
    check([1, 3, 3 * 4096 + 24], Code4::Nf4, BlockSize::B64, false, false);
    check([16, 2, 3 * 4096 + 13], Code4::Fp4, BlockSize::B64, false, false);
    check([20, 2, 40_000], Code4::Fp4, BlockSize::B256, true, false);
}

#[test]
fn any_thread_count_gives_the_same_bytes() {
    for rows in [1, 3, 16] {
        for k in [512, 515] {
            let case = Case::<f32>::new([rows, 700, k], Code4::Nf4, BlockSize::B64, true, true);
            for isa in isa::available() {
                let with = |threads| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    pool.unwrap().install(|| case.run(isa))
                };
                let one = with(1);
                assert!(one == with(2) && one == with(3), "{isa} {rows} rows");
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_neighbours_when_tiled() {
    // 1027 is no multiple of 8: every row count goes the tiled way.
    let case = Case::<f32>::new([16, 70, 1027], Code4::Nf4, BlockSize::B64, false, true);
    for isa in isa::available() {
        let all = case.run(isa);
        for row in [0, 7, 15] {
            let mut one = Case::<f32>::new([1, 70, 1027], Code4::Nf4, BlockSize::B64, false, true);
            one.packed.clone_from(&case.packed);
            one.absmax.clone_from(&case.absmax);
            one.bias.clone_from(&case.bias);
            one.input = case.input[row * 1027..(row + 1) * 1027].to_vec();
            assert_eq!(one.run(isa), all[row * 70..(row + 1) * 70], "{isa} row {row}");
        }
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    for rows in [1, 2, 16] {
        for k in [256, 261] {
            let mut case = Case::<f32>::new([rows, 4, k], Code4::Nf4, BlockSize::B64, false, false);
            case.input[rows * k - 1] = f32::NAN;
            for isa in isa::available() {
                let out = case.run(isa);
                for (i, x) in out.iter().enumerate() {
                    assert_eq!(x.is_nan(), i / 4 == rows - 1, "{isa} {rows} rows, output {i}");
                }
            }
            case.input[rows * k - 1] = 0.5;
            case.absmax[0] = f32::INFINITY; // within weight row 0
            for isa in isa::available() {
                let out = case.run(isa);
                for (i, x) in out.iter().enumerate() {
                    assert_eq!(!x.is_finite(), i % 4 == 0, "{isa} {rows} rows, output {i}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_shape_lies_within_the_bound(
        rows in 0usize..20,
        n in 0usize..60,
        k in 0usize..700,
        blocksize in 0..BlockSize::ALL.len(),
        nf4: bool,
        nested: bool,
        bias: bool,
    ) {
        let code = if nf4 { Code4::Nf4 } else { Code4::Fp4 };
        Case::<bf16>::new([rows, n, k], code, BlockSize::ALL[blocksize], nested, bias).check();
    }
}
