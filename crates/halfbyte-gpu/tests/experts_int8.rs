//! The 8-bit products of experts: rows equal the core's bit for bit, whatever the routes; gradients
//! equal the sums of each row's `int8_linear_grad_input`.

mod common;
mod drawn;
mod placed;
mod random;
mod routed;

use drawn::Graph;
use halfbyte::{DType, Element, TokenRows, bf16, f16};
use halfbyte_gpu::ops::{self, Experts8, Routing};
use halfbyte_gpu::{Device, Error, Stream};
use placed::{Bits, Placed, assert_same, cast, nowhere};
use random::Random;
use routed::{Routed, bucket, ids, overwrite};

#[derive(Clone, Copy, Debug)]
struct Case {
    tokens: usize,
    slots: usize,
    experts: usize,
    out_features: usize,
    in_features: usize,
    /// Columns of activations with outliers; none means no threshold.
    outliers: usize,
    bias: bool,
    bad: bool,
    /// Elements that all buffers begin behind an aligned address.
    shift: usize,
}

impl Case {
    fn threshold(&self) -> f32 {
        if self.outliers > 0 { 6.0 } else { 0.0 }
    }

    fn shape(&self) -> [usize; 3] {
        [self.experts, self.out_features, self.in_features]
    }
}

/// A weight and activations on the host.
struct Host<T> {
    case: Case,
    token_rows: TokenRows,
    codes: Vec<i8>,
    scales: Vec<f32>,
    input: Vec<T>,
    grad: Vec<T>,
    bias: Option<Vec<T>>,
}

impl<T: Element + Bits> Host<T> {
    fn new(case: Case, token_rows: TokenRows) -> Self {
        let Case { tokens, slots, experts, out_features: n, in_features: k, .. } = case;
        let mut random = Random(tokens as u64 + 7);
        let rows = if token_rows == TokenRows::One { tokens } else { tokens * slots };
        Self {
            case,
            token_rows,
            codes: random.codes(experts * n * k),
            scales: random.floats(experts * n),
            input: cast(&random.activations(rows, k, case.outliers)),
            grad: cast(&random.floats(tokens * slots * n)),
            bias: case.bias.then(|| cast(&random.floats(experts * n))),
        }
    }

    /// The core's result; NaN in rows whose id is out of range.
    fn expected(&self, ids: &[i64]) -> Vec<T> {
        let Case { tokens, slots, experts, out_features: n, .. } = self.case;
        let known = |&id: &i64| bucket(id, experts).min(experts) as i64;
        let routes: Vec<i64> = ids.iter().map(known).collect();
        let routing = halfbyte::Routing::new(&routes, tokens, slots, experts).unwrap();
        let weight = halfbyte::Experts8::new(&self.codes, &self.scales, self.case.shape()).unwrap();
        let mut out = vec![T::default(); ids.len() * n];
        let (rows, threshold) = (self.token_rows, self.case.threshold());
        let bias = self.bias.as_deref();
        halfbyte::experts_matmul_8bit(
            &self.input,
            rows,
            &routing,
            &weight,
            threshold,
            bias,
            &mut out,
        )
        .unwrap();
        for (row, &id) in ids.iter().enumerate() {
            if bucket(id, experts) > experts {
                out[row * n..][..n].fill(T::from_f32(f32::NAN));
            }
        }
        out
    }
}

/// What lies on the device.
struct Call<'a, T> {
    host: &'a Host<T>,
    codes: Placed<i8>,
    scales: Placed<f32>,
    input: Placed<T>,
    grad: Placed<T>,
    bias: Option<Placed<T>>,
    out: Placed<T>,
    grad_input: Placed<T>,
    workspace: Placed<u8>,
}

impl<'a, T: Element + Bits> Call<'a, T> {
    fn new(stream: &Stream, host: &'a Host<T>, routing: &Routing) -> Self {
        let Case { out_features: n, in_features: k, shift, .. } = host.case;
        let (rows, threshold) = (host.token_rows, host.case.threshold());
        let bytes = ops::experts_matmul_8bit_workspace(routing, rows, k, threshold)
            .max(ops::experts_matmul_8bit_grad_input_workspace(routing, rows, k));
        Self {
            host,
            codes: Placed::new(stream, &host.codes, shift),
            scales: Placed::new(stream, &host.scales, shift),
            input: Placed::new(stream, &host.input, shift),
            grad: Placed::new(stream, &host.grad, shift),
            bias: host.bias.as_ref().map(|bias| Placed::new(stream, bias, shift)),
            out: Placed::unwritten(stream, routing.rows() * n, shift),
            grad_input: Placed::unwritten(stream, routing.count(rows) * k, shift),
            workspace: Placed::unwritten(stream, bytes, shift),
        }
    }

    fn weight(&self) -> Experts8 {
        Experts8::new(self.codes.slice(), self.scales.slice(), self.host.case.shape()).unwrap()
    }

