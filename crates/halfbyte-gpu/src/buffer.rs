//! Memory that is ours: for stand-alone Rust programs, tests, and paged optimizer states. Under
//! `PyTorch` every buffer comes from its allocator instead.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::slice::DeviceSlice;
use crate::stream::Stream;
use std::fmt;
use std::marker::PhantomData;

/// A type of which every bit pattern is a value, so that device memory can be read as it.
///
/// # Safety
/// The type has no padding and no invalid bit pattern.
pub unsafe trait Plain: Copy + Send + 'static {}

macro_rules! plain {
    ($($t:ty),*) => { $(
        // SAFETY: numbers of fixed width take every bit pattern.
        unsafe impl Plain for $t {}
    )* };
}
plain!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64, halfbyte::f16, halfbyte::bf16);

/// Memory of a device, `len` elements of `T`, freed on drop.
///
/// ```no_run
/// use halfbyte::{BlockSize, Code4};
/// use halfbyte_gpu::{DeviceBuffer, Stream, cuda_device, ops};
///
/// let (code, blocksize) = (Code4::Nf4, BlockSize::B64);
/// let values: Vec<f32> = (0..4096).map(|i| (i as f32).cos()).collect();
/// let blocks = blocksize.over(values.len());
///
/// let device = cuda_device(0)?; // no GPU, or no driver: the error says what was looked for
/// let stream = Stream::new(device)?;
/// let input = DeviceBuffer::from_slice(&stream, &values)?;
/// let packed = DeviceBuffer::<u8>::zeroed(device, blocks.packed_len())?;
/// let absmax = DeviceBuffer::<f32>::zeroed(device, blocks.count())?;
/// let (x, to, scales) = (input.slice().into(), packed.slice(), absmax.slice());
/// ops::quantize_4bit(&stream, x, code, blocksize, to, scales)?;
/// let packed: Vec<u8> = packed.to_vec(&stream)?; // waits for the stream
/// # Ok::<(), halfbyte_gpu::Error>(())
/// ```
pub struct DeviceBuffer<T> {
    device: &'static Device,
    pointer: u64,
    len: usize,
    element: PhantomData<fn() -> T>,
}

impl<T: Plain> DeviceBuffer<T> {
    /// `len` zeroed elements.
    ///
    /// # Errors
    /// When the device's memory is full, or the driver refuses.
    pub fn zeroed(device: &'static Device, len: usize) -> Result<Self> {
        let buffer = Self::new(device, len)?;
        if buffer.bytes() > 0 {
            // SAFETY: the buffer was just allocated with that many bytes.
            unsafe { device.driver().zero(buffer.pointer, buffer.bytes()) }?;
        }
        Ok(buffer)
    }

