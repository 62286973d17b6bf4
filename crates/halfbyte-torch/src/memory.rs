//! Checked memory of tensors, as kernels take it.

use crate::device::Device;
use crate::dtype::{Scalar, ScalarType};
use crate::error::{Error, Result};
use crate::overlap::Place;
use crate::tensor::{Inspection, Name, Tensor};
use std::ffi::c_void;

/// Checked, contiguous, aligned memory for reading.
#[derive(Debug)]
pub(crate) struct Source<'a> {
    /// Where the tensor lies, whether or not it was copied.
    pub(crate) place: Place<'a>,
    pub(crate) data: *const c_void,
    pub(crate) inspection: Inspection,
    /// The contiguous copy that is read instead, held until the kernel is done, or launched.
    pub(crate) _copy: Option<Tensor>,
}

impl<'a> Source<'a> {
    pub(crate) fn place(&self) -> Place<'a> {
        self.place
    }

    pub(crate) fn len(&self) -> usize {
        self.inspection.numel
    }

    pub(crate) fn dtype(&self) -> ScalarType {
        self.inspection.dtype
    }

    pub(crate) fn device(&self) -> Device {
        self.inspection.device
    }

    /// Bytes of all elements.
    pub(crate) fn nbytes(&self) -> usize {
        self.inspection.bytes
    }

    /// The raw bytes, whatever the dtype.
    ///
    /// # Errors
    /// [`Error::Value`] when they are not on the CPU.
    pub(crate) fn bytes(&self) -> Result<&[u8]> {
        expect_cpu(self.place.name, self.inspection.device)?;
        // SAFETY: the memory is the CPU's, and `inspect` checked that there are so many bytes.
        Ok(unsafe { std::slice::from_raw_parts(self.data.cast(), self.inspection.bytes) })
    }

    /// # Errors
    /// [`Error::Type`] when the tensor holds another dtype, [`Error::Value`] when it is not on the
    /// CPU.
    pub(crate) fn slice<T: Scalar>(&self) -> Result<&[T]> {
        expect_dtype::<T>(self.place.name, self.inspection.dtype)?;
        expect_cpu(self.place.name, self.inspection.device)?;
        // SAFETY: the memory is the CPU's, the dtype is T's, the length was checked by `inspect`,
        // the alignment by `read`.
        Ok(unsafe { std::slice::from_raw_parts(self.data.cast(), self.inspection.numel) })
    }
}

/// Checked, contiguous, aligned memory for writing.
#[derive(Debug)]
pub(crate) struct Destination<'a> {
    /// Where the tensor lies, whether or not it was copied.
    pub(crate) place: Place<'a>,
    pub(crate) data: *mut c_void,
    pub(crate) inspection: Inspection,
    /// The contiguous buffer that is written instead.
    pub(crate) copy: Option<Tensor>,
}

impl<'a> Destination<'a> {
    pub(crate) fn place(&self) -> Place<'a> {
        self.place
    }

    pub(crate) fn len(&self) -> usize {
        self.inspection.numel
    }

    pub(crate) fn dtype(&self) -> ScalarType {
        self.inspection.dtype
    }

    pub(crate) fn device(&self) -> Device {
        self.inspection.device
    }

    /// Bytes of all elements.
    pub(crate) fn nbytes(&self) -> usize {
        self.inspection.bytes
    }

    /// The raw bytes, whatever the dtype.
    ///
    /// # Errors
    /// [`Error::Value`] when they are not on the CPU.
    pub(crate) fn bytes_mut(&mut self) -> Result<&mut [u8]> {
        expect_cpu(self.place.name, self.inspection.device)?;
        // SAFETY: the memory is the CPU's, and `inspect` checked that there are so many bytes.
        // Torch hands memory out through an opaque call, so it counts as initialized.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.data.cast(), self.inspection.bytes) })
    }

    /// # Errors
    /// [`Error::Type`] when the tensor holds another dtype, [`Error::Value`] when it is not on the
    /// CPU.
    pub(crate) fn slice_mut<T: Scalar>(&mut self) -> Result<&mut [T]> {
        expect_dtype::<T>(self.place.name, self.inspection.dtype)?;
        expect_cpu(self.place.name, self.inspection.device)?;
        // SAFETY: the memory is the CPU's, the dtype is T's, the length was checked by `inspect`, the alignment by
        // `write`; memory from torch counts as initialized (see `bytes_mut`).
        Ok(unsafe { std::slice::from_raw_parts_mut(self.data.cast(), self.inspection.numel) })
    }

    /// Refuses to write over memory that is being read.
    pub(crate) fn apart_from(&self, source: &Source<'_>) -> Result<()> {
        self.apart(source.place.name, source.data as usize, source.inspection.bytes)
    }

    /// Refuses to write the same memory twice.
    pub(crate) fn apart_from_output(&self, other: &Self) -> Result<()> {
        self.apart(other.place.name, other.data as usize, other.inspection.bytes)
    }

    fn apart(&self, what: Name, data: usize, bytes: usize) -> Result<()> {
        let own = self.data as usize;
        if own < data + bytes && data < own + self.inspection.bytes {
            return Err(Error::Value(format!("{} must not overlap {what}", self.place.name)));
        }
        Ok(())
    }

    /// Sets every element of what is written to 0.
    pub(crate) fn zero(&self) -> Result<()> {
        self.copy.as_ref().unwrap_or(self.place.tensor).zero()
    }

    /// Copies the result to where it belongs, if it was written elsewhere. On a GPU, behind the
    /// kernel on the current stream.
    pub(crate) fn finish(self) -> Result<()> {
        match &self.copy {
            Some(copy) => self.place.tensor.copy_from(copy),
            None => Ok(()),
        }
    }
}

pub(crate) fn expect_dtype<T: Scalar>(what: Name, got: ScalarType) -> Result<()> {
    if got == T::scalar_type() {
        return Ok(());
    }
    Err(Error::Type(format!("{what} must be {}, got {}", T::scalar_type().name(), got.name())))
}

fn expect_cpu(what: Name, got: Device) -> Result<()> {
    if got.is_cpu() {
        return Ok(());
    }
    Err(Error::Value(format!("{what} must be on the CPU like the other tensors, got {got}")))
}
