//! The same optimizer steps on the CPU and on a device, compared after each.

#![allow(dead_code, unreachable_pub)] // each test file takes what it needs

use crate::common;
use crate::placed::{Placed, Random, assert_same};
use halfbyte::optim::{BLOCK, Floats, FloatsMut, Hyper, Rounding, Rule, State8, Tensor32};
use halfbyte::{Code8, DType, bf16, f16};
use halfbyte_gpu::ops::optim as device_optim;
use halfbyte_gpu::{Device, DeviceBuffer, Stream};

/// Elements of a type known at run time.
#[derive(Clone, Debug)]
pub enum Values {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Values {
    pub fn new(dtype: DType, x: &[f32]) -> Self {
        match dtype {
            DType::F32 => Self::F32(x.to_vec()),
            DType::F16 => Self::F16(x.iter().map(|&x| f16::from_f32(x)).collect()),
            DType::BF16 => Self::BF16(x.iter().map(|&x| bf16::from_f32(x)).collect()),
        }
    }

    fn floats(&self) -> Floats<'_> {
        match self {
            Self::F32(x) => Floats::F32(x),
            Self::F16(x) => Floats::F16(x),
            Self::BF16(x) => Floats::BF16(x),
        }
    }

    fn floats_mut(&mut self) -> FloatsMut<'_> {
        match self {
            Self::F32(x) => FloatsMut::F32(x),
            Self::F16(x) => FloatsMut::F16(x),
            Self::BF16(x) => FloatsMut::BF16(x),
        }
    }

    fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::F32(x) => x.clone(),
            Self::F16(x) => x.iter().map(|x| x.to_f32()).collect(),
            Self::BF16(x) => x.iter().map(|x| x.to_f32()).collect(),
        }
    }
}

/// [`Values`] on a device.
enum Buffer {
    F32(Placed<f32>),
    F16(Placed<f16>),
    BF16(Placed<bf16>),
}

impl Buffer {
    fn new(stream: &Stream, values: &Values, shift: usize) -> Self {
        match values {
            Values::F32(x) => Self::F32(Placed::new(stream, x, shift)),
            Values::F16(x) => Self::F16(Placed::new(stream, x, shift)),
            Values::BF16(x) => Self::BF16(Placed::new(stream, x, shift)),
        }
    }

    fn floats(&self) -> halfbyte_gpu::Floats {
        match self {
            Self::F32(x) => x.floats(),
            Self::F16(x) => x.floats(),
            Self::BF16(x) => x.floats(),
        }
    }

    fn read(&self, stream: &Stream) -> Values {
        match self {
            Self::F32(x) => Values::F32(x.read(stream)),
            Self::F16(x) => Values::F16(x.read(stream)),
            Self::BF16(x) => Values::BF16(x.read(stream)),
        }
    }
}

/// How the parameter of a tensor is rounded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rounded {
    Nearest,
    Stochastic,
    Kahan,
}

/// What one tensor is.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub n: usize,
    pub param: DType,
    pub grad: DType,
    pub rounded: Rounded,
}

/// Ragged sizes, of every pair of types, roundings in turn.
pub fn shapes(sizes: &[usize]) -> Vec<Shape> {
    let rounded = [Rounded::Nearest, Rounded::Stochastic, Rounded::Kahan];
    let types = DType::ALL.iter().flat_map(|&param| DType::ALL.map(|grad| (param, grad)));
    let all = types.flat_map(|types| sizes.iter().map(move |&n| (n, types)));
    all.enumerate()
        .map(|(i, (n, (param, grad)))| Shape { n, param, grad, rounded: rounded[i % 3] })
        .collect()
}

/// A tensor on the CPU.
struct Owned {
    shape: Shape,
    param: Values,
    grad: Values,
    state8: State8,
    state1: Vec<f32>,
    state2: Vec<f32>,
    rest: Vec<bf16>,
    norm: f32,
}

/// A tensor on the device.
struct Placing {
    param: Buffer,
    floats: Placed<f32>,
    codes1: Placed<u8>,
    absmax1: Placed<f32>,
    codes2: Placed<u8>,
    absmax2: Placed<f32>,
    state1: Placed<f32>,
    state2: Placed<f32>,
    rest: Placed<bf16>,
    norm: Placed<f32>,
}

/// A group of tensors that are stepped together.
pub struct Case {
    pub rule: Rule,
    pub bits: u32,
    pub shapes: Vec<Shape>,
    pub steps: u64,
    pub hyper: Hyper,
    /// Buffers begin so many elements behind an aligned address.
    pub shift: usize,
    pub codes: [Code8; 2],
    /// Gradients of a step.
    pub gradient: fn(usize, u64, &mut Random) -> Vec<f32>,
    /// The parameter's norm, handed in.
    pub param_norm: Option<f64>,
    pub scale: f32,
}

