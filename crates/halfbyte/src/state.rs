//! What a 4-bit tensor needs besides its packed bytes, and how checkpoints spell it.

use crate::blocks::BlockSize;
use crate::code::{Code4, Code8};
use crate::element::DType;
use crate::error::{Error, Result};
use crate::ops::{NestedScales, Scales};
use serde_json::{Map, Value};

/// Element type in which packed bytes are stored (`bnb_4bit_quant_storage`): the same bytes, only
/// viewed differently. FSDP wants it equal to the dtype of the other parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum QuantStorage {
    /// One byte an element, the default.
    #[default]
    U8,
    /// Two bytes viewed as a bfloat16.
    BF16,
    /// Two bytes viewed as a float16.
    F16,
    /// Four bytes viewed as a float32.
    F32,
}

impl QuantStorage {
    /// Bytes per stored element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::BF16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// Rows of the stored `[rows, 1]` tensor that holds `packed_len` bytes, the last one padded
    /// with zero bytes where they do not divide.
    #[must_use]
    pub const fn rows(self, packed_len: usize) -> usize {
        packed_len.div_ceil(self.size())
    }
}

/// Elements of a shape. Saturates, so that an impossible shape never equals a buffer's length.
pub(crate) fn numel(shape: &[usize]) -> usize {
    shape.iter().fold(1, |n: usize, &d| n.saturating_mul(d))
}

/// The JSON document in `<weight>.quant_state.bitsandbytes__<type>`.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantMeta {
    /// 4-bit data type.
    pub quant_type: Code4,
    /// Block size of the weight.
    pub blocksize: BlockSize,
    /// Dtype that the weight had and decodes to.
    pub dtype: DType,
    /// Shape that the weight had and decodes to.
    pub shape: Vec<usize>,
    /// Present when the scales are quantized too.
    pub nested: Option<NestedMeta>,
}

/// The part of [`QuantMeta`] about double-quantized scales. Their dtype is always float32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NestedMeta {
    /// Block size of the second level.
    pub blocksize: BlockSize,
    /// The mean that was subtracted from the scales.
    pub offset: f32,
}

impl QuantMeta {
    /// Number of elements.
    #[must_use]
    pub fn numel(&self) -> usize {
        numel(&self.shape)
    }

    /// Reads the JSON document. `tensor` names the weight in error messages.
    ///
    /// Unknown keys are ignored; absent, mistyped or contradictory ones are errors, as is a shape
    /// whose product overflows.
    ///
    /// # Errors
    /// [`Error::State`], [`Error::BlockSize`], [`Error::QuantType`] or [`Error::DTypeName`].
    pub fn from_json(json: &[u8], tensor: &str) -> Result<Self> {
        let bad = |reason: String| Error::State { tensor: tensor.to_owned(), reason };
        let value: Value = serde_json::from_slice(json)
            .map_err(|e| bad(format!("expected a JSON object, but {e}")))?;
        let Value::Object(map) = value else {
            return Err(bad(format!("expected a JSON object, got {}", kind(&value))));
        };
        let field = Field { map: &map, tensor };

        let shape = field.get("shape")?.as_array().ok_or_else(|| field.not("shape", "an array"))?;
        let shape: Vec<usize> = shape
            .iter()
            .map(|d| d.as_u64().and_then(|d| usize::try_from(d).ok()))
            .collect::<Option<_>>()
            .ok_or_else(|| field.not("shape", "an array of non-negative integers"))?;
        // Also keeps every later byte count (at most 4 bytes an element) within isize.
        let fits = shape
            .iter()
            .try_fold(1usize, |n, &d| n.checked_mul(d.max(1)))
            .is_some_and(|n| n <= isize::MAX as usize / 4);
        if !fits {
            return Err(bad(format!("shape {shape:?} has more elements than memory can address")));
        }
        let nested = if map.contains_key("nested_blocksize") || map.contains_key("nested_offset") {
            let dtype: DType = field.string("nested_dtype")?.parse()?;
            if dtype != DType::F32 {
                return Err(bad(format!("nested_dtype must be float32, got {dtype}")));
            }
            let offset = field.get("nested_offset")?;
            let offset = offset.as_f64().ok_or_else(|| field.not("nested_offset", "a number"))?;
            let blocksize = BlockSize::new(field.size("nested_blocksize")?)?;
            Some(NestedMeta { blocksize, offset: offset as f32 })
        } else {
            None
        };
        Ok(Self {
            quant_type: field.string("quant_type")?.parse()?,
            blocksize: BlockSize::new(field.size("blocksize")?)?,
            dtype: field.string("dtype")?.parse()?,
            shape,
            nested,
        })
    }

