//! SGD with momentum (Polyak; as in Sutskever et al., ICML 2013, without their Nesterov form). LARS
//! (You, Gitman, Ginsburg, arXiv 1708.03888) is this with a bound on the update's norm.
//!
//! ```text
//! g = g + wd p
//! m = beta1 m + g        m = g at step 1
//! p = p - lr m
//! ```

use super::{Step, Update, decayed};
use crate::optim::{Hyper, vector::Vector};

#[derive(Clone, Copy, Debug)]
pub(in crate::optim) struct Momentum {
    beta: f32,
    weight_decay: f32,
}

impl Update<1> for Momentum {
    const SECOND: usize = 0;
    const CARRIES: bool = false;

    fn new(h: &Hyper) -> Step<Self> {
        let beta = if h.step == 1 { 0.0 } else { h.beta1 as f32 };
        Step::new(Self { beta, weight_decay: h.weight_decay as f32 }, h, -h.lr, false)
    }

    fn numbers(&self) -> Vec<f32> {
        vec![self.beta, self.weight_decay]
    }

    #[inline(always)]
    fn states<V: Vector>(&self, g: V, p: V, [m]: [V; 1]) -> ([V; 1], V) {
        let g = decayed(g, p, self.weight_decay);
        ([m.mul_add(m.like(self.beta), g)], g)
    }

    #[inline(always)]
    fn update<V: Vector>(&self, [m]: [V; 1], _: V) -> V {
        m
    }
}
