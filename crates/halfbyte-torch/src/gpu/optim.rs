//! The optimizer steps on a GPU: checked tensors to the launchers' tables.

use super::Queue;
use crate::dtype::Scalar;
use crate::error::{Error, Result};
use crate::memory::{Destination, Source};
use halfbyte::optim::{Hyper, Rule};
use halfbyte_gpu::DeviceSlice;
use halfbyte_gpu::ops::optim as gpu;

/// What states of both kinds have: checked columns with an entry for each parameter, or empty.
pub(crate) struct Columns<'c, 'a> {
    pub(crate) params: &'c [Destination<'a>],
    pub(crate) grads: &'c [Source<'a>],
    pub(crate) state1: &'c [Destination<'a>],
    pub(crate) state2: &'c [Destination<'a>],
    pub(crate) compensation: &'c [Destination<'a>],
    /// For stochastic rounding.
    pub(crate) streams: &'c [i64],
    pub(crate) seed: i64,
}

/// Entry `index` of a column, or nothing when there is no such column.
fn entry<T: Scalar>(
    column: &[Destination<'_>],
    index: usize,
    queue: &Queue,
) -> Result<DeviceSlice<T>> {
    column.get(index).map_or_else(|| Ok(DeviceSlice::empty()), |state| state.on(queue))
}

impl Columns<'_, '_> {
    fn rounding(&self, index: usize, queue: &Queue) -> Result<gpu::Rounding> {
        Ok(match (self.compensation.get(index), self.streams.get(index)) {
            (Some(rest), _) => gpu::Rounding::Kahan(rest.on(queue)?),
            (None, Some(&stream)) => {
                gpu::Rounding::Stochastic { seed: self.seed as u64, stream: stream as u64 }
            }
            (None, None) => gpu::Rounding::Nearest,
        })
    }
}

/// One step with float32 states. `norms` take the norms of the updates.
pub(crate) fn step_32bit(
    queue: &Queue,
    rule: Rule,
    hyper: &Hyper,
    columns: &Columns<'_, '_>,
    norms: &[Destination<'_>],
    param_norm: Option<f64>,
) -> Result<()> {
    let lengths: Vec<_> = columns.params.iter().map(Destination::len).collect();
    let mut work = Vec::with_capacity(lengths.len());
    for (index, (param, grad)) in columns.params.iter().zip(columns.grads).enumerate() {
        work.push(gpu::Tensor32 {
            param: param.floats_on(queue, "p")?,
            grad: grad.floats_on(queue, "g")?,
            state1: entry(columns.state1, index, queue)?,
            state2: entry(columns.state2, index, queue)?,
            param_norm,
            update_norm: norms.get(index).map(|norm| norm.on(queue)).transpose()?,
            rounding: columns.rounding(index, queue)?,
        });
    }
    let bytes = gpu::step_32bit_workspace(queue.device(), rule, hyper, &lengths);
    let scratch = queue.workspace(bytes)?;
    Ok(gpu::step_32bit(queue.stream(), rule, hyper, &work, scratch.slice())?)
}

/// The scales and codes of 8-bit states.
pub(crate) struct Coded<'c, 'a> {
    pub(crate) absmax1: &'c [Destination<'a>],
    pub(crate) absmax2: &'c [Destination<'a>],
    pub(crate) qmap1: &'c Source<'a>,
    pub(crate) qmap2: Option<&'c Source<'a>>,
}

/// One step with 8-bit states. That the codes ascend, which the CPU checks, would have to be waited
/// for.
pub(crate) fn step_8bit(
    queue: &Queue,
    rule: Rule,
    hyper: &Hyper,
    columns: &Columns<'_, '_>,
    coded: &Coded<'_, '_>,
) -> Result<()> {
    let mut work = Vec::with_capacity(columns.params.len());
    for (index, (param, grad)) in columns.params.iter().zip(columns.grads).enumerate() {
        let (floats, state1) = if rule.has_float_state() {
            (entry(columns.state1, index, queue)?, DeviceSlice::empty())
        } else {
            (DeviceSlice::empty(), entry(columns.state1, index, queue)?)
        };
        work.push(gpu::Tensor8 {
            param: param.floats_on(queue, "p")?,
            grad: grad.floats_on(queue, "g")?,
            floats,
            state1,
            absmax1: entry(coded.absmax1, index, queue)?,
            state2: entry(columns.state2, index, queue)?,
            absmax2: entry(coded.absmax2, index, queue)?,
            rounding: columns.rounding(index, queue)?,
        });
    }
    let code1 = code("qmap1", coded.qmap1, queue)?;
    let code2 = coded.qmap2.map(|qmap2| code("qmap2", qmap2, queue)).transpose()?;
    let bytes = gpu::step_8bit_workspace(queue.device(), work.len());
    let scratch = queue.workspace(bytes)?;
    Ok(gpu::step_8bit(queue.stream(), rule, hyper, &work, code1, code2, scratch.slice())?)
}

fn code(what: &str, values: &Source<'_>, queue: &Queue) -> Result<DeviceSlice<f32>> {
    if values.len() == 256 {
        return values.on(queue);
    }
    Err(Error::Value(format!("{what} must hold 256 values, got {}", values.len())))
}
