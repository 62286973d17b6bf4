//! Where tensors are.

use crate::shim::shim;
use std::sync::OnceLock;

/// `at::DeviceType` by the numbers that this libtorch gives them.
struct Kinds {
    cpu: i32,
    cuda: i32,
    xpu: i32,
    meta: i32,
}

/// Asked for once: every op looks at the device of every tensor.
#[inline]
fn kinds() -> &'static Kinds {
    static KINDS: OnceLock<Kinds> = OnceLock::new();
    KINDS.get_or_init(|| {
        let s = shim();
        // SAFETY: these functions take nothing and return a constant.
        unsafe {
            Kinds {
                cpu: (s.aoti_torch_device_type_cpu)(),
                cuda: (s.aoti_torch_device_type_cuda)(),
                xpu: (s.aoti_torch_device_type_xpu)(),
                meta: (s.aoti_torch_device_type_meta)(),
            }
        }
    })
}

/// `at::Device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) kind: i32,
    /// Which of its kind; 0 for the CPU.
    pub(crate) index: i32,
}

impl Device {
    pub(crate) fn cpu() -> Self {
        Self { kind: kinds().cpu, index: 0 }
    }

    /// `"cuda"` or `"xpu"`, and which.
    pub(crate) fn gpu(kind: &str, index: i32) -> Option<Self> {
        match kind {
            "cuda" => Some(Self { kind: kinds().cuda, index }),
            "xpu" => Some(Self { kind: kinds().xpu, index }),
            _ => None,
        }
    }

    #[inline]
    pub(crate) fn is_cpu(self) -> bool {
        self.kind == kinds().cpu
    }

    /// CUDA devices, and those of ROCm, which torch calls by the same name.
    pub(crate) fn is_cuda(self) -> bool {
        self.kind == kinds().cuda
    }

    pub(crate) fn is_xpu(self) -> bool {
        self.kind == kinds().xpu
    }

    /// Whether there are kernels for this kind of device.
    #[inline]
    pub(crate) fn is_served(self) -> bool {
        self.is_cpu() || self.is_cuda() || self.is_xpu()
    }
}

/// As `PyTorch` prints it.
impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            device if device.is_cpu() => f.write_str("cpu"),
            device if device.is_cuda() => write!(f, "cuda:{}", self.index),
            device if device.is_xpu() => write!(f, "xpu:{}", self.index),
            device if device.kind == kinds().meta => f.write_str("meta"),
            device => write!(f, "a device of type {}", device.kind),
        }
    }
}
