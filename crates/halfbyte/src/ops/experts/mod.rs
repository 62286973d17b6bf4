//! Layers of experts: each row of activations times the quantized weight of the expert that its
//! token is routed to, and the gradient of the activations. All experts in one call; no weight is
//! dequantized and no activations are gathered in memory.
//!
//! ```text
//! for each token t, for each of its slots s:           x[t][s] is x[t] where a token has one row
//!     e = ids[t][s]
//!     forward:    y[t][s] = x[t][s] · dequantize(weight[e])^T + bias[e]     0 without an expert
//!     grad_input: x[t][s] = y[t][s] · dequantize(weight[e])                 0 without an expert
//!                 x[t]    = Σ_s of these                where a token has one row
//! ```
//!
//! The rows are sorted by expert ([`Routing`]). Each expert is then a product of its own, as in
//! `matmul_4bit`, over rows picked by index as they are read and written, and the tasks of all
//! experts run together, so that an expert with few rows costs no start and wait of its own.
//!
//! What holds of the bytes: a result row is that of `matmul_4bit` (or `matmul_4bit_grad_input`)
//! with the expert's weight over all the rows that are routed to it, bit for bit. That call's way
//! depends on the number of rows only. The sum over a token's slots is taken in float32, in the
//! order of the experts' numbers (equal numbers: of the slots), and rounded once.

mod routing;
#[cfg(test)]
mod tests;

pub use routing::Routing;

use super::gemm::{self, Part, Routed, Weight};
use super::matmul_4bit::few_rows;
use super::{Scales, Weight4, Weight8};
use crate::Element;
use crate::blocks::BlockSize;
use crate::error::{Result, check_len};
use crate::isa::{self, Isa};
use crate::threads::Shared;

/// How many rows of activations, or of their gradient, a token has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenRows {
    /// One, which all its experts read: `[tokens, in_features]`.
    One,
    /// One for each of its experts: `[tokens, slots, in_features]`.
    Each,
}

impl TokenRows {
    /// Rows of all tokens.
    pub(super) fn count(self, routing: &Routing) -> usize {
        match self {
            Self::One => routing.tokens(),
            Self::Each => routing.tokens() * routing.slots(),
        }
    }

    /// Slots to a row.
    pub(super) fn sharing(self, routing: &Routing) -> usize {
        match self {
            Self::One => routing.slots(),
            Self::Each => 1,
        }
    }
}

/// 4-bit weights of several experts, `[experts, out_features, in_features]`.
///
/// Each expert has its own blocks: they run over its flattened matrix, which is filled up with
/// zeros to whole blocks if it must be. The experts follow each other, in `packed` as in the
/// scales. (Where `out_features * in_features` is a multiple of the block size, this is the layout
/// of the whole tensor quantized at once.)
#[derive(Clone, Copy, Debug)]
pub struct Experts4<'a> {
    packed: &'a [u8],
    scales: Scales<'a>,
    table: &'a [f32; 16],
    blocksize: BlockSize,
    experts: usize,
    out_features: usize,
    in_features: usize,
}

impl<'a> Experts4<'a> {
    /// Ties the parts together. Nested scales are blocks of the list of all experts' scales.
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length) unless `scales` holds
    /// `blocks = ceil(out_features * in_features / blocksize)` entries for each expert, and
    /// `packed` `blocks * blocksize / 2` bytes.
    pub fn new(
        packed: &'a [u8],
        scales: Scales<'a>,
        table: &'a [f32; 16],
        blocksize: BlockSize,
        [experts, out_features, in_features]: [usize; 3],
    ) -> Result<Self> {
        let each = blocksize.over(out_features.saturating_mul(in_features));
        let padded = each.count().saturating_mul(blocksize.get());
        let all = blocksize.over(experts.saturating_mul(padded));
        check_len("packed", all.packed_len(), packed.len(), "bytes")?;
        scales.check(all)?;
        Ok(Self { packed, scales, table, blocksize, experts, out_features, in_features })
    }

    /// Number of experts.
    #[must_use]
    pub const fn experts(&self) -> usize {
        self.experts
    }

    /// Rows of each expert's weight.
    #[must_use]
    pub const fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns of each expert's weight.
    #[must_use]
    pub const fn in_features(&self) -> usize {
        self.in_features
    }

    /// The weight of one expert.
    ///
    /// # Panics
    /// When there is no such expert.
    #[must_use]
    pub fn expert(&self, expert: usize) -> Weight4<'a> {
        assert!(expert < self.experts, "expert {expert} of {}", self.experts);
        let blocks = self.blocksize.over(self.out_features * self.in_features).count();
        let bytes = blocks * self.blocksize.get() / 2;
        let packed = &self.packed[expert * bytes..][..bytes];
        let (n, k) = (self.out_features, self.in_features);
        Weight4::slice(packed, self.scales, expert * blocks, self.table, self.blocksize, [n, k])
    }
}

