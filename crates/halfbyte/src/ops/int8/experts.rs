//! The forward product of a layer of 8-bit experts: as [`super::int8_linear`] for each expert over
//! the rows that are routed to it, all in one run of tasks.

use super::product::{self, Group, Left, Order};
use super::rows;
use crate::Element;
use crate::error::{Result, check_len};
use crate::isa;
use crate::ops::experts::{Experts8, Routing, TokenRows};

/// Each row of `input` times the 8-bit weight of its expert under the rule of
/// [`int8_linear`](super::int8_linear), plus the expert's bias. Rows without an expert are zero.
///
/// A result row is that of `int8_linear` with the expert's weight over all the rows that are routed
/// to it, bit for bit: outlier columns are those of these rows.
///
/// - `input`: `[tokens, in_features]` or `[tokens, slots, in_features]`, as `token_rows` says.
/// - `threshold`: magnitude from which on an activation counts as an outlier; 0 for none.
/// - `bias`: `[experts, out_features]`, if any.
/// - `out`: `[tokens, slots, out_features]`.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) when a buffer has another length, or `routing` another
/// number of experts; [`Error::Isa`](crate::Error::Isa) for a bad `HALFBYTE_ISA`.
pub fn experts_matmul_8bit<T: Element>(
    input: &[T],
    token_rows: TokenRows,
    routing: &Routing,
    weight: &Experts8<'_>,
    threshold: f32,
    bias: Option<&[T]>,
    out: &mut [T],
) -> Result<()> {
    let (n, depth) = (weight.out_features(), weight.in_features());
    let slots = TokenRows::Each.count(routing);
    check_len("weight", routing.experts(), weight.experts(), "experts")?;
    check_len("input", token_rows.count(routing).saturating_mul(depth), input.len(), "elements")?;
    check_len("out", slots.saturating_mul(n), out.len(), "elements")?;
    if let Some(bias) = bias {
        check_len("bias", weight.experts() * n, bias.len(), "elements")?;
    }
    let isa = isa::selected()?;
    let share = token_rows.sharing(routing);
    for row in routing.unrouted() {
        out[row * n..][..n].fill(T::default());
    }
    let mut stats = vec![0.0; slots];
    let borders: Vec<_> = (0..weight.experts()).map(|e| routing.positions_of(e)).collect();
    let row = |position: usize| routing.sorted()[position] / share;
    let outliers = rows::group_stats(isa, input, depth, threshold, &borders, row, &mut stats);
    let groups: Vec<_> = borders
        .into_iter()
        .zip(&outliers)
        .enumerate()
        .filter(|(_, (rows, _))| !rows.is_empty())
        .map(|(e, (rows, outliers))| Group {
            weight: weight.expert(e),
            bias: bias.map(|b| &b[e * n..][..n]),
            outliers,
            rows,
        })
        .collect();
    let left = Left { input, codes: None, stats: &stats, depth };
    product::run(isa, &left, Order::Routed { out: routing.sorted(), share }, &groups, out);
    Ok(())
}
