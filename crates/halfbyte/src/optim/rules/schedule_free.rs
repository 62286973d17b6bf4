//! Schedule-free AdamW (Defazio et al., "The Road Less Scheduled", arXiv 2405.15682). The
//! parameter is `y`, where gradients are taken; `z` is the sequence that takes the steps.
//!
//! ```text
//! v = beta2 v + (1 - beta2) g^2
//! u = g / (sqrt(v) / c2 + eps) + wd y        c2 = sqrt(1 - beta2^t)
//! z' = z - lr u
//! y = y + c (z - y) - lr (1 - beta1 (1 - c)) u
//! ```
//!
//! with the old z, and the averaging weight c of this step, the caller's ([`Hyper::alpha`]).

use super::{Average, Step, Update, bias_corrections};
use crate::optim::{Hyper, vector::Vector};

#[derive(Clone, Copy, Debug)]
pub(in crate::optim) struct ScheduleFree {
    v: Average,
    /// `eps * c2`, and `c2`.
    eps: f32,
    correction: f32,
    weight_decay: f32,
    /// `-lr`, for z.
    rate: f32,
    /// `c`.
    weight: f32,
    /// `-lr (1 - beta1 (1 - c))`, for y.
    y_rate: f32,
}

impl Update<2> for ScheduleFree {
    const FLOATS: usize = 1;
    const SECOND: usize = 1;
    const CARRIES: bool = true;

    fn new(h: &Hyper) -> Step<Self> {
        let (_, c2) = bias_corrections(h);
        let rule = Self {
            v: Average::new(h.beta2),
            eps: (h.eps * c2) as f32,
            correction: c2 as f32,
            weight_decay: h.weight_decay as f32,
            rate: -h.lr as f32,
            weight: h.alpha as f32,
            y_rate: (h.lr * (h.beta1 * (1.0 - h.alpha) - 1.0)) as f32,
        };
        Step::new(rule, h, 1.0, false)
    }

    fn numbers(&self) -> Vec<f32> {
        let Self { eps, correction, weight_decay, rate, weight, y_rate, .. } = *self;
        [&self.v.numbers()[..], &[eps, correction, weight_decay, rate, weight, y_rate]].concat()
    }

    #[inline(always)]
    fn states<V: Vector>(&self, g: V, y: V, [z, v]: [V; 2]) -> ([V; 2], V) {
        let v = self.v.of_square(v, g);
        let u = g.div(v.sqrt().add(v.like(self.eps))).mul(g.like(self.correction));
        let u = y.mul_add(y.like(self.weight_decay), u);
        let to_z = y.mul_add(y.like(-1.0), z);
        let change = to_z.mul_add(z.like(self.weight), u.mul(u.like(self.y_rate)));
        ([u.mul_add(u.like(self.rate), z), v], change)
    }

    #[inline(always)]
    fn update<V: Vector>(&self, _: [V; 2], change: V) -> V {
        change
    }
}
