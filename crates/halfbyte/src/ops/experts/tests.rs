//! Every instruction set against float64, and against a product of its own for each expert.

use super::{Experts4, Experts8, Routing, TokenRows, run, run_grad};
use crate::isa::{self, Isa};
use crate::ops::matmul_4bit::{self, few_rows};
use crate::ops::{NestedScales, Scales, Weight8, gemm};
use crate::{BlockSize, Code4, Code8, DType, Element, Error, bf16, f16};
use proptest::prelude::*;

/// Reproducible numbers: the same case fails the same way.
struct Numbers(u64);

impl Numbers {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as u32
    }
    /// Between -1 and 1.
    fn signed(&mut self) -> f32 {
        self.bits() as f32 / (1u32 << 30) as f32 - 1.0
    }
    fn elements<T: Element>(&mut self, n: usize) -> Vec<T> {
        (0..n).map(|_| T::from_f32(self.signed())).collect()
    }
}

#[derive(Clone, Copy, Debug)]
enum Ids {
    /// Any expert, or none.
    Random,
    /// Expert 0 only.
    First,
    /// None anywhere.
    None,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    experts: usize,
    out_features: usize,
    in_features: usize,
    tokens: usize,
    slots: usize,
    ids: Ids,
    token_rows: TokenRows,
    blocksize: BlockSize,
    code: Code4,
    nested: bool,
    bias: bool,
}

const PLAIN: Case = Case {
    experts: 3,
    out_features: 20,
    in_features: 32,
    tokens: 12,
    slots: 2,
    ids: Ids::Random,
    token_rows: TokenRows::One,
    blocksize: BlockSize::B64,
    code: Code4::Nf4,
    nested: false,
    bias: true,
};

/// A case's buffers.
struct Parts<T> {
    case: Case,
    packed: Vec<u8>,
    absmax: Vec<f32>,
    absmax8: Vec<u8>,
    absmax2: Vec<f32>,
    codes8: Vec<i8>,
    scales8: Vec<f32>,
    routing: Routing,
    ids: Vec<usize>,
    input: Vec<T>,
    grad: Vec<T>,
    bias: Option<Vec<T>>,
}

impl<T: Element> Parts<T> {
    fn new(case: Case) -> Self {
        let Case { experts, out_features: n, in_features: k, tokens, slots, .. } = case;
        let mut numbers = Numbers((experts * 7 + n * 31 + k * 17 + tokens) as u64);
        let rows = tokens * slots;
        let ids: Vec<usize> = (0..rows)
            .map(|_| match case.ids {
                Ids::Random => numbers.bits() as usize % (experts + 1),
                Ids::First => 0,
                Ids::None => experts,
            })
            .collect();
        let wide: Vec<i64> = ids.iter().map(|id| *id as i64).collect();
        let padded = case.blocksize.over(n * k).count() * case.blocksize.get();
        let blocks = case.blocksize.over(experts * padded);
        Self {
            case,
            packed: (0..blocks.packed_len()).map(|_| numbers.bits() as u8).collect(),
            absmax: (0..blocks.count()).map(|_| numbers.signed().abs() + 0.01).collect(),
            absmax8: (0..blocks.count()).map(|_| numbers.bits() as u8).collect(),
            absmax2: numbers.elements(BlockSize::B256.over(blocks.count()).count()),
            codes8: (0..experts * n * k).map(|_| (numbers.bits() % 255) as i8).collect(),
            scales8: numbers.elements(experts * n),
            routing: Routing::new(&wide, tokens, slots, experts).unwrap(),
            ids,
            input: numbers.elements(case.input_rows() * k),
            grad: numbers.elements(rows * n),
            bias: case.bias.then(|| numbers.elements(experts * n)),
        }
    }

