//! Every launcher against the core on cases drawn at random: shapes around the ends of tiles and
//! blocks, each buffer at an address of its own, wild values, threads in several orders, and some
//! calls captured into a graph, where an allocation, a copy or a wait would be an error.
//!
//! The cases are the same on every run. `HALFBYTE_ATTACK=first,count` runs others, on the emulated
//! devices alone.

mod common;
mod drawn;
mod placed;
mod random;
mod stepped;

use drawn::{Draw, fixed};
use halfbyte::optim::Rule;
use halfbyte::{BlockSize, Code4, Code8, DType, Element, NonFinite, bf16, f16};
use halfbyte_gpu::ops::{self, NestedScales, Scales, Table4};
use halfbyte_gpu::{Device, Stream, cuda_device};
use placed::{Bits, Placed, assert_same, cast};
use random::Columns;
use std::env;
use stepped::{Case, Rounded, Shape};

/// Compute capabilities that differ in what launchers choose.
const CAPABILITIES: [u32; 7] = [75, 80, 86, 89, 90, 100, 120];
const ORDERS: [&str; 4] = ["up", "down", "random:1", "random:77"];
/// Cases of the test.
const CASES: u64 = 400;

/// `$f::<T>($arguments)` for one of the dtypes.
macro_rules! by_dtype {
    ($draw:ident, $f:ident($($argument:expr),*)) => {
        match $draw.one(&DType::ALL) {
            DType::F32 => $f::<f32>($($argument),*),
            DType::F16 => $f::<f16>($($argument),*),
            DType::BF16 => $f::<bf16>($($argument),*),
        }
    };
}