    /// Writes the JSON document, byte for byte as bitsandbytes writes it (its key order, Python's
    /// separators and Python's spelling of floats).
    #[must_use]
    pub fn to_json(&self) -> String {
        let shape = self.shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let mut json = format!(
            r#"{{"quant_type": "{}", "blocksize": {}, "dtype": "{}", "shape": [{shape}]"#,
            self.quant_type,
            self.blocksize.get(),
            self.dtype,
        );
        if let Some(nested) = self.nested {
            let (blocksize, offset) = (nested.blocksize.get(), python_float(nested.offset.into()));
            json.push_str(r#", "nested_blocksize": "#);
            json.push_str(&blocksize.to_string());
            json.push_str(r#", "nested_dtype": "float32", "nested_offset": "#);
            json.push_str(&offset);
        }
        json.push('}');
        json
    }
}

/// Typed access to the fields of one state, with errors that name the field.
struct Field<'a> {
    map: &'a Map<String, Value>,
    tensor: &'a str,
}

impl<'a> Field<'a> {
    fn get(&self, key: &str) -> Result<&'a Value> {
        self.map.get(key).ok_or_else(|| Error::State {
            tensor: self.tensor.to_owned(),
            reason: format!("expected the key {key:?}, which is missing"),
        })
    }

    fn not(&self, key: &str, expected: &str) -> Error {
        let got = self.map.get(key).map_or_else(|| "nothing".to_owned(), ToString::to_string);
        Error::State {
            tensor: self.tensor.to_owned(),
            reason: format!("{key} must be {expected}, got {got}"),
        }
    }

