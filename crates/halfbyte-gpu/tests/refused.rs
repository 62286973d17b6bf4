//! Calls that are refused: each buffer of each launcher with another length or dtype is named
//! before anything is launched, and no size makes a panic.
//!
//! The buffers are at addresses that nothing lies at; the emulated driver refuses all launches.

mod common;

use halfbyte::optim::{Hyper, Rule};
use halfbyte::{BlockSize, Code4, DType};
use halfbyte_gpu::ops::optim::{
    Rounding, Tensor8, Tensor32, step_8bit, step_32bit, step_32bit_workspace,
};
use halfbyte_gpu::ops::{self, NestedScales, Outliers, Scales, Table4, Weight4, Weight8};
use halfbyte_gpu::{DeviceSlice, Error, Floats, Result, Stream};
use std::env;

/// What is wrong with one buffer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Wrong {
    Short,
    Long,
    Huge,
    DType,
}

/// Gives a launcher its buffers, one of them wrong.
struct Buffers {
    /// Which one, counted in the order they are asked for.
    wrong: (usize, Wrong),
    asked: usize,
    /// The name it goes by in messages; empty where another one is named, because this one says
    /// what the others must be. `None` while nothing is wrong.
    name: Option<&'static str>,
}

impl Buffers {
    fn is_wrong(&mut self) -> bool {
        self.asked += 1;
        self.asked - 1 == self.wrong.0
    }

    /// A buffer that must hold `len` elements.
    fn slice<T>(&mut self, name: &'static str, len: usize) -> DeviceSlice<T> {
        let mut given = len;
        if self.is_wrong() {
            (given, self.name) = match self.wrong.1 {
                Wrong::Short if len == 0 => (len, None),
                Wrong::Short => (len - 1, Some(name)),
                Wrong::Long => (len + 1, Some(name)),
                Wrong::Huge => (usize::MAX, Some(name)),
                Wrong::DType => (len, None),
            };
        }
        // SAFETY: nothing is launched with it.
        unsafe { DeviceSlice::new(64, given) }
    }

    /// Floats of any dtype.
    fn any(&mut self, name: &'static str, len: usize) -> Floats {
        // SAFETY: nothing is launched with it.
        unsafe { Floats::new(64, self.slice::<f32>(name, len).len(), DType::F32) }
    }

    /// Floats of the dtype of the others.
    fn floats(&mut self, name: &'static str, len: usize) -> Floats {
        let (wrong, floats) = (self.asked == self.wrong.0, self.any(name, len));
        if !wrong || self.wrong.1 != Wrong::DType {
            return floats;
        }
        self.name = Some(name);
        // SAFETY: nothing is launched with it.
        unsafe { Floats::new(64, len, DType::F16) }
    }

    /// Scratch of at least `len` bytes: it may be longer, and a few of them are for alignment.
    fn workspace(&mut self, len: usize) -> DeviceSlice<u8> {
        let mut given = len;
        if self.is_wrong() && len > 0 && self.wrong.1 == Wrong::Short {
            (given, self.name) = (len / 4, Some("workspace"));
        }
        // SAFETY: nothing is launched with it.
        unsafe { DeviceSlice::new(64, given) }
    }

    fn scales(&mut self, len: usize) -> Scales {
        Scales::Nested(NestedScales {
            absmax: self.slice("absmax", len),
            code: self.slice("nested code", 256),
            absmax2: self.slice("absmax2", len.div_ceil(256)),
            blocksize: BlockSize::B256,
            offset: self.slice("offset", 1),
        })
    }

    fn weight4(&mut self, rows: usize, columns: usize) -> Result<Weight4> {
        let len = rows * columns;
        let packed = self.slice("packed", len.div_ceil(2));
        let table = Table4::Device(self.slice("table", 16));
        let scales = self.scales(len.div_ceil(64));
        Weight4::new(packed, scales, table, BlockSize::B64, rows, columns)
    }

    fn weight8(&mut self, rows: usize, columns: usize) -> Result<Weight8> {
        let (codes, scales) = (self.slice("codes", rows * columns), self.slice("scales", rows));
        Weight8::new(codes, scales, rows, columns)
    }

