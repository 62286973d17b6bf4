//! Optimizer steps on the device: `halfbyte::optim`, with the same names and the same bits.
//!
//! | what | launches, while the tensors fit into one table |
//! |---|---|
//! | [`step_8bit`], [`step_32bit`] | one for all tensors |
//! | [`step_32bit`] with a trust ratio | three: norms, rates, steps |
//!
//! A launch takes its table of tensors by value, so that it can be captured in a CUDA graph: 49
//! tensors where kernels take 4096 bytes of arguments, 408 where they take 32764 (CUDA 12.1 and
//! newer). More tensors take more launches. On OpenCL and Level Zero the table is copied into the
//! workspace first.
//!
//! Parameters and states after a step equal the core's bit for bit, trust ratios included: the
//! norms are summed in the core's order, in float64 arithmetic made of integers. (A NaN stays a
//! NaN; its payload may differ.)

mod launch;
mod table;

use crate::error::{Error, Result, check_len};
use crate::{Device, DeviceSlice, Floats, Stream};
use halfbyte::bf16;
use halfbyte::optim::{BLOCK, Hyper, Rule};

/// How a new parameter is rounded to bfloat16, as `halfbyte::optim::Rounding` says it. Parameters
/// of other types are rounded to nearest even whatever this says.
#[derive(Clone, Copy, Debug, Default)]
pub enum Rounding {
    /// To nearest even.
    #[default]
    Nearest,
    /// Up or down at random, with probabilities that make the expectation exact.
    Stochastic {
        /// Chosen by the user.
        seed: u64,
        /// Which tensor this is. The lower 32 bits count.
        stream: u64,
    },
    /// The parameter is the sum of itself and this tensor, as long as the parameter, which takes
    /// what rounding cuts off.
    Kahan(DeviceSlice<bf16>),
}

/// A parameter with float32 states.
#[derive(Clone, Copy, Debug)]
pub struct Tensor32 {
    /// The parameter.
    pub param: Floats,
    /// Its gradient, of any of the types.
    pub grad: Floats,
    /// As long as the parameter, twice that for `AdEMAMix`.
    pub state1: DeviceSlice<f32>,
    /// As long as the parameter for rules with a second state, else empty.
    pub state2: DeviceSlice<f32>,
    /// The parameter's norm where the caller knows it; else it is computed when needed.
    pub param_norm: Option<f64>,
    /// One element. Takes the update's norm when [`Hyper::max_unorm`] applies.
    pub update_norm: Option<DeviceSlice<f32>>,
    /// For bfloat16 parameters.
    pub rounding: Rounding,
}

/// A parameter with 8-bit states.
#[derive(Clone, Copy, Debug)]
pub struct Tensor8 {
    /// The parameter.
    pub param: Floats,
    /// Its gradient, of any of the types.
    pub grad: Floats,
    /// The first state of rules that keep it in float32 ([`Rule::has_float_state`]), else empty.
    pub floats: DeviceSlice<f32>,
    /// Codes of the first state, as long as the parameter, twice that for `AdEMAMix`; empty when it
    /// is in `floats`.
    pub state1: DeviceSlice<u8>,
    /// Its scales: one per block of 256, twice that for `AdEMAMix`.
    pub absmax1: DeviceSlice<f32>,
    /// Codes of the second state, or empty.
    pub state2: DeviceSlice<u8>,
    /// Its scales, or empty.
    pub absmax2: DeviceSlice<f32>,
    /// For bfloat16 parameters.
    pub rounding: Rounding,
}

/// Bytes of workspace that [`step_8bit`] takes for `tensors` tensors. None on CUDA and ROCm.
#[must_use]
pub fn step_8bit_workspace(device: &Device, tensors: usize) -> usize {
    launch::table_bytes(device, tensors)
}

/// Bytes of workspace that [`step_32bit`] takes for tensors of these lengths. None on CUDA and ROCm
/// without a trust ratio.
#[must_use]
pub fn step_32bit_workspace(
    device: &Device,
    rule: Rule,
    hyper: &Hyper,
    lengths: &[usize],
) -> usize {
    let ratios = if has_trust_ratio(rule, hyper) { launch::norms_bytes(lengths) } else { 0 };
    launch::table_bytes(device, lengths.len()) + ratios
}

