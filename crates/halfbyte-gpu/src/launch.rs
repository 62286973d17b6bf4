//! What a launch takes beside the kernel: typed arguments and the size of the grid.

use crate::slice::{DeviceSlice, Floats};
use std::ffi::c_void;

/// One kernel argument. The type must be the one the kernel's parameter list has; `From` makes
/// them from slices and numbers.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'a> {
    /// A device address.
    Pointer(u64),
    /// `u32`.
    U32(u32),
    /// `i32`.
    I32(i32),
    /// `u64`.
    U64(u64),
    /// `f32`.
    F32(f32),
    /// A struct by value, laid out as C does, 8-byte aligned. CUDA and HIP only.
    Bytes(&'a [u8]),
}

impl Arg<'_> {
    /// No memory.
    pub(crate) const NULL: Self = Self::Pointer(0);

    /// Where the value lies, for drivers that copy arguments from addresses.
    pub(crate) fn address(&self) -> *const c_void {
        match self {
            Self::Pointer(value) | Self::U64(value) => std::ptr::from_ref(value).cast(),
            Self::U32(value) => std::ptr::from_ref(value).cast(),
            Self::I32(value) => std::ptr::from_ref(value).cast(),
            Self::F32(value) => std::ptr::from_ref(value).cast(),
            Self::Bytes(bytes) => bytes.as_ptr().cast(),
        }
    }

    /// Size of the value in bytes.
    pub(crate) fn size(&self) -> usize {
        match self {
            Self::Pointer(_) | Self::U64(_) => 8,
            Self::U32(_) | Self::I32(_) | Self::F32(_) => 4,
            Self::Bytes(bytes) => bytes.len(),
        }
    }
}

impl<T> From<DeviceSlice<T>> for Arg<'_> {
    fn from(slice: DeviceSlice<T>) -> Self {
        Self::Pointer(slice.pointer())
    }
}

impl From<Floats> for Arg<'_> {
    fn from(floats: Floats) -> Self {
        Self::Pointer(floats.pointer())
    }
}

/// Null for none.
impl<T> From<Option<DeviceSlice<T>>> for Arg<'_> {
    fn from(slice: Option<DeviceSlice<T>>) -> Self {
        slice.map_or(Self::NULL, Self::from)
    }
}

/// Null for none.
impl From<Option<Floats>> for Arg<'_> {
    fn from(floats: Option<Floats>) -> Self {
        floats.map_or(Self::NULL, Self::from)
    }
}

impl From<u32> for Arg<'_> {
    fn from(value: u32) -> Self {
        Self::U32(value)
    }
}

impl From<i32> for Arg<'_> {
    fn from(value: i32) -> Self {
        Self::I32(value)
    }
}

impl From<u64> for Arg<'_> {
    fn from(value: u64) -> Self {
        Self::U64(value)
    }
}

impl From<usize> for Arg<'_> {
    fn from(value: usize) -> Self {
        Self::U64(value as u64)
    }
}

impl From<f32> for Arg<'_> {
    fn from(value: f32) -> Self {
        Self::F32(value)
    }
}

impl<'a> From<&'a [u8]> for Arg<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::Bytes(bytes)
    }
}

/// How many groups of how many threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Number of groups in x, y and z. A zero makes the launch do nothing.
    pub groups: [u32; 3],
    /// Threads per group, in x.
    pub threads: u32,
    /// Shared memory per group beyond what the kernel declares, in bytes.
    pub shared_bytes: u32,
}

impl Grid {
    /// `groups` groups in x, of `threads` threads. A number of groups past `u32::MAX` becomes
    /// `u32::MAX`, which [`crate::Stream::launch`] refuses.
    #[must_use]
    pub fn new(groups: usize, threads: u32) -> Self {
        let groups = u32::try_from(groups).unwrap_or(u32::MAX);
        Self { groups: [groups, 1, 1], threads, shared_bytes: 0 }
    }

    /// The same with shared memory of `bytes` per group, beyond what the kernel declares.
    #[must_use]
    pub const fn shared(self, bytes: u32) -> Self {
        Self { shared_bytes: bytes, ..self }
    }

    /// The same with `y` groups in y.
    #[must_use]
    pub const fn y(self, y: u32) -> Self {
        Self { groups: [self.groups[0], y, self.groups[2]], ..self }
    }
}
