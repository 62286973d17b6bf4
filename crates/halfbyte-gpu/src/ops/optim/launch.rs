//! Tables of tensors, and the launches that take them.

use super::table::{CHUNK, Entry, Header, LARGE, SMALL, TASK, Table};
use super::{Tensor8, Tensor32, has_trust_ratio};
use crate::error::Result;
use crate::{Arg, Device, DeviceSlice, Grid, Runtime, Source, Stream, sources};
use halfbyte::optim::{BLOCK, Hyper, Rule};
use std::ffi::CStr;

/// Threads of a group.
const THREADS: u32 = 256;
/// Groups per multiprocessor before each takes several chunks.
const GROUPS_PER_MULTIPROCESSOR: usize = 8;
/// Most chunks that a group of an 8-bit step takes: it makes a table of codes first.
const CHUNKS_PER_GROUP: usize = 8;
/// Bytes of the two sums of a task.
const SUMS: usize = 2 * size_of::<u64>();

/// How a device takes a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// By value, in 4096 bytes.
    Small,
    /// By value, in 32764 bytes.
    Large,
    /// From the workspace.
    Uploaded,
}

impl Form {
    /// For `tensors` tensors.
    fn of(device: &Device, tensors: usize) -> Self {
        match device.runtime() {
            Runtime::Cuda
                if tensors > SMALL && device.parameter_bytes() >= size_of::<Table<LARGE>>() =>
            {
                Self::Large
            }
            Runtime::Cuda | Runtime::Rocm => Self::Small,
            Runtime::Xpu | Runtime::OpenCl => Self::Uploaded,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Large => "large",
            Self::Uploaded => "uploaded",
        }
    }
}

/// A rule's source. Each has its own, so that no more is compiled than is used.
macro_rules! source_of {
    ($function:ident: $($rule:ident => $source:ident,)*) => {
        fn $function(rule: Rule) -> &'static Source {
            match rule {
                $(Rule::$rule => &sources::$source,)*
            }
        }
    };
}

source_of! { source_8bit:
    Adam => OPTIM_8BIT_ADAM,
    AdEmaMix => OPTIM_8BIT_ADEMAMIX,
    Momentum => OPTIM_8BIT_MOMENTUM,
    Lion => OPTIM_8BIT_LION,
    RmsProp => OPTIM_8BIT_RMSPROP,
    Adagrad => OPTIM_8BIT_ADAGRAD,
    ScheduleFree => OPTIM_8BIT_SCHEDULE_FREE_ADAMW,
}

source_of! { source_32bit:
    Adam => OPTIM_32BIT_ADAM,
    AdEmaMix => OPTIM_32BIT_ADEMAMIX,
    Momentum => OPTIM_32BIT_MOMENTUM,
    Lion => OPTIM_32BIT_LION,
    RmsProp => OPTIM_32BIT_RMSPROP,
    Adagrad => OPTIM_32BIT_ADAGRAD,
    ScheduleFree => OPTIM_32BIT_SCHEDULE_FREE_ADAMW,
}

/// Workspace for the table, where it is not an argument.
pub(super) fn table_bytes(device: &Device, tensors: usize) -> usize {
    match Form::of(device, tensors) {
        Form::Small | Form::Large => 0,
        Form::Uploaded if tensors == 0 => 0,
        Form::Uploaded => DeviceSlice::carved_bytes::<u8>(size_of::<Table<LARGE>>()),
    }
}

/// Workspace for the norms of tensors of these lengths, and their rates.
pub(super) fn norms_bytes(lengths: &[usize]) -> usize {
    let tasks: usize = lengths.iter().map(|&n| BLOCK.over(n).count().div_ceil(TASK)).sum();
    DeviceSlice::carved_bytes::<f32>(lengths.len()) + DeviceSlice::carved_bytes::<u8>(SUMS * tasks)
}

/// What one kind of launch is: its source and kernel, and how many groups it has.
struct Launch<'a> {
    stream: &'a Stream,
    source: &'static Source,
    kernel: String,
    /// Blocks of a unit: a chunk or a task.
    unit: usize,
    groups: Groups,
    form: Form,
    /// Takes the table where it is not an argument.
    table: DeviceSlice<u8>,
}

/// How many groups a launch has.
#[derive(Clone, Copy)]
enum Groups {
    /// Enough to fill the device; each takes several chunks.
    Shared,
    /// One per task.
    Unit,
    /// One per tensor.
    Tensor,
}