    fn forward(&self, stream: &Stream, routed: &Routed) -> Result<(), Error> {
        ops::experts_matmul_8bit(
            stream,
            self.input.floats(),
            self.host.token_rows,
            routed.ids.slice(),
            &routed.routing,
            &self.weight(),
            self.host.case.threshold(),
            self.bias.as_ref().map(Placed::floats),
            self.out.floats(),
            self.workspace.slice(),
        )
    }

    fn backward(&self, stream: &Stream, routed: &Routed) -> Result<(), Error> {
        ops::experts_matmul_8bit_grad_input(
            stream,
            self.grad.floats(),
            self.host.token_rows,
            routed.ids.slice(),
            &routed.routing,
            &self.weight(),
            self.grad_input.floats(),
            self.workspace.slice(),
        )
    }

    /// Panics unless every element lies within the stated bound of the exact gradient, is zero
    /// without an expert, or NaN for a bad id.
    fn check_gradient(&self, device: &Device, ids: &[i64], got: &[T]) {
        let Case { slots, experts, out_features: n, in_features: k, .. } = self.host.case;
        let cores = device.capability() >= if T::DTYPE == DType::BF16 { 80 } else { 75 };
        let (weights, result, least) = match T::DTYPE {
            DType::F32 => (-40, -24, 0.0),
            DType::F16 => (if cores { -11 } else { -40 }, -11, 2.0f64.powi(-25)),
            DType::BF16 => (if cores { -8 } else { -40 }, -8, 0.0),
        };
        let one = self.host.token_rows == TokenRows::One;
        for (i, got) in got.iter().enumerate() {
            let (row, column) = (i / k, i % k);
            let rows = if one { row * slots..(row + 1) * slots } else { row..row + 1 };
            let at = format!("{device} {} {:?}: [{row}, {column}]", T::DTYPE, self.host.case);
            if rows.clone().any(|row| bucket(ids[row], experts) > experts) {
                assert!(got.to_f32().is_nan(), "{at} is {got:?}, not NaN");
                continue;
            }
            let relative = 2.0f64.powi(weights) + (rows.len() * n + 2) as f64 * 2.0f64.powi(-23);
            let (mut sum, mut most, mut grads) = (0.0f64, 0.0f64, 0.0f64);
            for row in rows {
                let expert = bucket(ids[row], experts);
                for o in 0..if expert < experts { n } else { 0 } {
                    let x = f64::from(self.host.grad[row * n + o].to_f32());
                    let code = f64::from(self.host.codes[(expert * n + o) * k + column]);
                    let term = x * code * f64::from(self.host.scales[expert * n + o]) / 127.0;
                    sum += term;
                    most += term.abs();
                    grads += x.abs();
                }
            }
            let bound = relative * most
                + least * (grads + if most > 0.0 { 1.0 } else { 0.0 })
                + 2.0f64.powi(result) * sum.abs();
            let off = (f64::from(got.to_f32()) - sum).abs();
            assert!(off <= bound, "{at} is {off} off, beyond {bound}");
        }
    }
}

fn check<T: Element + Bits>(mut case: Case, device: &'static Device) {
    let stream = common::stream(device);
    if case.slots == 0 {
        case.tokens = 0; // as many as `Routed` finds in no ids
    }
    let ids = ids(case.tokens * case.slots, case.experts, case.tokens as u64, case.bad);
    let routed = Routed::new(&stream, &ids, case.slots, case.experts);
    routed.run(&stream).unwrap();
    for token_rows in [TokenRows::One, TokenRows::Each] {
        let host = Host::<T>::new(case, token_rows);
        let call = Call::new(&stream, &host, &routed.routing);
        call.forward(&stream, &routed).unwrap();
        let at = format!("{device} {} {token_rows:?} {case:?}", T::DTYPE);
        assert_same::<T>(&call.out.read(&stream), &host.expected(&ids), &at);
        call.backward(&stream, &routed).unwrap();
        call.check_gradient(device, &ids, &call.grad_input.read(&stream));
        call.workspace.read(&stream);
    }
}

/// Tokens, slots, experts, features: few rows and many, one expert, experts without rows, ragged.
const SHAPES: [(usize, usize, usize, usize, usize); 12] = [
    (1, 1, 1, 8, 32),
    (1, 2, 4, 12, 64),
    (8, 2, 64, 6, 96),
    (3, 3, 3, 20, 530),
    (40, 2, 5, 66, 96),
    (70, 1, 1, 130, 64),
    (33, 2, 2, 48, 144),
    (150, 2, 2, 70, 32),
    (5, 2, 4, 7, 33),
    (50, 2, 3, 33, 50),
    (6, 4, 40, 9, 1040),
    (200, 1, 1, 133, 80),
];

fn cases() -> Vec<Case> {
    let case = |(i, (tokens, slots, experts, out_features, in_features))| Case {
        tokens,
        slots,
        experts,
        out_features,
        in_features,
        outliers: [0, 3, 20][i % 3],
        bias: i % 4 < 2,
        bad: i % 4 == 1,
        shift: [0, 0, 1, 0, 2][i % 5],
    };
    SHAPES.into_iter().enumerate().map(case).collect()
}

