//! Routing on the device, and the 4-bit products of experts: rows lie within the stated bound of the
//! exact product with their expert's decoded weight, whatever the routes.

mod common;
mod drawn;
mod placed;
mod random;
mod routed;

use drawn::{Graph, assert_near};
use halfbyte::{BlockSize, Code4, Code8, DType, Element, TokenRows, bf16, f16};
use halfbyte_gpu::ops::{self, Experts4, NestedScales, Routing, Scales, Table4};
use halfbyte_gpu::{Device, DeviceSlice, Error, Stream};
use placed::{Bits, Placed, Random, bytes, cast, nowhere};
use routed::{Routed, bucket, ids, overwrite};

#[test]
fn rows_are_sorted_by_expert_and_keep_their_order() {
    for device in common::portable_devices() {
        let stream = common::stream(device);
        for (rows, experts) in
            [(0, 4), (1, 1), (16, 64), (512, 8), (513, 3), (2100, 300), (1500, 0), (300, 1000)]
        {
            let ids = ids(rows, experts, rows as u64, true);
            let routed = Routed::new(&stream, &ids, 1, experts);
            routed.run(&stream).unwrap();
            let mut order: Vec<i32> = (0..rows as i32).collect();
            order.sort_by_key(|&row| bucket(ids[row as usize], experts));
            let before = |b| ids.iter().filter(|&&id| bucket(id, experts) < b).count() as i32;
            let starts: Vec<i32> = (0..experts + 3).map(before).collect();
            assert_eq!(
                routed.order.read(&stream),
                order,
                "{device} {rows} rows, {experts} experts"
            );
            assert_eq!(routed.starts.read(&stream), starts, "{device} {rows}, {experts}");
            routed.workspace.read(&stream);
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    tokens: usize,
    slots: usize,
    experts: usize,
    out_features: usize,
    in_features: usize,
    blocksize: usize,
    nested: bool,
    bias: bool,
    bad: bool,
    /// Elements that all buffers begin behind an aligned address.
    shift: usize,
}

/// What tests take that are of something else.
const CASE: Case = Case {
    tokens: 60,
    slots: 2,
    experts: 4,
    out_features: 34,
    in_features: 96,
    blocksize: 64,
    nested: true,
    bias: true,
    bad: false,
    shift: 0,
};

const OFFSET: f32 = 0.37;

/// A weight on the host and its parts.
struct Host {
    case: Case,
    code: Code4,
    packed: Vec<u8>,
    absmax: Vec<f32>,
    absmax8: Vec<u8>,
    absmax2: Vec<f32>,
}

impl Host {
    fn new(case: Case) -> Self {
        let each = Self::blocksize(case).over(case.out_features * case.in_features).count();
        let blocks = each * case.experts;
        let mut random = Random(case.tokens as u64);
        let mut scales = |n| (0..n).map(|_| random.uniform().abs() + 0.01).collect::<Vec<f32>>();
        Self {
            case,
            code: Code4::ALL[case.tokens % 2],
            packed: bytes(blocks * case.blocksize / 2),
            absmax: scales(blocks),
            absmax8: bytes(blocks),
            absmax2: scales(blocks.div_ceil(64)),
        }
    }

    fn blocksize(case: Case) -> BlockSize {
        BlockSize::new(case.blocksize).unwrap()
    }

    /// `[experts, out_features, in_features]`, without what fills experts up.
    fn decode(&self) -> Vec<f32> {
        let Case { experts, out_features, in_features, .. } = self.case;
        let scales = if self.case.nested {
            halfbyte::Scales::Nested(halfbyte::NestedScales {
                absmax: &self.absmax8,
                code: Code8::dynamic(true).values(),
                absmax2: &self.absmax2,
                blocksize: BlockSize::B64,
                offset: OFFSET,
            })
        } else {
            halfbyte::Scales::Plain(&self.absmax)
        };
        let mut all = vec![0.0f32; 2 * self.packed.len()];
        let (table, blocksize) = (self.code.table(), Self::blocksize(self.case));
        halfbyte::dequantize_4bit(&self.packed, &scales, table, blocksize, &mut all).unwrap();
        let padded = all.len().checked_div(experts).unwrap_or(0);
        let expert = |e: usize| &all[e * padded..][..out_features * in_features];
        (0..experts).flat_map(|e| expert(e).to_vec()).collect()
    }

    fn with<R>(&self, stream: &Stream, run: impl FnOnce(&Experts4) -> R) -> R {
        let Case { experts, out_features, in_features, shift, .. } = self.case;
        let packed = Placed::new(stream, &self.packed, shift);
        let absmax = Placed::new(stream, &self.absmax, shift);
        let absmax8 = Placed::new(stream, &self.absmax8, shift);
        let absmax2 = Placed::new(stream, &self.absmax2, shift);
        let code2 = Placed::new(stream, Code8::dynamic(true).values(), shift);
        let offset = Placed::new(stream, &[OFFSET], shift);
        let scales = if self.case.nested {
            Scales::Nested(NestedScales {
                absmax: absmax8.slice(),
                code: code2.slice(),
                absmax2: absmax2.slice(),
                blocksize: BlockSize::B64,
                offset: offset.slice(),
            })
        } else {
            Scales::Plain(absmax.slice())
        };
        let table = Placed::new(stream, self.code.table(), shift);
        let table = if self.case.experts.is_multiple_of(3) {
            Table4::Device(table.slice())
        } else {
            Table4::Standard(self.code)
        };
        let shape = [experts, out_features, in_features];
        let weight =
            Experts4::new(packed.slice(), scales, table, Self::blocksize(self.case), shape);
        let result = run(&weight.unwrap());
        stream.synchronize().unwrap();
        result
    }
}

/// A product of `case`, its input, and where the result comes.
struct Call<T> {
    grad: bool,
    token_rows: TokenRows,
    input: Placed<T>,
    bias: Option<Placed<T>>,
    out: Placed<T>,
    workspace: Placed<u8>,
}

impl<T: Element + Bits> Call<T> {
    fn new(
        stream: &Stream,
        case: Case,
        routing: &Routing,
        grad: bool,
        token_rows: TokenRows,
    ) -> (Self, Vec<T>, Vec<T>) {
        let Case { experts, out_features, in_features, shift, .. } = case;
        let mut random = Random(3);
        let mut floats = |n| cast::<T>(&(0..n).map(|_| random.uniform()).collect::<Vec<f32>>());
        let input_rows = if grad { routing.rows() } else { routing.count(token_rows) };
        let input = floats(input_rows * if grad { out_features } else { in_features });
        let bias = if case.bias && !grad { floats(experts * out_features) } else { vec![] };
        let out = if grad {
            routing.count(token_rows) * in_features
        } else {
            routing.rows() * out_features
        };
        let bytes = if grad {
            ops::experts_matmul_4bit_grad_input_workspace(routing, token_rows, in_features)
        } else {
            0
        };
        let call = Self {
            grad,
            token_rows,
            input: Placed::new(stream, &input, shift),
            bias: (!bias.is_empty()).then(|| Placed::new(stream, &bias, shift)),
            out: Placed::unwritten(stream, out, shift),
            workspace: Placed::unwritten(stream, bytes, shift),
        };
        (call, input, bias)
    }

    fn run(&self, stream: &Stream, routed: &Routed, weight: &Experts4) -> Result<(), Error> {
        let (input, out, rows) = (self.input.floats(), self.out.floats(), self.token_rows);
        if self.grad {
            let (ids, workspace) = (routed.ids.slice(), self.workspace.slice());
            ops::experts_matmul_4bit_grad_input(
                stream,
                input,
                rows,
                ids,
                &routed.routing,
                weight,
                out,
                workspace,
            )
        } else {
            let bias = self.bias.as_ref().map(Placed::floats);
            ops::experts_matmul_4bit(stream, input, rows, &routed.routing, weight, bias, out)
        }
    }
}

/// Panics unless every element is near the sum of the exact products, zero or NaN as the ids say.
#[allow(clippy::too_many_arguments, reason = "what a result depends on")]
fn check_result<T: Element>(
    case: Case,
    weight: &[f32],
    ids: &[i64],
    grad: bool,
    token_rows: TokenRows,
    input: &[T],
    bias: &[T],
    got: &[T],
    rounded: bool,
) {
    let Case { slots, experts, out_features: n, in_features: k, .. } = case;
    let (depth, columns) = if grad { (n, k) } else { (k, n) };
    let summed = grad && token_rows == TokenRows::One;
    let shared = token_rows == TokenRows::One && !grad;
    for (i, &got) in got.iter().enumerate() {
        let (row, column) = (i / columns, i % columns);
        let rows = if summed { row * slots..(row + 1) * slots } else { row..row + 1 };
        let at = format!("grad {grad} {token_rows:?} {case:?}: [{row}, {column}]");
        let buckets: Vec<usize> = rows.clone().map(|row| bucket(ids[row], experts)).collect();
        if buckets.contains(&(experts + 1)) {
            assert!(got.to_f32().is_nan(), "{at} is {got:?}, not NaN");
            continue;
        }
        if buckets.iter().all(|&b| b == experts) {
            assert_eq!(got.to_f32(), 0.0, "{at} has no expert");
            continue;
        }
        let terms = rows.zip(&buckets).filter(|&(_, &e)| e < experts).flat_map(|(row, &e)| {
            let from = if shared { row / slots } else { row } * depth;
            (0..depth).map(move |d| {
                let at = if grad { d * k + column } else { column * k + d };
                (input[from + d].to_f32(), weight[e * n * k + at])
            })
        });
        let bias = bias.get(buckets[0] * n + column).map_or(0.0, |bias| bias.to_f32());
        assert_near(got, terms, bias, rounded, &at);
    }
}

/// Whether tensor cores may do it, which take weights that are rounded.
fn rounded(device: &Device, dtype: DType, case: Case, grad: bool) -> bool {
    let rows = case.tokens * case.slots;
    common::on_tensor_cores(device, dtype)
        && case.in_features.is_multiple_of(32)
        && (grad || rows > 8 && rows > 2 * case.experts)
}

fn check<T: Element + Bits>(case: Case, device: &'static Device) {
    let stream = common::stream(device);
    let host = Host::new(case);
    let weight = host.decode();
    let ids = ids(case.tokens * case.slots, case.experts, case.tokens as u64, case.bad);
    let routed = Routed::new(&stream, &ids, case.slots, case.experts);
    routed.run(&stream).unwrap();
    for grad in [false, true] {
        for token_rows in [TokenRows::One, TokenRows::Each] {
            let (call, input, bias) =
                Call::<T>::new(&stream, case, &routed.routing, grad, token_rows);
            host.with(&stream, |weight| call.run(&stream, &routed, weight)).unwrap();
            call.workspace.read(&stream);
            let got = call.out.read(&stream);
            let rounded = rounded(device, T::DTYPE, case, grad);
            check_result(case, &weight, &ids, grad, token_rows, &input, &bias, &got, rounded);
        }
    }
}

/// Tokens, slots, experts, features: few rows and many, one expert, experts without rows, ragged.
const SHAPES: [(usize, usize, usize, usize, usize); 14] = [
    (1, 1, 1, 8, 32),
    (1, 2, 4, 12, 64),
    (8, 2, 64, 6, 32),
    (3, 3, 3, 20, 96),
    (40, 2, 5, 66, 96),
    (70, 1, 1, 130, 64),
    (33, 2, 2, 48, 160),
    (150, 2, 2, 70, 32),
    (5, 2, 4, 7, 33),
    (50, 2, 3, 33, 64),
    (30, 3, 2, 10, 50),
    (6, 4, 40, 9, 40),
    (20, 2, 6, 64, 128),
    (300, 2, 3, 34, 32),
];

fn cases() -> Vec<Case> {
    let case = |(i, (tokens, slots, experts, out_features, in_features))| Case {
        tokens,
        slots,
        experts,
        out_features,
        in_features,
        blocksize: [64, 32, 128, 256, 64][i % 5],
        nested: i % 2 == 1,
        bias: i % 4 < 2,
        bad: i % 3 == 1,
        shift: [0, 0, 1, 0, 2][i % 5],
    };
    SHAPES.into_iter().enumerate().map(case).collect()
}

#[test]
fn every_row_lies_near_the_product_with_its_expert() {
    for device in common::portable_devices() {
        for case in cases() {
            for_all_dtypes!(check(case, device));
        }
    }
}

/// Ways differ by compute capability: no bfloat16 on tensor cores at 7.5, no tile of 128 rows.
#[test]
fn every_capability_lies_near_the_product() {
    for device in common::cuda_devices() {
        for case in cases().into_iter().skip(4).step_by(3) {
            check::<f16>(case, device);
            check::<bf16>(case, device);
        }
    }
}

/// A nested block holds scales of two experts, and tokens of every expert read the right ones.
#[test]
fn experts_may_share_a_nested_block() {
    let case = Case { tokens: 24, experts: 7, out_features: 18, in_features: 32, ..CASE };
    assert!(!(18usize * 32 / 64).is_multiple_of(64), "nine blocks each");
    for device in common::cuda_devices() {
        for_all_dtypes!(check(case, device));
    }
}

/// The bits of a row do not depend on the routes of others, nor on the run.
#[test]
fn a_row_does_not_depend_on_the_others() {
    let case = Case { slots: 1, ..CASE };
    let experts = case.experts;
    for device in common::cuda_devices() {
        let stream = common::stream(device);
        let host = Host::new(case);
        for grad in [false, true] {
            let run = |ids: &[i64]| {
                let routed = Routed::new(&stream, ids, 1, experts);
                routed.run(&stream).unwrap();
                let (call, ..) =
                    Call::<f16>::new(&stream, case, &routed.routing, grad, TokenRows::Each);
                host.with(&stream, |weight| call.run(&stream, &routed, weight)).unwrap();
                call.out.read(&stream)
            };
            let columns = if grad { case.in_features } else { case.out_features };
            let spread: Vec<i64> = (0..60).map(|row| row % 4).collect();
            let mut alone = vec![experts as i64; 60];
            alone[41] = spread[41];
            let (all, one) = (run(&spread), run(&alone));
            assert_eq!(all, run(&spread), "{device}: two runs");
            let row = 41 * columns..42 * columns;
            assert_eq!(all[row.clone()], one[row], "{device} grad {grad}");
        }
    }
}

/// Captured once, replayed with other routes in the same memory: routing and products.
#[test]
fn a_graph_follows_the_routes() {
    if common::on_hardware() {
        return assert!(!common::cuda_devices().is_empty(), "tests/gpu captures on hardware");
    }
    for (tokens, slots) in [(8, 2), (300, 2)] {
        let case = Case { tokens, slots, experts: 5, in_features: 64, bad: true, ..CASE };
        let device = common::cuda_devices()[1];
        let stream = common::stream(device);
        let host = Host::new(case);
        let weight = host.decode();
        let mut list = ids(tokens * slots, case.experts, 1, true);
        let routed = Routed::new(&stream, &list, slots, case.experts);
        for grad in [false, true] {
            let rows = TokenRows::One;
            let (call, input, bias) = Call::<bf16>::new(&stream, case, &routed.routing, grad, rows);
            host.with(&stream, |operand| {
                let graph = Graph::record(&stream, || {
                    routed.run(&stream)?;
                    call.run(&stream, &routed, operand)
                })
                .unwrap();
                for seed in [2, 3] {
                    list = ids(tokens * slots, case.experts, seed, true);
                    overwrite(&routed.ids, &list);
                    graph.replay(&stream);
                    let got = call.out.read(&stream);
                    let rounded = rounded(device, DType::BF16, case, grad);
                    check_result(case, &weight, &list, grad, rows, &input, &bias, &got, rounded);
                }
            });
        }
    }
}

#[test]
fn nothing_and_sums_of_nothing() {
    for device in common::portable_devices() {
        for (tokens, slots, experts, out_features, in_features) in [
            (0, 2, 3, 4, 32),
            (3, 0, 3, 4, 32),
            (3, 2, 0, 4, 32),
            (3, 2, 3, 0, 32),
            (3, 2, 3, 4, 0),
        ] {
            let (nested, bias) = (false, false);
            let case =
                Case { tokens, slots, experts, out_features, in_features, nested, bias, ..CASE };
            check::<bf16>(case, device);
        }
    }
}

#[test]
fn wrong_buffers_are_refused() {
    common::set_up();
    let stream = common::stream(common::cuda_devices()[0]);
    let message = |result: Result<(), Error>| result.unwrap_err().to_string();
    let lists = |order, starts| Routing::new(nowhere(order), nowhere(starts), 4, 2, 3).map(|_| ());
    assert!(lists(8, 6).is_ok());
    assert_eq!(message(lists(7, 6)), "order must hold 8 elements, got 7");
    assert_eq!(message(lists(8, 4)), "starts must hold 6 elements, got 4");
    let many = Routing::new(nowhere(1 << 31), nowhere(6), 1 << 30, 2, 3).map(|_| ());
    assert_eq!(message(many), "the number of rows must be at most 2147483647, got 2147483648");

    let routing = Routing::new(nowhere(8), nowhere(6), 4, 2, 3).unwrap();
    let none = DeviceSlice::empty();
    assert_eq!(
        message(ops::route(&stream, nowhere(7), &routing, none)),
        "expert_ids must hold 8 elements, got 7"
    );
    let weight = |packed, scales, experts| {
        let scales = Scales::Plain(nowhere(scales));
        let table = Table4::Standard(Code4::Nf4);
        Experts4::new(nowhere(packed), scales, table, BlockSize::B64, [experts, 2, 33])
    };
    assert_eq!(message(weight(99, 6, 3).map(|_| ())), "packed must hold 192 elements, got 99");
    assert_eq!(message(weight(192, 3, 3).map(|_| ())), "absmax must hold 6 elements, got 3");
    let (good, other) = (weight(192, 6, 3).unwrap(), weight(256, 8, 4).unwrap());
    let call = |weight: &Experts4, input, rows, out| {
        let (input, out) = (nowhere::<f32>(input).into(), nowhere::<f32>(out).into());
        message(ops::experts_matmul_4bit(&stream, input, rows, &routing, weight, None, out))
    };
    assert_eq!(call(&other, 132, TokenRows::One, 16), "weight must hold 3 elements, got 4");
    assert_eq!(call(&good, 132, TokenRows::Each, 16), "input must hold 264 elements, got 132");
    assert_eq!(call(&good, 132, TokenRows::One, 8), "out must hold 16 elements, got 8");
    let grad = ops::experts_matmul_4bit_grad_input(
        &stream,
        nowhere::<f32>(16).into(),
        TokenRows::One,
        nowhere(8),
        &routing,
        &good,
        nowhere::<f32>(132).into(),
        nowhere(40),
    );
    assert_eq!(message(grad), "workspace must hold 1056 elements, got 40");
}
