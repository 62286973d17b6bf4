//! Which rows go to which expert: sorted on the device, so that nothing waits for the host.

use crate::error::{Error, Result, check_len};
use crate::ops::weight::by_dtype;
use crate::{DeviceSlice, Floats, Grid, Stream, sources};
use halfbyte::TokenRows;

/// Rows that one group sorts alone. As in `kernels/experts_route.cu`.
const FEW: usize = 512;
/// Fewest rows that a group counts.
const CHUNK: usize = 1024;
/// Most counts: chunks times buckets, unless one chunk alone has more.
const COUNTS: usize = 1 << 18;
/// Most experts.
const MOST_EXPERTS: usize = 1 << 20;
/// Threads per group.
const THREADS: u32 = 256;
/// Most groups in y.
const GROUPS_Y: usize = 65_535;

/// The rows of a layer of experts, sorted by expert: two lists in device memory, and their sizes.
///
/// A token has `slots` rows (the `k` of top-k); the row of slot `s` of token `t` is
/// `t * slots + s`. There are `experts + 2` buckets of rows: one for each expert, one for rows
/// without an expert (their id is `experts`), one for rows whose id is out of range.
#[derive(Clone, Copy, Debug)]
pub struct Routing {
    order: DeviceSlice<i32>,
    starts: DeviceSlice<i32>,
    tokens: usize,
    slots: usize,
    experts: usize,
}

impl Routing {
    /// Room for the lists, which [`route`] fills.
    ///
    /// - `order`: `[tokens * slots]`, will hold the rows by bucket, ascending within one.
    /// - `starts`: `[experts + 3]`, will hold the first place of each bucket in `order`, and behind
    ///   them the number of rows.
    ///
    /// # Errors
    /// [`Error::Length`] when a list has another length, [`Error::Argument`] for 2^31 rows or more
    /// and for more than 2^20 experts.
    pub fn new(
        order: DeviceSlice<i32>,
        starts: DeviceSlice<i32>,
        tokens: usize,
        slots: usize,
        experts: usize,
    ) -> Result<Self> {
        let rows = tokens.saturating_mul(slots);
        let at_most = |what, most: usize, got: usize| {
            if got <= most {
                return Ok(());
            }
            Err(Error::Argument { what, expected: format!("at most {most}"), got: got.to_string() })
        };
        at_most("the number of rows", i32::MAX as usize, rows)?;
        at_most("the number of experts", MOST_EXPERTS, experts)?;
        check_len("order", rows, order.len())?;
        check_len("starts", experts + 3, starts.len())?;
        Ok(Self { order, starts, tokens, slots, experts })
    }

    /// As [`Routing::new`], with both lists at the front of `workspace`:
    /// [`Routing::workspace`] bytes of it.
    ///
    /// # Errors
    /// As [`Routing::new`]; [`Error::Length`] when the workspace is too short.
    pub fn carve(
        workspace: &mut DeviceSlice<u8>,
        tokens: usize,
        slots: usize,
        experts: usize,
    ) -> Result<Self> {
        let order = workspace.carve("workspace", tokens.saturating_mul(slots))?;
        let starts = workspace.carve("workspace", experts.saturating_add(3))?;
        Self::new(order, starts, tokens, slots, experts)
    }

    /// Bytes that [`Routing::carve`] takes for `rows` rows.
    #[must_use]
    pub const fn workspace(rows: usize, experts: usize) -> usize {
        DeviceSlice::<u8>::carved_bytes::<i32>(rows)
            .saturating_add(DeviceSlice::<u8>::carved_bytes::<i32>(experts.saturating_add(3)))
    }

    /// The rows by bucket, `[rows]`.
    #[must_use]
    pub const fn order(&self) -> DeviceSlice<i32> {
        self.order
    }

    /// Where the buckets start, `[experts + 3]`.
    #[must_use]
    pub const fn starts(&self) -> DeviceSlice<i32> {
        self.starts
    }

    /// Number of tokens.
    #[must_use]
    pub const fn tokens(&self) -> usize {
        self.tokens
    }

    /// Rows of a token.
    #[must_use]
    pub const fn slots(&self) -> usize {
        self.slots
    }

    /// Rows of all tokens.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.tokens * self.slots
    }

    /// Number of experts.
    #[must_use]
    pub const fn experts(&self) -> usize {
        self.experts
    }

    /// Rows of activations, when a token has as many as `token_rows` says.
    #[must_use]
    pub const fn count(&self, token_rows: TokenRows) -> usize {
        match token_rows {
            TokenRows::One => self.tokens,
            TokenRows::Each => self.rows(),
        }
    }

    /// How many rows share one row of activations.
    #[must_use]
    pub const fn sharing(&self, token_rows: TokenRows) -> usize {
        match token_rows {
            TokenRows::One => self.slots,
            TokenRows::Each => 1,
        }
    }

    /// The most tiles of `height` rows that the rows can make: a tile has rows of one bucket only.
    pub(in crate::ops) fn tiles(&self, height: usize) -> usize {
        self.rows() / height + self.rows().min(self.experts + 2)
    }
}

/// Rows that a group counts, and how many groups that takes.
fn chunks(rows: usize, experts: usize) -> (usize, usize) {
    let most = (COUNTS / (experts + 2)).max(1);
    let chunk = CHUNK.max(rows.div_ceil(most)).next_multiple_of(THREADS as usize);
    (chunk, rows.div_ceil(chunk))
}

