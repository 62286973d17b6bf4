//! Tensors: an owning handle, and what must hold before a kernel reads or writes the memory.

use crate::device::Device;
use crate::dtype::{Scalar, ScalarType};
use crate::error::{Error, Result};
use crate::memory::{Destination, Source};
use crate::overlap::Place;
use crate::shim::{Handle, NO_WORDS, Value, check, shim};
use std::ffi::c_void;

/// What messages call a tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Name {
    pub(crate) what: &'static str,
    /// The parameter that it belongs to, where there are many.
    pub(crate) of: Option<usize>,
}

impl From<&'static str> for Name {
    fn from(what: &'static str) -> Self {
        Self { what, of: None }
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.what, self.of) {
            (what, None) => f.write_str(what),
            ("p", Some(index)) => write!(f, "parameter {index}"),
            (what, Some(index)) => write!(f, "{what} of parameter {index}"),
        }
    }
}

/// An owning tensor handle.
#[derive(Debug)]
pub(crate) struct Tensor(Handle);

impl Drop for Tensor {
    fn drop(&mut self) {
        // SAFETY: the handle is owned and freed once.
        unsafe { (shim().aoti_torch_delete_tensor_object)(self.0) };
    }
}

impl Tensor {
    /// # Safety
    /// `value` is an owning tensor handle that nobody else frees.
    pub(crate) unsafe fn from_value(value: Value) -> Self {
        Self(value as usize as Handle)
    }

    /// Hands the ownership over.
    pub(crate) fn into_value(self) -> Value {
        std::mem::ManuallyDrop::new(self).0 as usize as Value
    }

    /// A fresh contiguous tensor, from torch's allocator for the device.
    pub(crate) fn empty(sizes: &[i64], dtype: ScalarType, device: Device) -> Result<Self> {
        const INLINE: usize = 8;
        let mut few = [0i64; INLINE];
        let mut many = Vec::new();
        let strides: &mut [i64] = if sizes.len() <= INLINE {
            &mut few[..sizes.len()]
        } else {
            many.resize(sizes.len(), 0);
            &mut many
        };
        let mut step = 1i64;
        for (stride, size) in strides.iter_mut().zip(sizes).rev() {
            *stride = step;
            step = step.saturating_mul(*size.max(&1)); // an empty tensor may have any other size
        }
        let mut handle = std::ptr::null_mut();
        let s = shim();
        // SAFETY: both arrays hold `sizes.len()` entries.
        let made = check(unsafe {
            (s.aoti_torch_empty_strided)(
                sizes.len() as i64,
                sizes.as_ptr(),
                strides.as_ptr(),
                dtype.0,
                device.kind,
                device.index,
                &raw mut handle,
            )
        });
        made.map_err(|error| no_memory(sizes, dtype, device, error))?;
        let tensor = Self(handle);
        if device.is_cpu() {
            tensor.prefer_huge_pages(dtype)?;
        }
        Ok(tensor)
    }

    fn prefer_huge_pages(&self, dtype: ScalarType) -> Result<()> {
        let bytes = self.numel()? * dtype.size().unwrap_or(0);
        let mut data = std::ptr::null_mut();
        // SAFETY: the handle is valid.
        check(unsafe { (shim().torch_get_mutable_data_ptr)(self.0, &raw mut data) })?;
        prefer_huge_pages(data as usize, bytes);
        Ok(())
    }

    pub(crate) fn dim(&self) -> Result<usize> {
        let mut dim = 0;
        // SAFETY: the handle is valid.
        check(unsafe { (shim().aoti_torch_get_dim)(self.0, &raw mut dim) })?;
        Ok(dim as usize)
    }

    pub(crate) fn numel(&self) -> Result<usize> {
        let mut numel = 0;
        // SAFETY: the handle is valid.
        check(unsafe { (shim().aoti_torch_get_numel)(self.0, &raw mut numel) })?;
        Ok(numel as usize)
    }