    /// A copy of `values`, made in the stream's order and complete on return.
    ///
    /// # Errors
    /// As [`DeviceBuffer::zeroed`].
    pub fn from_slice(stream: &Stream, values: &[T]) -> Result<Self> {
        let device = stream.device();
        let buffer = Self::new(device, values.len())?;
        if buffer.bytes() > 0 {
            // SAFETY: `T` is plain: its memory can be read as bytes.
            let bytes = unsafe {
                std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values))
            };
            // SAFETY: the buffer was just allocated with as many bytes; the stream is its device's.
            unsafe { device.driver().upload(stream.raw(), bytes, buffer.pointer) }?;
        }
        Ok(buffer)
    }

    /// The values, once the stream has run all that was enqueued before.
    ///
    /// # Errors
    /// [`Error::Argument`] when the stream is another device's; else what the driver reports.
    pub fn to_vec(&self, stream: &Stream) -> Result<Vec<T>> {
        if !std::ptr::eq(stream.device(), self.device) {
            return Err(Error::Argument {
                what: "stream",
                expected: format!("a stream of {}", self.device),
                got: format!("one of {}", stream.device()),
            });
        }
        let mut values = Vec::<T>::with_capacity(self.len);
        if self.bytes() > 0 {
            let spare = values.spare_capacity_mut();
            // SAFETY: zeroing makes the capacity's bytes initialized; as many lie in the vector.
            let bytes = unsafe {
                spare.as_mut_ptr().cast::<u8>().write_bytes(0, self.bytes());
                std::slice::from_raw_parts_mut(spare.as_mut_ptr().cast::<u8>(), self.bytes())
            };
            // SAFETY: the buffer holds as many bytes; the stream is its device's.
            unsafe { self.device.driver().download(stream.raw(), self.pointer, bytes) }?;
        }
        // SAFETY: `len` elements were written, and every bit pattern is a `T`.
        unsafe { values.set_len(self.len) };
        Ok(values)
    }

    /// The whole buffer, as launchers take it.
    ///
    /// The buffer must outlive what is launched with the slice (drop it after
    /// [`Stream::synchronize`]), and a slice that is written must not be used elsewhere meanwhile.
    #[must_use]
    pub fn slice(&self) -> DeviceSlice<T> {
        // SAFETY: the memory is allocated with `len` elements, aligned to 256 bytes, on the device.
        unsafe { DeviceSlice::new(self.pointer, self.len) }
    }

    fn new(device: &'static Device, len: usize) -> Result<Self> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| Error::Argument {
            what: "len",
            expected: "a number of elements whose bytes fit in memory".into(),
            got: len.to_string(),
        })?;
        let pointer = if bytes == 0 { 0 } else { device.driver().allocate(bytes)? };
        Ok(Self { device, pointer, len, element: PhantomData })
    }
}

impl<T> DeviceBuffer<T> {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &'static Device {
        self.device
    }

    fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

impl<T> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        if self.pointer != 0 {
            // SAFETY: the pointer came from this driver; users of the slice have finished.
            unsafe { self.device.driver().free(self.pointer) };
        }
    }
}

impl<T> fmt::Debug for DeviceBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}] on {}", std::any::type_name::<T>(), self.len, self.device)
    }
}

/// Bytes that the host and the device reach by the same address, and that move between them by
/// page: the memory of paged optimizer states. Freed on drop. It holds zeros at first.
pub struct ManagedBuffer {
    device: &'static Device,
    pointer: u64,
    bytes: usize,
}

impl ManagedBuffer {
    /// `bytes` zeroed bytes, aligned to 256.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the device has no such memory; else what the driver reports.
    pub fn zeroed(device: &'static Device, bytes: usize) -> Result<Self> {
        let pointer = if bytes == 0 { 0 } else { device.driver().allocate_managed(bytes)? };
        let buffer = Self { device, pointer, bytes };
        if bytes > 0 {
            // By the device: the host would make each page in its own memory, which then moves over.
            // Of a state larger than the device's memory the first pages leave it again.
            // SAFETY: nobody else has the memory yet.
            unsafe { device.driver().zero(pointer, bytes)? };
        }
        Ok(buffer)
    }

    /// The address, on the host and on the device. Null for no bytes.
    #[must_use]
    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &'static Device {
        self.device
    }

    /// Asks for all pages to be moved to the device, in the stream's order. A hint: where it
    /// cannot be followed, as in a graph that is being captured, pages move when they are touched.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn prefetch_to_device(&self, stream: &Stream) -> Result<()> {
        self.prefetch(stream, true)
    }

    /// Asks for all pages to be moved to the host, in the stream's order.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn prefetch_to_host(&self, stream: &Stream) -> Result<()> {
        self.prefetch(stream, false)
    }

    fn prefetch(&self, stream: &Stream, to_device: bool) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        // SAFETY: the memory is this buffer's; the stream belongs to the device it names.
        unsafe {
            stream.device().driver().prefetch(stream.raw(), self.pointer, self.bytes, to_device)
        }
    }
}

impl Drop for ManagedBuffer {
    fn drop(&mut self) {
        if self.pointer != 0 {
            // SAFETY: the pointer came from this driver; its users have finished.
            unsafe { self.device.driver().free(self.pointer) };
        }
    }
}

impl fmt::Debug for ManagedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} managed bytes on {}", self.bytes, self.device)
    }
}
