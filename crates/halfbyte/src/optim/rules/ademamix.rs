//! AdEMAMix (Pagliardini, Ablin, Grangier, arXiv 2409.03137), with decoupled weight decay.
//!
//! ```text
//! m1 = beta1 m1 + (1 - beta1) g
//! m2 = beta3 m2 + (1 - beta3) g
//! v  = beta2 v + (1 - beta2) g^2
//! c1 = 1 - beta1^t,  c2 = sqrt(1 - beta2^t)
//! p = p (1 - lr wd) - lr (m1 / c1 + alpha m2) / (sqrt(v) / c2 + eps)
//! ```
//!
//! The schedules of alpha and beta3 are the caller's.

use super::{Average, Step, Update, bias_corrections};
use crate::optim::{Hyper, vector::Vector};

#[derive(Clone, Copy, Debug)]
pub(in crate::optim) struct AdEmaMix {
    m1: Average,
    m2: Average,
    v: Average,
    alpha: f32,
    /// `1 / c1`, `1 / c2`.
    corrections: (f32, f32),
    eps: f32,
}

impl Update<3> for AdEmaMix {
    const SECOND: usize = 1;
    const CARRIES: bool = false;

    fn new(h: &Hyper) -> Step<Self> {
        let (c1, c2) = bias_corrections(h);
        let rule = Self {
            m1: Average::new(h.beta1),
            m2: Average::new(h.beta3),
            v: Average::new(h.beta2),
            alpha: h.alpha as f32,
            corrections: ((1.0 / c1) as f32, (1.0 / c2) as f32),
            eps: h.eps as f32,
        };
        Step::new(rule, h, -h.lr, true)
    }

    fn numbers(&self) -> Vec<f32> {
        let (c1, c2) = self.corrections;
        let averages = [self.m1, self.m2, self.v].map(Average::numbers);
        [averages.as_flattened(), &[self.alpha, c1, c2, self.eps]].concat()
    }

    #[inline(always)]
    fn states<V: Vector>(&self, g: V, _: V, [m1, m2, v]: [V; 3]) -> ([V; 3], V) {
        ([self.m1.of(m1, g), self.m2.of(m2, g), self.v.of_square(v, g)], g)
    }

    #[inline(always)]
    fn update<V: Vector>(&self, [m1, m2, v]: [V; 3], _: V) -> V {
        let (c1, c2) = self.corrections;
        let mixed = m1.mul_add(v.like(c1), m2.mul(v.like(self.alpha)));
        mixed.div(v.sqrt().mul_add(v.like(c2), v.like(self.eps)))
    }
}