    fn outliers(&mut self, columns: usize) -> Outliers {
        Outliers {
            columns: self.slice("outliers.columns", columns),
            count: self.slice("outliers.count", 1),
        }
    }
}

type Launcher = fn(&Stream, &mut Buffers) -> Result<()>;

const B64: BlockSize = BlockSize::B64;

/// Each launcher, called with 100 elements or rows of 64 and the like.
const LAUNCHERS: [(&str, Launcher); 18] = [
    ("quantize_4bit", |s, b| {
        let (x, q) = (b.any("", 101), b.slice("packed", 51));
        ops::quantize_4bit(s, x, Code4::Nf4, B64, q, b.slice("absmax", 2))
    }),
    ("dequantize_4bit", |s, b| {
        let (q, scales) = (b.slice("packed", 51), b.scales(2));
        let table = Table4::Device(b.slice("table", 16));
        ops::dequantize_4bit(s, q, &scales, &table, B64, b.any("", 101))
    }),
    ("quantize_blockwise", |s, b| {
        let (x, q, absmax) = (b.any("", 101), b.slice("out", 101), b.slice("absmax", 2));
        // SAFETY: nothing is launched with it.
        let code = unsafe { DeviceSlice::new(64, 256) };
        ops::quantize_blockwise(s, x, code, B64, q, absmax)
    }),
    ("dequantize_blockwise", |s, b| {
        let (q, absmax) = (b.slice("codes", 101), b.slice("absmax", 2));
        // SAFETY: nothing is launched with it.
        let code = unsafe { DeviceSlice::new(64, 256) };
        ops::dequantize_blockwise(s, q, absmax, code, B64, b.any("", 101))
    }),
    ("quantize_absmax", |s, b| {
        let (x, q, absmax2) = (b.slice("", 500), b.slice("codes", 500), b.slice("absmax2", 8));
        let (offset, work) =
            (b.slice("offset", 1), b.workspace(ops::quantize_absmax_workspace(500)));
        ops::quantize_absmax(s, x, B64, q, absmax2, offset, work)
    }),
    ("matvec_4bit", |s, b| {
        let weight = b.weight4(24, 96)?;
        let (a, bias) = (b.any("a", 5 * 96), b.floats("bias", 24));
        ops::matvec_4bit(s, a, 5, &weight, Some(bias), b.floats("out", 5 * 24))
    }),
    ("matmul_4bit", |s, b| {
        let weight = b.weight4(64, 1024)?;
        let (x, bias) = (b.any("input", 9 * 1024), b.floats("bias", 64));
        let work = b.workspace(ops::matmul_4bit_workspace(s.device(), 9, 64, 1024, DType::F32));
        ops::matmul_4bit(s, x, 9, &weight, Some(bias), b.floats("out", 9 * 64), work)
    }),
    ("matmul_4bit_grad_input", |s, b| {
        let weight = b.weight4(96, 1024)?;
        let (x, y) = (b.any("grad_output", 9 * 96), b.floats("out", 9 * 1024));
        ops::matmul_4bit_grad_input(s, x, 9, &weight, y, DeviceSlice::empty())
    }),
    ("int8_vectorwise_quant", |s, b| {
        let (x, q, r) = (b.any("", 10 * 64), b.slice("codes", 10 * 64), b.slice("row_stats", 10));
        let (list, work) = (b.outliers(64), b.workspace(ops::int8_vectorwise_quant_workspace(64)));
        ops::int8_vectorwise_quant(s, x, 64, 6.0, q, r, Some(list), work)
    }),
    ("int8_double_quant", |s, b| {
        let x = b.any("", 10 * 64);
        let (q, p) = (b.slice("row_codes", 10 * 64), b.slice("col_codes", 10 * 64));
        let (r, c) = (b.slice("row_stats", 10), b.slice("col_stats", 64));
        let (list, work) = (b.outliers(64), b.workspace(ops::int8_vectorwise_quant_workspace(64)));
        ops::int8_double_quant(s, x, 64, 6.0, q, p, r, c, Some(list), work)
    }),
    ("int8_vectorwise_dequant", |s, b| {
        let (q, r) = (b.slice("", 10 * 64), b.slice("row_stats", 10));
        ops::int8_vectorwise_dequant(s, q, 64, r, b.any("out", 10 * 64))
    }),
    ("int8_linear_matmul", |s, b| {
        let (x, w) = (b.slice("a", 10 * 64), b.slice("b", 20 * 64));
        ops::int8_linear_matmul(s, x, w, 64, b.slice("out", 200))
    }),
    ("int8_mm_dequant", |s, b| {
        let (r, c) = (b.slice("", 10), b.slice("", 20));
        let (acc, bias) = (b.slice("acc", 200), b.slice("bias", 20));
        ops::int8_mm_dequant(s, acc, r, c, Some(bias), b.any("out", 200))
    }),
    ("int8_mixed_scaled_mm", |s, b| {
        let weight = b.weight8(20, 64)?;
        let (x, a, r) = (b.floats("input", 640), b.slice("a", 640), b.slice("", 10));
        let (list, bias, y) = (b.outliers(64), b.floats("bias", 20), b.any("out", 200));
        ops::int8_mixed_scaled_mm(s, x, a, r, &weight, Some(list), Some(bias), y)
    }),
    ("int8_linear", |s, b| {
        let weight = b.weight8(20, 64)?;
        let (x, bias, y) = (b.any("input", 640), b.floats("bias", 20), b.floats("out", 200));
        let (list, work) = (b.outliers(64), b.workspace(ops::int8_linear_workspace(10, 64)));
        ops::int8_linear(s, x, 10, &weight, 6.0, Some(bias), y, Some(list), work)
    }),
    ("int8_linear_grad_input", |s, b| {
        let weight = b.weight8(20, 64)?;
        let x = b.any("grad_output", 200);
        ops::int8_linear_grad_input(s, x, 10, &weight, b.floats("out", 640))
    }),
    ("step_8bit", |s, b| {
        let (code1, code2) = (b.slice("code1", 256), b.slice("code2", 256));
        let tensor = Tensor8 {
            param: b.any("", 600),
            grad: b.any("gradient", 600),
            floats: b.slice("float32 state1", 0),
            state1: b.slice("state1", 600),
            absmax1: b.slice("absmax1", 3),
            state2: b.slice("state2", 600),
            absmax2: b.slice("absmax2", 3),
            rounding: Rounding::Kahan(b.slice("compensation", 600)),
        };
        let (hyper, work) = (Hyper::default(), DeviceSlice::empty());
        step_8bit(s, Rule::Adam, &hyper, &[tensor], code1, Some(code2), work)
    }),
    ("step_32bit", |s, b| {
        let hyper = Hyper { max_unorm: 1.0, ..Hyper::default() };
        let tensor = Tensor32 {
            param: b.any("", 70_000),
            grad: b.any("gradient", 70_000),
            state1: b.slice("state1", 70_000),
            state2: b.slice("state2", 70_000),
            param_norm: None,
            update_norm: Some(b.slice("update_norm", 1)),
            rounding: Rounding::Kahan(b.slice("compensation", 70_000)),
        };
        let work = b.workspace(step_32bit_workspace(s.device(), Rule::Adam, &hyper, &[70_000]));
        step_32bit(s, Rule::Adam, &hyper, &[tensor], work)
    }),
];

