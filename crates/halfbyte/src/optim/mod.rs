//! Optimizer steps with 32-bit or 8-bit states: one fused pass over memory, many tensors a call.
//!
//! ```text
//! for each tensor, for each block of 256 elements:
//!     s = code[q] * absmax                      decode (8-bit states)
//!     s = rule(g, p, s)                         float32, see Rule
//!     absmax = max |s|
//!     p = p + p * shrink + rate * update(s)
//!     q = nearest code of s / absmax            encode (8-bit states)
//! ```
//!
//! Nothing of the size of a tensor is allocated. All tensors of a call are cut into tasks that are
//! spread over threads together, so that many small tensors cost what one large one does. Results
//! do not depend on the thread count nor on the instruction set.
//!
//! The format of 8-bit states is that of "8-bit Optimizers via Block-wise Quantization"
//! (arXiv 2110.02861): blocks of 256, the signed dynamic map for state 1, the unsigned one for a
//! second moment. An element whose gradient or new state is NaN or infinite is skipped: its
//! parameter stays, its states become zero, its block is not disturbed. (With 32-bit states NaN
//! propagates.) Codes are the nearest, but a first moment never changes sign through encoding, and a
//! second moment above zero never becomes zero.
//!
//! ```
//! use halfbyte::Code8;
//! use halfbyte::optim::{Floats, FloatsMut, Hyper, Rounding, Rule, State8, step_8bit};
//!
//! let (mut weight, grad) = (vec![1.0f32; 5000], vec![0.5f32; 5000]);
//! let mut state = State8::new(Rule::Adam, weight.len());
//! for step in 1..=10 {
//!     let hyper = Hyper { lr: 0.01, step, ..Hyper::default() };
//!     let tensor = state.tensor(
//!         FloatsMut::F32(&mut weight),
//!         Floats::F32(&grad),
//!         Rounding::Nearest,
//!     );
//!     step_8bit(Rule::Adam, &hyper, Code8::dynamic(true), Code8::dynamic(false), &mut [tensor])?;
//! }
//! assert!((weight[0] - 0.9).abs() < 1e-3); // ten steps of about lr
//! # Ok::<(), halfbyte::Error>(())
//! ```

// The walks are generic over vectors and get their instruction set from the function that they are
// inlined into.
#[allow(clippy::inline_always, clippy::needless_range_loop)]
mod engine;
#[allow(clippy::inline_always)]
mod float;
#[allow(clippy::inline_always)]
mod round;
#[allow(clippy::inline_always)]
mod rules;
mod tensor;
#[cfg(test)]
mod tests;
#[allow(clippy::inline_always)]
mod vector;

pub use tensor::{Floats, FloatsMut, Rounding, State8, Tensor8, Tensor32};

use crate::blocks::BlockSize;
use crate::code::Code8;
use crate::error::{Error, Result};

/// Elements that share a scale of an 8-bit state.
pub const BLOCK: BlockSize = BlockSize::B256;

/// An update rule. Each module of `rules` states its formula and source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    /// Adam and AdamW (the decay is decoupled in both), and LAMB, which is Adam with
    /// [`Hyper::max_unorm`].
    Adam,
    /// AdEMAMix: two first moments, one second moment.
    AdEmaMix,
    /// SGD with momentum, and LARS, which is the same with [`Hyper::max_unorm`].
    Momentum,
    /// Lion.
    Lion,
    /// RMSprop.
    RmsProp,
    /// Adagrad.
    Adagrad,
    /// Schedule-free AdamW, whose first state is float32 always and starts as a copy of the
    /// parameter. [`Hyper::alpha`] is the weight of this step's average.
    ScheduleFree,
}

impl Rule {
    /// All rules.
    pub const ALL: [Self; 7] = [
        Self::Adam,
        Self::AdEmaMix,
        Self::Momentum,
        Self::Lion,
        Self::RmsProp,
        Self::Adagrad,
        Self::ScheduleFree,
    ];

    /// The rule's name in PyTorch's ops.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Adam => "adam",
            Self::AdEmaMix => "ademamix",
            Self::Momentum => "momentum",
            Self::Lion => "lion",
            Self::RmsProp => "rmsprop",
            Self::Adagrad => "adagrad",
            Self::ScheduleFree => "schedule_free_adamw",
        }
    }

    /// How many parameter-sized parts `state1` has: 2 for AdEMAMix, one after the other.
    #[must_use]
    pub const fn first_states(self) -> usize {
        match self {
            Self::AdEmaMix => 2,
            _ => 1,
        }
    }

    /// Whether there is a `state2`, a second moment.
    #[must_use]
    pub const fn has_second_state(self) -> bool {
        matches!(self, Self::Adam | Self::AdEmaMix | Self::ScheduleFree)
    }

    /// How many of them are 8-bit codes in [`Tensor8`]: all but one that is float32 always.
    #[must_use]
    pub const fn coded_first_states(self) -> usize {
        self.first_states() - self.has_float_state() as usize
    }

    /// Whether `state1` is float32 beside an 8-bit second state too: [`Tensor8::floats`].
    #[must_use]
    pub const fn has_float_state(self) -> bool {
        matches!(self, Self::ScheduleFree)
    }

    /// Whether [`Hyper::max_unorm`] applies, with 32-bit states.
    #[must_use]
    pub const fn has_trust_ratio(self) -> bool {
        matches!(self, Self::Adam | Self::Momentum | Self::RmsProp)
    }
}