    fn scales(&self) -> Scales<'_> {
        if self.case.nested {
            Scales::Nested(NestedScales {
                absmax: &self.absmax8,
                code: Code8::dynamic(true).values(),
                absmax2: &self.absmax2,
                blocksize: BlockSize::B256,
                offset: 0.7,
            })
        } else {
            Scales::Plain(&self.absmax)
        }
    }

    fn weight(&self) -> Experts4<'_> {
        let Case { experts, out_features, in_features, blocksize, code, .. } = self.case;
        let shape = [experts, out_features, in_features];
        Experts4::new(&self.packed, self.scales(), code.table(), blocksize, shape).unwrap()
    }

    fn weight8(&self) -> Experts8<'_> {
        let Case { experts, out_features, in_features, .. } = self.case;
        Experts8::new(&self.codes8, &self.scales8, [experts, out_features, in_features]).unwrap()
    }

    /// The 4-bit weight of all experts, decoded by the layout that `Experts4` states.
    fn decoded(&self) -> Vec<f64> {
        let Case { experts, out_features, in_features, blocksize, code, .. } = self.case;
        let (len, block) = (out_features * in_features, blocksize.get());
        let blocks = len.div_ceil(block);
        let mut scales = vec![0.0; experts * blocks];
        self.scales().decode(0, &mut scales);
        (0..experts * len)
            .map(|i| {
                let (e, i) = (i / len, i % len);
                let byte = self.packed[e * blocks * block / 2 + i / 2];
                let q = byte >> (4 - i % 2 * 4) & 15;
                f64::from(code.table()[q as usize] * scales[e * blocks + i / block])
            })
            .collect()
    }

    fn decoded8(&self) -> Vec<f64> {
        let k = self.case.in_features;
        let decode = |(i, q): (usize, &i8)| f32::from(*q) * self.scales8[i / k] * (1.0 / 127.0);
        self.codes8.iter().enumerate().map(decode).map(f64::from).collect()
    }

    fn forward(&self, isa: Isa) -> Vec<T> {
        let mut out = vec![T::from_f32(f32::NAN); self.ids.len() * self.case.out_features];
        let bias = self.bias.as_deref();
        let (weight, rows) = (self.weight(), self.case.token_rows);
        run(isa, &self.input, rows, &self.routing, &weight, bias, &mut out);
        out
    }

    fn grad_input(&self, isa: Isa) -> Vec<T> {
        self.grad_of(isa, |e| self.weight().expert(e))
    }

    fn grad_input8(&self, isa: Isa) -> Vec<T> {
        self.grad_of(isa, |e| self.weight8().expert(e))
    }

    fn grad_of<W: gemm::Weight>(&self, isa: Isa, expert: impl Fn(usize) -> W) -> Vec<T> {
        let k = self.case.in_features;
        let mut out = vec![T::from_f32(f32::NAN); self.case.input_rows() * k];
        run_grad(isa, &self.grad, self.case.token_rows, &self.routing, expert, k, &mut out);
        out
    }

    /// Row `row` of the input.
    fn input_row(&self, row: usize) -> &[T] {
        let k = self.case.in_features;
        &self.input[self.case.input_row(row) * k..][..k]
    }

    fn check(&self) {
        self.check_forward();
        self.check_grad(&self.decoded(), "4-bit", |isa| self.grad_input(isa));
        self.check_grad(&self.decoded8(), "8-bit", |isa| self.grad_input8(isa));
    }

    fn check_forward(&self) {
        let Case { out_features: n, in_features: k, .. } = self.case;
        let w = self.decoded();
        let exact: Vec<_> = (0..self.ids.len() * n)
            .map(|i| {
                let (row, o) = (i / n, i % n);
                let e = self.ids[row];
                if e == self.case.experts {
                    return (0.0, 0.0);
                }
                let bias = self.bias.as_ref().map_or(0.0, |b| f64::from(b[e * n + o].to_f32()));
                let w = &w[(e * n + o) * k..][..k];
                let products = self.input_row(row).iter().zip(w);
                products.fold((bias, bias.abs()), |(sum, size), (x, w)| {
                    let p = f64::from(x.to_f32()) * w;
                    (sum + p, size + p.abs())
                })
            })
            .collect();
        for isa in isa::available() {
            for (i, (got, exact)) in self.forward(isa).iter().zip(&exact).enumerate() {
                // Both ways' bounds, generously: few rows, and many.
                check(*got, k + 20, *exact, &format!("{isa} {:?} forward {i}", self.case));
            }
        }
    }

    fn check_grad(&self, w: &[f64], bits: &str, grad_input: impl Fn(Isa) -> Vec<T>) {
        let Case { out_features: n, in_features: k, slots, .. } = self.case;
        let mut exact = vec![(0.0, 0.0); self.case.input_rows() * k];
        for (row, &e) in self.ids.iter().enumerate().filter(|(_, e)| **e < self.case.experts) {
            for o in 0..n {
                let g = f64::from(self.grad[row * n + o].to_f32());
                for c in 0..k {
                    let p = g * w[(e * n + o) * k + c];
                    let (sum, size) = &mut exact[self.case.input_row(row) * k + c];
                    (*sum, *size) = (*sum + p, *size + p.abs());
                }
            }
        }
        for isa in isa::available() {
            for (i, (got, exact)) in grad_input(isa).iter().zip(&exact).enumerate() {
                let at = format!("{isa} {bits} {:?} gradient {i}", self.case);
                check(*got, n + slots + 1, *exact, &at);
            }
        }
    }

    /// Each expert by itself: rows gathered, `matmul_4bit`, rows scattered.
    fn one_by_one(&self, isa: Isa) -> (Vec<T>, Vec<T>) {
        let Case { experts, out_features: n, in_features: k, .. } = self.case;
        let mut out = vec![T::default(); self.ids.len() * n];
        let mut grad_input = vec![T::default(); self.ids.len() * k];
        for e in 0..experts {
            // A copy of the expert's scales, decoded, stands for the part of the list.
            let blocks = self.case.blocksize.over(n * k);
            let mut scales = vec![0.0; blocks.count()];
            self.scales().decode(e * blocks.count(), &mut scales);
            let bytes = blocks.count() * self.case.blocksize.get() / 2;
            let weight = matmul_4bit::Weight4::new(
                &self.packed[e * bytes..][..blocks.packed_len()],
                Scales::Plain(&scales),
                self.case.code.table(),
                self.case.blocksize,
                n,
                k,
            )
            .unwrap();
            let rows = self.routing.rows_of(e);
            let x: Vec<T> = rows.iter().flat_map(|row| self.input_row(*row)).copied().collect();
            let g: Vec<T> = rows.iter().flat_map(|r| &self.grad[r * n..][..n]).copied().collect();
            let bias = self.bias.as_ref().map(|b| &b[e * n..][..n]);
            let (mut y, mut gx) = (vec![T::default(); rows.len() * n], vec![T::default(); x.len()]);
            matmul_4bit::run(isa, &x, rows.len(), &weight, bias, &mut y);
            matmul_4bit::run_grad(isa, &g, rows.len(), &weight, &mut gx);
            for (m, row) in rows.iter().enumerate() {
                out[row * n..][..n].copy_from_slice(&y[m * n..][..n]);
                grad_input[row * k..][..k].copy_from_slice(&gx[m * k..][..k]);
            }
        }
        (out, grad_input)
    }
}

