//! The tensors of an optimizer's step, checked together before anything is changed.

use crate::dtype::Scalar;
use crate::error::{Error, Result};
use crate::gpu::Queue;
use crate::memory::{Destination, Source, expect_dtype};
use crate::overlap::Places;
use crate::tensor::{Name, Tensor};
use halfbyte::optim::{Floats, FloatsMut, Rounding, Rule};
use halfbyte::{bf16, f16};

/// The tensors of a call, with what is known of them together.
pub(crate) struct Call<'a> {
    rule: Rule,
    /// Messages say which parameter is meant.
    many: bool,
    pub(crate) params: Vec<Destination<'a>>,
    pub(crate) grads: Vec<Source<'a>>,
    pub(crate) places: Places<'a>,
}

impl<'a> Call<'a> {
    /// Parameters and gradients, checked.
    pub(crate) fn new(rule: Rule, many: bool, p: &'a [Tensor], g: &'a [Tensor]) -> Result<Self> {
        const LISTS: usize = 6;
        let mut call = Self {
            rule,
            many,
            params: Vec::with_capacity(p.len()),
            grads: Vec::with_capacity(p.len()),
            places: Places::with_capacity(LISTS * p.len() + 2),
        };
        call.expect_list("g", g, p.len())?;
        for (index, (p, g)) in p.iter().zip(g).enumerate() {
            let (param, grad) = (p.update(call.name("p", index))?, g.read(call.name("g", index))?);
            for (place, dtype) in [(param.place(), param.dtype()), (grad.place(), grad.dtype())] {
                let known = [f32::scalar_type(), bf16::scalar_type(), f16::scalar_type()];
                if !known.contains(&dtype) {
                    return Err(Error::Value(format!(
                        "{} must be float32, float16 or bfloat16, got {}",
                        place.name,
                        dtype.name()
                    )));
                }
            }
            if g.sizes()? != p.sizes()? {
                return Err(Error::Value(format!(
                    "{} must have the parameter's shape {:?}, got {:?}",
                    grad.place().name,
                    p.sizes()?,
                    g.sizes()?
                )));
            }
            call.places.written(param.place());
            call.places.read(grad.place());
            call.params.push(param);
            call.grads.push(grad);
        }
        Ok(call)
    }

    fn name(&self, what: &'static str, index: usize) -> Name {
        Name { what, of: self.many.then_some(index) }
    }

    fn expect_list(&self, what: &str, list: &[Tensor], expected: usize) -> Result<()> {
        if list.len() == expected {
            return Ok(());
        }
        let (rule, got) = (self.rule.name(), list.len());
        Err(Error::Value(if self.many {
            format!(
                "{what} must list {expected} tensors for these parameters and {rule}, got {got}"
            )
        } else {
            format!("{what} must be given for {rule}, got None")
        }))
    }

    /// One tensor of `T` per parameter, of the length that `length` makes of the parameter's, or
    /// none where the rule has none.
    pub(crate) fn column<T: Scalar>(
        &mut self,
        what: &'static str,
        list: &'a [Tensor],
        wanted: bool,
        length: impl Fn(usize) -> usize,
    ) -> Result<Vec<Destination<'a>>> {
        self.expect_list(what, list, if wanted { self.params.len() } else { 0 })?;
        let mut column = Vec::with_capacity(list.len());
        for (index, tensor) in list.iter().enumerate() {
            let name = self.name(what, index);
            let state = tensor.update(name)?;
            expect_dtype::<T>(name, state.dtype())?;
            let expected = length(self.params[index].len());
            if state.len() != expected {
                return Err(Error::Value(format!(
                    "{name} must hold {expected} elements, got {}",
                    state.len()
                )));
            }
            self.places.written(state.place());
            column.push(state);
        }
        Ok(column)
    }

    /// How each parameter is rounded, with the tensors that the answer needs.
    pub(crate) fn compensation(
        &mut self,
        list: &'a [Tensor],
        streams: usize,
    ) -> Result<Vec<Destination<'a>>> {
        let n = self.params.len();
        if ![0, n].contains(&streams) {
            return Err(Error::Value(format!(
                "streams must hold {n} integers for these parameters or none, got {streams}"
            )));
        }
        if list.is_empty() {
            return Ok(Vec::new());
        }
        if streams > 0 && n > 0 {
            return Err(Error::Value(
                "rounding is stochastic (streams) or compensated (compensation), got both".into(),
            ));
        }
        let rounded = self.params.iter().find(|p| p.dtype() != bf16::scalar_type());
        if let Some(param) = rounded {
            return Err(Error::Type(format!(
                "{} must be bfloat16 to be compensated, got {}",
                param.place().name,
                param.dtype().name()
            )));
        }
        self.column::<bf16>("compensation", list, true, |n| n)
    }
}

pub(crate) fn floats<'a>(source: &'a Source<'_>) -> Result<Floats<'a>> {
    Ok(if source.dtype() == f32::scalar_type() {
        Floats::F32(source.slice()?)
    } else if source.dtype() == bf16::scalar_type() {
        Floats::BF16(source.slice()?)
    } else {
        Floats::F16(source.slice()?)
    })
}

pub(crate) fn floats_mut<'a>(destination: &'a mut Destination<'_>) -> Result<FloatsMut<'a>> {
    Ok(if destination.dtype() == f32::scalar_type() {
        FloatsMut::F32(destination.slice_mut()?)
    } else if destination.dtype() == bf16::scalar_type() {
        FloatsMut::BF16(destination.slice_mut()?)
    } else {
        FloatsMut::F16(destination.slice_mut()?)
    })
}

/// The next tensor of a column, or nothing when there is no such column.
pub(crate) fn next<'a, T: Scalar>(
    column: &mut std::slice::IterMut<'a, Destination<'_>>,
) -> Result<&'a mut [T]> {
    column.next().map_or_else(|| Ok(Default::default()), Destination::slice_mut)
}

pub(crate) fn rounding<'a>(
    rest: &mut std::slice::IterMut<'a, Destination<'_>>,
    streams: &[i64],
    index: usize,
    seed: i64,
) -> Result<Rounding<'a>> {
    Ok(match (rest.next(), streams.get(index)) {
        (Some(rest), _) => Rounding::Kahan(rest.slice_mut()?),
        (None, Some(&stream)) => Rounding::Stochastic { seed: seed as u64, stream: stream as u64 },
        (None, None) => Rounding::Nearest,
    })
}

/// Where the step runs; none for the CPU.
pub(crate) fn queue_of(params: &[Destination<'_>]) -> Result<Option<Queue>> {
    let Some(first) = params.first() else { return Ok(None) };
    Queue::at(first.device(), first.place().name)
}

pub(crate) fn finish<const N: usize>(columns: [Vec<Destination<'_>>; N]) -> Result<()> {
    columns.into_iter().flatten().try_for_each(Destination::finish)
}
