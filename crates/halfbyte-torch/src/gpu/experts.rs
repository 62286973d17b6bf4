//! The routes of a layer of experts on a GPU.

use super::{Queue, Workspace};
use crate::error::Result;
use crate::memory::Source;
use halfbyte_gpu::{DeviceSlice, ops};

/// Rows sorted by expert, by launches on the queue's stream: nothing waits for them.
pub(crate) struct Routed {
    routing: ops::Routing,
    ids: DeviceSlice<i64>,
    _lists: Workspace,
}

impl Routed {
    /// - `expert_ids`: int64 `[tokens, slots]`.
    pub(crate) fn new(
        queue: &Queue,
        expert_ids: &Source<'_>,
        [tokens, slots]: [usize; 2],
        experts: usize,
    ) -> Result<Self> {
        let ids = expert_ids.on::<i64>(queue)?;
        let rows = tokens.saturating_mul(slots);
        let lists = ops::Routing::workspace(rows, experts);
        let lists = queue.workspace(lists.saturating_add(ops::route_workspace(rows, experts)))?;
        let mut rest = lists.slice();
        let routing = ops::Routing::carve(&mut rest, tokens, slots, experts)?;
        ops::route(queue.stream(), ids, &routing, rest)?;
        Ok(Self { routing, ids, _lists: lists })
    }

    pub(crate) fn routing(&self) -> &ops::Routing {
        &self.routing
    }

    /// As they lie on the device.
    pub(crate) fn ids(&self) -> DeviceSlice<i64> {
        self.ids
    }
}