impl Case {
    fn input_rows(&self) -> usize {
        match self.token_rows {
            TokenRows::One => self.tokens,
            TokenRows::Each => self.tokens * self.slots,
        }
    }

    fn input_row(&self, row: usize) -> usize {
        match self.token_rows {
            TokenRows::One => row / self.slots,
            TokenRows::Each => row,
        }
    }

    fn check(self) {
        for token_rows in [TokenRows::One, TokenRows::Each] {
            let case = Self { token_rows, ..self };
            Parts::<f32>::new(case).check();
            Parts::<f16>::new(case).check();
            Parts::<bf16>::new(case).check();
        }
    }
}

/// `got` against a sum, given how many roundings it took and the sum of absolute values.
fn check<T: Element>(got: T, roundings: usize, (sum, size): (f64, f64), at: &str) {
    let slack = roundings as f64 * 2f64.powi(-24) * size;
    let (unit, tiny) = match T::DTYPE {
        DType::F32 => (2f64.powi(-24), 2f64.powi(-140)),
        DType::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        DType::BF16 => (2f64.powi(-8), 2f64.powi(-134)),
    };
    let slack = slack + unit * (sum.abs() + slack) + tiny;
    let error = (f64::from(got.to_f32()) - sum).abs();
    assert!(error <= slack, "{at}: error {error:e} over {slack:e}, exact {sum}, got {got:?}");
}

