//! Tensors on a GPU: the device and stream that a kernel is launched on, and torch's memory as the
//! launchers of `halfbyte-gpu` take it.
//!
//! The ops themselves are those of the CPU: one boxed kernel serves every dispatch key, checks its
//! arguments once, and asks [`Queue::of`] where the first tensor is.
//!
//! **Streams and memory.** A kernel is launched on the stream that is current for its tensors'
//! device. What an op allocates (results, contiguous copies, scratch) comes from torch's caching
//! allocator while that stream is current, so it belongs to that stream: when a temporary is freed
//! right after the launch, the allocator hands its memory to later work of the same stream only,
//! which runs after the kernel. So nothing has to be recorded (`record_stream`) and nothing waits.
//! Arguments that come from another stream are the caller's to order, as with torch's own ops.
//!
//! **Devices.** The launchers push the device's context when another one is current, and every
//! allocation names its device; the current device of the thread is neither read nor changed.

pub(crate) mod experts;
pub(crate) mod managed;
pub(crate) mod optim;
pub(crate) mod outliers;
mod streams;
mod symbols;

pub(crate) use symbols::take_symbol_error;

use crate::device::Device;
use crate::dtype::{Scalar, ScalarType};
use crate::error::{Error, Result};
use crate::memory::{Destination, Source, expect_dtype};
use crate::tensor::{Name, Tensor};
use halfbyte::{DType, bf16, f16};
use halfbyte_gpu::{DeviceSlice, Floats, Stream};

/// Where a kernel is launched: the current stream of the first tensor's device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Queue {
    stream: Stream,
    device: Device,
    /// The tensor that decided it.
    of: Name,
}

impl Queue {
    /// For a tensor on a GPU; none for one on the CPU.
    ///
    /// # Errors
    /// [`Error::Gpu`] when the GPU cannot be used, with the reason.
    #[inline]
    pub(crate) fn of(first: &Source<'_>) -> Result<Option<Self>> {
        Self::at(first.device(), first.place().name)
    }

    /// As [`Queue::of`], for a device that the tensor called `of` decided.
    #[inline]
    pub(crate) fn at(device: Device, of: Name) -> Result<Option<Self>> {
        if device.is_cpu() { Ok(None) } else { Self::current(device, of).map(Some) }
    }

    fn current(device: Device, of: Name) -> Result<Self> {
        Ok(Self { stream: streams::current(device)?, device, of })
    }

    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    pub(crate) fn device(&self) -> &'static halfbyte_gpu::Device {
        self.stream.device()
    }

    /// A fresh tensor on this device.
    pub(crate) fn empty(&self, sizes: &[i64], dtype: ScalarType) -> Result<Tensor> {
        Tensor::empty(sizes, dtype, self.device)
    }

    /// Scratch memory, which may go away as soon as the launches that use it are enqueued.
    pub(crate) fn workspace(&self, bytes: usize) -> Result<Workspace> {
        if bytes == 0 {
            return Ok(Workspace { slice: DeviceSlice::empty(), _tensor: None });
        }
        let tensor = self.empty(&[bytes as i64], u8::scalar_type())?;
        let slice = tensor.write("workspace")?.on(self)?;
        Ok(Workspace { slice, _tensor: Some(tensor) })
    }

    fn expect(&self, what: Name, got: Device) -> Result<()> {
        if got == self.device {
            return Ok(());
        }
        let Self { device, of, .. } = self;
        Err(Error::Value(format!("{what} must be on {device} as {of} is, got {got}")))
    }
}

/// What [`Queue::workspace`] hands out.
pub(crate) struct Workspace {
    slice: DeviceSlice<u8>,
    _tensor: Option<Tensor>,
}

impl Workspace {
    pub(crate) fn slice(&self) -> DeviceSlice<u8> {
        self.slice
    }
}

/// The element types that kernels compute with.
pub(crate) fn float(dtype: ScalarType) -> Option<DType> {
    let known = [
        (f32::scalar_type(), DType::F32),
        (bf16::scalar_type(), DType::BF16),
        (f16::scalar_type(), DType::F16),
    ];
    known.into_iter().find_map(|(code, float)| (code == dtype).then_some(float))
}

fn expect_float(what: impl std::fmt::Display, dtype: ScalarType) -> Result<DType> {
    float(dtype).ok_or_else(|| {
        Error::Value(format!("{what} must be float32, float16 or bfloat16, got {}", dtype.name()))
    })
}

macro_rules! on_device {
    ($($memory:ident),*) => { $(impl $memory<'_> {
        /// The elements, where the kernel on `queue` finds them.
        ///
        /// # Errors
        /// [`Error::Type`] when the tensor holds another dtype, [`Error::Value`] when it is on
        /// another device.
        pub(crate) fn on<T: Scalar>(&self, queue: &Queue) -> Result<DeviceSlice<T>> {
            expect_dtype::<T>(self.place.name, self.inspection.dtype)?;
            queue.expect(self.place.name, self.inspection.device)?;
            // SAFETY: the memory is the queue's device's, the dtype is T's, the length was checked
            // by `inspect`, the alignment by `read` or `write`; the module says how long it lives.
            Ok(unsafe { DeviceSlice::new(self.data as u64, self.inspection.numel) })
        }

        /// The raw bytes, whatever the dtype.
        ///
        /// # Errors
        /// [`Error::Value`] when they are on another device.
        pub(crate) fn bytes_on(&self, queue: &Queue) -> Result<DeviceSlice<u8>> {
            queue.expect(self.place.name, self.inspection.device)?;
            // SAFETY: as above; bytes need no alignment.
            Ok(unsafe { DeviceSlice::new(self.data as u64, self.inspection.bytes) })
        }

        /// The elements, of float32, float16 or bfloat16; `what` is what decides that.
        ///
        /// # Errors
        /// [`Error::Value`] for other dtypes, or when they are on another device.
        pub(crate) fn floats_on(&self, queue: &Queue, what: &str) -> Result<Floats> {
            let dtype = expect_float(what, self.inspection.dtype)?;
            queue.expect(self.place.name, self.inspection.device)?;
            // SAFETY: as in `on`.
            Ok(unsafe { Floats::new(self.data as u64, self.inspection.numel, dtype) })
        }

        /// The elements, of the dtype that another tensor has.
        ///
        /// # Errors
        /// [`Error::Type`] for other dtypes, [`Error::Value`] when they are on another device.
        pub(crate) fn floats_as(&self, queue: &Queue, dtype: ScalarType) -> Result<Floats> {
            if self.inspection.dtype == dtype {
                return self.floats_on(queue, self.place.name.what);
            }
            Err(Error::Type(format!(
                "{} must be {}, got {}",
                self.place.name,
                dtype.name(),
                self.inspection.dtype.name()
            )))
        }
    })* };
}
on_device!(Source, Destination);