/// A stream on which no launch succeeds.
fn stream() -> Stream {
    let device = common::cuda_devices()[1];
    // SAFETY: both tests of this program set the same, before they launch anything.
    unsafe { env::set_var("HALFBYTE_EMULATOR_FAIL", "cuLaunchKernel=700") };
    common::stream(device)
}

#[test]
fn a_wrong_buffer_is_named_before_anything_is_launched() {
    if common::on_hardware() {
        return eprintln!("not done on hardware, where launches succeed");
    }
    let stream = stream();
    for (launcher, call) in LAUNCHERS {
        for wrong in [Wrong::Short, Wrong::Long, Wrong::Huge, Wrong::DType] {
            let mut refused = 0;
            for i in 0.. {
                let mut buffers = Buffers { wrong: (i, wrong), asked: 0, name: None };
                let at = format!("{launcher}, buffer {i} {wrong:?}");
                let error = call(&stream, &mut buffers).expect_err(&at);
                match (&error, buffers.name) {
                    (Error::Length { what, .. }, Some(expected)) if wrong != Wrong::DType => {
                        assert!(expected.is_empty() || *what == expected, "{at}: {error}");
                        refused += 1;
                    }
                    (Error::DType { what, .. }, Some(expected)) => {
                        assert_eq!((*what, wrong), (expected, Wrong::DType), "{at}: {error}");
                        refused += 1;
                    }
                    // Without a fault it gets as far as the launch; and the others may fit it.
                    (Error::Call { .. }, None | Some("")) => {}
                    _ => panic!("{at}: {error}"),
                }
                if buffers.asked <= i {
                    break;
                }
            }
            assert!(refused >= 2 || wrong == Wrong::DType, "{launcher}: {refused}");
        }
    }
}

