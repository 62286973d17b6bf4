//! What a step works on: a parameter, its gradient and its states.

use super::{BLOCK, Rule};
use crate::error::{Result, check_len};
use crate::{DType, bf16, f16};
use std::ffi::c_void;

/// Elements of one of the three types, to read.
#[derive(Clone, Copy, Debug)]
pub enum Floats<'a> {
    /// float32.
    F32(&'a [f32]),
    /// float16.
    F16(&'a [f16]),
    /// bfloat16.
    BF16(&'a [bf16]),
}

/// Elements of one of the three types, to change.
#[derive(Debug)]
pub enum FloatsMut<'a> {
    /// float32.
    F32(&'a mut [f32]),
    /// float16.
    F16(&'a mut [f16]),
    /// bfloat16.
    BF16(&'a mut [bf16]),
}

impl Floats<'_> {
    /// Number of elements.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::F16(x) => x.len(),
            Self::BF16(x) => x.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) const fn raw(&self) -> (DType, *const c_void) {
        match self {
            Self::F32(x) => (DType::F32, x.as_ptr().cast()),
            Self::F16(x) => (DType::F16, x.as_ptr().cast()),
            Self::BF16(x) => (DType::BF16, x.as_ptr().cast()),
        }
    }
}

impl FloatsMut<'_> {
    /// Number of elements.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::F16(x) => x.len(),
            Self::BF16(x) => x.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) const fn raw(&mut self) -> (DType, *mut c_void) {
        match self {
            Self::F32(x) => (DType::F32, x.as_mut_ptr().cast()),
            Self::F16(x) => (DType::F16, x.as_mut_ptr().cast()),
            Self::BF16(x) => (DType::BF16, x.as_mut_ptr().cast()),
        }
    }
}

macro_rules! from_slices {
    ($($variant:ident($T:ty)),*) => {$(
        impl<'a> From<&'a [$T]> for Floats<'a> {
            fn from(x: &'a [$T]) -> Self {
                Self::$variant(x)
            }
        }

        impl<'a> From<&'a mut [$T]> for FloatsMut<'a> {
            fn from(x: &'a mut [$T]) -> Self {
                Self::$variant(x)
            }
        }
    )*};
}
from_slices!(F32(f32), F16(f16), BF16(bf16));

/// How a new parameter is rounded to bfloat16. Parameters of other types are rounded to nearest
/// even whatever this says.
#[derive(Debug, Default)]
pub enum Rounding<'a> {
    /// To nearest even. An update below half an ulp of the parameter is lost.
    #[default]
    Nearest,
    /// Up or down at random, with probabilities that make the expectation exact. The random bits
    /// are Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
    /// of the seed, the step, the stream and the element's index: they depend on nothing else.
    Stochastic {
        /// Chosen by the user.
        seed: u64,
        /// Which tensor this is.
        stream: u64,
    },
    /// The parameter is the sum of itself and this tensor, which takes what rounding cuts off
    /// (Kahan, "Further remarks on reducing truncation errors", CACM 1965).
    Kahan(&'a mut [bf16]),
}

/// A parameter with float32 states.
#[derive(Debug)]
pub struct Tensor32<'a> {
    /// The parameter.
    pub param: FloatsMut<'a>,
    /// Its gradient, of any of the types.
    pub grad: Floats<'a>,
    /// As long as the parameter, twice that for `AdEMAMix`.
    pub state1: &'a mut [f32],
    /// As long as the parameter for rules with a second state, else empty.
    pub state2: &'a mut [f32],
    /// The parameter's norm where the caller knows it; else it is computed when needed.
    pub param_norm: Option<f64>,
    /// Takes the update's norm when [`Hyper::max_unorm`](super::Hyper::max_unorm) applies.
    pub update_norm: Option<&'a mut f32>,
    /// For bfloat16 parameters.
    pub rounding: Rounding<'a>,
}