impl std::str::FromStr for Rule {
    type Err = Error;

    /// Reads a rule's name; `"lamb"` is `"adam"` and `"lars"` is `"momentum"`.
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "lamb" => Ok(Self::Adam),
            "lars" => Ok(Self::Momentum),
            _ => Self::ALL
                .into_iter()
                .find(|rule| rule.name() == name)
                .ok_or_else(|| Error::Optimizer { got: name.to_owned() }),
        }
    }
}

/// The numbers of a step. Scalars that a rule derives from them are computed in float64 and rounded
/// to float32 once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    /// Learning rate.
    pub lr: f64,
    /// Decay rate of the first moment (the second one for `RMSprop`, the momentum for `Momentum`).
    pub beta1: f64,
    /// Decay rate of the second moment (of the momentum for `Lion`).
    pub beta2: f64,
    /// Decay rate of `AdEMAMix`'s slow moment.
    pub beta3: f64,
    /// Weight of `AdEMAMix`'s slow moment.
    pub alpha: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay: decoupled for `Adam`, `AdEMAMix` and `Lion`, else added to the gradient.
    pub weight_decay: f64,
    /// Gradients are multiplied by this.
    pub gnorm_scale: f64,
    /// When positive: the update is scaled down to at most this multiple of the parameter's norm
    /// (32-bit states of the rules with [`Rule::has_trust_ratio`]).
    pub max_unorm: f64,
    /// Leave parameter and states alone where the gradient is exactly zero.
    pub skip_zeros: bool,
    /// Number of this step, from 1.
    pub step: u64,
}

impl Default for Hyper {
    /// Adam's usual numbers, at step 1.
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            beta3: 0.9999,
            alpha: 0.0,
            eps: 1e-8,
            weight_decay: 0.0,
            gnorm_scale: 1.0,
            max_unorm: 0.0,
            skip_zeros: false,
            step: 1,
        }
    }
}

/// The numbers that a rule makes of [`Hyper`], once a step: for back ends that have kernels of their
/// own and must give the same bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coefficients {
    /// Gradients are multiplied by this.
    pub gnorm_scale: f32,
    /// What an update is multiplied by, before a trust ratio is multiplied in and the product is
    /// rounded to float32.
    pub rate: f64,
    /// What a parameter is multiplied by and added to itself: decoupled weight decay.
    pub shrink: f32,
    /// The rule's own numbers in the order of its fields (averages as two: beta, then 1 - beta),
    /// then zeros.
    pub rule: [f32; Coefficients::RULE],
}

impl Coefficients {
    /// Most numbers that a rule has of its own.
    pub const RULE: usize = 10;

    /// The numbers of one step.
    #[must_use]
    pub fn new(rule: Rule, hyper: &Hyper) -> Self {
        engine::coefficients(rule, hyper)
    }
}

/// Updates every tensor in place, with float32 states.
///
/// # Errors
/// [`Error::Length`] when a gradient or a state does not have its parameter's length,
/// [`Error::Isa`] for a bad `HALFBYTE_ISA`. Nothing has been changed then.
pub fn step_32bit(rule: Rule, hyper: &Hyper, tensors: &mut [Tensor32<'_>]) -> Result<()> {
    tensors.iter().try_for_each(|tensor| tensor.check(rule))?;
    engine::step_32bit(crate::isa::selected()?, rule, hyper, tensors);
    Ok(())
}

/// Updates every tensor in place, with 8-bit states: `code1` for state 1, `code2` for a second
/// moment. [`Hyper::max_unorm`] does not apply.
///
/// # Errors
/// As [`step_32bit`].
pub fn step_8bit(
    rule: Rule,
    hyper: &Hyper,
    code1: &Code8,
    code2: &Code8,
    tensors: &mut [Tensor8<'_>],
) -> Result<()> {
    tensors.iter().try_for_each(|tensor| tensor.check(rule))?;
    engine::step_8bit(crate::isa::selected()?, rule, hyper, [code1, code2], tensors);
    Ok(())
}