#[test]
fn shapes() {
    for (i, (experts, out_features, in_features, tokens, slots)) in [
        (1, 1, 1, 1, 1),
        (2, 5, 7, 3, 2),
        (3, 0, 7, 4, 2),
        (3, 5, 0, 4, 2),
        (3, 5, 7, 0, 2),
        (3, 5, 7, 4, 0),
        (0, 5, 7, 4, 2),
        (4, 33, 64, 1, 2),
        (8, 64, 33, 1, 4),
        (2, 70, 70, 40, 1),
        (3, 17, 65, 30, 3),
        (5, 48, 96, 64, 2),
        (8, 40, 48, 90, 4),
        (2, 31, 130, 290, 2),
    ]
    .into_iter()
    .enumerate()
    {
        let (code, nested) = (Code4::ALL[i % 2], i % 3 == 0);
        let case = Case { experts, out_features, in_features, tokens, slots, code, ..PLAIN };
        case.check();
        Case { nested: !nested, bias: false, ..case }.check();
        if experts > 0 {
            Case { ids: Ids::First, nested, ..case }.check();
        }
        Case { ids: Ids::None, ..case }.check();
    }
}

#[test]
fn block_sizes() {
    for blocksize in BlockSize::ALL {
        for (out_features, in_features) in [(8, 64), (9, 71), (3, 129)] {
            for nested in [false, true] {
                let case = Case { out_features, in_features, blocksize, nested, ..PLAIN };
                Parts::<f32>::new(case).check();
                Parts::<bf16>::new(Case { tokens: 60, ..case }).check();
            }
        }
    }
}

/// An expert's scales may start within a second-level block, and experts go either way.
#[test]
fn each_expert_gives_the_bytes_of_a_call_of_its_own() {
    for (out_features, in_features) in [(21, 64), (40, 192), (13, 1000), (9, 37), (300, 8)] {
        for (tokens, nested) in [(1, true), (9, false), (20, true), (90, true), (400, false)] {
            let case = Case { experts: 5, out_features, in_features, tokens, nested, ..PLAIN };
            for token_rows in [TokenRows::One, TokenRows::Each] {
                let parts = Parts::<f32>::new(Case { token_rows, ..case });
                for isa in isa::available() {
                    let (out, grad_input) = parts.one_by_one(isa);
                    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert!(bits(&parts.forward(isa)) == bits(&out), "{isa} {:?}", parts.case);
                    if token_rows == TokenRows::Each {
                        let got = bits(&parts.grad_input(isa));
                        assert!(got == bits(&grad_input), "{isa} {:?}", parts.case);
                    }
                }
            }
        }
    }
}

#[test]
fn few_and_many_rows_meet_in_one_call() {
    // 40 rows for one expert, 2 for another.
    let ids: Vec<i64> = (0..42).map(|row| i64::from(row % 21 == 20)).collect();
    let mut parts = Parts::<f32>::new(Case { experts: 2, tokens: 21, ..PLAIN });
    parts.ids = ids.iter().map(|id| *id as usize).collect();
    parts.routing = Routing::new(&ids, 21, 2, 2).unwrap();
    assert!(parts.routing.rows_of(0).len() > few_rows::MAX_ROWS);
    assert!(parts.routing.rows_of(1).len() <= few_rows::MAX_ROWS);
    for isa in isa::available() {
        assert!(parts.forward(isa) == parts.one_by_one(isa).0, "{isa}");
    }
    parts.check();
}

