//! The optimizer ops: parameters, gradients and states from the dispatcher to the core's step.
//!
//! Everything is checked before anything is changed. Tensors that are not contiguous are worked on
//! in a contiguous copy; parameters and states are copied back.

// Kernels own their arguments, whether or not they use them up.
#![allow(clippy::needless_pass_by_value)]

use crate::error::{Error, Result};
use crate::ops::use_torch_threads;
use crate::overlap::Places;
use crate::stack::{Ints, Str, group, ops};
use crate::tensor::{Destination, Name, Scalar, Source, Tensor};
use halfbyte::optim::{
    BLOCK, Floats, FloatsMut, Hyper, Rounding, Rule, Tensor8, Tensor32, step_8bit, step_32bit,
};
use halfbyte::{Code8, bf16, f16};

ops! {
    Update32bit = c"optimizer_update_32bit" => update_32bit(
        optimizer_name: Str, tensors: One, state: OneState32, norms: Norms, rates: Rates,
        rest: Rest) -> ();
    Update32bitGroup = c"optimizer_update_32bit.group" => update_32bit_group(
        optimizer_name: Str, tensors: Many, state: State32, max_unorm: f64, rates: Rates,
        rest: Rest, random: Random) -> ();
    Update8bit = c"optimizer_update_8bit_blockwise" => update_8bit(
        optimizer_name: Str, tensors: One, state2: Option<Tensor>, rates: Rates, time: Time,
        state: OneState8, rest: Scaling) -> ();
    Update8bitGroup = c"optimizer_update_8bit_blockwise.group" => update_8bit_group(
        optimizer_name: Str, tensors: Many, state: State8, rates: Rates, rest: Rest,
        random: Random) -> ();
}

group! {
    /// One parameter.
    One { g: Tensor, p: Tensor, state1: Tensor }
}

group! {
    /// What else goes with one parameter and 32-bit states.
    OneState32 { state2: Option<Tensor>, unorm_vec: Option<Tensor> }
}

group! {
    /// What else goes with one parameter and 8-bit states.
    OneState8 { qmap1: Tensor, qmap2: Option<Tensor>, absmax1: Tensor, absmax2: Option<Tensor> }
}

group! {
    /// Parameters that share their hyperparameters.
    Many { g: Vec<Tensor>, p: Vec<Tensor>, state1: Vec<Tensor>, state2: Vec<Tensor> }
}

group! {
    /// What else goes with them and 32-bit states.
    State32 { unorm_vec: Vec<Tensor>, compensation: Vec<Tensor> }
}

group! {
    /// What else goes with them and 8-bit states.
    State8 {
        absmax1: Vec<Tensor>,
        absmax2: Vec<Tensor>,
        compensation: Vec<Tensor>,
        qmap1: Tensor,
        qmap2: Option<Tensor>,
    }
}

group! {
    /// For the trust ratio of one parameter.
    Norms { max_unorm: f64, param_norm: f64 }
}

group! {
    /// Numbers that every schema lists together.
    Rates { beta1: f64, beta2: f64, beta3: f64, alpha: f64, eps: f64 }
}

group! {
    /// Where training is.
    Time { step: i64, lr: f64 }
}

group! {
    /// What happens to gradients and parameters beside the rule.
    Scaling { weight_decay: f64, gnorm_scale: f64, skip_zeros: bool }
}

group! {
    /// [`Time`] and [`Scaling`] as most schemas mix them.
    Rest { weight_decay: f64, step: i64, lr: f64, gnorm_scale: f64, skip_zeros: bool }
}

group! {
    /// For stochastic rounding: a stream per parameter, or none to round to nearest.
    Random { streams: Ints, seed: i64 }
}

fn rule(name: &Str) -> Result<Rule> {
    Ok(String::from_utf8_lossy(name.bytes()?).parse()?)
}

fn hyper(rates: &Rates, rest: &Rest, max_unorm: f64) -> Result<Hyper> {
    let step = u64::try_from(rest.step)
        .ok()
        .filter(|&step| step > 0)
        .ok_or_else(|| Error::Value(format!("step must count from 1, got {}", rest.step)))?;
    Ok(Hyper {
        lr: rest.lr,
        beta1: rates.beta1,
        beta2: rates.beta2,
        beta3: rates.beta3,
        alpha: rates.alpha,
        eps: rates.eps,
        weight_decay: rest.weight_decay,
        gnorm_scale: rest.gnorm_scale,
        max_unorm,
        skip_zeros: rest.skip_zeros,
        step,
    })
}

/// The tensors of a call, with what is known of them together.
struct Call<'a> {
    rule: Rule,
    /// Messages say which parameter is meant.
    many: bool,
    params: Vec<Destination<'a>>,
    grads: Vec<Source<'a>>,
    places: Places<'a>,
}

