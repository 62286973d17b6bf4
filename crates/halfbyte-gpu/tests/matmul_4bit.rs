//! `matmul_4bit` and `matmul_4bit_grad_input` lie within their stated bound of the exact product
//! over the core's decoded weight, on every device at hand.

mod common;
mod placed;

use halfbyte::{BlockSize, Code4, Code8, DType, Element, bf16, f16};
use halfbyte_gpu::ops::{self, NestedScales, Scales, Table4, Weight4};
use halfbyte_gpu::{Device, DeviceSlice, Error, Floats, Result, Stream};
use placed::{Bits, Placed, Random, bytes, cast};

#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    out_features: usize,
    in_features: usize,
    blocksize: usize,
    /// `None`: a table of the caller's.
    code: Option<Code4>,
    nested: bool,
    bias: bool,
    /// Elements that all buffers begin behind an aligned address.
    shift: usize,
}

const OWN: [f32; 16] = [
    1.5, -7.25, 0.33, 0.1, -0.0, 2.0, 3e-3, -1e-3, 0.7, 0.333, -0.9, 4.0, -2.0, 1e-4, -0.25, 0.0625,
];

/// A weight on the host, as the definition sees it, and its parts.
struct Host {
    case: Case,
    packed: Vec<u8>,
    absmax: Vec<f32>,
    absmax8: Vec<u8>,
    absmax2: Vec<f32>,
    code2: [f32; 256],
    offset: f32,
    table: [f32; 16],
}

impl Host {
    fn new(case: Case) -> Self {
        let blocks =
            BlockSize::new(case.blocksize).unwrap().over(case.out_features * case.in_features);
        let mut random = Random(case.rows as u64);
        let mut scales = |n| (0..n).map(|_| random.uniform().abs() + 0.01).collect::<Vec<f32>>();
        Self {
            case,
            packed: bytes(blocks.packed_len()),
            absmax: scales(blocks.count()),
            absmax8: bytes(blocks.count()),
            absmax2: scales(blocks.count().div_ceil(256)),
            code2: *Code8::dynamic(true).values(),
            offset: 0.37,
            table: case.code.map_or(OWN, |code| *code.table()),
        }
    }

    fn decode<T: Element>(&self) -> Vec<T> {
        let scales = if self.case.nested {
            halfbyte::Scales::Nested(halfbyte::NestedScales {
                absmax: &self.absmax8,
                code: &self.code2,
                absmax2: &self.absmax2,
                blocksize: BlockSize::B256,
                offset: self.offset,
            })
        } else {
            halfbyte::Scales::Plain(&self.absmax)
        };
        let mut out = vec![T::default(); self.case.out_features * self.case.in_features];
        let blocksize = BlockSize::new(self.case.blocksize).unwrap();
        halfbyte::dequantize_4bit(&self.packed, &scales, &self.table, blocksize, &mut out).unwrap();
        out
    }

    /// Calls `run` with the weight on the device.
    fn with<R>(&self, stream: &Stream, run: impl FnOnce(&Weight4) -> R) -> R {
        let shift = self.case.shift;
        let packed = Placed::new(stream, &self.packed, shift);
        let absmax = Placed::new(stream, &self.absmax, shift);
        let absmax8 = Placed::new(stream, &self.absmax8, shift);
        let absmax2 = Placed::new(stream, &self.absmax2, shift);
        let code = Placed::new(stream, &self.code2, shift);
        let offset = Placed::new(stream, &[self.offset], shift);
        let table = Placed::new(stream, &self.table, shift);
        let scales = if self.case.nested {
            Scales::Nested(NestedScales {
                absmax: absmax8.slice(),
                code: code.slice(),
                absmax2: absmax2.slice(),
                blocksize: BlockSize::B256,
                offset: offset.slice(),
            })
        } else {
            Scales::Plain(absmax.slice())
        };
        let table = self.case.code.map_or(Table4::Device(table.slice()), Table4::Standard);
        let blocksize = BlockSize::new(self.case.blocksize).unwrap();
        let Case { out_features, in_features, .. } = self.case;
        let weight =
            Weight4::new(packed.slice(), scales, table, blocksize, out_features, in_features);
        let result = run(&weight.unwrap());
        stream.synchronize().unwrap();
        result
    }
}

