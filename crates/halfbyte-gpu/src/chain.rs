//! Which back end serves: CUDA, ROCm, XPU or the CPU, and why not the others.

use crate::device::{Device, Runtime};
use crate::error::{Error, Result};
use std::env;
use std::fmt;
use std::sync::OnceLock;

/// What can do the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    /// NVIDIA GPUs.
    Cuda,
    /// AMD GPUs.
    Rocm,
    /// Intel GPUs.
    Xpu,
    /// The core's kernels: always there.
    Cpu,
}

impl Backend {
    /// All of them, in the order in which they are considered.
    pub const CHAIN: [Self; 4] = [Self::Cuda, Self::Rocm, Self::Xpu, Self::Cpu];

    /// The name that `HALFBYTE_BACKEND` takes.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::Rocm => "rocm",
            Self::Xpu => "xpu",
            Self::Cpu => "cpu",
        }
    }

    /// The first device of this back end; none for the CPU.
    fn first_device(self) -> Option<Result<&'static Device>> {
        match self {
            Self::Cuda => Some(crate::cuda_device(0)),
            Self::Rocm => Some(crate::rocm_device(0)),
            Self::Xpu => Some(crate::xpu_device(0)),
            Self::Cpu => None,
        }
    }

    /// What was looked for, found and refused for this back end.
    fn probe(self) -> BackendReport {
        match self {
            Self::Cuda => crate::cuda::probe(),
            Self::Rocm => crate::hip::probe(),
            Self::Xpu => crate::level_zero::probe(),
            Self::Cpu => BackendReport {
                backend: self,
                looked_for: String::new(),
                found: Some(format!("instruction set {}", halfbyte::isa::detect())),
                kernels: String::new(),
                devices: Vec::new(),
                refused: None,
            },
        }
    }

    fn of(runtime: Runtime) -> Option<Self> {
        match runtime {
            Runtime::Cuda => Some(Self::Cuda),
            Runtime::Rocm => Some(Self::Rocm),
            Runtime::Xpu => Some(Self::Xpu),
            Runtime::OpenCl => None,
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cuda => "CUDA",
            Self::Rocm => "ROCm",
            Self::Xpu => "XPU",
            Self::Cpu => "CPU",
        })
    }
}

/// One device of a back end, in a [`BackendReport`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceReport {
    /// Its number.
    pub ordinal: usize,
    /// The name its driver gives.
    pub name: String,
    /// Its architecture, for example `sm_80`.
    pub architecture: String,
    /// Why it cannot be used; none when it can.
    pub refused: Option<String>,
}

/// What was looked for, found and refused for one back end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendReport {
    /// The back end.
    pub backend: Backend,
    /// What was looked for, for example `libcuda.so.1`.
    pub looked_for: String,
    /// What was found: the library's file and version; none when nothing was.
    pub found: Option<String>,
    /// Where kernels come from: machine code in this build, or a compiler with its version and
    /// file, or why there is neither. Empty where no device was found.
    pub kernels: String,
    /// The devices, refused ones included.
    pub devices: Vec<DeviceReport>,
    /// Why the back end cannot be used; none when it can.
    pub refused: Option<String>,
}

/// Why a runtime cannot be used, and the file if one was found.
pub(crate) struct Refusal {
    pub(crate) found: Option<String>,
    pub(crate) error: Error,
}

/// What a report says was looked for: the file that the variable names, else the usual ones.
pub(crate) fn looked_for(variable: &str, usual: &str) -> String {
    match env::var(variable) {
        Ok(path) if !path.is_empty() => format!("{path} ({variable})"),
        _ => usual.to_owned(),
    }
}

impl BackendReport {
    /// True when the back end has a device that can be used (the CPU always).
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.refused.is_none()
    }

    /// A report of a back end that cannot be used.
    pub(crate) fn refused(backend: Backend, looked_for: String, why: &Error) -> Self {
        Self {
            backend,
            looked_for,
            found: None,
            kernels: String::new(),
            devices: Vec::new(),
            refused: Some(why.to_string()),
        }
    }

    /// The same report, refused when no device of it can be used.
    pub(crate) fn judged(mut self) -> Self {
        if self.refused.is_none() && self.devices.iter().all(|device| device.refused.is_some()) {
            self.refused = Some(if self.devices.is_empty() {
                "no devices".to_owned()
            } else {
                "no device that has kernels".to_owned()
            });
        }
        self
    }
}