impl<'a> Call<'a> {
    /// Parameters and gradients, checked.
    fn new(rule: Rule, many: bool, p: &'a [Tensor], g: &'a [Tensor]) -> Result<Self> {
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
    fn column<T: Scalar>(
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
            let mut state = tensor.update(name)?;
            state.slice_mut::<T>()?;
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
    fn compensation(&mut self, list: &'a [Tensor], streams: usize) -> Result<Vec<Destination<'a>>> {
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

fn floats<'a>(source: &'a Source<'_>) -> Result<Floats<'a>> {
    Ok(if source.dtype() == f32::scalar_type() {
        Floats::F32(source.slice()?)
    } else if source.dtype() == bf16::scalar_type() {
        Floats::BF16(source.slice()?)
    } else {
        Floats::F16(source.slice()?)
    })
}

fn floats_mut<'a>(destination: &'a mut Destination<'_>) -> Result<FloatsMut<'a>> {
    Ok(if destination.dtype() == f32::scalar_type() {
        FloatsMut::F32(destination.slice_mut()?)
    } else if destination.dtype() == bf16::scalar_type() {
        FloatsMut::BF16(destination.slice_mut()?)
    } else {
        FloatsMut::F16(destination.slice_mut()?)
    })
}

/// The next tensor of a column, or nothing when there is no such column.
fn next<'a, T: Scalar>(
    column: &mut std::slice::IterMut<'a, Destination<'_>>,
) -> Result<&'a mut [T]> {
    column.next().map_or_else(|| Ok(Default::default()), Destination::slice_mut)
}

fn rounding<'a>(
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

fn finish<const N: usize>(columns: [Vec<Destination<'_>>; N]) -> Result<()> {
    columns.into_iter().flatten().try_for_each(Destination::finish)
}

// ---- 32-bit states -----------------------------------------------------------------------------

fn step32(
    many: bool,
    (rule, hyper): (Rule, &Hyper),
    tensors: &Many,
    (unorm_vec, param_norm): (&[Tensor], Option<f64>),
    compensation: &[Tensor],
    (streams, seed): (&[i64], i64),
) -> Result<()> {
    let mut call = Call::new(rule, many, &tensors.p, &tensors.g)?;
    let first = rule.first_states();
    let mut state1 = call.column::<f32>("state1", &tensors.state1, true, |n| first * n)?;
    let second = rule.has_second_state();
    let mut state2 = call.column::<f32>("state2", &tensors.state2, second, |n| n)?;
    let mut norms = call.column::<f32>("unorm_vec", unorm_vec, !unorm_vec.is_empty(), |_| 1)?;
    let mut rest = call.compensation(compensation, streams.len())?;
    let Call { mut params, grads, places, .. } = call;
    places.check()?;
    {
        let (mut state2, mut norms, mut rest) =
            (state2.iter_mut(), norms.iter_mut(), rest.iter_mut());
        let mut work = Vec::with_capacity(params.len());
        for (index, ((param, grad), state1)) in
            params.iter_mut().zip(&grads).zip(&mut state1).enumerate()
        {
            work.push(Tensor32 {
                param: floats_mut(param)?,
                grad: floats(grad)?,
                state1: state1.slice_mut()?,
                state2: next(&mut state2)?,
                param_norm,
                update_norm: next::<f32>(&mut norms)?.first_mut(),
                rounding: rounding(&mut rest, streams, index, seed)?,
            });
        }
        use_torch_threads();
        step_32bit(rule, hyper, &mut work)?;
    }
    finish([params, state1, state2, norms, rest])
}

fn update_32bit(
    optimizer_name: Str,
    tensors: One,
    state: OneState32,
    norms: Norms,
    rates: Rates,
    rest: Rest,
) -> Result<()> {
    let rule = rule(&optimizer_name)?;
    let hyper = hyper(&rates, &rest, norms.max_unorm)?;
    // A negative one, which no norm is, asks for the norm to be computed.
    let param_norm = Some(norms.param_norm).filter(|&norm| norm >= 0.0);
    let unorm_vec = state.unorm_vec.as_slice();
    let tensors = tensors.with(state.state2, rule);
    step32(false, (rule, &hyper), &tensors, (unorm_vec, param_norm), &[], (&[], 0))
}

impl One {
    /// As a group of one. Rules with one state do not look at another one.
    fn with(self, state2: Option<Tensor>, rule: Rule) -> Many {
        let state2 = state2.filter(|_| rule.has_second_state());
        Many {
            g: vec![self.g],
            p: vec![self.p],
            state1: vec![self.state1],
            state2: state2.into_iter().collect(),
        }
    }
}

fn update_32bit_group(
    optimizer_name: Str,
    tensors: Many,
    state: State32,
    max_unorm: f64,
    rates: Rates,
    rest: Rest,
    random: Random,
) -> Result<()> {
    let rule = rule(&optimizer_name)?;
    let hyper = hyper(&rates, &rest, max_unorm)?;
    random.streams.with(|streams| {
        let random = (streams, random.seed);
        let norms = (&state.unorm_vec[..], None);
        step32(true, (rule, &hyper), &tensors, norms, &state.compensation, random)
    })
}

// ---- 8-bit states ------------------------------------------------------------------------------

/// What 8-bit states have beside their codes.
struct Scales<'a> {
    absmax1: &'a [Tensor],
    absmax2: &'a [Tensor],
    qmap1: &'a Tensor,
    qmap2: Option<&'a Tensor>,
}

fn step8(
    many: bool,
    (rule, hyper): (Rule, &Hyper),
    tensors: &Many,
    scales: &Scales<'_>,
    compensation: &[Tensor],
    (streams, seed): (&[i64], i64),
) -> Result<()> {
    let mut call = Call::new(rule, many, &tensors.p, &tensors.g)?;
    let (first, second) = (rule.first_states(), rule.has_second_state());
    let coded = !rule.has_float_state();
    let blocks = |n| BLOCK.over(n).count();
    let mut state1 = if coded {
        call.column::<u8>("state1", &tensors.state1, true, |n| first * n)?
    } else {
        call.column::<f32>("state1", &tensors.state1, true, |n| first * n)?
    };
    let mut state2 = call.column::<u8>("state2", &tensors.state2, second, |n| n)?;
    let mut absmax1 =
        call.column::<f32>("absmax1", scales.absmax1, coded, |n| first * blocks(n))?;
    let mut absmax2 = call.column::<f32>("absmax2", scales.absmax2, second, blocks)?;
    let mut rest = call.compensation(compensation, streams.len())?;

    let qmap1 = scales.qmap1.read_as::<f32>("qmap1")?;
    let code1 = code("qmap1", &qmap1)?;
    let qmap2 = match scales.qmap2.filter(|_| second) {
        Some(qmap2) => Some(qmap2.read_as::<f32>("qmap2")?),
        None if second => {
            return Err(Error::Value(format!(
                "qmap2 must hold 256 values for {}, got none",
                rule.name()
            )));
        }
        None => None,
    };
    let code2 = qmap2.as_ref().map(|qmap2| code("qmap2", qmap2)).transpose()?;
    call.places.read(qmap1.place());
    if let Some(qmap2) = &qmap2 {
        call.places.read(qmap2.place());
    }
    let Call { mut params, grads, places, .. } = call;
    places.check()?;
    {
        let (mut absmax1, mut state2, mut absmax2, mut rest) =
            (absmax1.iter_mut(), state2.iter_mut(), absmax2.iter_mut(), rest.iter_mut());
        let mut work = Vec::with_capacity(params.len());
        for (index, ((param, grad), state1)) in
            params.iter_mut().zip(&grads).zip(&mut state1).enumerate()
        {
            let (floats, state1): (&mut [f32], &mut [u8]) =
                if coded { (&mut [], state1.slice_mut()?) } else { (state1.slice_mut()?, &mut []) };
            work.push(Tensor8 {
                param: floats_mut(param)?,
                grad: self::floats(grad)?,
                floats,
                state1,
                absmax1: next(&mut absmax1)?,
                state2: next(&mut state2)?,
                absmax2: next(&mut absmax2)?,
                rounding: rounding(&mut rest, streams, index, seed)?,
            });
        }
        use_torch_threads();
        let code2 = code2.as_ref().unwrap_or_else(|| Code8::dynamic(false));
        step_8bit(rule, hyper, &code1, code2, &mut work)?;
    }
    finish([params, state1, state2, absmax1, absmax2, rest])
}

fn code(what: &str, values: &Source<'_>) -> Result<Code8> {
    let values = values.slice()?;
    if values.len() != 256 {
        return Err(Error::Value(format!("{what} must hold 256 values, got {}", values.len())));
    }
    Code8::new(values).map_err(|error| Error::Value(format!("{what}: {error}")))
}

fn update_8bit(
    optimizer_name: Str,
    tensors: One,
    state2: Option<Tensor>,
    rates: Rates,
    time: Time,
    state: OneState8,
    rest: Scaling,
) -> Result<()> {
    let rule = rule(&optimizer_name)?;
    let (Time { step, lr }, Scaling { weight_decay, gnorm_scale, skip_zeros }) = (time, rest);
    let rest = Rest { weight_decay, step, lr, gnorm_scale, skip_zeros };
    let hyper = hyper(&rates, &rest, 0.0)?;
    let absmax2 = state.absmax2.filter(|_| rule.has_second_state());
    let scales = Scales {
        absmax1: if rule.has_float_state() { &[] } else { std::slice::from_ref(&state.absmax1) },
        absmax2: absmax2.as_slice(),
        qmap1: &state.qmap1,
        qmap2: state.qmap2.as_ref(),
    };
    step8(false, (rule, &hyper), &tensors.with(state2, rule), &scales, &[], (&[], 0))
}

fn update_8bit_group(
    optimizer_name: Str,
    tensors: Many,
    state: State8,
    rates: Rates,
    rest: Rest,
    random: Random,
) -> Result<()> {
    let rule = rule(&optimizer_name)?;
    let hyper = hyper(&rates, &rest, 0.0)?;
    let scales = Scales {
        absmax1: &state.absmax1,
        absmax2: &state.absmax2,
        qmap1: &state.qmap1,
        qmap2: state.qmap2.as_ref(),
    };
    random.streams.with(|streams| {
        let random = (streams, random.seed);
        step8(true, (rule, &hyper), &tensors, &scales, &state.compensation, random)
    })
}