/// One of the two products, on the device, with a workspace of exactly the stated size.
fn multiply<T: Element + Bits>(
    stream: &Stream,
    host: &Host,
    grad: bool,
    input: &[T],
    bias: Option<&[T]>,
) -> Vec<T> {
    let Case { rows, out_features, in_features, shift, .. } = host.case;
    let columns = if grad { in_features } else { out_features };
    let size =
        if grad { ops::matmul_4bit_grad_input_workspace } else { ops::matmul_4bit_workspace };
    let bytes = size(stream.device(), rows, out_features, in_features, T::DTYPE);
    let x = Placed::new(stream, input, shift);
    let b = Placed::new(stream, bias.unwrap_or(&[]), shift);
    let y = Placed::<T>::unwritten(stream, rows * columns, shift);
    let workspace = Placed::<u8>::unwritten(stream, bytes, shift);
    host.with(stream, |weight| {
        let (x, y, workspace) = (x.floats(), y.floats(), workspace.slice());
        if grad {
            ops::matmul_4bit_grad_input(stream, x, rows, weight, y, workspace)
        } else {
            ops::matmul_4bit(stream, x, rows, weight, bias.map(|_| b.floats()), y, workspace)
        }
        .unwrap();
    });
    workspace.read(stream);
    y.read(stream)
}

/// The rounding of an element, relative to it.
fn unit(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2f64.powi(-24),
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
    }
}

/// The bound that `ops/matmul_4bit.rs` states. On the way of float32 products the weight's rounding
/// is none, so the bound is not slack there; from five rows on either way may be taken.
fn check<T: Element + Bits>(case: Case, device: &'static Device) {
    let stream = common::stream(device);
    let host = Host::new(case);
    let weight: Vec<f32> = host.decode();
    let Case { rows, out_features, in_features, .. } = case;
    for grad in [false, true] {
        let (depth, columns) =
            if grad { (out_features, in_features) } else { (in_features, out_features) };
        let mut random = Random(3);
        let input: Vec<f32> = (0..rows * depth).map(|_| random.uniform()).collect();
        let input: Vec<T> = cast(&input);
        let bias: Vec<f32> = (0..columns).map(|_| random.uniform()).collect();
        let bias: Option<Vec<T>> = (case.bias && !grad).then(|| cast(&bias));
        let got = multiply(&stream, &host, grad, &input, bias.as_deref());
        assert_eq!(got.len(), rows * columns);
        let tensor_cores = common::on_tensor_cores(device, T::DTYPE)
            && in_features % 32 == 0
            && (grad || rows > 4);
        let rounding = if tensor_cores { unit(T::DTYPE) } else { 0.0 };
        for (i, got) in got.iter().enumerate() {
            let (row, column) = (i / columns, i % columns);
            let (mut exact, mut size, mut inputs) = (0.0, 0.0, 0.0);
            for k in 0..depth {
                let at = if grad { k * in_features + column } else { column * in_features + k };
                let a = f64::from(input[row * depth + k].to_f32());
                let product = a * f64::from(weight[at]);
                exact += product;
                size += product.abs();
                inputs += a.abs();
            }
            if let Some(bias) = &bias {
                exact += f64::from(bias[column].to_f32());
            }
            let sums = 2f64.powi(-22) * (depth + 2) as f64;
            let subnormal = if T::DTYPE == DType::F16 { 2f64.powi(-25) } else { 0.0 };
            let bound = unit(T::DTYPE) * (exact.abs() + size * sums)
                + size * (rounding * (1.0 + sums) + sums)
                + inputs * subnormal
                + subnormal
                + 1e-30;
            let difference = (f64::from(got.to_f32()) - exact).abs();
            assert!(
                difference <= bound,
                "{device} {} grad {grad} {case:?}: [{row}, {column}] is {got:?}, exactly {exact}, \
                 {difference} apart, more than {bound}",
                T::DTYPE
            );
        }
    }
}

