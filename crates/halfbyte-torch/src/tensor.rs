//! Tensors as kernels see them: an owning handle, and checked slices of its memory.

use crate::error::{Error, Result};
use crate::overlap::Place;
use crate::shim::{Handle, Value, check, shim};
use halfbyte::{bf16, f16};
use std::ffi::c_void;
use std::sync::OnceLock;

/// `at::ScalarType` by the number that this libtorch gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ScalarType(pub(crate) i32);

/// The element types this crate knows by name.
struct Known {
    code: ScalarType,
    name: &'static str,
    size: usize,
}

fn known() -> &'static [Known] {
    static KNOWN: OnceLock<Vec<Known>> = OnceLock::new();
    KNOWN.get_or_init(|| {
        let s = shim();
        // SAFETY: these functions take nothing and return a constant.
        let codes = unsafe {
            [
                ((s.aoti_torch_dtype_float32)(), "float32", 4),
                ((s.aoti_torch_dtype_uint8)(), "uint8", 1),
                ((s.aoti_torch_dtype_bfloat16)(), "bfloat16", 2),
                ((s.aoti_torch_dtype_float16)(), "float16", 2),
                ((s.aoti_torch_dtype_float64)(), "float64", 8),
                ((s.aoti_torch_dtype_int8)(), "int8", 1),
                ((s.aoti_torch_dtype_int16)(), "int16", 2),
                ((s.aoti_torch_dtype_int32)(), "int32", 4),
                ((s.aoti_torch_dtype_int64)(), "int64", 8),
                ((s.aoti_torch_dtype_bool)(), "bool", 1),
            ]
        };
        codes
            .into_iter()
            .map(|(code, name, size)| Known { code: ScalarType(code), name, size })
            .collect()
    })
}

impl ScalarType {
    /// True for float32, float16, bfloat16 and float64.
    pub(crate) fn is_float(self) -> bool {
        known().iter().any(|k| k.code == self && k.name.contains("float"))
    }

    /// Bytes per element, for the types that can hold packed codes.
    pub(crate) fn size(self) -> Option<usize> {
        known().iter().find(|k| k.code == self).map(|k| k.size)
    }

    /// As `PyTorch` prints it, without the `torch.` prefix.
    pub(crate) fn name(self) -> String {
        known()
            .iter()
            .find(|k| k.code == self)
            .map_or_else(|| foreign_name(self.0), |k| k.name.to_owned())
    }
}

/// What `PyTorch` calls a dtype that no op here takes; its numbers are part of its file format.
fn foreign_name(number: i32) -> String {
    let name = match number {
        8 => "complex32",
        9 => "complex64",
        10 => "complex128",
        12 => "qint8",
        13 => "quint8",
        14 => "qint32",
        23 => "float8_e5m2",
        24 => "float8_e4m3fn",
        25 => "float8_e5m2fnuz",
        26 => "float8_e4m3fnuz",
        27 => "uint16",
        28 => "uint32",
        29 => "uint64",
        44 => "float8_e8m0fnu",
        45 => "float4_e2m1fn_x2",
        _ => return format!("dtype number {number}"),
    };
    name.to_owned()
}

/// Rust types that tensors hold.
pub(crate) trait Scalar: Copy + 'static {
    fn scalar_type() -> ScalarType;
}

macro_rules! scalar {
    ($($t:ty => $index:literal),*) => { $(impl Scalar for $t {
        #[inline]
        fn scalar_type() -> ScalarType {
            known()[$index].code
        }
    })* };
}
scalar!(f32 => 0, u8 => 1, bf16 => 2, f16 => 3, i8 => 5, i32 => 7, i64 => 8);

