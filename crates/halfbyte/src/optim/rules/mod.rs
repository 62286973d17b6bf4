//! The update rules, one a file, each written once for every instruction set.

mod adagrad;
mod adam;
mod ademamix;
mod lion;
mod momentum;
mod rmsprop;
mod schedule_free;

pub(super) use adagrad::Adagrad;
pub(super) use adam::Adam;
pub(super) use ademamix::AdEmaMix;
pub(super) use lion::Lion;
pub(super) use momentum::Momentum;
pub(super) use rmsprop::RmsProp;
pub(super) use schedule_free::ScheduleFree;

use super::vector::Vector;
use super::{Coefficients, Hyper};

/// A rule with `N` states: what is float32 always, first moments, then the second moment.
///
/// ```text
/// g = gradient * gnorm_scale
/// s, carry = states(g, p, s)
/// p = p + p * shrink + rate * update(s, carry)
/// ```
pub(super) trait Update<const N: usize>: Copy + Send + Sync {
    /// How many of the states are float32 beside 8-bit ones too.
    const FLOATS: usize = 0;
    /// How many of the states are second moments.
    const SECOND: usize;
    /// Whether `update` looks at `carry`: what it needs that is not a new state.
    const CARRIES: bool;

    /// The numbers of one step; also `rate` and `shrink`.
    fn new(hyper: &Hyper) -> Step<Self>;
    /// The rule's own numbers, in the order of its fields: [`Coefficients::rule`].
    fn numbers(&self) -> Vec<f32>;
    fn states<V: Vector>(&self, g: V, p: V, s: [V; N]) -> ([V; N], V);
    fn update<V: Vector>(&self, s: [V; N], carry: V) -> V;
}

/// A rule with the numbers that all rules have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step<U> {
    pub(super) rule: U,
    pub(super) gnorm_scale: f32,
    /// In float64: a tensor's trust ratio is multiplied in before it is rounded.
    pub(super) rate: f64,
    /// `-lr * weight_decay` where the decay is decoupled. As a number near 1, `1 - lr * weight_decay`
    /// would be rounded to float32: at 1e-6 that is off by 1%, at every step in the same direction.
    pub(super) shrink: f32,
}

impl<U> Step<U> {
    fn new(rule: U, hyper: &Hyper, rate: f64, decoupled_decay: bool) -> Self {
        let shrink = if decoupled_decay { -hyper.lr * hyper.weight_decay } else { 0.0 };
        Self { rule, gnorm_scale: hyper.gnorm_scale as f32, rate, shrink: shrink as f32 }
    }

    /// These numbers without their names.
    pub(super) fn coefficients<const N: usize>(&self) -> Coefficients
    where
        U: Update<N>,
    {
        let mut rule = [0.0; Coefficients::RULE];
        let numbers = self.rule.numbers();
        rule[..numbers.len()].copy_from_slice(&numbers);
        let Self { gnorm_scale, rate, shrink, .. } = *self;
        Coefficients { gnorm_scale, rate, shrink, rule }
    }

    /// The new parameter.
    #[inline(always)]
    pub(super) fn param<V: Vector>(&self, p: V, update: V, rate: V) -> V {
        update.mul_add(rate, p.mul_add(p.like(self.shrink), p))
    }
}

/// An exponential moving average: `old * beta + new * (1 - beta)`.
#[derive(Clone, Copy, Debug)]
struct Average {
    beta: f32,
    /// `1 - beta` in float64, then rounded.
    rest: f32,
}

impl Average {
    fn new(beta: f64) -> Self {
        Self { beta: beta as f32, rest: (1.0 - beta) as f32 }
    }

    fn numbers(self) -> [f32; 2] {
        [self.beta, self.rest]
    }

    #[inline(always)]
    fn of<V: Vector>(self, old: V, new: V) -> V {
        old.mul_add(new.like(self.beta), new.mul(new.like(self.rest)))
    }

    /// Of the square of `new`.
    #[inline(always)]
    fn of_square<V: Vector>(self, old: V, new: V) -> V {
        old.mul_add(new.like(self.beta), new.mul(new.like(self.rest)).mul(new))
    }
}

/// The corrections for moments that start at zero: `1 - beta1^t` and `sqrt(1 - beta2^t)`.
fn bias_corrections(hyper: &Hyper) -> (f64, f64) {
    let power = |beta: f64| 1.0 - beta.powf(hyper.step as f64);
    (power(hyper.beta1), power(hyper.beta2).sqrt())
}

/// Weight decay that is part of the gradient: `g + weight_decay * p`.
#[inline(always)]
fn decayed<V: Vector>(g: V, p: V, weight_decay: f32) -> V {
    p.mul_add(p.like(weight_decay), g)
}