/// A parameter with 8-bit states.
#[derive(Debug)]
pub struct Tensor8<'a> {
    /// The parameter.
    pub param: FloatsMut<'a>,
    /// Its gradient, of any of the types.
    pub grad: Floats<'a>,
    /// The first state of rules that keep it in float32 ([`Rule::has_float_state`]), else empty.
    pub floats: &'a mut [f32],
    /// Codes of the first state, as long as the parameter, twice that for `AdEMAMix`; empty when it
    /// is in `floats`.
    pub state1: &'a mut [u8],
    /// Its scales: one per block of 256, twice that for `AdEMAMix`.
    pub absmax1: &'a mut [f32],
    /// Codes of the second state, or empty.
    pub state2: &'a mut [u8],
    /// Its scales, or empty.
    pub absmax2: &'a mut [f32],
    /// For bfloat16 parameters.
    pub rounding: Rounding<'a>,
}

fn check_common(
    param: &FloatsMut<'_>,
    grad: &Floats<'_>,
    state2: usize,
    rounding: &Rounding<'_>,
    rule: Rule,
) -> Result<()> {
    let n = param.len();
    check_len("gradient", n, grad.len(), "elements")?;
    check_len("state2", if rule.has_second_state() { n } else { 0 }, state2, "elements")?;
    match rounding {
        Rounding::Kahan(rest) => check_len("compensation", n, rest.len(), "elements"),
        _ => Ok(()),
    }
}

impl Tensor32<'_> {
    pub(super) fn check(&self, rule: Rule) -> Result<()> {
        check_common(&self.param, &self.grad, self.state2.len(), &self.rounding, rule)?;
        check_len("state1", rule.first_states() * self.param.len(), self.state1.len(), "elements")
    }
}

impl Tensor8<'_> {
    pub(super) fn check(&self, rule: Rule) -> Result<()> {
        check_common(&self.param, &self.grad, self.state2.len(), &self.rounding, rule)?;
        let n = self.param.len();
        let (floats, first) = (usize::from(rule.has_float_state()), rule.coded_first_states());
        check_len("float32 state1", floats * n, self.floats.len(), "elements")?;
        check_len("state1", first * n, self.state1.len(), "elements")?;
        let blocks = BLOCK.over(n).count();
        let second = if rule.has_second_state() { blocks } else { 0 };
        check_len("absmax1", first * blocks, self.absmax1.len(), "float32 scales")?;
        check_len("absmax2", second, self.absmax2.len(), "float32 scales")
    }
}

/// The 8-bit states of one parameter, all zero at first. The bytes are what PyTorch's
/// `state_dict` of an 8-bit optimizer holds.
#[derive(Clone, Debug, PartialEq)]
pub struct State8 {
    /// The first state of rules that keep it in float32, else empty.
    pub floats: Vec<f32>,
    /// Codes of the first state (twice for `AdEMAMix`).
    pub state1: Vec<u8>,
    /// Its scales.
    pub absmax1: Vec<f32>,
    /// Codes of the second state, empty for rules without one.
    pub state2: Vec<u8>,
    /// Its scales.
    pub absmax2: Vec<f32>,
}

impl State8 {
    /// Zero states for a parameter of `len` elements: a zero scale makes every code a zero.
    #[must_use]
    pub fn new(rule: Rule, len: usize) -> Self {
        let first = rule.coded_first_states();
        let second = usize::from(rule.has_second_state());
        let blocks = BLOCK.over(len).count();
        Self {
            floats: vec![0.0; if rule.has_float_state() { len } else { 0 }],
            state1: vec![0; first * len],
            absmax1: vec![0.0; first * blocks],
            state2: vec![0; second * len],
            absmax2: vec![0.0; second * blocks],
        }
    }

    /// These states, beside a parameter and its gradient.
    #[must_use]
    pub fn tensor<'a>(
        &'a mut self,
        param: FloatsMut<'a>,
        grad: Floats<'a>,
        rounding: Rounding<'a>,
    ) -> Tensor8<'a> {
        Tensor8 {
            param,
            grad,
            floats: &mut self.floats,
            state1: &mut self.state1,
            absmax1: &mut self.absmax1,
            state2: &mut self.state2,
            absmax2: &mut self.absmax2,
            rounding,
        }
    }
}