    pub(crate) fn sizes(&self) -> Result<&[i64]> {
        let dim = self.dim()?;
        let mut sizes = std::ptr::null_mut();
        // SAFETY: the handle is valid.
        check(unsafe { (shim().aoti_torch_get_sizes)(self.0, &raw mut sizes) })?;
        // SAFETY: the tensor, which outlives the borrow, owns `dim` sizes.
        Ok(unsafe { borrowed(sizes, dim) })
    }

    pub(crate) fn strides(&self) -> Result<&[i64]> {
        let dim = self.dim()?;
        let mut strides = std::ptr::null_mut();
        // SAFETY: the handle is valid.
        check(unsafe { (shim().aoti_torch_get_strides)(self.0, &raw mut strides) })?;
        // SAFETY: the tensor, which outlives the borrow, owns `dim` strides.
        Ok(unsafe { borrowed(strides, dim) })
    }

    pub(crate) fn dtype(&self) -> Result<ScalarType> {
        let mut dtype = 0;
        // SAFETY: the handle is valid.
        check(unsafe { (shim().aoti_torch_get_dtype)(self.0, &raw mut dtype) })?;
        Ok(ScalarType(dtype))
    }

    pub(crate) fn device(&self) -> Result<Device> {
        let s = shim();
        let mut device = Device { kind: 0, index: 0 };
        // SAFETY: the handle is valid.
        unsafe {
            check((s.aoti_torch_get_device_type)(self.0, &raw mut device.kind))?;
            if !device.is_cpu() {
                check((s.aoti_torch_get_device_index)(self.0, &raw mut device.index))?;
            }
        }
        Ok(device)
    }

    /// A view of the first `n` elements of a contiguous vector.
    pub(crate) fn first(&self, n: i64) -> Result<Self> {
        let one = 1;
        let mut view = std::ptr::null_mut();
        // SAFETY: the handle is valid; the arrays hold one entry each.
        check(unsafe {
            (shim().aoti_torch__reinterpret_tensor)(
                self.0,
                1,
                &raw const n,
                &raw const one,
                0,
                &raw mut view,
            )
        })?;
        Ok(Self(view))
    }

    /// Sets every element to 0.
    pub(crate) fn zero(&self) -> Result<()> {
        // SAFETY: the handle is valid.
        check(unsafe { (shim().aoti_torch_zero_)(self.0) })
    }

    /// Copies the values; autograd does not see it.
    pub(crate) fn copy_from(&self, source: &Self) -> Result<()> {
        let s = shim();
        // SAFETY: both handles are valid; the mode is this thread's, and is put back.
        unsafe {
            let recording = (s.aoti_torch_grad_mode_is_enabled)();
            if recording {
                (s.aoti_torch_grad_mode_set_enabled)(false);
            }
            let copied = check((s.aoti_torch_copy_)(self.0, source.0, 0));
            if recording {
                (s.aoti_torch_grad_mode_set_enabled)(true);
            }
            copied
        }
    }