/// Bytes of workspace that [`route`] takes. Zero for up to 512 rows.
#[must_use]
pub fn route_workspace(rows: usize, experts: usize) -> usize {
    if rows <= FEW {
        return 0;
    }
    let counts = chunks(rows, experts).1.saturating_mul(experts.saturating_add(2));
    DeviceSlice::<u8>::carved_bytes::<u32>(counts)
}

/// Sorts rows by expert: fills the lists of `routing`.
///
/// - `expert_ids`: `[tokens, slots]`, from 0 to `experts`, where `experts` itself means that the
///   row has no expert. An id out of range cannot be refused without waiting for the device: its
///   row goes to a bucket of its own, and products make it NaN.
/// - `workspace`: at least [`route_workspace`] bytes, of any content.
///
/// One launch for up to 512 rows, three for more. The lists are the same in every run.
///
/// # Errors
/// [`Error::Length`] when `expert_ids` has another length, or the workspace is too short; else
/// what loading the kernel or the driver reports.
pub fn route(
    stream: &Stream,
    expert_ids: DeviceSlice<i64>,
    routing: &Routing,
    mut workspace: DeviceSlice<u8>,
) -> Result<()> {
    let (rows, experts) = (routing.rows(), routing.experts);
    check_len("expert_ids", rows, expert_ids.len())?;
    let source = &sources::EXPERTS_ROUTE;
    let (rows32, experts32) = (rows as u32, experts as u32);
    let (order, starts) = (routing.order, routing.starts);
    if rows <= FEW {
        return stream.launch(
            source,
            c"experts_route_few",
            Grid::new(1, THREADS),
            &[expert_ids.into(), rows32.into(), experts32.into(), order.into(), starts.into()],
        );
    }
    let (chunk, groups) = chunks(rows, experts);
    let counts = workspace.carve::<u32>("workspace", groups * (experts + 2))?;
    let (chunk32, each) = (chunk as u32, Grid::new(groups, THREADS));
    stream.launch(
        source,
        c"experts_route_count",
        each,
        &[expert_ids.into(), rows32.into(), experts32.into(), chunk32.into(), counts.into()],
    )?;
    stream.launch(
        source,
        c"experts_route_scan",
        Grid::new(1, THREADS),
        &[(groups as u32).into(), rows32.into(), experts32.into(), counts.into(), starts.into()],
    )?;
    stream.launch(
        source,
        c"experts_route_place",
        each,
        &[
            expert_ids.into(),
            rows32.into(),
            experts32.into(),
            chunk32.into(),
            counts.into(),
            order.into(),
        ],
    )
}

/// Rows without an expert become 0, rows whose id is out of range NaN; others are left alone.
///
/// - `expert_ids`: `[rows]`, as for [`route`].
/// - `out`: `[rows, features]`.
///
/// # Errors
/// [`Error::Length`] when `out` has another length; else what loading the kernel or the driver
/// reports.
pub fn fill_unrouted(
    stream: &Stream,
    expert_ids: DeviceSlice<i64>,
    experts: usize,
    features: usize,
    out: Floats,
) -> Result<()> {
    let rows = expert_ids.len();
    check_len("out", rows.saturating_mul(features), out.len())?;
    if out.is_empty() {
        return Ok(());
    }
    stream.launch(
        &sources::EXPERTS_ROUTE,
        by_dtype!(out.dtype(), "fill_unrouted"),
        Grid::new(rows.min(GROUPS_Y), THREADS),
        &[expert_ids.into(), rows.into(), (experts as u32).into(), features.into(), out.into()],
    )
}

/// Sums over the slots of each token, in float32, in ascending order of the slots, rounded once.
/// Slots without an expert are not read; a bad id makes the token's row NaN.
///
/// - `products`: `[tokens, slots, features]`.
/// - `expert_ids`: `[tokens, slots]`, as for [`route`].
/// - `out`: `[tokens, features]`.
///
/// # Errors
/// [`Error::Length`] when a buffer has another length; else what loading the kernel or the driver
/// reports.
pub fn sum_slots(
    stream: &Stream,
    products: DeviceSlice<f32>,
    expert_ids: DeviceSlice<i64>,
    routing: &Routing,
    features: usize,
    out: Floats,
) -> Result<()> {
    check_len("expert_ids", routing.rows(), expert_ids.len())?;
    check_len("products", routing.rows().saturating_mul(features), products.len())?;
    check_len("out", routing.tokens.saturating_mul(features), out.len())?;
    if out.is_empty() {
        return Ok(());
    }
    stream.launch(
        &sources::EXPERTS_ROUTE,
        by_dtype!(out.dtype(), "sum_slots"),
        Grid::new(features.div_ceil(THREADS as usize), THREADS)
            .y(routing.tokens.min(GROUPS_Y) as u32),
        &[
            products.into(),
            expert_ids.into(),
            routing.tokens.into(),
            (routing.slots as u32).into(),
            (routing.experts as u32).into(),
            features.into(),
            out.into(),
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_the_rows_and_counts_are_few() {
        for rows in [513, 1024, 1025, 131_072, (1 << 31) - 1] {
            for experts in [0, 1, 8, 64, 4096, MOST_EXPERTS] {
                let (chunk, groups) = chunks(rows, experts);
                assert!(chunk * groups >= rows && chunk * (groups - 1) < rows, "{rows} {experts}");
                assert!(chunk.is_multiple_of(256));
                assert!(groups * (experts + 2) <= COUNTS.max(experts + 2), "{rows} {experts}");
            }
        }
    }
}