/// Runs `$body` with `$t` bound to the Rust type of a float32, float16 or bfloat16 `$dtype`.
macro_rules! with_float {
    ($dtype:expr, $what:literal, $t:ident => $body:expr) => {{
        let dtype: $crate::tensor::ScalarType = $dtype;
        if dtype == <f32 as $crate::tensor::Scalar>::scalar_type() {
            type $t = f32;
            $body
        } else if dtype == <halfbyte::bf16 as $crate::tensor::Scalar>::scalar_type() {
            type $t = halfbyte::bf16;
            $body
        } else if dtype == <halfbyte::f16 as $crate::tensor::Scalar>::scalar_type() {
            type $t = halfbyte::f16;
            $body
        } else {
            Err($crate::error::Error::Value(format!(
                concat!($what, " must be float32, float16 or bfloat16, got {}"),
                dtype.name()
            )))
        }
    }};
}
pub(crate) use with_float;

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

    /// A fresh contiguous CPU tensor.
    pub(crate) fn empty(sizes: &[i64], dtype: ScalarType) -> Result<Self> {
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
        check(unsafe {
            (s.aoti_torch_empty_strided)(
                sizes.len() as i64,
                sizes.as_ptr(),
                strides.as_ptr(),
                dtype.0,
                (s.aoti_torch_device_type_cpu)(),
                0,
                &raw mut handle,
            )
        })?;
        let tensor = Self(handle);
        tensor.prefer_huge_pages(dtype)?;
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

    /// A fresh 0-dimensional float32 tensor.
    pub(crate) fn scalar(value: f32) -> Result<Self> {
        let tensor = Self::empty(&[], f32::scalar_type())?;
        tensor.write("scalar")?.slice_mut::<f32>()?[0] = value;
        Ok(tensor)
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

    /// Copies the values; autograd does not see it.
    fn copy_from(&self, source: &Self) -> Result<()> {
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

    /// Checks that the memory the tensor claims is really there: on the CPU, and inside its
    /// storage (FSDP shrinks storages under live tensors). Says if it is contiguous.
    fn inspect(&self, what: Name) -> Result<Inspection> {
        let s = shim();
        let (mut device, mut offset, mut storage) = (0, 0, 0);
        // SAFETY: the handle is valid.
        unsafe {
            check((s.aoti_torch_get_device_type)(self.0, &raw mut device))?;
            if device != (s.aoti_torch_device_type_cpu)() {
                return Err(Error::Value(format!(
                    "{what} must be on the CPU like the other tensors"
                )));
            }
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
        Ok(Inspection { contiguous, distinct, numel, bytes: numel * item, item, reach, dtype })
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
        self.copied(place, inspection.dtype)
    }

    /// The elements as `T`, converted when the tensor has another dtype.
    pub(crate) fn read_as<T: Scalar>(&self, what: impl Into<Name>) -> Result<Source<'_>> {
        let what = what.into();
        if self.dtype()? == T::scalar_type() {
            return self.read(what);
        }
        let inspection = self.inspect(what)?;
        let place = inspection.place(what, self, self.const_data(&inspection)?);
        self.copied(place, T::scalar_type())
    }

    fn copied<'a>(&self, place: Place<'a>, dtype: ScalarType) -> Result<Source<'a>> {
        let copy = Self::empty(self.sizes()?, dtype)?;
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
        let copy = Self::empty(self.sizes()?, inspection.dtype)?;
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
struct Inspection {
    dtype: ScalarType,
    contiguous: bool,
    /// No two elements lie in one place because of a stride of 0.
    distinct: bool,
    numel: usize,
    bytes: usize,
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

/// Checked, contiguous, aligned memory for reading.
#[derive(Debug)]
pub(crate) struct Source<'a> {
    /// Where the tensor lies, whether or not it was copied.
    place: Place<'a>,
    data: *const c_void,
    inspection: Inspection,
    _copy: Option<Tensor>,
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

    /// The raw bytes, whatever the dtype.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `inspect` checked that the tensor owns this many bytes.
        unsafe { std::slice::from_raw_parts(self.data.cast(), self.inspection.bytes) }
    }

    /// # Errors
    /// [`Error::Type`] when the tensor holds another dtype.
    pub(crate) fn slice<T: Scalar>(&self) -> Result<&[T]> {
        expect_dtype::<T>(self.place.name, self.inspection.dtype)?;
        // SAFETY: the dtype is T's, the length was checked by `inspect`, the alignment by `read`.
        Ok(unsafe { std::slice::from_raw_parts(self.data.cast(), self.inspection.numel) })
    }
}

/// Checked, contiguous, aligned memory for writing.
#[derive(Debug)]
pub(crate) struct Destination<'a> {
    /// Where the tensor lies, whether or not it was copied.
    place: Place<'a>,
    data: *mut c_void,
    inspection: Inspection,
    copy: Option<Tensor>,
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

    /// The raw bytes, whatever the dtype.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `inspect` checked that the tensor owns this many bytes. Torch hands memory out
        // through an opaque call, so it counts as initialized.
        unsafe { std::slice::from_raw_parts_mut(self.data.cast(), self.inspection.bytes) }
    }

    /// # Errors
    /// [`Error::Type`] when the tensor holds another dtype.
    pub(crate) fn slice_mut<T: Scalar>(&mut self) -> Result<&mut [T]> {
        expect_dtype::<T>(self.place.name, self.inspection.dtype)?;
        // SAFETY: the dtype is T's, the length was checked by `inspect`, the alignment by
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

    /// Copies the result to where it belongs, if it was written elsewhere.
    pub(crate) fn finish(self) -> Result<()> {
        match &self.copy {
            Some(copy) => self.place.tensor.copy_from(copy),
            None => Ok(()),
        }
    }
}

fn expect_dtype<T: Scalar>(what: Name, got: ScalarType) -> Result<()> {
    if got == T::scalar_type() {
        return Ok(());
    }
    Err(Error::Type(format!("{what} must be {}, got {}", T::scalar_type().name(), got.name())))
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