impl Case {
    pub fn new(rule: Rule, bits: u32, shapes: Vec<Shape>) -> Self {
        let hyper = Hyper {
            lr: 0.01,
            beta1: 0.9,
            beta2: 0.99,
            beta3: 0.999,
            alpha: 0.3,
            eps: 1e-8,
            weight_decay: 0.1,
            gnorm_scale: 0.7,
            ..Hyper::default()
        };
        let codes = [Code8::dynamic(true).clone(), Code8::dynamic(false).clone()];
        let (steps, shift, gradient, param_norm) = (3, 0, ordinary as fn(_, _, &mut _) -> _, None);
        Self { rule, bits, shapes, steps, hyper, shift, codes, gradient, param_norm, scale: 1.0 }
    }

    fn start(&self, random: &mut Random) -> Vec<Owned> {
        let tensor = |&shape: &Shape| {
            let Shape { n, param, grad, rounded } = shape;
            let weights: Vec<f32> = (0..n).map(|_| normal(random) * self.scale).collect();
            let rest = if rounded == Rounded::Kahan { n } else { 0 };
            Owned {
                shape,
                param: Values::new(param, &weights),
                grad: Values::new(grad, &vec![0.0; n]),
                state8: self.zero_state(n, &weights),
                state1: match self.rule {
                    Rule::ScheduleFree => weights,
                    rule => vec![0.0; rule.first_states() * n],
                },
                state2: vec![0.0; if self.rule.has_second_state() { n } else { 0 }],
                rest: vec![bf16::ZERO; rest],
                norm: -1.0,
            }
        };
        self.shapes.iter().map(tensor).collect()
    }

    fn zero_state(&self, n: usize, weights: &[f32]) -> State8 {
        let mut state = State8::new(self.rule, n);
        let len = state.floats.len();
        state.floats.copy_from_slice(&weights[..len]);
        state
    }

    /// On one device of each runtime.
    pub fn run_on_portable_devices(&self) {
        for device in common::portable_devices() {
            self.run(device);
        }
    }

    /// Steps on the CPU and on the device, and panics where they differ.
    pub fn run(&self, device: &'static Device) {
        let stream = Stream::new(device).unwrap();
        let mut random = Random(self.shapes.len() as u64 + 7);
        let mut tensors = self.start(&mut random);
        let placed: Vec<_> = tensors.iter().map(|t| t.place(&stream, self.shift)).collect();
        let code = |i: usize| DeviceBuffer::from_slice(&stream, self.codes[i].values()).unwrap();
        let codes = [code(0), code(1)];
        let lengths: Vec<usize> = self.shapes.iter().map(|shape| shape.n).collect();
        let bytes = match self.bits {
            8 => device_optim::step_8bit_workspace(device, lengths.len()),
            _ => device_optim::step_32bit_workspace(device, self.rule, &self.hyper, &lengths),
        };
        let workspace = DeviceBuffer::zeroed(device, bytes).unwrap();
        for step in 1..=self.steps {
            let hyper = Hyper { step, ..self.hyper };
            let mut grads = vec![];
            for t in &mut tensors {
                t.grad = Values::new(t.shape.grad, &(self.gradient)(t.shape.n, step, &mut random));
                grads.push(Buffer::new(&stream, &t.grad, self.shift));
            }
            let on_device = placed.iter().zip(&grads).zip(&self.shapes).enumerate();
            if self.bits == 8 {
                let group: Vec<_> = on_device
                    .map(|(i, ((t, grad), shape))| device_optim::Tensor8 {
                        param: t.param.floats(),
                        grad: grad.floats(),
                        floats: t.floats.slice(),
                        state1: t.codes1.slice(),
                        absmax1: t.absmax1.slice(),
                        state2: t.codes2.slice(),
                        absmax2: t.absmax2.slice(),
                        rounding: t.rounding(shape.rounded, i),
                    })
                    .collect();
                let [code1, code2] = [codes[0].slice(), codes[1].slice()];
                let (code2, workspace) = (Some(code2), workspace.slice());
                device_optim::step_8bit(
                    &stream, self.rule, &hyper, &group, code1, code2, workspace,
                )
                .unwrap();
            } else {
                let group: Vec<_> = on_device
                    .map(|(i, ((t, grad), shape))| device_optim::Tensor32 {
                        param: t.param.floats(),
                        grad: grad.floats(),
                        state1: t.state1.slice(),
                        state2: t.state2.slice(),
                        param_norm: self.param_norm.filter(|_| i % 2 == 0),
                        update_norm: (i % 3 != 2).then(|| t.norm.slice()),
                        rounding: t.rounding(shape.rounded, i),
                    })
                    .collect();
                device_optim::step_32bit(&stream, self.rule, &hyper, &group, workspace.slice())
                    .unwrap();
            }
            self.step_on_cpu(&hyper, &mut tensors);
            stream.synchronize().unwrap();
            for (i, (t, placed)) in tensors.iter().zip(&placed).enumerate() {
                let (rule, bits) = (self.rule, self.bits);
                let at = format!("{device} {rule:?} {bits} step {step} tensor {i} {:?}", t.shape);
                placed.assert_is(&stream, t, bits, &at);
            }
        }
    }