    /// Checks that the memory the tensor claims is really there: on a device that has kernels, and
    /// inside its storage (FSDP shrinks storages under live tensors). Says if it is contiguous.
    fn inspect(&self, what: Name) -> Result<Inspection> {
        let s = shim();
        let device = self.device()?;
        if !device.is_served() {
            return Err(Error::Value(format!(
                "{what} must be on the CPU, a CUDA or an XPU device, got {device}"
            )));
        }
        let (mut offset, mut storage) = (0, 0);
        // SAFETY: the handle is valid.
        unsafe {
            check((s.aoti_torch_get_storage_offset)(self.0, &raw mut offset))?;
            check((s.aoti_torch_get_storage_size)(self.0, &raw mut storage))?;
        }
        let (numel, dtype) = (self.numel()?, self.dtype()?);
        let item = dtype.size().ok_or_else(|| {
            Error::Type(format!("{what}: tensors of {} are not supported", dtype.name()))
        })?;
        let (mut contiguous, mut distinct) = (true, true);
        let (mut step, mut last) = (1i64, 0i64);
        if numel > 0 {
            for (&size, &stride) in self.sizes()?.iter().zip(self.strides()?).rev() {
                if size != 1 {
                    contiguous &= stride == step;
                    distinct &= stride != 0;
                    step *= size;
                    last = last.saturating_add((size - 1).saturating_mul(stride));
                }
            }
            let end = offset.saturating_add(last).saturating_add(1).saturating_mul(item as i64);
            if end > storage {
                return Err(Error::Value(format!(
                    "{what} needs {end} bytes of storage, but its storage holds {storage} \
                     (was it freed or resized?)"
                )));
            }
        }
        let reach = if numel == 0 { 0 } else { (last as usize + 1) * item };
        let bytes = numel * item;
        Ok(Inspection { device, dtype, contiguous, distinct, numel, bytes, item, reach })
    }

    /// The elements for reading: in place when contiguous, else a contiguous copy.
    pub(crate) fn read(&self, what: impl Into<Name>) -> Result<Source<'_>> {
        let what = what.into();
        let inspection = self.inspect(what)?;
        let data = self.const_data(&inspection)?;
        let place = inspection.place(what, self, data);
        if inspection.contiguous && (data as usize).is_multiple_of(inspection.item) {
            return Ok(Source { place, data, inspection, _copy: None });
        }
        self.copied(place, inspection.dtype, inspection.device)
    }

    /// The elements as `T`, converted when the tensor has another dtype.
    pub(crate) fn read_as<T: Scalar>(&self, what: impl Into<Name>) -> Result<Source<'_>> {
        self.read_to(what, T::scalar_type())
    }

    /// As [`read_as`](Self::read_as), where the dtype is known at run time only.
    pub(crate) fn read_to(&self, what: impl Into<Name>, dtype: ScalarType) -> Result<Source<'_>> {
        let what = what.into();
        if self.dtype()? == dtype {
            return self.read(what);
        }
        let inspection = self.inspect(what)?;
        let place = inspection.place(what, self, self.const_data(&inspection)?);
        self.copied(place, dtype, inspection.device)
    }

    /// On a GPU the copy is made on the current stream, where the kernel comes after it; its memory
    /// goes back to torch's allocator, which gives it to later work of the same stream only.
    fn copied<'a>(
        &self,
        place: Place<'a>,
        dtype: ScalarType,
        device: Device,
    ) -> Result<Source<'a>> {
        let copy = Self::empty(self.sizes()?, dtype, device)?;
        copy.copy_from(self)?;
        let inspection = copy.inspect(place.name)?;
        let data = copy.const_data(&inspection)?;
        Ok(Source { place, data, inspection, _copy: Some(copy) })
    }

    fn const_data(&self, inspection: &Inspection) -> Result<*const c_void> {
        let mut data = std::ptr::null();
        // SAFETY: the handle is valid.
        check(unsafe { (shim().torch_get_const_data_ptr)(self.0, &raw mut data) })?;
        inspection.present(data)
    }

    /// The elements for overwriting: in place when contiguous, else a buffer that
    /// [`Destination::finish`] copies back. Its contents at first are of no use.
    pub(crate) fn write(&self, what: impl Into<Name>) -> Result<Destination<'_>> {
        let what = what.into();
        let inspection = self.inspect(what)?;
        if !inspection.distinct {
            return Err(Error::Value(format!(
                "{what} must have a place of its own for every element, got a tensor that was \
                 expanded (strides {:?})",
                self.strides()?
            )));
        }
        let data = self.mutable_data(&inspection)?;
        let place = inspection.place(what, self, data);
        if inspection.contiguous && (data as usize).is_multiple_of(inspection.item) {
            return Ok(Destination { place, data, inspection, copy: None });
        }
        let copy = Self::empty(self.sizes()?, inspection.dtype, inspection.device)?;
        let inspection = copy.inspect(what)?;
        let data = copy.mutable_data(&inspection)?;
        Ok(Destination { place, data, inspection, copy: Some(copy) })
    }

    /// The elements for changing: as [`write`](Self::write), and a buffer holds the tensor's values.
    pub(crate) fn update(&self, what: impl Into<Name>) -> Result<Destination<'_>> {
        let destination = self.write(what)?;
        if let Some(copy) = &destination.copy {
            copy.copy_from(self)?;
        }
        Ok(destination)
    }

    fn mutable_data(&self, inspection: &Inspection) -> Result<*mut c_void> {
        let mut data = std::ptr::null_mut();
        // SAFETY: the handle is valid.
        check(unsafe { (shim().torch_get_mutable_data_ptr)(self.0, &raw mut data) })?;
        inspection.present(data).map(<*const c_void>::cast_mut)
    }
}