#[test]
fn every_row_is_that_of_the_core() {
    for device in common::portable_devices() {
        for case in cases() {
            for_all_dtypes!(check(case, device));
        }
    }
}

/// Tensor cores of each capability; an expert with rows for large tiles, and outliers in them.
#[test]
fn every_capability_gives_the_rows_of_the_core() {
    for device in common::cuda_devices() {
        for mut case in cases().into_iter().skip(4).step_by(3) {
            case.outliers = 19;
            check::<f16>(case, device);
            check::<bf16>(case, device);
        }
    }
}

/// Special values: rows of NaN and infinity spoil no other row.
#[test]
fn special_values_stay_in_their_rows() {
    let case = Case {
        tokens: 20,
        slots: 2,
        experts: 3,
        out_features: 11,
        in_features: 40,
        outliers: 2,
        bias: true,
        bad: false,
        shift: 0,
    };
    for device in common::portable_devices() {
        let stream = common::stream(device);
        let ids = ids(40, 3, 5, false);
        let routed = Routed::new(&stream, &ids, 2, 3);
        routed.run(&stream).unwrap();
        let mut host = Host::<f32>::new(case, TokenRows::One);
        for (i, special) in
            [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-40, f32::MAX].into_iter().enumerate()
        {
            host.input[3 * i * 40 + 7 * i] = special;
        }
        let call = Call::new(&stream, &host, &routed.routing);
        call.forward(&stream, &routed).unwrap();
        assert_same(&call.out.read(&stream), &host.expected(&ids), &format!("{device}"));
    }
}

/// Captured once, replayed with other routes in the same memory.
#[test]
fn a_graph_follows_the_routes() {
    if common::on_hardware() {
        return assert!(!common::cuda_devices().is_empty(), "tests/gpu captures on hardware");
    }
    for (tokens, outliers) in [(8, 3), (60, 0)] {
        let case = Case {
            tokens,
            slots: 2,
            experts: 5,
            out_features: 34,
            in_features: 64,
            outliers,
            bias: true,
            bad: true,
            shift: 0,
        };
        let device = common::cuda_devices()[1];
        let stream = common::stream(device);
        let mut list = ids(2 * tokens, 5, 1, true);
        let routed = Routed::new(&stream, &list, 2, 5);
        let host = Host::<bf16>::new(case, TokenRows::One);
        let call = Call::new(&stream, &host, &routed.routing);
        let graph = Graph::record(&stream, || {
            routed.run(&stream)?;
            call.forward(&stream, &routed)?;
            call.backward(&stream, &routed)
        })
        .unwrap();
        for seed in [2, 3] {
            list = ids(2 * tokens, 5, seed, true);
            overwrite(&routed.ids, &list);
            graph.replay(&stream);
            let at = format!("{case:?}, replayed with seed {seed}");
            assert_same(&call.out.read(&stream), &host.expected(&list), &at);
            call.check_gradient(device, &list, &call.grad_input.read(&stream));
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
            for outliers in [0, 1] {
                let case = Case {
                    tokens,
                    slots,
                    experts,
                    out_features,
                    in_features,
                    outliers,
                    bias: true,
                    bad: false,
                    shift: 0,
                };
                check::<bf16>(case, device);
            }
        }
    }
}

#[test]
fn wrong_buffers_are_refused() {
    common::set_up();
    let stream = common::stream(common::cuda_devices()[0]);
    let message = |result: Result<(), Error>| result.unwrap_err().to_string();
    let weight = |codes, scales, k| Experts8::new(nowhere(codes), nowhere(scales), [3, 2, k]);
    assert_eq!(message(weight(59, 6, 10).map(|_| ())), "codes must hold 60 elements, got 59");
    assert_eq!(message(weight(60, 3, 10).map(|_| ())), "scales must hold 6 elements, got 3");
    let deep = halfbyte::INT8_MAX_DEPTH + 1;
    let error = message(weight(6 * deep, 6, deep).map(|_| ()));
    assert!(error.contains(&format!("got {deep}")), "{error}");

    let routing = Routing::new(nowhere(8), nowhere(6), 4, 2, 3).unwrap();
    let good = weight(60, 6, 10).unwrap();
    let call = |input, ids, out, bias: Option<usize>, scratch| {
        let floats = |n| nowhere::<f32>(n).into();
        message(ops::experts_matmul_8bit(
            &stream,
            floats(input),
            TokenRows::One,
            nowhere(ids),
            &routing,
            &good,
            6.0,
            bias.map(floats),
            floats(out),
            nowhere(scratch),
        ))
    };
    assert_eq!(call(39, 8, 16, None, 0), "input must hold 40 elements, got 39");
    assert_eq!(call(40, 7, 16, None, 0), "expert_ids must hold 8 elements, got 7");
    assert_eq!(call(40, 8, 15, None, 0), "out must hold 16 elements, got 15");
    assert_eq!(call(40, 8, 16, Some(2), 0), "bias must hold 6 elements, got 2");
    assert_eq!(call(40, 8, 16, None, 0), "workspace must hold 64 elements, got 0");
}