/// Shapes by block sizes, codes, nesting, bias and alignment, each with one of the others.
fn cases() -> Vec<Case> {
    let shapes = [
        (1, 64, 64),
        (3, 20, 96),
        (8, 33, 160),
        (9, 70, 96),
        (12, 1, 32),
        (16, 64, 64),
        (17, 130, 160),
        (31, 201, 320),
        (33, 136, 544),
        (64, 64, 1024),
        (65, 129, 64),
        (16, 520, 32),
        (140, 72, 224),
        (96, 65, 128),
        // Rows that are no multiple of 32 codes, odd ones among them.
        (40, 33, 33),
        (20, 48, 50),
        (10, 5, 7),
        (70, 66, 100),
        (11, 3, 1),
    ];
    let blocksizes = [64, 32, 128, 4096, 256, 64, 1024];
    let codes = [Some(Code4::Nf4), Some(Code4::Fp4), None];
    let case = |(i, (rows, out_features, in_features))| Case {
        rows,
        out_features,
        in_features,
        blocksize: blocksizes[i % 7],
        code: codes[i % 3],
        nested: i % 2 == 1,
        bias: i % 4 < 2,
        shift: [0, 0, 0, 2, 0, 1][i % 6],
    };
    shapes.into_iter().enumerate().map(case).collect()
}

#[test]
fn every_shape_lies_near_the_exact_product() {
    for device in common::portable_devices() {
        for case in cases() {
            for_all_dtypes!(check(case, device));
        }
    }
}

/// Ways differ by compute capability: no bfloat16 on tensor cores at 7.5, and less shared memory.
#[test]
fn every_capability_lies_near_the_exact_product() {
    for device in common::cuda_devices() {
        for case in cases().into_iter().skip(8).step_by(3) {
            check::<f16>(case, device);
            check::<bf16>(case, device);
        }
    }
}

/// The tiles of 128 and of 256 rows: see the plans' own test for what four multiprocessors take.
#[test]
fn many_rows_lie_near_the_exact_product() {
    let case = |rows, out_features, in_features, nested, blocksize| Case {
        rows,
        out_features,
        in_features,
        blocksize,
        code: Some(Code4::Nf4),
        nested,
        bias: true,
        shift: 0,
    };
    for device in common::cuda_devices().into_iter().skip(1) {
        check::<bf16>(case(256, 256, 96, true, 64), device);
        check::<f16>(case(250, 104, 256, false, 128), device);
        check::<f16>(case(512, 250, 64, false, 32), device);
        check::<bf16>(case(500, 72, 256, true, 64), device);
    }
}

/// Rows of the identity pick elements of the weight: on tensor cores they are `dequantize_4bit`'s.
#[test]
fn the_weight_is_the_decoded_one_bit_for_bit() {
    fn check<T: Element + Bits>(device: &'static Device, nested: bool, code: Option<Code4>) {
        let (out_features, in_features) = (64, 96);
        let stream = common::stream(device);
        let case = Case {
            rows: 0,
            out_features,
            in_features,
            blocksize: 64,
            code,
            nested,
            bias: false,
            shift: 0,
        };
        for grad in [false, true] {
            let n = if grad { out_features } else { in_features };
            let host = Host::new(Case { rows: n, ..case });
            let weight: Vec<T> = host.decode();
            let one = |i: usize| if i / n == i % n { 1.0 } else { 0.0 };
            let identity: Vec<T> = cast(&(0..n * n).map(one).collect::<Vec<f32>>());
            let got = multiply(&stream, &host, grad, &identity, None);
            for (i, got) in got.iter().enumerate() {
                let at = if grad { i } else { i % out_features * in_features + i / out_features };
                // By value: a sum that begins with zero loses the sign of FP4's -0.0.
                assert_eq!(got.to_f32(), weight[at].to_f32(), "{device} grad {grad} {case:?} {i}");
            }
        }
    }
    for device in common::cuda_devices() {
        for (nested, code) in [(false, Some(Code4::Nf4)), (true, Some(Code4::Fp4)), (true, None)] {
            check::<f16>(device, nested, code);
            check::<bf16>(device, nested, code);
        }
    }
}