/// Updates every tensor in place, with float32 states.
///
/// # Errors
/// [`Error::Length`] when a gradient, a state or the compensation does not have its parameter's
/// length or the workspace is too small, [`Error::Argument`] for a `param_norm` that is negative,
/// and what the driver reports. After the first two nothing has been changed.
pub fn step_32bit(
    stream: &Stream,
    rule: Rule,
    hyper: &Hyper,
    tensors: &[Tensor32],
    workspace: DeviceSlice<u8>,
) -> Result<()> {
    tensors.iter().try_for_each(|tensor| tensor.check(rule))?;
    launch::step_32bit(stream, rule, hyper, tensors, workspace)
}

/// Updates every tensor in place, with 8-bit states: `code1` for state 1, `code2` for a second
/// moment (`None` only for rules that have none), 256 ascending values each.
/// [`Hyper::max_unorm`] does not apply.
///
/// The codes lie on the device and are not looked at here. Tables that do not ascend or hold NaN
/// make for wrong states, never for accesses out of bounds.
///
/// # Errors
/// As [`step_32bit`]; [`Error::Length`] when a code does not hold 256 values.
pub fn step_8bit(
    stream: &Stream,
    rule: Rule,
    hyper: &Hyper,
    tensors: &[Tensor8],
    code1: DeviceSlice<f32>,
    code2: Option<DeviceSlice<f32>>,
    workspace: DeviceSlice<u8>,
) -> Result<()> {
    if rule.coded_first_states() > 0 {
        check_len("code1", 256, code1.len())?;
    }
    if rule.has_second_state() {
        check_len("code2", 256, code2.map_or(0, |code| code.len()))?;
    }
    tensors.iter().try_for_each(|tensor| tensor.check(rule))?;
    launch::step_8bit(stream, rule, hyper, tensors, [Some(code1), code2], workspace)
}

/// Whether updates are bounded by the norm of the parameter.
fn has_trust_ratio(rule: Rule, hyper: &Hyper) -> bool {
    hyper.max_unorm > 0.0 && rule.has_trust_ratio()
}

fn check_common(
    param: Floats,
    grad: Floats,
    state2: usize,
    rounding: Rounding,
    rule: Rule,
) -> Result<()> {
    let n = param.len();
    check_len("gradient", n, grad.len())?;
    check_len("state2", if rule.has_second_state() { n } else { 0 }, state2)?;
    match rounding {
        Rounding::Kahan(rest) => check_len("compensation", n, rest.len()),
        _ => Ok(()),
    }
}

impl Tensor32 {
    fn check(&self, rule: Rule) -> Result<()> {
        check_common(self.param, self.grad, self.state2.len(), self.rounding, rule)?;
        let first = rule.first_states().saturating_mul(self.param.len());
        check_len("state1", first, self.state1.len())?;
        if let Some(norm) = self.param_norm.filter(|norm| norm.is_sign_negative()) {
            return Err(Error::Argument {
                what: "param_norm",
                expected: "a norm, which is not negative".into(),
                got: norm.to_string(),
            });
        }
        self.update_norm.map_or(Ok(()), |norm| check_len("update_norm", 1, norm.len()))
    }
}

impl Tensor8 {
    fn check(&self, rule: Rule) -> Result<()> {
        check_common(self.param, self.grad, self.state2.len(), self.rounding, rule)?;
        let n = self.param.len();
        let (floats, first) = (usize::from(rule.has_float_state()), rule.coded_first_states());
        check_len("float32 state1", floats * n, self.floats.len())?;
        check_len("state1", first.saturating_mul(n), self.state1.len())?;
        let blocks = BLOCK.over(n).count();
        let second = if rule.has_second_state() { blocks } else { 0 };
        check_len("absmax1", first * blocks, self.absmax1.len())?;
        check_len("absmax2", second, self.absmax2.len())
    }
}