impl<'a> Launch<'a> {
    fn new(
        stream: &'a Stream,
        (source, kernel): (&'static Source, String),
        (unit, groups): (usize, Groups),
        form: Form,
        table: DeviceSlice<u8>,
    ) -> Self {
        let kernel = format!("{kernel}_{}\0", form.name());
        Self { stream, source, kernel, unit, groups, form, table }
    }

    /// As many launches as the tensors take. `head` completes the header of a launch from the
    /// numbers of tensors and units in those before.
    fn run(&self, entries: &[Entry], head: impl Fn(usize, usize) -> Header) -> Result<()> {
        let (mut tensors, mut units) = (0, 0);
        while tensors < entries.len() {
            let header = head(tensors, units);
            let (count, used) = match self.form {
                Form::Small => self.run_one::<SMALL>(&entries[tensors..], header)?,
                Form::Large | Form::Uploaded => {
                    self.run_one::<LARGE>(&entries[tensors..], header)?
                }
            };
            tensors += count;
            units += used;
        }
        Ok(())
    }

    /// Launches with the first entries, and says how many they were and how many units they have.
    fn run_one<const N: usize>(&self, entries: &[Entry], header: Header) -> Result<(usize, usize)> {
        let mut table = Table::<N> { header, tensors: [Entry::default(); N] };
        let (mut count, mut units) = (0, 0);
        for (slot, entry) in table.tensors.iter_mut().zip(entries) {
            let more = entry.units(self.unit);
            if count > 0 && units + more > i32::MAX as usize {
                break;
            }
            *slot = Entry { first: units as u32, ..*entry };
            (count, units) = (count + 1, units + more);
        }
        (table.header.tensors, table.header.units) = (count as u32, units as u32);
        let groups = match self.groups {
            Groups::Shared => {
                let fill =
                    GROUPS_PER_MULTIPROCESSOR * self.stream.device().multiprocessors() as usize;
                units.min(fill.max(units.div_ceil(CHUNKS_PER_GROUP)))
            }
            Groups::Unit => units,
            Groups::Tensor => count,
        };
        let argument = match self.form {
            Form::Small | Form::Large => Arg::Bytes(table.bytes(N)),
            Form::Uploaded => {
                let bytes = table.bytes(count);
                let to = self.table.part("workspace", 0, bytes.len())?;
                let (device, stream) = (self.stream.device(), self.stream.raw());
                // SAFETY: `to` is a part of the workspace, which is the caller's to give and as
                // long as `bytes`; the stream is the device's.
                unsafe { device.driver().upload(stream, bytes, to.pointer()) }?;
                Arg::from(to)
            }
        };
        self.stream.launch(self.source, self.name(), Grid::new(groups, THREADS), &[argument])?;
        Ok((count, units))
    }

    fn name(&self) -> &CStr {
        CStr::from_bytes_with_nul(self.kernel.as_bytes()).unwrap_or(c"")
    }
}

/// Cuts the place for a table off the workspace.
fn carve_table(form: Form, workspace: &mut DeviceSlice<u8>) -> Result<DeviceSlice<u8>> {
    match form {
        Form::Small | Form::Large => Ok(DeviceSlice::empty()),
        Form::Uploaded => workspace.carve("workspace", size_of::<Table<LARGE>>()),
    }
}

/// Those that are not empty.
fn entries<T>(tensors: &[T], rule: Rule, entry: impl Fn(Rule, &T) -> Entry) -> Vec<Entry> {
    let all = tensors.iter().map(|tensor| entry(rule, tensor));
    all.filter(|entry| entry.units(CHUNK) > 0).collect()
}

pub(super) fn step_8bit(
    stream: &Stream,
    rule: Rule,
    hyper: &Hyper,
    tensors: &[Tensor8],
    codes: [Option<DeviceSlice<f32>>; 2],
    mut workspace: DeviceSlice<u8>,
) -> Result<()> {
    let entries = entries(tensors, rule, Entry::of_8bit);
    if entries.is_empty() {
        return Ok(());
    }
    let form = Form::of(stream.device(), entries.len());
    let table = carve_table(form, &mut workspace)?;
    let [code1, code2] = codes.map(|code| code.map_or(0, |code| code.pointer()));
    let header = Header { code1, code2, ..Header::new(rule, hyper) };
    let kernel = (source_8bit(rule), format!("optim_8bit_{}", rule.name()));
    Launch::new(stream, kernel, (CHUNK, Groups::Shared), form, table).run(&entries, |_, _| header)
}

pub(super) fn step_32bit(
    stream: &Stream,
    rule: Rule,
    hyper: &Hyper,
    tensors: &[Tensor32],
    mut workspace: DeviceSlice<u8>,
) -> Result<()> {
    let header = Header::new(rule, hyper);
    let ratios = has_trust_ratio(rule, hyper);
    // Empty tensors have norms too: they are zero.
    let entries = if ratios {
        tensors.iter().map(|tensor| Entry::of_32bit(rule, tensor)).collect()
    } else {
        entries(tensors, rule, Entry::of_32bit)
    };
    if entries.is_empty() {
        return Ok(());
    }
    let form = Form::of(stream.device(), entries.len());
    let table = carve_table(form, &mut workspace)?;
    let launch = |kernel, split| Launch::new(stream, kernel, split, form, table);
    let mut rates = 0;
    if ratios {
        let tasks: usize = entries.iter().map(|entry| entry.units(TASK)).sum();
        rates = workspace.carve::<f32>("workspace", entries.len())?.pointer();
        let sums = workspace.carve::<u8>("workspace", SUMS * tasks)?.pointer();
        let head = |tensors: usize, units: usize| {
            let rates = rates + (tensors * size_of::<f32>()) as u64;
            header.with_norms(rates, sums + (units * SUMS) as u64)
        };
        let norms = (&sources::OPTIM_NORMS, format!("optim_norms_{}", rule.name()));
        launch(norms, (TASK, Groups::Unit)).run(&entries, head)?;
        let trust = (&sources::OPTIM_NORMS, "optim_trust".to_owned());
        launch(trust, (TASK, Groups::Tensor)).run(&entries, head)?;
    }
    let steps = (source_32bit(rule), format!("optim_32bit_{}", rule.name()));
    launch(steps, (CHUNK, Groups::Shared)).run(&entries, |tensors, _| {
        header.with_norms(if ratios { rates + (tensors * size_of::<f32>()) as u64 } else { 0 }, 0)
    })
}