/// What lies in the workspace does not matter, nor does the run; splits are added in order.
#[test]
fn every_run_gives_the_same_bits() {
    let device = *common::cuda_devices().last().unwrap();
    let stream = common::stream(device);
    let (rows, out_features, in_features) = (16, 64, 2048);
    let host = Host::new(Case {
        rows,
        out_features,
        in_features,
        blocksize: 64,
        code: Some(Code4::Nf4),
        nested: false,
        bias: false,
        shift: 0,
    });
    let bytes = ops::matmul_4bit_workspace(device, rows, out_features, in_features, DType::BF16);
    assert!(common::on_hardware() || bytes >= 2 * rows * out_features * 4, "split: {bytes}");
    let mut random = Random(5);
    let input: Vec<f32> = (0..rows * in_features).map(|_| random.uniform()).collect();
    let input: Vec<bf16> = cast(&input);
    let run = |filler: u8| {
        let x = Placed::new(&stream, &input, 0);
        let y = Placed::<bf16>::unwritten(&stream, rows * out_features, 0);
        let workspace = Placed::new(&stream, &vec![filler; bytes], 3);
        host.with(&stream, |weight| {
            ops::matmul_4bit(&stream, x.floats(), rows, weight, None, y.floats(), workspace.slice())
        })
        .unwrap();
        y.read(&stream)
    };
    assert_eq!(run(0), run(0xFF));
}

#[test]
fn nothing_and_sums_of_nothing() {
    for device in common::portable_devices() {
        let stream = common::stream(device);
        for (rows, out_features, in_features) in [(0, 5, 64), (20, 0, 64), (20, 6, 0)] {
            let case = Case {
                rows,
                out_features,
                in_features,
                blocksize: 64,
                code: Some(Code4::Nf4),
                nested: false,
                bias: false,
                shift: 0,
            };
            let host = Host::new(case);
            for grad in [false, true] {
                let depth = if grad { out_features } else { in_features };
                let got = multiply(&stream, &host, grad, &vec![bf16::ONE; rows * depth], None);
                assert!(got.iter().all(|&x| x == bf16::ZERO), "{device} {case:?}: {got:?}");
            }
        }
    }
}

#[test]
fn wrong_buffers_are_refused() {
    let device = common::cuda_devices()[1];
    let stream = common::stream(device);
    // SAFETY: nothing is launched with any of them.
    let (floats, absmax, packed) = unsafe {
        (
            |len, dtype| Floats::new(16, len, dtype),
            DeviceSlice::new(16, 64 * 2048 / 64),
            DeviceSlice::new(16, 64 * 2048 / 2),
        )
    };
    let table = Table4::Standard(Code4::Nf4);
    let weight = Weight4::new(packed, Scales::Plain(absmax), table, BlockSize::B64, 64, 2048);
    let weight = weight.unwrap();
    let half = |len| floats(len, DType::F16);
    let forward = |input, bias, out, workspace| {
        ops::matmul_4bit(&stream, input, 16, &weight, bias, out, workspace)
    };
    let grad = |input, out| {
        let none = DeviceSlice::empty();
        ops::matmul_4bit_grad_input(&stream, input, 16, &weight, out, none)
    };
    let none = DeviceSlice::empty();
    let (input, out) = (half(16 * 2048), half(16 * 64));
    let length = |result: Result<()>, name: &str| {
        assert!(matches!(&result, Err(Error::Length { what, .. }) if *what == name), "{result:?}");
    };
    length(forward(half(16 * 2047), None, out, none), "input");
    length(forward(input, None, half(16 * 65), none), "out");
    length(forward(input, Some(half(63)), out, none), "bias");
    length(grad(half(16 * 63), input), "grad_output");
    length(grad(out, half(16 * 2047)), "out");
    if !common::on_hardware() {
        length(forward(input, None, out, none), "workspace");
    }
    let dtype = |result: Result<()>, name: &str| {
        assert!(matches!(&result, Err(Error::DType { what, .. }) if *what == name), "{result:?}");
    };
    dtype(forward(input, None, floats(16 * 64, DType::BF16), none), "out");
    dtype(forward(input, Some(floats(64, DType::F32)), out, none), "bias");
    dtype(grad(out, floats(16 * 2048, DType::F32)), "out");
}
