//! Memory on a device, as launchers take it: an address, a length, an element type.

use crate::error::{Error, Result};
use halfbyte::DType;
use std::fmt;
use std::marker::PhantomData;

/// `len` elements of `T` in a device's memory. A plain description: it owns nothing.
///
/// Whoever makes one vouches for the memory (see [`DeviceSlice::new`]); so launchers are safe
/// functions that check lengths.
pub struct DeviceSlice<T> {
    pointer: u64,
    len: usize,
    element: PhantomData<fn() -> T>,
}

impl<T> DeviceSlice<T> {
    /// Describes `len` elements of `T` at the device address `pointer`.
    ///
    /// # Safety
    /// Until the stream has run what is launched with this slice: the memory holds `len` elements
    /// of `T`, is aligned for `T` (no more than that), lies on that stream's device (or is
    /// accessible to it) and stays allocated. Memory that an op writes is neither read nor
    /// written by anything else meanwhile, unless the same stream orders it.
    #[must_use]
    pub const unsafe fn new(pointer: u64, len: usize) -> Self {
        Self { pointer, len, element: PhantomData }
    }

    /// No elements. Its address is null.
    #[must_use]
    pub const fn empty() -> Self {
        Self { pointer: 0, len: 0, element: PhantomData }
    }

    /// Number of elements.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// True for no elements.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device address.
    #[must_use]
    pub const fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Size in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.len.saturating_mul(size_of::<T>()) as u64
    }

    /// The elements from `start` on, `len` of them.
    ///
    /// # Errors
    /// [`Error::Argument`] when the slice ends before them.
    pub fn part(&self, what: &'static str, start: usize, len: usize) -> Result<Self> {
        match start.checked_add(len) {
            Some(end) if end <= self.len => Ok(Self {
                pointer: self.pointer + (start * size_of::<T>()) as u64,
                len,
                element: PhantomData,
            }),
            _ => Err(Error::Argument {
                what,
                expected: format!("inside a buffer of {} elements", self.len),
                got: format!("{len} elements from {start} on"),
            }),
        }
    }
}

impl DeviceSlice<u8> {
    /// Alignment of what [`DeviceSlice::carve`] cuts off, in bytes.
    pub const CARVE_ALIGNMENT: usize = 16;

    /// Bytes of workspace that `len` elements of `U` take when carved, alignment included. The
    /// sum over all parts is what a `<op>_workspace` function returns.
    #[must_use]
    pub const fn carved_bytes<U>(len: usize) -> usize {
        len.saturating_mul(size_of::<U>()).saturating_add(Self::CARVE_ALIGNMENT)
    }

    /// Cuts `len` elements of `U` off the front of a workspace, at an address that is a multiple
    /// of [`DeviceSlice::CARVE_ALIGNMENT`].
    ///
    /// # Errors
    /// [`Error::Length`] with `what` as the buffer's name when the workspace is too small.
    pub fn carve<U>(&mut self, what: &'static str, len: usize) -> Result<DeviceSlice<U>> {
        let alignment = Self::CARVE_ALIGNMENT as u64;
        let pointer = self.pointer.next_multiple_of(alignment);
        let padding = (pointer - self.pointer) as usize;
        let used = len.saturating_mul(size_of::<U>()).saturating_add(padding);
        if used > self.len {
            return Err(Error::Length { what, expected: used, got: self.len });
        }
        self.pointer += used as u64;
        self.len -= used;
        Ok(DeviceSlice { pointer, len, element: PhantomData })
    }
}

impl<T> Clone for DeviceSlice<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DeviceSlice<T> {}

impl<T> fmt::Debug for DeviceSlice<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}] at {:#x}", std::any::type_name::<T>(), self.len, self.pointer)
    }
}

/// Floating-point elements in a device's memory whose type is known at run time only.
#[derive(Clone, Copy, Debug)]
pub struct Floats {
    pointer: u64,
    len: usize,
    dtype: DType,
}

impl Floats {
    /// Describes `len` elements of `dtype` at the device address `pointer`.
    ///
    /// # Safety
    /// As for [`DeviceSlice::new`].
    #[must_use]
    pub const unsafe fn new(pointer: u64, len: usize, dtype: DType) -> Self {
        Self { pointer, len, dtype }
    }

    /// Number of elements.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// True for no elements.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device address.
    #[must_use]
    pub const fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Element type.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Size in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.len.saturating_mul(self.dtype.size()) as u64
    }
}

impl<T: halfbyte::Element> From<DeviceSlice<T>> for Floats {
    fn from(slice: DeviceSlice<T>) -> Self {
        Self { pointer: slice.pointer, len: slice.len, dtype: T::DTYPE }
    }
}