    fn string(&self, key: &str) -> Result<&'a str> {
        self.get(key)?.as_str().ok_or_else(|| self.not(key, "a string"))
    }

    fn size(&self, key: &str) -> Result<usize> {
        let n = self.get(key)?.as_u64().and_then(|n| usize::try_from(n).ok());
        n.ok_or_else(|| self.not(key, "a non-negative integer"))
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// `repr(x)` of Python: shortest digits that round-trip, exponent form below 1e-4 and from 1e16,
/// its exponent signed and at least two digits wide; `NaN` and `Infinity` as `json.dumps` has them.
fn python_float(x: f64) -> String {
    if x.is_nan() {
        return "NaN".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity".into() } else { "-Infinity".into() };
    }
    if x == 0.0 || (1e-4..1e16).contains(&x.abs()) {
        return format!("{x:?}");
    }
    let short = format!("{x:e}");
    let (digits, exponent) = short.split_once('e').unwrap_or((&short, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// Scales that own their memory; [`as_scales`](Self::as_scales) lends them to an op.
#[derive(Clone, Debug, PartialEq)]
pub enum OwnedScales {
    /// float32 `absmax`.
    Plain(Vec<f32>),
    /// Double-quantized `absmax`; see [`NestedScales`].
    Nested {
        /// One 8-bit index per block of the weight.
        absmax: Vec<u8>,
        /// The 8-bit code of `absmax`.
        code: Box<[f32; 256]>,
        /// One scale per `blocksize` entries of `absmax`.
        absmax2: Vec<f32>,
        /// Block size of the second level.
        blocksize: BlockSize,
        /// The mean that was subtracted.
        offset: f32,
    },
}

impl OwnedScales {
    /// Borrows the scales for an op.
    #[must_use]
    pub fn as_scales(&self) -> Scales<'_> {
        match self {
            Self::Plain(absmax) => Scales::Plain(absmax),
            Self::Nested { absmax, code, absmax2, blocksize, offset } => {
                Scales::Nested(NestedScales {
                    absmax,
                    code,
                    absmax2,
                    blocksize: *blocksize,
                    offset: *offset,
                })
            }
        }
    }

    /// Bytes of all scales and their look-up table.
    #[must_use]
    pub fn nbytes(&self) -> usize {
        match self {
            Self::Plain(absmax) => 4 * absmax.len(),
            Self::Nested { absmax, code, absmax2, .. } => {
                absmax.len() + 4 * (code.len() + absmax2.len() + 1)
            }
        }
    }
}

/// Everything about a 4-bit tensor but its packed bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantState {
    /// 4-bit data type.
    pub quant_type: Code4,
    /// The value of each index: [`Code4::table`], unless a checkpoint brings another one.
    pub table: [f32; 16],
    /// Block size of the weight.
    pub blocksize: BlockSize,
    /// Dtype that the weight had.
    pub dtype: DType,
    /// Shape that the weight had.
    pub shape: Vec<usize>,
    /// One scale per block.
    pub scales: OwnedScales,
}

impl QuantState {
    /// Number of elements.
    #[must_use]
    pub fn numel(&self) -> usize {
        numel(&self.shape)
    }

    /// What goes into the JSON document.
    #[must_use]
    pub fn meta(&self) -> QuantMeta {
        let nested = match &self.scales {
            OwnedScales::Plain(_) => None,
            OwnedScales::Nested { blocksize, offset, .. } => {
                Some(NestedMeta { blocksize: *blocksize, offset: *offset })
            }
        };
        QuantMeta {
            quant_type: self.quant_type,
            blocksize: self.blocksize,
            dtype: self.dtype,
            shape: self.shape.clone(),
            nested,
        }
    }

    /// Quantizes plain scales to 8 bits (blocks of 256, signed dynamic code); nested ones stay as
    /// they are.
    ///
    /// # Errors
    /// [`Error::Isa`] for a bad `HALFBYTE_ISA`.
    pub fn compress_statistics(&mut self) -> Result<()> {
        let OwnedScales::Plain(plain) = &self.scales else { return Ok(()) };
        let blocksize = BlockSize::B256;
        let mut absmax = vec![0u8; plain.len()];
        let mut absmax2 = vec![0.0f32; blocksize.over(plain.len()).count()];
        let offset = crate::quantize_absmax(plain, blocksize, &mut absmax, &mut absmax2)?;
        let code = Box::new(*Code8::dynamic(true).values());
        self.scales = OwnedScales::Nested { absmax, code, absmax2, blocksize, offset };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(nested: Option<NestedMeta>) -> QuantMeta {
        QuantMeta {
            quant_type: Code4::Nf4,
            blocksize: BlockSize::B64,
            dtype: DType::BF16,
            shape: vec![64, 96],
            nested,
        }
    }

    #[test]
    fn json_is_spelled_as_upstream_spells_it() {
        assert_eq!(
            meta(None).to_json(),
            r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 96]}"#
        );
        let nested = NestedMeta { blocksize: BlockSize::B256, offset: 2.620_710_849_761_963 };
        assert!(meta(Some(nested)).to_json().ends_with(
            r#""nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.620710849761963}"#
        ));
    }

    #[test]
    fn floats_are_spelled_as_python_spells_them() {
        for (x, repr) in [
            (0.0, "0.0"),
            (1.0, "1.0"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (-2.5e-300, "-2.5e-300"),
            (f64::NAN, "NaN"),
            (f64::INFINITY, "Infinity"),
        ] {
            assert_eq!(python_float(x), repr);
        }
    }

    #[test]
    fn json_round_trips() {
        for nested in [None, Some(NestedMeta { blocksize: BlockSize::B256, offset: 1.5e-7 })] {
            let m = meta(nested);
            assert_eq!(QuantMeta::from_json(m.to_json().as_bytes(), "w").unwrap(), m);
        }
    }

    #[test]
    fn bad_documents_get_a_sentence_that_names_the_field() {
        let good = meta(None).to_json();
        for (from, to, expect) in [
            ("\"nf4\"", "\"af4\"", "quant_type must be \"nf4\" or \"fp4\", got \"af4\""),
            ("\"nf4\"", "4", "quant_type must be a string, got 4"),
            ("64,", "48,", "blocksize must be one of"),
            ("\"blocksize\": 64", "\"blocksize\": -64", "blocksize must be a non-negative integer"),
            ("\"bfloat16\"", "\"int8\"", "dtype must be one of float32, float16, bfloat16"),
            ("[64, 96]", "[64, -96]", "shape must be an array of non-negative integers"),
            ("[64, 96]", "\"64\"", "shape must be an array"),
            ("[64, 96]", "[4294967296, 4294967296, 0]", "more elements than memory can address"),
            ("\"shape\": [64, 96]", "\"nope\": 1", "expected the key \"shape\", which is missing"),
            ("[64, 96]}", "[64, 96], \"nested_blocksize\": 256}", "\"nested_dtype\""),
            ("}", "", "expected a JSON object, but"),
        ] {
            let json = good.replacen(from, to, 1);
            let message = QuantMeta::from_json(json.as_bytes(), "w").unwrap_err().to_string();
            assert!(message.contains(expect), "{json}\n  gave {message:?}\n  not  {expect:?}");
        }
        assert!(QuantMeta::from_json(b"[]", "w").unwrap_err().to_string().contains("an array"));
    }

    #[test]
    fn storage_rows_round_up() {
        assert_eq!(QuantStorage::U8.rows(5), 5);
        assert_eq!(QuantStorage::BF16.rows(5), 3);
        assert_eq!(QuantStorage::F32.rows(0), 0);
    }
}