type Attack = fn(&mut Draw, &'static Device);

const ATTACKS: [Attack; 10] = [
    |draw, device| by_dtype!(draw, quantize_4bit(draw, device)),
    |draw, device| by_dtype!(draw, dequantize_4bit(draw, device)),
    |draw, device| by_dtype!(draw, blockwise(draw, device)),
    quantize_absmax,
    |draw, device| by_dtype!(draw, product_4bit(draw, device)),
    |draw, device| by_dtype!(draw, int8_rows(draw, device)),
    |draw, device| by_dtype!(draw, int8_layer(draw, device)),
    int8_sums,
    |draw, device| by_dtype!(draw, int8_grad(draw, device)),
    optimizer,
];

fn attack(first: u64, count: u64) {
    common::set_up();
    let devices: Vec<_> = if common::on_hardware() {
        common::devices()
    } else {
        let list = CAPABILITIES.map(|capability| capability.to_string()).join(",");
        // SAFETY: this program has one test, and nothing has been launched: no other thread reads
        // the environment through C.
        unsafe { env::set_var("HALFBYTE_EMULATOR_DEVICES", list) };
        (0..CAPABILITIES.len()).map(|n| cuda_device(n).unwrap()).collect()
    };
    for seed in first..first + count {
        let mut draw = Draw::new(seed);
        let attack = draw.one(&ATTACKS);
        let device = draw.one(&devices);
        // SAFETY: launches read the variable on this thread.
        unsafe { env::set_var("HALFBYTE_EMULATOR_ORDER", draw.one(&ORDERS)) };
        draw.at = format!("HALFBYTE_ATTACK={seed},1 {device}");
        attack(&mut draw, device);
    }
}

#[test]
fn results_equal_the_core_s_whatever_is_drawn() {
    match env::var("HALFBYTE_ATTACK") {
        Ok(range) => {
            let (first, count) = range.split_once(',').expect("HALFBYTE_ATTACK=first,count");
            attack(first.parse().unwrap(), count.parse().unwrap());
        }
        Err(_) => attack(0, CASES),
    }
}

// ---- 4-bit and 8-bit blocks ------------------------------------------------------------------------

fn quantize_4bit<T: Element + Bits>(draw: &mut Draw, device: &'static Device) {
    let stream = common::stream(device);
    let blocksize = draw.one(&BlockSize::ALL);
    let len = draw.len(blocksize.get(), 12_000);
    let input: Vec<T> = cast(&draw.values(len));
    let code = draw.one(&[Code4::Nf4, Code4::Fp4]);
    let blocks = blocksize.over(len);
    let (mut packed, mut absmax) = (vec![0; blocks.packed_len()], vec![0.0; blocks.count()]);
    let rule = NonFinite::Propagate;
    halfbyte::quantize_4bit(&input, code, blocksize, rule, &mut packed, &mut absmax).unwrap();
    let x = draw.place(&stream, &input);
    let (q, scales) = (draw.room(&stream, packed.len()), draw.room(&stream, absmax.len()));
    let (into, to) = (q.slice(), scales.slice());
    draw.run(&stream, || ops::quantize_4bit(&stream, x.floats(), code, blocksize, into, to));
    let at = format!("{} {} {len} {blocksize:?} {code:?}", draw.at, T::DTYPE);
    assert_same(&scales.read(&stream), &absmax, &at);
    assert!(q.read(&stream) == packed, "packed: {at}");
}

/// A 4-bit weight of random parts, on the host.
struct Host {
    packed: Vec<u8>,
    absmax: Vec<f32>,
    absmax8: Vec<u8>,
    absmax2: Vec<f32>,
    code2: [f32; 256],
    offset: f32,
    table: [f32; 16],
    code: Option<Code4>,
    blocksize: BlockSize,
    second: BlockSize,
    nested: bool,
}

/// And on the device.
struct OnDevice {
    packed: Placed<u8>,
    absmax: Placed<f32>,
    absmax8: Placed<u8>,
    absmax2: Placed<f32>,
    code2: Placed<f32>,
    offset: Placed<f32>,
    table: Placed<f32>,
}

impl Host {
    fn new(draw: &mut Draw, blocksize: BlockSize, len: usize, tame: bool) -> Self {
        let blocks = blocksize.over(len);
        let second = draw.one(&BlockSize::ALL);
        let code = draw.one(&[Some(Code4::Nf4), Some(Code4::Fp4), None]);
        let mut floats = |n| if tame { draw.tame(n) } else { draw.values(n) };
        let (absmax, absmax2) =
            (floats(blocks.count()), floats(second.over(blocks.count()).count()));
        let offset = floats(1)[0];
        let own = fixed(&floats(16));
        let code2 =
            if draw.coin() { *Code8::dynamic(true).values() } else { fixed(&draw.tame(256)) };
        Self {
            packed: draw.bytes(blocks.packed_len()),
            absmax8: draw.bytes(blocks.count()),
            absmax,
            absmax2,
            code2,
            offset,
            table: code.map_or(own, |code| *code.table()),
            code,
            blocksize,
            second,
            nested: draw.coin(),
        }
    }

    fn decode<T: Element>(&self, len: usize) -> Vec<T> {
        let scales = if self.nested {
            halfbyte::Scales::Nested(halfbyte::NestedScales {
                absmax: &self.absmax8,
                code: &self.code2,
                absmax2: &self.absmax2,
                blocksize: self.second,
                offset: self.offset,
            })
        } else {
            halfbyte::Scales::Plain(&self.absmax)
        };
        let mut out = vec![T::default(); len];
        halfbyte::dequantize_4bit(&self.packed, &scales, &self.table, self.blocksize, &mut out)
            .unwrap();
        out
    }

    fn place(&self, draw: &mut Draw, stream: &Stream) -> OnDevice {
        OnDevice {
            packed: draw.place(stream, &self.packed),
            absmax: draw.place(stream, &self.absmax),
            absmax8: draw.place(stream, &self.absmax8),
            absmax2: draw.place(stream, &self.absmax2),
            code2: draw.place(stream, &self.code2),
            offset: draw.place(stream, &[self.offset]),
            table: draw.place(stream, &self.table),
        }
    }

    fn parts(&self, placed: &OnDevice) -> (Scales, Table4) {
        let scales = if self.nested {
            Scales::Nested(NestedScales {
                absmax: placed.absmax8.slice(),
                code: placed.code2.slice(),
                absmax2: placed.absmax2.slice(),
                blocksize: self.second,
                offset: placed.offset.slice(),
            })
        } else {
            Scales::Plain(placed.absmax.slice())
        };
        (scales, self.code.map_or(Table4::Device(placed.table.slice()), Table4::Standard))
    }
}

fn dequantize_4bit<T: Element + Bits>(draw: &mut Draw, device: &'static Device) {
    let stream = common::stream(device);
    let blocksize = draw.one(&BlockSize::ALL);
    let len = draw.len(blocksize.get(), 20_000);
    let host = Host::new(draw, blocksize, len, false);
    let placed = host.place(draw, &stream);
    let (scales, table) = host.parts(&placed);
    let out = draw.room::<T>(&stream, len);
    let (packed, to) = (placed.packed.slice(), out.floats());
    draw.run(&stream, || ops::dequantize_4bit(&stream, packed, &scales, &table, blocksize, to));
    let at = format!("{} {} {len} {blocksize:?} {:?}", draw.at, T::DTYPE, host.code);
    assert_same(&out.read(&stream), &host.decode::<T>(len), &at);
}

fn blockwise<T: Element + Bits>(draw: &mut Draw, device: &'static Device) {
    let stream = common::stream(device);
    let blocksize = draw.one(&BlockSize::ALL);
    let len = draw.len(blocksize.get(), 12_000);
    let input: Vec<T> = cast(&draw.values(len));
    let code = draw.code8();
    let (mut codes, mut absmax) = (vec![0; len], vec![0.0; blocksize.over(len).count()]);
    let rule = NonFinite::Propagate;
    halfbyte::quantize_blockwise(&input, &code, blocksize, rule, &mut codes, &mut absmax).unwrap();
    let mut decoded = vec![T::default(); len];
    halfbyte::dequantize_blockwise(&codes, &absmax, code.values(), blocksize, &mut decoded)
        .unwrap();
    let x = draw.place(&stream, &input);
    let table = draw.place(&stream, code.values());
    let (q, scales) = (draw.room(&stream, len), draw.room(&stream, absmax.len()));
    let (into, to) = (q.slice(), scales.slice());
    let map = table.slice();
    draw.run(&stream, || ops::quantize_blockwise(&stream, x.floats(), map, blocksize, into, to));
    let at = format!("{} {} {len} {blocksize:?}", draw.at, T::DTYPE);
    assert_same(&scales.read(&stream), &absmax, &at);
    let got = q.read(&stream);
    if let Some(i) = (0..len).find(|&i| got[i] != codes[i]) {
        panic!("{at}: code {i} of {:?} is {}, not {}", input[i], got[i], codes[i]);
    }
    let out = draw.room::<T>(&stream, len);
    draw.run(&stream, || {
        ops::dequantize_blockwise(&stream, into, to, map, blocksize, out.floats())
    });
    assert_same(&out.read(&stream), &decoded, &at);
}

fn quantize_absmax(draw: &mut Draw, device: &'static Device) {
    let stream = common::stream(device);
    let blocksize = draw.one(&BlockSize::ALL);
    let len = draw.len(blocksize.get(), 9000);
    let absmax = draw.values(len);
    let (mut codes, mut absmax2) = (vec![0; len], vec![0.0; blocksize.over(len).count()]);
    let offset = halfbyte::quantize_absmax(&absmax, blocksize, &mut codes, &mut absmax2).unwrap();
    let x = draw.place(&stream, &absmax);
    let (q, scales) = (draw.room(&stream, len), draw.room(&stream, absmax2.len()));
    let (mean, scratch) =
        (draw.room(&stream, 1), draw.room(&stream, ops::quantize_absmax_workspace(len)));
    let (to, mean_to) = (scales.slice(), mean.slice());
    let into = q.slice();
    draw.run(&stream, || {
        ops::quantize_absmax(&stream, x.slice(), blocksize, into, to, mean_to, scratch.slice())
    });
    let at = format!("{} {len} {blocksize:?}", draw.at);
    assert_same(&mean.read(&stream), &[offset], &at);
    assert_same(&scales.read(&stream), &absmax2, &at);
    assert!(q.read(&stream) == codes, "codes: {at}");
    scratch.read(&stream);
}

// ---- the 4-bit product -------------------------------------------------------------------------------

/// Forward and backward, within the bound that `ops/matmul_4bit.rs` states.
fn product_4bit<T: Element + Bits>(draw: &mut Draw, device: &'static Device) {
    let stream = common::stream(device);
    let blocksize = draw.one(&BlockSize::ALL);
    let rows = draw.one(&[0, 1, 2, 3, 5, 8, 9, 15, 17, 31, 33, 63, 64, 65, 130, 257]);
    let in_features =
        draw.one(&[0, 1, 7, 8, 24, 31, 32, 33, 64, 65, 96, 100, 128, 160, 257, 320, 512, 1024]);
    let most = 200_000 / (rows * in_features).max(1);
    let out_features = draw.one(&[0, 1, 2, 3, 5, 16, 33, 64, 65, 70, 129, 260]).min(most);
    let host = Host::new(draw, blocksize, out_features * in_features, true);
    let weight: Vec<f32> = host.decode(out_features * in_features);
    let placed = host.place(draw, &stream);
    let (scales, table) = host.parts(&placed);
    let packed = placed.packed.slice();
    let on_device =
        ops::Weight4::new(packed, scales, table, blocksize, out_features, in_features).unwrap();
    for grad in [false, true] {
        let (depth, columns) =
            if grad { (out_features, in_features) } else { (in_features, out_features) };
        let input: Vec<T> = cast(&draw.tame(rows * depth));
        let bias: Option<Vec<T>> = (!grad && draw.coin()).then(|| cast(&draw.tame(columns)));
        let size =
            if grad { ops::matmul_4bit_grad_input_workspace } else { ops::matmul_4bit_workspace };
        let x = draw.place(&stream, &input);
        let b = bias.as_ref().map(|bias| draw.place(&stream, bias));
        let y = draw.room::<T>(&stream, rows * columns);
        let bytes = size(device, rows, out_features, in_features, T::DTYPE);
        let scratch = draw.room::<u8>(&stream, bytes);
        let (a, out, work) = (x.floats(), y.floats(), scratch.slice());
        let b = b.as_ref().map(Placed::floats);
        draw.run(&stream, || {
            if grad {
                ops::matmul_4bit_grad_input(&stream, a, rows, &on_device, out, work)
            } else {
                ops::matmul_4bit(&stream, a, rows, &on_device, b, out, work)
            }
        });
        scratch.read(&stream);
        let at = format!(
            "{} {} [{rows}, {depth}] grad {grad} {out_features}x{in_features}",
            draw.at,
            T::DTYPE
        );
        for (i, got) in y.read(&stream).iter().enumerate() {
            let (row, column) = (i / columns, i % columns);
            let terms = (0..depth).map(|k| {
                let w = if grad { k * in_features + column } else { column * in_features + k };
                (input[row * depth + k].to_f32(), weight[w])
            });
            let bias = bias.as_ref().map_or(0.0, |bias| bias[column].to_f32());
            let rounded = device.capability() >= 75;
            drawn::assert_near::<T>(
                *got,
                terms,
                bias,
                rounded,
                &format!("{at}: [{row}, {column}]"),
            );
        }
    }
}

// ---- LLM.int8() --------------------------------------------------------------------------------------

fn int8_rows<T: Element + Bits>(draw: &mut Draw, device: &'static Device) {
    let stream = common::stream(device);
    let columns = draw.one(&[1, 2, 7, 8, 9, 31, 32, 33, 64, 100, 255, 256, 257, 513, 2047, 2049]);
    let rows = draw.below(1 + 40_000 / columns.max(600));
    let len = rows * columns;
    let a: Vec<T> = cast(&draw.values(len));
    let threshold = draw.one(&[0.0, 6.0, 0.4, 1e-3, f32::MAX, f32::INFINITY]);
    let (mut codes, mut stats) = (vec![0; len], vec![0.0; rows]);
    let (mut by_column, mut maxima) = (vec![0; len], vec![0.0; columns]);
    let rule = NonFinite::Propagate;
    let (to, to_stats) = (&mut codes, &mut stats);
    let (down, most) = (&mut by_column, &mut maxima);
    let found = halfbyte::int8_double_quant(&a, columns, threshold, rule, to, down, to_stats, most)
        .unwrap();
    let x = draw.place(&stream, &a);
    let (q, p) = (draw.room(&stream, len), draw.room(&stream, len));
    let (r, c) = (draw.room(&stream, rows), draw.room(&stream, columns));
    let scratch = draw.room(&stream, ops::int8_vectorwise_quant_workspace(columns));
    let list = Columns::new(&stream, columns);
    let asked = draw.coin().then(|| list.outliers());
    let (into, stats_to, work) = (q.slice(), r.slice(), scratch.slice());
    let at = format!("{} {} {rows}x{columns} from {threshold}", draw.at, T::DTYPE);
    for double in [false, true] {
        let (a, down, most) = (x.floats(), p.slice(), c.slice());
        draw.run(&stream, || {
            if double {
                ops::int8_double_quant(
                    &stream, a, columns, threshold, into, down, stats_to, most, asked, work,
                )
            } else {
                ops::int8_vectorwise_quant(
                    &stream, a, columns, threshold, into, stats_to, asked, work,
                )
            }
        });
        assert_same(&r.read(&stream), &stats, &format!("statistics, {double}, {at}"));
        assert!(q.read(&stream) == codes, "codes, {double}, {at}");
        if asked.is_some() {
            assert_eq!(list.read(&stream), found, "outliers, {double}, {at}");
        }
    }
    assert_same(&c.read(&stream), &maxima, &format!("columns' statistics, {at}"));
    assert!(p.read(&stream) == by_column, "columns' codes, {at}");
    let mut decoded = vec![T::default(); len];
    halfbyte::int8_vectorwise_dequant(&codes, columns, &stats, &mut decoded).unwrap();
    let y = draw.room::<T>(&stream, len);
    draw.run(&stream, || {
        ops::int8_vectorwise_dequant(&stream, into, columns, stats_to, y.floats())
    });
    assert_same(&y.read(&stream), &decoded, &at);
}

fn int8_layer<T: Element + Bits>(draw: &mut Draw, device: &'static Device) {
    let stream = common::stream(device);
    let (rows, n, depth) = draw.product();
    let wild = draw.below(4) == 0;
    let input = if wild { draw.values(rows * depth) } else { draw.tame(rows * depth) };
    let input: Vec<T> = cast(&input);
    let (codes, scales) = (draw.codes(n * depth), draw.tame(n));
    let weight = halfbyte::Weight8::new(&codes, &scales, n, depth).unwrap();
    let bias: Option<Vec<T>> = draw.coin().then(|| cast(&draw.tame(n)));
    let threshold = draw.one(&[0.0, 0.3, 0.499, 6.0]);
    let mut expected = vec![T::default(); rows * n];
    let found =
        halfbyte::int8_linear(&input, rows, &weight, threshold, bias.as_deref(), &mut expected)
            .unwrap();
    let x = draw.place(&stream, &input);
    let (w, s) = (draw.place(&stream, &codes), draw.place(&stream, &scales));
    let b = bias.as_ref().map(|bias| draw.place(&stream, bias));
    let y = draw.room::<T>(&stream, rows * n);
    let list = Columns::new(&stream, depth);
    let asked = draw.coin().then(|| list.outliers());
    let scratch = draw.room::<u8>(&stream, ops::int8_linear_workspace(rows, depth));
    let on_device = ops::Weight8::new(w.slice(), s.slice(), n, depth).unwrap();
    let (a, out, work) = (x.floats(), y.floats(), scratch.slice());
    let bias = b.as_ref().map(Placed::floats);
    draw.run(&stream, || {
        ops::int8_linear(&stream, a, rows, &on_device, threshold, bias, out, asked, work)
    });
    let at = format!("{} {} {rows}x{n}x{depth} from {threshold}", draw.at, T::DTYPE);
    assert_same(&y.read(&stream), &expected, &at);
    if asked.is_some() {
        assert_eq!(list.read(&stream), found, "outliers, {at}");
    }
    scratch.read(&stream);
}

fn int8_sums(draw: &mut Draw, device: &'static Device) {
    let stream = common::stream(device);
    let (m, n, depth) = draw.product();
    let (a, b) = (draw.codes(m * depth), draw.codes(n * depth));
    let (m, n) = if depth == 0 { (0, 0) } else { (m, n) };
    let mut expected = vec![0; m * n];
    halfbyte::int8_linear_matmul(&a, &b, depth, &mut expected).unwrap();
    let (x, w) = (draw.place(&stream, &a), draw.place(&stream, &b));
    let out = draw.room(&stream, m * n);
    draw.run(&stream, || {
        ops::int8_linear_matmul(&stream, x.slice(), w.slice(), depth, out.slice())
    });
    assert_eq!(out.read(&stream), expected, "{} {m}x{n}x{depth}", draw.at);
}

fn int8_grad<T: Element + Bits>(draw: &mut Draw, device: &'static Device) {
    let stream = common::stream(device);
    let (rows, depth, n) = draw.product();
    let grad: Vec<T> = cast(&draw.tame(rows * n));
    let (codes, scales) = (draw.codes(n * depth), draw.tame(n));
    let (w, s) = (draw.place(&stream, &codes), draw.place(&stream, &scales));
    let weight = ops::Weight8::new(w.slice(), s.slice(), n, depth).unwrap();
    let g = draw.place(&stream, &grad);
    let y = draw.room::<T>(&stream, rows * depth);
    draw.run(&stream, || {
        ops::int8_linear_grad_input(&stream, g.floats(), rows, &weight, y.floats())
    });
    for (i, got) in y.read(&stream).iter().enumerate() {
        let (row, column) = (i / depth, i % depth);
        let terms = (0..n).map(|o| {
            let w = f32::from(codes[o * depth + column]) * scales[o] / 127.0;
            (grad[row * n + o].to_f32(), w)
        });
        let at = format!("{} {} {rows}x{n}x{depth}: [{row}, {column}]", draw.at, T::DTYPE);
        drawn::assert_near::<T>(*got, terms, 0.0, true, &at);
    }
}

// ---- optimizers --------------------------------------------------------------------------------------

fn optimizer(draw: &mut Draw, device: &'static Device) {
    let count = draw.one(&[1, 2, 5, 51]);
    let shapes = (0..count).map(|_| Shape {
        n: draw.len(256, 4000 / count),
        param: draw.one(&DType::ALL),
        grad: draw.one(&DType::ALL),
        rounded: draw.one(&[Rounded::Nearest, Rounded::Stochastic, Rounded::Kahan]),
    });
    let shapes = shapes.collect();
    let mut case = Case::new(draw.one(&Rule::ALL), draw.one(&[8, 32]), shapes);
    case.steps = 2;
    case.shift = draw.one(&[0, 0, 1, 2, 3, 4, 8]);
    case.gradient = draw.one(&[stepped::ordinary as fn(_, _, &mut _) -> _, stepped::wild]);
    case.hyper.skip_zeros = draw.coin();
    case.hyper.weight_decay = draw.one(&[0.0, 0.1]);
    case.hyper.max_unorm = draw.one(&[0.0, 0.5, 1.0]);
    case.param_norm = draw.one(&[None, Some(0.0), Some(3.5)]);
    eprintln!("{}", draw.at);
    case.run(device);
}
