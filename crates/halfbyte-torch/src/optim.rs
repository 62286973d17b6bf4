//! The optimizer ops: parameters, gradients and states from the dispatcher to the core's step.
//!
//! Everything is checked before anything is changed. Tensors that are not contiguous are worked on
//! in a contiguous copy; parameters and states are copied back.

// Kernels own their arguments, whether or not they use them up.
#![allow(clippy::needless_pass_by_value)]

use crate::error::{Error, Result};
use crate::gpu;
use crate::gpu::optim::{Coded, Columns};
use crate::memory::Source;
use crate::optim_call::{Call, finish, floats, floats_mut, next, queue_of, rounding};
use crate::stack::{Ints, Str, group, ops};
use crate::tensor::Tensor;
use crate::threads::use_torch_threads;
use halfbyte::Code8;
use halfbyte::optim::{BLOCK, Hyper, Rule, Tensor8, Tensor32, step_8bit, step_32bit};

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
    if let Some(queue) = queue_of(&params)? {
        let columns = Columns {
            params: &params,
            grads: &grads,
            state1: &state1,
            state2: &state2,
            compensation: &rest,
            streams,
            seed,
        };
        gpu::optim::step_32bit(&queue, rule, hyper, &columns, &norms, param_norm)?;
        return finish([params, state1, state2, norms, rest]);
    }
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
    if call.params.is_empty() {
        return Ok(()); // no tensor says which device the codes should be on
    }

    let qmap1 = scales.qmap1.read_as::<f32>("qmap1")?;
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
    call.places.read(qmap1.place());
    if let Some(qmap2) = &qmap2 {
        call.places.read(qmap2.place());
    }
    let Call { mut params, grads, places, .. } = call;
    if let Some(queue) = queue_of(&params)? {
        places.check()?;
        let columns = Columns {
            params: &params,
            grads: &grads,
            state1: &state1,
            state2: &state2,
            compensation: &rest,
            streams,
            seed,
        };
        let (qmap1, qmap2) = (&qmap1, qmap2.as_ref());
        let coded = Coded { absmax1: &absmax1, absmax2: &absmax2, qmap1, qmap2 };
        gpu::optim::step_8bit(&queue, rule, hyper, &columns, &coded)?;
        return finish([params, state1, state2, absmax1, absmax2, rest]);
    }
    let code1 = code("qmap1", &qmap1)?;
    let code2 = qmap2.as_ref().map(|qmap2| code("qmap2", qmap2)).transpose()?;
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
                grad: crate::optim_call::floats(grad)?,
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