/// Sizes that no memory has: an error, whatever they are, and workspace sizes that say so.
#[test]
fn no_size_makes_a_panic() {
    if common::on_hardware() {
        return eprintln!("not done on hardware, where launches succeed");
    }
    let stream = stream();
    let device = stream.device();
    let most = usize::MAX;
    for n in [most, most - 1, most / 2, 1 << 62, 1 << 60, 1 << 44] {
        // SAFETY: nothing is launched with them.
        let (floats, bytes) =
            unsafe { (Floats::new(64, n, DType::F32), |len| DeviceSlice::<u8>::new(64, len)) };
        // SAFETY: as above.
        let slice = |len| unsafe { DeviceSlice::<f32>::new(64, len) };
        let (packed, absmax) = (bytes(n.div_ceil(2)), slice(n.div_ceil(64)));
        let refused = [
            ops::quantize_4bit(&stream, floats, Code4::Nf4, B64, packed, absmax),
            ops::quantize_blockwise(&stream, floats, slice(256), B64, bytes(n), absmax),
            ops::quantize_absmax(
                &stream,
                slice(n),
                B64,
                bytes(n),
                absmax,
                slice(1),
                bytes(1 << 20),
            ),
        ];
        for result in refused {
            let error = result.unwrap_err();
            let small = n == 1 << 44 && matches!(error, Error::Call { .. });
            assert!(small || matches!(error, Error::Argument { .. }), "{n}: {error}");
        }
        for dtype in DType::ALL {
            for (rows, out, columns) in [(n, n, n), (n, 1, 32), (9, n, 32), (9, 64, n), (n, 0, n)] {
                let _ = ops::matmul_4bit_workspace(device, rows, out, columns, dtype);
                let _ = ops::matmul_4bit_grad_input_workspace(device, rows, out, columns, dtype);
            }
        }
        assert!(ops::int8_linear_workspace(n, 64) >= n && ops::int8_linear_workspace(1, n) >= n);
        assert!(ops::int8_vectorwise_quant_workspace(n) >= n / 32);
        assert!(ops::quantize_absmax_workspace(n) <= 32 << 10);
        let (none, empty) = (slice(0), bytes(0));
        // SAFETY: nothing is launched with it.
        let no_floats = unsafe { Floats::new(64, 0, DType::F32) };
        // Rows of nothing, as many as can be said.
        if let Ok(weight) = Weight8::new(DeviceSlice::empty(), none, 0, 0) {
            let (x, y) = (no_floats, no_floats);
            let error = ops::int8_linear(&stream, x, n, &weight, 6.0, None, y, None, empty);
            assert!(matches!(error, Err(Error::Length { what: "workspace", .. })), "{error:?}");
            ops::int8_linear_grad_input(&stream, x, n, &weight, y).unwrap();
        }
        let table = Table4::Standard(Code4::Nf4);
        let weight = Weight4::new(empty, Scales::Plain(none), table, B64, n, 0).unwrap();
        let (x, y) = (no_floats, no_floats);
        let error = ops::matvec_4bit(&stream, x, 8, &weight, None, y).unwrap_err();
        assert!(matches!(error, Error::Length { what: "out", .. }), "{error}");
        ops::matmul_4bit(&stream, x, 0, &weight, None, y, empty).unwrap();
        ops::matmul_4bit_grad_input(&stream, floats, 1, &weight, y, empty).unwrap();
    }
}
