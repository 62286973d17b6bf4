//! Routes of rows to experts, on the device: what the tests of their products share.

#![allow(dead_code)] // each test file takes what it needs

use crate::placed::{Placed, Random};
use halfbyte_gpu::ops::{self, Routing};
use halfbyte_gpu::{Error, Stream};

/// The lists of a routing and what makes them, on the device.
pub(crate) struct Routed {
    pub(crate) ids: Placed<i64>,
    pub(crate) order: Placed<i32>,
    pub(crate) starts: Placed<i32>,
    pub(crate) workspace: Placed<u8>,
    pub(crate) routing: Routing,
}

impl Routed {
    pub(crate) fn new(stream: &Stream, ids: &[i64], slots: usize, experts: usize) -> Self {
        let tokens = ids.len().checked_div(slots).unwrap_or(0);
        let order = Placed::unwritten(stream, ids.len(), 1);
        let starts = Placed::unwritten(stream, experts + 3, 1);
        let bytes = ops::route_workspace(ids.len(), experts);
        let routing = Routing::new(order.slice(), starts.slice(), tokens, slots, experts).unwrap();
        let workspace = Placed::unwritten(stream, bytes, 0);
        Self { ids: Placed::new(stream, ids, 1), order, starts, workspace, routing }
    }

    pub(crate) fn run(&self, stream: &Stream) -> Result<(), Error> {
        ops::route(stream, self.ids.slice(), &self.routing, self.workspace.slice())
    }
}

/// `count` ids; one in nine names no expert, and with `bad` one in eleven is out of range.
pub(crate) fn ids(count: usize, experts: usize, seed: u64, bad: bool) -> Vec<i64> {
    let mut random = Random(seed);
    let one = |_| match (random.below(9), random.below(11)) {
        (_, 0) if bad => [-1, experts as i64 + 1, i64::MIN, i64::MAX][random.below(4)],
        (0, _) => experts as i64,
        _ => random.below(experts.max(1)).min(experts) as i64,
    };
    (0..count).map(one).collect()
}

/// Where a row with this id goes.
pub(crate) fn bucket(id: i64, experts: usize) -> usize {
    usize::try_from(id).ok().filter(|&id| id <= experts).unwrap_or(experts + 1)
}

/// Other ids in the memory of a routing.
pub(crate) fn overwrite(ids: &Placed<i64>, values: &[i64]) {
    let slice = ids.slice();
    assert_eq!(slice.len(), values.len());
    // SAFETY: the emulator's memory is the host's; the buffer has that length, and nothing runs.
    unsafe {
        std::ptr::copy_nonoverlapping(values.as_ptr(), slice.pointer() as *mut i64, values.len());
    }
}
