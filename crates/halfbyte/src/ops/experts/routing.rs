//! Which rows go to which expert.

use crate::error::{Error, Result, check_len};
use std::ops::Range;

/// For each token, the experts that it is routed to, sorted by expert.
///
/// A token has `slots` experts (the `k` of top-k). The row of slot `s` of token `t` is
/// `t * slots + s`.
///
/// ```
/// use halfbyte::Routing;
/// // Two tokens, two experts each; 3 means none.
/// let routing = Routing::new(&[2, 0, 0, 3], 2, 2, 3)?;
/// assert_eq!(routing.rows_of(0), [1, 2]);
/// assert_eq!(routing.unrouted(), [3]);
/// # Ok::<(), halfbyte::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Routing {
    tokens: usize,
    slots: usize,
    /// Where each expert's rows start, then where those without an expert do, then the end.
    starts: Vec<usize>,
    /// Grouped by expert, ascending within.
    rows: Vec<usize>,
}

impl Routing {
    /// Sorts the rows by expert.
    ///
    /// - `ids`: `[tokens, slots]`, from 0 to `experts`, where `experts` itself means that the slot
    ///   has no expert.
    ///
    /// # Errors
    /// [`Error::Length`] when `ids` has another length; [`Error::Expert`] for a number below 0 or
    /// above `experts`.
    pub fn new(ids: &[i64], tokens: usize, slots: usize, experts: usize) -> Result<Self> {
        check_len("expert_ids", tokens.saturating_mul(slots), ids.len(), "numbers")?;
        let mut starts = vec![0; experts + 2];
        for (row, &got) in ids.iter().enumerate() {
            match usize::try_from(got) {
                Ok(expert) if expert <= experts => starts[expert + 1] += 1,
                _ => {
                    let (token, slot) = (row / slots, row % slots);
                    return Err(Error::Expert { got, experts, token, slot });
                }
            }
        }
        for expert in 1..starts.len() {
            starts[expert] += starts[expert - 1];
        }
        let mut next = starts.clone();
        let mut rows = vec![0; ids.len()];
        for (row, &expert) in ids.iter().enumerate() {
            let next = &mut next[expert as usize];
            rows[*next] = row;
            *next += 1;
        }
        Ok(Self { tokens, slots, starts, rows })
    }

    /// Number of tokens.
    #[must_use]
    pub const fn tokens(&self) -> usize {
        self.tokens
    }

    /// Number of experts that each token is routed to.
    #[must_use]
    pub const fn slots(&self) -> usize {
        self.slots
    }

    /// Number of experts.
    #[must_use]
    pub const fn experts(&self) -> usize {
        self.starts.len() - 2
    }

    /// The rows of an expert, ascending.
    ///
    /// # Panics
    /// When there is no such expert.
    #[must_use]
    pub fn rows_of(&self, expert: usize) -> &[usize] {
        assert!(expert < self.experts(), "expert {expert} of {}", self.experts());
        &self.rows[self.starts[expert]..self.starts[expert + 1]]
    }

    /// All rows, expert after expert.
    pub(in crate::ops) fn sorted(&self) -> &[usize] {
        &self.rows
    }

    /// Where an expert's rows stand among the [`sorted`](Self::sorted).
    pub(in crate::ops) fn positions_of(&self, expert: usize) -> Range<usize> {
        self.starts[expert]..self.starts[expert + 1]
    }

    /// The rows without an expert, ascending.
    #[must_use]
    pub fn unrouted(&self) -> &[usize] {
        &self.rows[self.starts[self.experts()]..]
    }
}