impl fmt::Display for BackendReport {
    /// A few lines of text: the back end, then what was found, indented by two spaces.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.is_usable() { "usable" } else { "not usable" };
        write!(f, "{}: {verdict}", self.backend)?;
        if let Some(reason) = &self.refused {
            write!(f, ": {reason}")?;
        }
        match &self.found {
            Some(found) => write!(f, "\n  found {found}")?,
            None if self.backend != Backend::Cpu => {
                write!(f, "\n  looked for {}", self.looked_for)?;
            }
            None => {}
        }
        for device in &self.devices {
            write!(f, "\n  device {}: {} ({})", device.ordinal, device.name, device.architecture)?;
            if let Some(reason) = &device.refused {
                write!(f, ": {reason}")?;
            }
        }
        if !self.kernels.is_empty() {
            write!(f, "\n  kernels: {}", self.kernels)?;
        }
        Ok(())
    }
}

/// A report per back end, in the order of the chain. Opens each driver, makes no context.
///
/// A back end that `HALFBYTE_BACKEND` excludes is not opened, and its report says so.
#[must_use]
pub fn report() -> Vec<BackendReport> {
    Backend::CHAIN.into_iter().map(Backend::probe).collect()
}

/// The back end that `HALFBYTE_BACKEND` names (read once per process); none when it is not set.
///
/// # Errors
/// [`Error::Backend`] when it names none.
pub fn selected() -> Result<Option<Backend>> {
    static SELECTED: OnceLock<Result<Option<Backend>>> = OnceLock::new();
    SELECTED
        .get_or_init(|| match env::var("HALFBYTE_BACKEND") {
            Err(env::VarError::NotPresent) => Ok(None),
            Err(env::VarError::NotUnicode(name)) => {
                Err(Error::Backend { got: name.to_string_lossy().into_owned() })
            }
            Ok(name) if name.trim().is_empty() => Ok(None),
            Ok(name) => parse(&name).map(Some),
        })
        .clone()
}

/// The back end in use: the one `HALFBYTE_BACKEND` names, else the first of the chain with a
/// device that can be used.
///
/// # Errors
/// When `HALFBYTE_BACKEND` names no back end, or one that cannot be used (the error says why).
pub fn choose() -> Result<Backend> {
    if let Some(backend) = selected()? {
        backend.first_device().transpose()?;
        return Ok(backend);
    }
    let usable = |backend: &Backend| backend.probe().is_usable();
    Ok(Backend::CHAIN.into_iter().find(usable).unwrap_or(Backend::Cpu))
}

/// Refuses a runtime that `HALFBYTE_BACKEND` excludes. Asked before its library is opened.
pub(crate) fn permit(runtime: Runtime) -> Result<()> {
    match selected()? {
        Some(backend) if Backend::of(runtime).is_some_and(|this| this != backend) => {
            Err(Error::Deselected { selected: backend.name(), runtime })
        }
        _ => Ok(()),
    }
}

fn parse(name: &str) -> Result<Backend> {
    let wanted = name.trim();
    Backend::CHAIN
        .into_iter()
        .find(|backend| backend.name().eq_ignore_ascii_case(wanted))
        .ok_or_else(|| Error::Backend { got: name.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_others_are_refused_with_the_list() {
        for backend in Backend::CHAIN {
            assert_eq!(parse(&backend.name().to_uppercase()).unwrap(), backend);
        }
        let error = parse("metal").unwrap_err().to_string();
        assert_eq!(error, "HALFBYTE_BACKEND must be one of cpu, cuda, rocm, xpu, got \"metal\"");
    }

    #[test]
    fn a_report_without_usable_devices_is_refused() {
        let device = |refused: Option<&str>| DeviceReport {
            ordinal: 0,
            name: "old".into(),
            architecture: "sm_61".into(),
            refused: refused.map(str::to_owned),
        };
        let report = |devices| BackendReport {
            backend: Backend::Cuda,
            looked_for: "libcuda.so.1".into(),
            found: Some("a driver".into()),
            kernels: String::new(),
            devices,
            refused: None,
        };
        assert_eq!(report(vec![]).judged().refused.as_deref(), Some("no devices"));
        let old = report(vec![device(Some("too old"))]).judged();
        assert!(!old.is_usable());
        assert!(old.to_string().contains("device 0: old (sm_61): too old"), "{old}");
        assert!(report(vec![device(Some("too old")), device(None)]).judged().is_usable());
    }
}
