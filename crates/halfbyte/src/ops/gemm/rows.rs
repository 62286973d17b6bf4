//! Which rows of the activations a product takes, and where its results go.

/// The rows of a product: row `m` reads row `input(m)` of the activations, and row `output(m)` of
/// the result is written. No two rows have the same output.
pub(in crate::ops) trait Rows: Copy + Sync {
    fn len(&self) -> usize;
    fn input(&self, m: usize) -> usize;
    fn output(&self, m: usize) -> usize;
}

/// The first so many rows of both.
#[derive(Clone, Copy)]
pub(in crate::ops) struct All(pub(in crate::ops) usize);

impl Rows for All {
    fn len(&self) -> usize {
        self.0
    }
    fn input(&self, m: usize) -> usize {
        m
    }
    fn output(&self, m: usize) -> usize {
        m
    }
}

/// Rows `rows` of the result; `sharing` of them in a row share one of the activations.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Routed<'a> {
    pub(in crate::ops) rows: &'a [usize],
    pub(in crate::ops) sharing: usize,
}

impl Rows for Routed<'_> {
    fn len(&self) -> usize {
        self.rows.len()
    }
    fn input(&self, m: usize) -> usize {
        self.rows[m] / self.sharing
    }
    fn output(&self, m: usize) -> usize {
        self.rows[m]
    }
}
