//! Adagrad (Duchi, Hazan, Singer, JMLR 12, 2011).
//!
//! ```text
//! g = g + wd p
//! v = v + g^2
//! p = p - lr g / (sqrt(v) + eps)
//! ```

use super::{Step, Update, decayed};
use crate::optim::{Hyper, vector::Vector};

#[derive(Clone, Copy, Debug)]
pub(in crate::optim) struct Adagrad {
    weight_decay: f32,
    eps: f32,
}

impl Update<1> for Adagrad {
    const SECOND: usize = 0; // its state is encoded as a first moment's
    const CARRIES: bool = true;

    fn new(h: &Hyper) -> Step<Self> {
        let rule = Self { weight_decay: h.weight_decay as f32, eps: h.eps as f32 };
        Step::new(rule, h, -h.lr, false)
    }

    fn numbers(&self) -> Vec<f32> {
        vec![self.weight_decay, self.eps]
    }

    #[inline(always)]
    fn states<V: Vector>(&self, g: V, p: V, [v]: [V; 1]) -> ([V; 1], V) {
        let g = decayed(g, p, self.weight_decay);
        ([g.mul_add(g, v)], g)
    }

    #[inline(always)]
    fn update<V: Vector>(&self, [v]: [V; 1], g: V) -> V {
        g.div(v.sqrt().add(v.like(self.eps)))
    }
}
