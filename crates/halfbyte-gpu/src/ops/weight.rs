//! What the 4-bit launchers share: scales, tables and weights in device memory.

use crate::error::{Result, check_len};
use crate::{Arg, DeviceSlice};
use halfbyte::{BlockSize, Blocks, Code4};

/// The scales of a 4-bit tensor, one per block.
#[derive(Clone, Copy, Debug)]
pub enum Scales {
    /// float32 `absmax`.
    Plain(DeviceSlice<f32>),
    /// Double-quantized `absmax`.
    Nested(NestedScales),
}

/// Double-quantized scales: scale `i` is `code[absmax[i]] * absmax2[i / blocksize] + offset[0]`,
/// each operation rounded to float32.
#[derive(Clone, Copy, Debug)]
pub struct NestedScales {
    /// One 8-bit index per block of the weight.
    pub absmax: DeviceSlice<u8>,
    /// The 8-bit code of `absmax`, `[256]`.
    pub code: DeviceSlice<f32>,
    /// One float32 scale per `blocksize` entries of `absmax`.
    pub absmax2: DeviceSlice<f32>,
    /// Block size of the second level (256 in every known checkpoint).
    pub blocksize: BlockSize,
    /// The mean that was subtracted before quantizing, `[1]`. It stays on the device.
    pub offset: DeviceSlice<f32>,
}

impl Scales {
    /// Number of scales.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::Plain(absmax) => absmax.len(),
            Self::Nested(nested) => nested.absmax.len(),
        }
    }

    /// True when there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Checks both levels' lengths against the blocks they scale.
    pub(super) fn check(&self, blocks: Blocks) -> Result<()> {
        check_len("absmax", blocks.count(), self.len())?;
        if let Self::Nested(nested) = self {
            let second = nested.blocksize.over(nested.absmax.len()).count();
            check_len("absmax2", second, nested.absmax2.len())?;
            check_len("nested code", 256, nested.code.len())?;
            check_len("offset", 1, nested.offset.len())?;
        }
        Ok(())
    }

    /// The arguments of `SCALE_PARAMETERS` in `kernels/weight_4bit.h`.
    pub(super) fn args(&self) -> [Arg<'static>; 6] {
        const NONE: Arg<'_> = Arg::NULL;
        match self {
            Self::Plain(absmax) => [(*absmax).into(), NONE, NONE, NONE, NONE, Arg::U32(0)],
            Self::Nested(nested) => [
                NONE,
                nested.absmax.into(),
                nested.code.into(),
                nested.absmax2.into(),
                nested.offset.into(),
                Arg::U32(shift(nested.blocksize)),
            ],
        }
    }
}

/// The 16 values of a 4-bit code.
#[derive(Clone, Copy, Debug)]
pub enum Table4 {
    /// NF4 or FP4: no memory is read for it.
    Standard(Code4),
    /// Any 16 float32 values in device memory.
    Device(DeviceSlice<f32>),
}

impl Table4 {
    /// Checks the length of a table in memory.
    pub(super) fn check(&self) -> Result<()> {
        match self {
            Self::Standard(_) => Ok(()),
            Self::Device(table) => check_len("table", 16, table.len()),
        }
    }

    /// The arguments of `TABLE_PARAMETERS` in `kernels/weight_4bit.h`.
    pub(super) fn args(&self) -> [Arg<'static>; 2] {
        match self {
            Self::Standard(Code4::Nf4) => [Arg::U32(0), Arg::NULL],
            Self::Standard(Code4::Fp4) => [Arg::U32(1), Arg::NULL],
            Self::Device(table) => [Arg::U32(2), (*table).into()],
        }
    }
}

/// A 4-bit weight `[out_features, in_features]`, its blocks running over the flattened tensor.
#[derive(Clone, Copy, Debug)]
pub struct Weight4 {
    packed: DeviceSlice<u8>,
    scales: Scales,
    table: Table4,
    blocks: Blocks,
    out_features: usize,
    in_features: usize,
}

impl Weight4 {
    /// Ties the parts together.
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length) unless `packed` holds
    /// `ceil(out_features * in_features / 2)` bytes, `scales` one entry per block, and a table
    /// in memory 16 values.
    pub fn new(
        packed: DeviceSlice<u8>,
        scales: Scales,
        table: Table4,
        blocksize: BlockSize,
        out_features: usize,
        in_features: usize,
    ) -> Result<Self> {
        let blocks = blocksize.over(out_features.saturating_mul(in_features));
        check_len("packed", blocks.packed_len(), packed.len())?;
        scales.check(blocks)?;
        table.check()?;
        Ok(Self { packed, scales, table, blocks, out_features, in_features })
    }

    /// Two codes a byte, the first in the high nibble.
    #[must_use]
    pub const fn packed(&self) -> DeviceSlice<u8> {
        self.packed
    }

    /// One scale per block.
    #[must_use]
    pub const fn scales(&self) -> &Scales {
        &self.scales
    }

    /// The code's values.
    #[must_use]
    pub const fn table(&self) -> &Table4 {
        &self.table
    }

    /// Elements per block of the flattened weight.
    #[must_use]
    pub const fn blocksize(&self) -> BlockSize {
        self.blocks.blocksize()
    }

    /// Rows of the weight.
    #[must_use]
    pub const fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns of the weight.
    #[must_use]
    pub const fn in_features(&self) -> usize {
        self.in_features
    }
}

/// The logarithm of a block size: kernels divide by shifting.
pub(super) const fn shift(blocksize: BlockSize) -> u32 {
    blocksize.get().trailing_zeros()
}

/// The name of a kernel that exists for each dtype: `by_dtype!(dtype, "op")` is `op_f32`, `op_f16`
/// or `op_bf16`.
macro_rules! by_dtype {
    ($dtype:expr, $op:literal) => {{
        const fn name(bytes: &'static [u8]) -> &'static std::ffi::CStr {
            match std::ffi::CStr::from_bytes_with_nul(bytes) {
                Ok(name) => name,
                Err(_) => panic!("one NUL, at the end"),
            }
        }
        match $dtype {
            halfbyte::DType::F32 => const { name(concat!($op, "_f32\0").as_bytes()) },
            halfbyte::DType::F16 => const { name(concat!($op, "_f16\0").as_bytes()) },
            halfbyte::DType::BF16 => const { name(concat!($op, "_bf16\0").as_bytes()) },
        }
    }};
}
pub(super) use by_dtype;
