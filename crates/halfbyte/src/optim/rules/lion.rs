//! Lion (Chen et al., arXiv 2302.06675).
//!
//! ```text
//! u = beta1 m + (1 - beta1) g
//! m = beta2 m + (1 - beta2) g
//! p = p (1 - lr wd) - lr sign(u)
//! ```

use super::{Average, Step, Update};
use crate::optim::{Hyper, vector::Vector};

#[derive(Clone, Copy, Debug)]
pub(in crate::optim) struct Lion {
    u: Average,
    m: Average,
}

impl Update<1> for Lion {
    const SECOND: usize = 0;
    const CARRIES: bool = true;

    fn new(h: &Hyper) -> Step<Self> {
        let rule = Self { u: Average::new(h.beta1), m: Average::new(h.beta2) };
        Step::new(rule, h, -h.lr, true)
    }

    fn numbers(&self) -> Vec<f32> {
        [self.u.numbers(), self.m.numbers()].concat()
    }

    #[inline(always)]
    fn states<V: Vector>(&self, g: V, _: V, [m]: [V; 1]) -> ([V; 1], V) {
        ([self.m.of(m, g)], self.u.of(m, g))
    }

    #[inline(always)]
    fn update<V: Vector>(&self, _: [V; 1], u: V) -> V {
        u.sign()
    }
}