/// The sum over slots: in float32, expert by expert, rounded once.
#[test]
fn a_shared_row_gets_the_sum_of_its_slots() {
    for (tokens, slots) in [(1, 2), (50, 2), (30, 4)] {
        let case = Case { experts: 4, in_features: 530, tokens, slots, ..PLAIN };
        let shared = Parts::<f32>::new(case);
        let k = case.in_features;
        for isa in isa::available() {
            let each = shared.one_by_one(isa).1;
            let mut sums = vec![0.0f32; tokens * k];
            for e in 0..case.experts {
                for row in shared.routing.rows_of(e) {
                    let sums = &mut sums[row / slots * k..][..k];
                    sums.iter_mut().zip(&each[row * k..]).for_each(|(s, x)| *s += x);
                }
            }
            assert!(shared.grad_input(isa) == sums, "{isa} {tokens} tokens {slots} slots");
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let (experts, out_features, in_features) = (4, 130, 600);
    for (tokens, slots) in [(2, 2), (30, 2), (700, 3)] {
        let case = Case { experts, out_features, in_features, tokens, slots, ..PLAIN };
        for token_rows in [TokenRows::One, TokenRows::Each] {
            let parts = Parts::<bf16>::new(Case { token_rows, nested: true, ..case });
            for isa in isa::available() {
                let with = |threads| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    pool.unwrap().install(|| {
                        (parts.forward(isa), parts.grad_input(isa), parts.grad_input8(isa))
                    })
                };
                let one = with(1);
                assert!(one == with(2) && one == with(3), "{isa} {:?}", parts.case);
            }
        }
    }
}

/// More tokens than the sums of one task hold.
#[test]
fn many_tokens_share() {
    let case = Case { experts: 2, out_features: 3, in_features: 40, tokens: 9000, ..PLAIN };
    Parts::<f32>::new(case).check();
}

/// What is not finite stays in the rows that it belongs to.
#[test]
fn nans_stay_in_their_rows() {
    for tokens in [3, 60] {
        let case = Case { tokens, token_rows: TokenRows::Each, ..PLAIN };
        let (n, k) = (case.out_features, case.in_features);
        let mut parts = Parts::<f32>::new(case);
        let row = (0..parts.ids.len()).rfind(|row| parts.ids[*row] < case.experts).unwrap();
        parts.input[row * k] = f32::NAN;
        parts.grad[row * n] = f32::NAN;
        for isa in isa::available() {
            for (i, y) in parts.forward(isa).iter().enumerate() {
                assert_eq!(y.is_nan(), i / n == row, "{isa} forward {i}");
            }
            for (i, x) in parts.grad_input(isa).iter().enumerate() {
                assert_eq!(x.is_nan(), i / k == row, "{isa} gradient {i}");
            }
        }
    }
}

/// `grad · dequantize(W)` for one 8-bit weight.
#[test]
fn an_8bit_gradient_equals_that_of_its_expert() {
    for (n, k) in [(1, 1), (33, 70), (300, 520)] {
        let case = Case { experts: 1, out_features: n, in_features: k, slots: 1, ..PLAIN };
        let parts = Parts::<bf16>::new(Case { ids: Ids::First, ..case });
        let weight = Weight8::new(&parts.codes8, &parts.scales8, n, k).unwrap();
        for isa in isa::available() {
            let mut out = vec![bf16::NAN; case.tokens * k];
            let part = gemm::Part { weight, rows: gemm::All(case.tokens), bias: None };
            gemm::grad_input(isa, &parts.grad, &[part], &mut out);
            assert!(parts.grad_input8(isa) == out, "{isa} {n}x{k}");
        }
    }
}

#[test]
fn an_8bit_scale_that_is_infinite_stays_in_its_row() {
    // 19 columns: the ends that are filled up must not become NaN.
    let case = Case { experts: 2, in_features: 19, ids: Ids::First, ..PLAIN };
    let mut parts = Parts::<f32>::new(case);
    parts.scales8[case.out_features] = f32::INFINITY; // of expert 1, which has no rows
    for isa in isa::available() {
        assert!(parts.grad_input8(isa).iter().all(|x| x.is_finite()), "{isa}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let error = |ids: &[i64]| Routing::new(ids, 2, 2, 3).unwrap_err();
    assert!(matches!(
        error(&[0, 3, -1, 0]),
        Error::Expert { got: -1, experts: 3, token: 1, slot: 0 }
    ));
    let message = error(&[0, 1, 2, 4]).to_string();
    assert!(
        message.contains("0..=3") && message.contains("got 4 for token 1, slot 1"),
        "{message}"
    );
    assert!(matches!(
        error(&[0; 3]),
        Error::Length { buffer: "expert_ids", expected: 4, got: 3, .. }
    ));

    let parts = Parts::<f32>::new(PLAIN);
    let (weight, weight8) = (parts.weight(), parts.weight8());
    let Case { experts, out_features: n, in_features: k, tokens, token_rows, .. } = PLAIN;
    let short = |e: Error| match e {
        Error::Length { buffer, .. } => buffer,
        e => panic!("{e}"),
    };
    let forward = |routing: &Routing, x: &[f32], bias: &[f32], len: usize| {
        let mut out = vec![0.0; len];
        let bias = Some(bias);
        short(
            super::experts_matmul_4bit(x, token_rows, routing, &weight, bias, &mut out)
                .unwrap_err(),
        )
    };
    let (x, bias, len) = (&parts.input[..], parts.bias.as_deref().unwrap(), 2 * tokens * n);
    let other = Routing::new(&[0; 24], tokens, 2, experts + 1).unwrap();
    assert_eq!(forward(&other, x, bias, len), "weight");
    assert_eq!(forward(&parts.routing, &x[1..], bias, len), "input");
    assert_eq!(forward(&parts.routing, x, &bias[1..], len), "bias");
    assert_eq!(forward(&parts.routing, x, bias, len - 1), "out");
    for eight in [false, true] {
        let grad = |routing: &Routing, g: &[f32], len: usize| {
            let mut out = vec![0.0; len];
            short(
                if eight {
                    let out = &mut out;
                    super::experts_matmul_8bit_grad_input(g, token_rows, routing, &weight8, out)
                } else {
                    let out = &mut out;
                    super::experts_matmul_4bit_grad_input(g, token_rows, routing, &weight, out)
                }
                .unwrap_err(),
            )
        };
        assert_eq!(grad(&other, &parts.grad, tokens * k), "weight");
        assert_eq!(grad(&parts.routing, &parts.grad[1..], tokens * k), "grad_output");
        assert_eq!(grad(&parts.routing, &parts.grad, tokens * k + 1), "out");
    }
    let new = |packed: &[u8], absmax: &[f32]| {
        let (table, shape) = (PLAIN.code.table(), [experts, n, k]);
        Experts4::new(packed, Scales::Plain(absmax), table, PLAIN.blocksize, shape).unwrap_err()
    };
    assert_eq!(short(new(&parts.packed[1..], &parts.absmax)), "packed");
    assert_eq!(short(new(&parts.packed, &parts.absmax[1..])), "absmax");
    let new = |codes, scales| Experts8::new(codes, scales, [experts, n, k]).unwrap_err();
    assert_eq!(short(new(&parts.codes8[1..], &parts.scales8)), "codes");
    assert_eq!(short(new(&parts.codes8, &parts.scales8[1..])), "scales");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_shape(
        experts in 1usize..8,
        out_features in 1usize..70,
        in_features in 1usize..70,
        tokens in 0usize..80,
        slots in 1usize..5,
        blocksize in prop::sample::select(&BlockSize::ALL[..]),
        fp4: bool,
        nested: bool,
        bias: bool,
        one: bool,
    ) {
        let code = if fp4 { Code4::Fp4 } else { Code4::Nf4 };
        let token_rows = if one { TokenRows::One } else { TokenRows::Each };
        let case = Case {
            experts, out_features, in_features, tokens, slots, ids: Ids::Random,
            token_rows, blocksize, code, nested, bias,
        };
        Parts::<f32>::new(case).check();
        Parts::<f16>::new(case).check();
    }
}