/// # Safety
/// `data` points to `len` values that live as long as the borrow, unless `len` is 0.
unsafe fn borrowed<'a, T>(data: *const T, len: usize) -> &'a [T] {
    if len == 0 {
        return &[];
    }
    // SAFETY: by the caller's contract.
    unsafe { std::slice::from_raw_parts(data, len) }
}

/// What [`Tensor::inspect`] has established.
#[derive(Debug)]
pub(crate) struct Inspection {
    pub(crate) device: Device,
    pub(crate) dtype: ScalarType,
    contiguous: bool,
    /// No two elements lie in one place because of a stride of 0.
    distinct: bool,
    pub(crate) numel: usize,
    pub(crate) bytes: usize,
    item: usize,
    /// Bytes from the first element to the end of the last one in memory.
    reach: usize,
}

impl Inspection {
    fn place<'a>(&self, name: Name, tensor: &'a Tensor, data: *const c_void) -> Place<'a> {
        let dense = self.reach == self.bytes;
        Place { name, tensor, start: data as usize, reach: self.reach, item: self.item, dense }
    }

    /// Empty tensors have no address; they get one that is aligned for everything.
    fn present(&self, data: *const c_void) -> Result<*const c_void> {
        if self.bytes == 0 {
            return Ok(std::ptr::without_provenance(64));
        }
        if data.is_null() {
            return Err(Error::Value("a tensor without memory was passed".into()));
        }
        Ok(data)
    }
}

/// Why a new tensor could not be had. Its sizes are right, so for want of memory unless PyTorch says
/// otherwise. The words are PyTorch's own, which programs look for to try smaller batches.
#[cold]
fn no_memory(sizes: &[i64], dtype: ScalarType, device: Device, error: Error) -> Error {
    let Error::Torch(mut what) = error else { return error };
    if what == NO_WORDS {
        let beginning = match device {
            device if device.is_cpu() => "DefaultCPUAllocator: can't allocate memory.",
            device if device.is_xpu() => "XPU out of memory.",
            _ => "CUDA out of memory.",
        };
        what =
            format!("{beginning} A {} tensor of {sizes:?} did not fit on {device}", dtype.name());
    }
    let of_device = !device.is_cpu() && what.contains("out of memory");
    if of_device { Error::Memory(what) } else { Error::Torch(what) }
}

/// Asks Linux for huge pages under large memory that the allocator has just mapped anew: filling
/// 32 MiB page by page costs several times what the kernels need (15 against 4.7 ms for
/// `dequantize_4bit` on one thread; 2-core Xeon, 2026-11). A hint: refusal is fine.
pub(crate) fn prefer_huge_pages(address: usize, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        const HUGE: usize = 2 << 20;
        let start = address.next_multiple_of(HUGE);
        let end = (address + bytes) / HUGE * HUGE;
        if bytes >= 2 * HUGE && start < end {
            // SAFETY: this advice changes no contents, wherever it points.
            unsafe { libc::madvise(start as *mut _, end - start, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (address, bytes);
}