/// 8-bit weights of several experts, `[experts, out_features, in_features]`: int8 codes and one
/// float32 scale (`SCB`) for each row of each expert.
#[derive(Clone, Copy, Debug)]
pub struct Experts8<'a> {
    codes: &'a [i8],
    scales: &'a [f32],
    experts: usize,
    out_features: usize,
    in_features: usize,
}

impl<'a> Experts8<'a> {
    /// Ties the parts together.
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length) unless `codes` holds
    /// `experts * out_features * in_features` values and `scales` `experts * out_features`;
    /// [`Error::Depth`](crate::Error::Depth) when `in_features` passes
    /// [`INT8_MAX_DEPTH`](crate::INT8_MAX_DEPTH).
    pub fn new(
        codes: &'a [i8],
        scales: &'a [f32],
        [experts, out_features, in_features]: [usize; 3],
    ) -> Result<Self> {
        // All experts' rows are the rows of one tall weight.
        Weight8::new(codes, scales, experts.saturating_mul(out_features), in_features)?;
        Ok(Self { codes, scales, experts, out_features, in_features })
    }

    /// Number of experts.
    #[must_use]
    pub const fn experts(&self) -> usize {
        self.experts
    }

    /// Rows of each expert's weight.
    #[must_use]
    pub const fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns of each expert's weight.
    #[must_use]
    pub const fn in_features(&self) -> usize {
        self.in_features
    }

    /// The weight of one expert.
    ///
    /// # Panics
    /// When there is no such expert.
    #[must_use]
    pub fn expert(&self, expert: usize) -> Weight8<'a> {
        assert!(expert < self.experts, "expert {expert} of {}", self.experts);
        let (n, k) = (self.out_features, self.in_features);
        Weight8::new(&self.codes[expert * n * k..][..n * k], &self.scales[expert * n..][..n], n, k)
            .expect("lengths that `new` has checked")
    }
}

/// Each row of `input` times the 4-bit weight of its expert, plus the expert's bias, accumulated
/// in float32 and rounded once to `T`. Rows without an expert are zero.
///
/// - `input`: `[tokens, in_features]` or `[tokens, slots, in_features]`, as `token_rows` says.
/// - `bias`: `[experts, out_features]`, if any.
/// - `out`: `[tokens, slots, out_features]`.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) when a buffer has another length, or `routing` another
/// number of experts; [`Error::Isa`](crate::Error::Isa) for a bad `HALFBYTE_ISA`.
pub fn experts_matmul_4bit<T: Element>(
    input: &[T],
    token_rows: TokenRows,
    routing: &Routing,
    weight: &Experts4<'_>,
    bias: Option<&[T]>,
    out: &mut [T],
) -> Result<()> {
    let (n, k) = (weight.out_features, weight.in_features);
    check_experts(routing, weight.experts)?;
    check_len("input", token_rows.count(routing).saturating_mul(k), input.len(), "elements")?;
    check_len("out", TokenRows::Each.count(routing).saturating_mul(n), out.len(), "elements")?;
    if let Some(bias) = bias {
        check_len("bias", weight.experts * n, bias.len(), "elements")?;
    }
    run(isa::selected()?, input, token_rows, routing, weight, bias, out);
    Ok(())
}

/// The gradient of [`experts_matmul_4bit`] for its input: each row of `grad_output` times the
/// transpose of its expert's weight, accumulated in float32. Under [`TokenRows::One`] the rows of
/// a token are summed, in float32 too. Rounded once to `T`.
///
/// - `grad_output`: `[tokens, slots, out_features]`. Rows without an expert are not read.
/// - `out`: `[tokens, in_features]` or `[tokens, slots, in_features]`, as `token_rows` says.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) when a buffer has another length, or `routing` another
/// number of experts; [`Error::Isa`](crate::Error::Isa) for a bad `HALFBYTE_ISA`.
pub fn experts_matmul_4bit_grad_input<T: Element>(
    grad_output: &[T],
    token_rows: TokenRows,
    routing: &Routing,
    weight: &Experts4<'_>,
    out: &mut [T],
) -> Result<()> {
    let shape = [weight.experts, weight.out_features, weight.in_features];
    check_grad(grad_output, token_rows, routing, shape, out)?;
    let expert = |e| weight.expert(e);
    run_grad(isa::selected()?, grad_output, token_rows, routing, expert, weight.in_features, out);
    Ok(())
}

