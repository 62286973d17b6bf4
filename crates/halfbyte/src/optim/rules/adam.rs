//! Adam (Kingma, Ba, arXiv 1412.6980) with decoupled weight decay (Loshchilov, Hutter, 1711.05101).
//! LAMB (You et al., 1904.00962) is this with a bound on the update's norm.
//!
//! ```text
//! m = beta1 m + (1 - beta1) g
//! v = beta2 v + (1 - beta2) g^2
//! c1 = 1 - beta1^t,  c2 = sqrt(1 - beta2^t)
//! p = p (1 - lr wd) - lr (c2 / c1) m / (sqrt(v) + eps c2)
//! ```
//!
//! which is `m/c1 / (sqrt(v)/c2 + eps)` with one division less.

use super::{Average, Step, Update, bias_corrections};
use crate::optim::{Hyper, vector::Vector};

#[derive(Clone, Copy, Debug)]
pub(in crate::optim) struct Adam {
    m: Average,
    v: Average,
    eps: f32,
}

impl Update<2> for Adam {
    const SECOND: usize = 1;
    const CARRIES: bool = false;

    fn new(h: &Hyper) -> Step<Self> {
        let (c1, c2) = bias_corrections(h);
        let rule =
            Self { m: Average::new(h.beta1), v: Average::new(h.beta2), eps: (h.eps * c2) as f32 };
        Step::new(rule, h, -h.lr * c2 / c1, true)
    }

    fn numbers(&self) -> Vec<f32> {
        [&self.m.numbers()[..], &self.v.numbers(), &[self.eps]].concat()
    }

    #[inline(always)]
    fn states<V: Vector>(&self, g: V, _: V, [m, v]: [V; 2]) -> ([V; 2], V) {
        ([self.m.of(m, g), self.v.of_square(v, g)], g)
    }

    #[inline(always)]
    fn update<V: Vector>(&self, [m, v]: [V; 2], _: V) -> V {
        m.div(v.sqrt().add(v.like(self.eps)))
    }
}
