//! The three floating-point element types that weights and activations come in.

use half::{bf16, f16};

/// Element type of a weight or an activation, as named in checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32, `"float32"`.
    F32,
    /// IEEE binary16, `"float16"`.
    F16,
    /// bfloat16, `"bfloat16"`.
    BF16,
}

impl DType {
    /// All element types.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::BF16];

    /// The name PyTorch and the on-disk state use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }

    /// Bytes per element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for DType {
    type Err = crate::Error;

    /// Reads a dtype name, with or without PyTorch's `torch.` prefix.
    fn from_str(s: &str) -> crate::Result<Self> {
        let name = s.strip_prefix("torch.").unwrap_or(s);
        Self::ALL.into_iter().find(|d| d.name() == name).ok_or_else(|| crate::Error::DTypeName {
            what: "dtype",
            expected: "float32, float16, bfloat16",
            got: s.to_owned(),
        })
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// A type that can be quantized, decoded to and multiplied: `f32`, [`half::f16`], [`half::bf16`].
///
/// All arithmetic happens in float32; [`from_f32`](Self::from_f32) rounds once, to nearest even.
/// The trait is sealed: kernels exist for exactly these three.
pub trait Element:
    sealed::Sealed
    + crate::arch::Lanes
    + Copy
    + Default
    + PartialEq
    + std::fmt::Debug
    + Send
    + Sync
    + 'static
{
    /// The run-time name of this type.
    const DTYPE: DType;
    /// Exact widening to float32.
    fn to_f32(self) -> f32;
    /// Rounds to nearest even.
    fn from_f32(x: f32) -> Self;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    #[inline]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline]
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    #[inline]
    fn to_f32(self) -> f32 {
        Self::to_f32_const(self)
    }
    #[inline]
    fn from_f32(x: f32) -> Self {
        Self::from_f32_const(x)
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
    #[inline]
    fn to_f32(self) -> f32 {
        Self::to_f32_const(self)
    }
    #[inline]
    fn from_f32(x: f32) -> Self {
        Self::from_f32_const(x)
    }
}