/// As [`experts_matmul_4bit_grad_input`] for 8-bit weights: the gradient is taken as if the
/// forward product had rounded nothing.
///
/// - `grad_output`: `[tokens, slots, out_features]`. Rows without an expert are not read.
/// - `out`: `[tokens, in_features]` or `[tokens, slots, in_features]`, as `token_rows` says.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) when a buffer has another length, or `routing` another
/// number of experts; [`Error::Isa`](crate::Error::Isa) for a bad `HALFBYTE_ISA`.
pub fn experts_matmul_8bit_grad_input<T: Element>(
    grad_output: &[T],
    token_rows: TokenRows,
    routing: &Routing,
    weight: &Experts8<'_>,
    out: &mut [T],
) -> Result<()> {
    let shape = [weight.experts, weight.out_features, weight.in_features];
    check_grad(grad_output, token_rows, routing, shape, out)?;
    let expert = |e| weight.expert(e);
    run_grad(isa::selected()?, grad_output, token_rows, routing, expert, weight.in_features, out);
    Ok(())
}

fn check_experts(routing: &Routing, experts: usize) -> Result<()> {
    check_len("weight", routing.experts(), experts, "experts")
}

fn check_grad<T>(
    grad_output: &[T],
    token_rows: TokenRows,
    routing: &Routing,
    [experts, n, k]: [usize; 3],
    out: &[T],
) -> Result<()> {
    check_experts(routing, experts)?;
    let rows = TokenRows::Each.count(routing);
    check_len("grad_output", rows.saturating_mul(n), grad_output.len(), "elements")?;
    check_len("out", token_rows.count(routing).saturating_mul(k), out.len(), "elements")
}

/// The experts that have rows, and these.
fn routed(routing: &Routing, sharing: usize) -> impl Iterator<Item = (usize, Routed<'_>)> {
    (0..routing.experts())
        .map(move |e| (e, Routed { rows: routing.rows_of(e), sharing }))
        .filter(|(_, routed)| !routed.rows.is_empty())
}

/// Makes the rows without an expert zero, of `columns` columns each.
fn clear<T: Element>(routing: &Routing, columns: usize, out: &mut [T]) {
    for row in routing.unrouted() {
        out[row * columns..][..columns].fill(T::default());
    }
}

fn run<T: Element>(
    isa: Isa,
    input: &[T],
    token_rows: TokenRows,
    routing: &Routing,
    weight: &Experts4<'_>,
    bias: Option<&[T]>,
    out: &mut [T],
) {
    let n = weight.out_features;
    clear(routing, n, out);
    let (few, many): (Vec<_>, Vec<_>) = routed(routing, token_rows.sharing(routing))
        .map(|(e, rows)| {
            let bias = bias.map(|bias| &bias[e * n..][..n]);
            Part { weight: weight.expert(e), rows, bias }
        })
        .partition(|part| part.rows.rows.len() <= few_rows::MAX_ROWS);
    let out = &Shared::new(out);
    gemm::forward(isa, input, &many, out, |work| {
        few_rows::forward_parts(isa, input, &few, out, work);
    });
}

fn run_grad<T: Element, W: Weight>(
    isa: Isa,
    grad_output: &[T],
    token_rows: TokenRows,
    routing: &Routing,
    expert: impl Fn(usize) -> W,
    in_features: usize,
    out: &mut [T],
) {
    let parts: Vec<_> =
        routed(routing, 1).map(|(e, rows)| Part { weight: expert(e), rows, bias: None }).collect();
    let slots = routing.slots();
    if token_rows == TokenRows::One && slots != 1 {
        gemm::grad_input_shared(isa, grad_output, &parts, slots, in_features, out);
    } else {
        clear(routing, in_features, out);
        gemm::grad_input(isa, grad_output, &parts, out);
    }
}