    fn step_on_cpu(&self, hyper: &Hyper, tensors: &mut [Owned]) {
        if self.bits == 8 {
            let mut group: Vec<_> = tensors
                .iter_mut()
                .enumerate()
                .map(|(i, t)| {
                    let rounding = rounding(t.shape.rounded, i, &mut t.rest);
                    t.state8.tensor(t.param.floats_mut(), t.grad.floats(), rounding)
                })
                .collect();
            let [code1, code2] = &self.codes;
            halfbyte::optim::step_8bit(self.rule, hyper, code1, code2, &mut group).unwrap();
        } else {
            let mut group: Vec<_> = tensors
                .iter_mut()
                .enumerate()
                .map(|(i, t)| Tensor32 {
                    param: t.param.floats_mut(),
                    grad: t.grad.floats(),
                    state1: &mut t.state1,
                    state2: &mut t.state2,
                    param_norm: self.param_norm.filter(|_| i % 2 == 0),
                    update_norm: (i % 3 != 2).then_some(&mut t.norm),
                    rounding: rounding(t.shape.rounded, i, &mut t.rest),
                })
                .collect();
            halfbyte::optim::step_32bit(self.rule, hyper, &mut group).unwrap();
        }
    }
}

const SEED: u64 = 0x1234_5678_9ABC_DEF0;

fn rounding(rounded: Rounded, index: usize, rest: &mut [bf16]) -> Rounding<'_> {
    match rounded {
        Rounded::Nearest => Rounding::Nearest,
        Rounded::Stochastic => Rounding::Stochastic { seed: SEED, stream: index as u64 },
        Rounded::Kahan => Rounding::Kahan(rest),
    }
}

impl Placing {
    fn rounding(&self, rounded: Rounded, index: usize) -> device_optim::Rounding {
        match rounded {
            Rounded::Nearest => device_optim::Rounding::Nearest,
            Rounded::Stochastic => {
                device_optim::Rounding::Stochastic { seed: SEED, stream: index as u64 }
            }
            Rounded::Kahan => device_optim::Rounding::Kahan(self.rest.slice()),
        }
    }

    fn assert_is(&self, stream: &Stream, t: &Owned, bits: u32, at: &str) {
        let read = |x: &Placed<f32>| x.read(stream);
        assert_same(
            &self.param.read(stream).to_f32(),
            &t.param.to_f32(),
            &format!("parameter, {at}"),
        );
        if bits == 8 {
            assert_same(&read(&self.absmax1), &t.state8.absmax1, &format!("absmax1, {at}"));
            assert_same(&read(&self.absmax2), &t.state8.absmax2, &format!("absmax2, {at}"));
            assert_same(&read(&self.floats), &t.state8.floats, &format!("float32 state, {at}"));
            same_codes(&self.codes1.read(stream), &t.state8.state1, &format!("state1, {at}"));
            same_codes(&self.codes2.read(stream), &t.state8.state2, &format!("state2, {at}"));
        } else {
            assert_same(&read(&self.state1), &t.state1, &format!("state1, {at}"));
            assert_same(&read(&self.state2), &t.state2, &format!("state2, {at}"));
            assert_same(&read(&self.norm), &[t.norm], &format!("update_norm, {at}"));
        }
        assert_same(&self.rest.read(stream), &t.rest, &format!("compensation, {at}"));
    }
}

impl Owned {
    fn place(&self, stream: &Stream, shift: usize) -> Placing {
        let floats = |x: &[f32]| Placed::new(stream, x, shift);
        Placing {
            param: Buffer::new(stream, &self.param, shift),
            floats: floats(&self.state8.floats),
            codes1: Placed::new(stream, &self.state8.state1, shift),
            absmax1: floats(&self.state8.absmax1),
            codes2: Placed::new(stream, &self.state8.state2, shift),
            absmax2: floats(&self.state8.absmax2),
            state1: floats(&self.state1),
            state2: floats(&self.state2),
            rest: Placed::new(stream, &self.rest, shift),
            norm: floats(&[self.norm]),
        }
    }
}

fn same_codes(got: &[u8], expected: &[u8], what: &str) {
    let different = (0..got.len()).find(|&i| got[i] != expected[i]);
    assert_eq!(got.len(), expected.len(), "{what}");
    if let Some(i) = different {
        panic!("{what}: code {i} is {}, not {}, block {}", got[i], expected[i], i / BLOCK.get());
    }
}

/// Bell-shaped, of about unit variance.
pub fn normal(random: &mut Random) -> f32 {
    1.7 * (0..4).map(|_| random.uniform()).sum::<f32>()
}

/// Gradients of several sizes, with zeros.
pub fn ordinary(n: usize, step: u64, random: &mut Random) -> Vec<f32> {
    let scale = |i: usize| [1.0, 1e-3, 1e-6, 0.0][(i / 7 + step as usize) % 4];
    (0..n).map(|i| normal(random) * scale(i)).collect()
}

/// The same with NaN, infinity, a negative zero and a number whose square is infinite.
pub fn wild(n: usize, step: u64, random: &mut Random) -> Vec<f32> {
    let mut grad = ordinary(n, step, random);
    if n > 0 {
        let at = |k: usize| (k * 97) % n;
        let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -0.0];
        for (k, x) in special.into_iter().enumerate() {
            grad[at(k + 1)] = x;
        }
    }
    grad
}
