//! Where tensors are.

use crate::shim::shim;

/// `at::Device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    /// `at::DeviceType` by the number that this libtorch gives it.
    pub(crate) kind: i32,
    /// Which of its kind; 0 for the CPU.
    pub(crate) index: i32,
}

impl Device {
    pub(crate) fn cpu() -> Self {
        // SAFETY: takes nothing, returns a constant.
        Self { kind: unsafe { (shim().aoti_torch_device_type_cpu)() }, index: 0 }
    }

    /// `"cuda"` or `"xpu"`, and which.
    pub(crate) fn gpu(kind: &str, index: i32) -> Option<Self> {
        let s = shim();
        // SAFETY: these functions take nothing and return a constant.
        let kind = unsafe {
            match kind {
                "cuda" => (s.aoti_torch_device_type_cuda)(),
                "xpu" => (s.aoti_torch_device_type_xpu)(),
                _ => return None,
            }
        };
        Some(Self { kind, index })
    }

    pub(crate) fn is_cpu(self) -> bool {
        self.kind == Self::cpu().kind
    }

    /// CUDA devices, and those of ROCm, which torch calls by the same name.
    pub(crate) fn is_cuda(self) -> bool {
        // SAFETY: takes nothing, returns a constant.
        self.kind == unsafe { (shim().aoti_torch_device_type_cuda)() }
    }

    pub(crate) fn is_xpu(self) -> bool {
        // SAFETY: takes nothing, returns a constant.
        self.kind == unsafe { (shim().aoti_torch_device_type_xpu)() }
    }

    /// Whether there are kernels for this kind of device.
    pub(crate) fn is_served(self) -> bool {
        self.is_cpu() || self.is_cuda() || self.is_xpu()
    }
}

/// As `PyTorch` prints it.
impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // SAFETY: takes nothing, returns a constant.
        let meta = unsafe { (shim().aoti_torch_device_type_meta)() };
        match self {
            device if device.is_cpu() => f.write_str("cpu"),
            device if device.is_cuda() => write!(f, "cuda:{}", self.index),
            device if device.is_xpu() => write!(f, "xpu:{}", self.index),
            device if device.kind == meta => f.write_str("meta"),
            device => write!(f, "a device of type {}", device.kind),
        }
    }
}
