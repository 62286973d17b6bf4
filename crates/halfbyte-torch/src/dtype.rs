//! Element types: torch's numbers, their names, and the Rust types they are.

use crate::shim::shim;
use halfbyte::{bf16, f16};
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
        let dtype: $crate::dtype::ScalarType = $dtype;
        if dtype == <f32 as $crate::dtype::Scalar>::scalar_type() {
            type $t = f32;
            $body
        } else if dtype == <halfbyte::bf16 as $crate::dtype::Scalar>::scalar_type() {
            type $t = halfbyte::bf16;
            $body
        } else if dtype == <halfbyte::f16 as $crate::dtype::Scalar>::scalar_type() {
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
