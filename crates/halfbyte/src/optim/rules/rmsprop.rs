//! `RMSprop` (Tieleman, Hinton, lecture 6.5, 2012).
//!
//! ```text
//! g = g + wd p
//! v = beta1 v + (1 - beta1) g^2
//! p = p - lr g / (sqrt(v) + eps)
//! ```

use super::{Average, Step, Update, decayed};
use crate::optim::{Hyper, vector::Vector};

#[derive(Clone, Copy, Debug)]
pub(in crate::optim) struct RmsProp {
    v: Average,
    weight_decay: f32,
    eps: f32,
}

impl Update<1> for RmsProp {
    const SECOND: usize = 0; // its state is encoded as a first moment's
    const CARRIES: bool = true;

    fn new(h: &Hyper) -> Step<Self> {
        let rule = Self {
            v: Average::new(h.beta1),
            weight_decay: h.weight_decay as f32,
            eps: h.eps as f32,
        };
        Step::new(rule, h, -h.lr, false)
    }

    fn numbers(&self) -> Vec<f32> {
        [&self.v.numbers()[..], &[self.weight_decay, self.eps]].concat()
    }

    #[inline(always)]
    fn states<V: Vector>(&self, g: V, p: V, [v]: [V; 1]) -> ([V; 1], V) {
        let g = decayed(g, p, self.weight_decay);
        ([self.v.of_square(v, g)], g)
    }

    #[inline(always)]
    fn update<V: Vector>(&self, [v]: [V; 1], g: V) -> V {
        g.div(v.sqrt().add(v.like(self.eps)))
    }
}
