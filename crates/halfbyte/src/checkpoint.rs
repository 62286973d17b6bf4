//! Checkpoints in the bitsandbytes layout: safetensors files, read without copying what is not
//! asked for and written whole or not at all.
//!
//! A 4-bit weight `W` is stored as `W` (packed bytes, `[rows, 1]`), `W.absmax`, `W.quant_map` and
//! `W.quant_state.bitsandbytes__nf4` (or `__fp4`, a JSON document as bytes), and, with double
//! quantization, `W.nested_absmax` and `W.nested_quant_map`.
//!
//! ```
//! use halfbyte::checkpoint::{Checkpoint, CheckpointWriter};
//! use halfbyte::{BlockSize, Code4, Params4bit};
//!
//! let weight: Vec<f32> = (0..64 * 96).map(|i| (i as f32).sin()).collect();
//! let params = Params4bit::quantize(&weight, &[64, 96], Code4::Nf4, BlockSize::B64)?
//!     .compress_statistics()?;
//!
//! let path = std::env::temp_dir().join(format!("halfbyte-doc-{}.safetensors", std::process::id()));
//! let mut writer = CheckpointWriter::new();
//! writer.add_4bit("layer.weight", &params);
//! writer.add("layer.bias", &[64], &[0.5f32; 64])?;
//! writer.write(&path)?;
//!
//! let checkpoint = Checkpoint::open(&path)?;
//! assert_eq!(checkpoint.names_4bit().collect::<Vec<_>>(), ["layer.weight"]);
//! assert_eq!(checkpoint.params_4bit("layer.weight")?, params);
//! assert_eq!(checkpoint.tensor("layer.bias")?.to_vec::<f32>()?, [0.5; 64]);
//! # std::fs::remove_file(path).unwrap();
//! # Ok::<(), halfbyte::Error>(())
//! ```

use crate::code::Code4;
use crate::element::{DType, Element};
use crate::error::{Error, Result, check_len};
use crate::params::Params4bit;
use crate::params8::Params8bit;
use crate::state::{OwnedScales, QuantMeta, QuantState, QuantStorage, numel};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata};
use safetensors::{SafeTensorError, SafeTensors, View};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

fn meta_key(weight: &str, code: Code4) -> String {
    format!("{weight}.quant_state.bitsandbytes__{code}")
}

/// One safetensors file, mapped into memory. The header is validated when it is opened.
struct Shard {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Where the tensors' bytes begin.
    data: usize,
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self> {
        let io = |source| Error::Io { path: path.clone(), source };
        let file = File::open(&path).map_err(io)?;
        // SAFETY: the file is opened read-only and only ever read through this map. As with every
        // mapped checkpoint, another process must not truncate it meanwhile.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let parse = |source| Error::SafeTensors { path: path.clone(), source };
        // `deserialize` also checks that the data section is complete.
        SafeTensors::deserialize(&map).map_err(parse)?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(parse)?;
        Ok(Self { path, map, metadata, data: header + size_of::<u64>() })
    }
}

/// A tensor inside a [`Checkpoint`].
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    name: &'a str,
    dtype: Dtype,
    shape: &'a [usize],
    bytes: &'a [u8],
}

impl<'a> TensorRef<'a> {
    /// Element type as the file has it, for example `BF16` or `U8`.
    #[must_use]
    pub fn dtype(&self) -> String {
        format!("{:?}", self.dtype)
    }

    /// Shape.
    #[must_use]
    pub const fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// Little-endian bytes, row-major.
    #[must_use]
    pub const fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The elements as `T`, converted from float32, float16 or bfloat16 (rounding to nearest even
    /// where `T` is narrower).
    ///
    /// # Errors
    /// [`Error::TensorDType`] for any other element type.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        let wide: fn(&[u8]) -> f32 = match self.dtype {
            Dtype::F32 => |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            Dtype::F16 => |b| f16::from_le_bytes([b[0], b[1]]).to_f32_const(),
            Dtype::BF16 => |b| bf16::from_le_bytes([b[0], b[1]]).to_f32_const(),
            _ => return Err(self.wrong_dtype("F32, F16 or BF16")),
        };
        let size = self.dtype.bitsize() / 8;
        Ok(self.bytes.chunks_exact(size).map(|b| T::from_f32(wide(b))).collect())
    }

    fn wrong_dtype(&self, expected: &str) -> Error {
        Error::TensorDType {
            tensor: self.name.to_owned(),
            expected: expected.to_owned(),
            got: self.dtype(),
        }
    }

    fn f32s(&self) -> Result<Vec<f32>> {
        if self.dtype == Dtype::F32 { self.to_vec() } else { Err(self.wrong_dtype("F32")) }
    }

    fn u8s(&self) -> Result<&'a [u8]> {
        if self.dtype == Dtype::U8 { Ok(self.bytes) } else { Err(self.wrong_dtype("U8")) }
    }

    fn table<const N: usize>(&self) -> Result<[f32; N]> {
        let values = self.f32s()?;
        values.as_slice().try_into().map_err(|_| Error::State {
            tensor: self.name.to_owned(),
            reason: format!("expected {N} float32 values, got {}", values.len()),
        })
    }
}

/// A checkpoint opened for reading: one safetensors file or a folder with one or several.
pub struct Checkpoint {
    path: PathBuf,
    shards: Vec<Shard>,
    /// Tensor name → shard.
    names: BTreeMap<String, usize>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint")
            .field("path", &self.path)
            .field("names", &self.names)
            .finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// Opens a `.safetensors` file, or a folder that holds `model.safetensors` or
    /// `model.safetensors.index.json` with its shards. Only headers are read.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::SafeTensors`] naming the file, [`Error::State`] for an index that
    /// is not JSON or promises a tensor its shard does not hold.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let shards = if path.is_dir() {
            let index = path.join(INDEX);
            if index.exists() {
                open_shards(&index)?
            } else {
                vec![Shard::open(path.join(SINGLE))?]
            }
        } else {
            vec![Shard::open(path.clone())?]
        };
        let mut names = BTreeMap::new();
        for (i, shard) in shards.iter().enumerate() {
            names.extend(shard.metadata.offset_keys().into_iter().map(|name| (name, i)));
        }
        Ok(Self { path, shards, names })
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// Names of the 4-bit weights, sorted.
    pub fn names_4bit(&self) -> impl Iterator<Item = &str> {
        self.names().filter(|name| self.quant_type(name).is_some())
    }

    /// The 4-bit data type of weight `name`, or `None` when it is not a 4-bit weight.
    #[must_use]
    pub fn quant_type(&self, name: &str) -> Option<Code4> {
        Code4::ALL.into_iter().find(|&code| self.names.contains_key(&meta_key(name, code)))
    }

    /// Names of the weights of 8-bit linear layers, sorted: int8 matrices `X.weight` with their
    /// scales in `X.SCB`.
    pub fn names_8bit(&self) -> impl Iterator<Item = &str> {
        self.names().filter(|name| {
            scales_key(name).is_some_and(|key| self.names.contains_key(&key))
                && self.tensor(name).is_ok_and(|t| t.dtype == Dtype::I8)
        })
    }

    /// One tensor, still in the mapped file.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn tensor(&self, name: &str) -> Result<TensorRef<'_>> {
        let found = self.names.get_key_value(name).and_then(|(name, &shard)| {
            let shard = &self.shards[shard];
            let info = shard.metadata.info(name)?;
            let (start, end) = info.data_offsets;
            let bytes = &shard.map[shard.data + start..shard.data + end];
            Some(TensorRef { name, dtype: info.dtype, shape: &info.shape, bytes })
        });
        found.ok_or_else(|| Error::MissingTensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
        })
    }

    /// A 4-bit weight with its state.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::TensorDType`] or [`Error::State`] naming the tensor that
    /// is absent, mistyped or contradicts the state.
    pub fn params_4bit(&self, name: &str) -> Result<Params4bit> {
        let code = self.quant_type(name).ok_or_else(|| Error::MissingTensor {
            path: self.path.clone(),
            tensor: meta_key(name, Code4::Nf4),
        })?;
        let part = |suffix: &str| self.tensor(&format!("{name}.{suffix}"));

        let meta = QuantMeta::from_json(self.tensor(&meta_key(name, code))?.u8s()?, name)?;
        if meta.quant_type != code {
            return Err(Error::State {
                tensor: name.to_owned(),
                reason: format!("the key says {code}, its JSON says {}", meta.quant_type),
            });
        }
        let scales = match meta.nested {
            None => OwnedScales::Plain(part("absmax")?.f32s()?),
            Some(nested) => OwnedScales::Nested {
                absmax: part("absmax")?.u8s()?.to_vec(),
                code: Box::new(part("nested_quant_map")?.table()?),
                absmax2: part("nested_absmax")?.f32s()?,
                blocksize: nested.blocksize,
                offset: nested.offset,
            },
        };
        let packed = self.tensor(name)?;
        let storage = match packed.dtype {
            Dtype::U8 => QuantStorage::U8,
            Dtype::BF16 => QuantStorage::BF16,
            Dtype::F16 => QuantStorage::F16,
            Dtype::F32 => QuantStorage::F32,
            _ => return Err(packed.wrong_dtype("U8, BF16, F16 or F32")),
        };
        let state = QuantState {
            quant_type: code,
            table: part("quant_map")?.table()?,
            blocksize: meta.blocksize,
            dtype: meta.dtype,
            shape: meta.shape,
            scales,
        };
        Params4bit::from_parts(packed.bytes.to_vec(), storage, state, name)
    }

    /// The weight `name` (`X.weight`) of an 8-bit linear layer with its scales.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::TensorDType`] or [`Error::State`] naming the tensor that
    /// is absent, mistyped, of another layout or contradicts the others.
    pub fn params_8bit(&self, name: &str) -> Result<Params8bit> {
        let weight = self.tensor(name)?;
        if weight.dtype != Dtype::I8 {
            return Err(weight.wrong_dtype("I8"));
        }
        let state = |reason: String| Error::State { tensor: name.to_owned(), reason };
        let &[rows, columns] = weight.shape else {
            return Err(state(format!("expected two dimensions, got shape {:?}", weight.shape)));
        };
        let key = scales_key(name)
            .ok_or_else(|| state("expected a name that ends in \"weight\"".to_owned()))?;
        if let Ok(format) = self.tensor(&format_key(&key))
            && format.u8s()? != [0]
        {
            let got = format.u8s()?;
            return Err(state(format!("expected weight_format 0 (row-major), got {got:?}")));
        }
        let codes = weight.bytes.iter().map(|&b| b.cast_signed()).collect();
        Params8bit::from_parts(codes, self.tensor(&key)?.f32s()?, [rows, columns], name)
    }
}

/// `X.SCB` of `X.weight`; upstream keeps it beside the weight, not under it.
fn scales_key(weight: &str) -> Option<String> {
    weight.strip_suffix("weight").map(|prefix| format!("{prefix}SCB"))
}

/// `X.weight_format` of `X.SCB`.
fn format_key(scales: &str) -> String {
    format!("{}weight_format", scales.trim_end_matches("SCB"))
}

/// The shards that an index names, each once, checked to hold what the index promises.
fn open_shards(index: &Path) -> Result<Vec<Shard>> {
    let bad = |reason: String| Error::State { tensor: index.display().to_string(), reason };
    let json =
        std::fs::read(index).map_err(|source| Error::Io { path: index.to_path_buf(), source })?;
    let json: serde_json::Value = serde_json::from_slice(&json)
        .map_err(|e| bad(format!("expected a JSON object, but {e}")))?;
    let weight_map = json
        .get("weight_map")
        .and_then(serde_json::Value::as_object)
        .ok_or_else(|| bad("expected an object under \"weight_map\"".into()))?;
    let mut promised: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, file) in weight_map {
        let file = file.as_str().ok_or_else(|| bad(format!("no file name for {tensor:?}")))?;
        if Path::new(file).components().count() != 1 {
            return Err(bad(format!("expected the name of a file beside it, got {file:?}")));
        }
        promised.entry(file).or_default().push(tensor);
    }
    let folder = index.parent().unwrap_or(Path::new("."));
    promised
        .into_iter()
        .map(|(file, tensors)| {
            let shard = Shard::open(folder.join(file))?;
            match tensors.into_iter().find(|t| shard.metadata.info(t).is_none()) {
                None => Ok(shard),
                Some(missing) => {
                    Err(Error::MissingTensor { path: shard.path, tensor: missing.to_owned() })
                }
            }
        })
        .collect()
}

/// Collects tensors and writes them as one safetensors file.
#[derive(Debug, Default)]
pub struct CheckpointWriter<'a> {
    tensors: BTreeMap<String, Entry<'a>>,
    metadata: HashMap<String, String>,
}

#[derive(Debug)]
struct Entry<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>,
}

impl View for &Entry<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

impl<'a> CheckpointWriter<'a> {
    /// An empty checkpoint, marked `format: pt` as Transformers expects.
    #[must_use]
    pub fn new() -> Self {
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        Self { tensors: BTreeMap::new(), metadata }
    }

    /// Adds (or replaces) a plain tensor.
    ///
    /// # Errors
    /// [`Error::Length`] when `data` does not have the shape's number of elements.
    pub fn add<T: Element>(&mut self, name: &str, shape: &[usize], data: &[T]) -> Result<()> {
        check_len("data", numel(shape), data.len(), "elements")?;
        let dtype = match T::DTYPE {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
        };
        let bytes = data.iter().flat_map(|x| {
            let bytes = match T::DTYPE {
                DType::F32 => x.to_f32().to_bits().to_le_bytes(),
                DType::F16 => u32::from(f16::from_f32_const(x.to_f32()).to_bits()).to_le_bytes(),
                DType::BF16 => u32::from(bf16::from_f32_const(x.to_f32()).to_bits()).to_le_bytes(),
            };
            bytes.into_iter().take(T::DTYPE.size())
        });
        self.entry(name.to_owned(), dtype, shape.to_vec(), bytes.collect::<Vec<u8>>());
        Ok(())
    }

    /// Adds (or replaces) a 4-bit weight under its four to six names.
    pub fn add_4bit(&mut self, name: &str, params: &'a Params4bit) {
        let state = params.state();
        let floats =
            |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|x| x.to_le_bytes()).collect() };
        let storage = params.storage();
        let rows = storage.rows(params.packed().len());
        let mut packed = Cow::Borrowed(params.packed());
        if packed.len() < rows * storage.size() {
            packed.to_mut().resize(rows * storage.size(), 0);
        }
        let dtype = match storage {
            QuantStorage::U8 => Dtype::U8,
            QuantStorage::BF16 => Dtype::BF16,
            QuantStorage::F16 => Dtype::F16,
            QuantStorage::F32 => Dtype::F32,
        };
        self.entry(name.to_owned(), dtype, vec![rows, 1], packed);
        self.entry(format!("{name}.quant_map"), Dtype::F32, vec![16], floats(&state.table));
        match &state.scales {
            OwnedScales::Plain(absmax) => {
                let key = format!("{name}.absmax");
                self.entry(key, Dtype::F32, vec![absmax.len()], floats(absmax));
            }
            OwnedScales::Nested { absmax, code, absmax2, .. } => {
                let key = format!("{name}.absmax");
                self.entry(key, Dtype::U8, vec![absmax.len()], absmax.as_slice());
                let key = format!("{name}.nested_absmax");
                self.entry(key, Dtype::F32, vec![absmax2.len()], floats(absmax2));
                let key = format!("{name}.nested_quant_map");
                self.entry(key, Dtype::F32, vec![256], floats(&code[..]));
            }
        }
        let json = state.meta().to_json().into_bytes();
        self.entry(meta_key(name, state.quant_type), Dtype::U8, vec![json.len()], json);
    }

    /// Adds (or replaces) the weight of an 8-bit linear layer under its three names: `X.weight`,
    /// `X.SCB` and `X.weight_format`.
    ///
    /// # Errors
    /// [`Error::State`] unless `name` ends in `weight`.
    pub fn add_8bit(&mut self, name: &str, params: &Params8bit) -> Result<()> {
        let key = scales_key(name).ok_or_else(|| Error::State {
            tensor: name.to_owned(),
            reason: "expected a name that ends in \"weight\"".to_owned(),
        })?;
        let codes: Vec<u8> = params.codes().iter().map(|q| q.cast_unsigned()).collect();
        let scales: Vec<u8> = params.scales().iter().flat_map(|x| x.to_le_bytes()).collect();
        self.entry(format_key(&key), Dtype::U8, Vec::new(), vec![0]);
        self.entry(key, Dtype::F32, vec![params.scales().len()], scales);
        self.entry(name.to_owned(), Dtype::I8, params.shape().to_vec(), codes);
        Ok(())
    }

    /// Adds (or replaces) an entry of the file's metadata.
    pub fn metadata(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.metadata.insert(key.into(), value.into());
    }

    fn entry(
        &mut self,
        name: String,
        dtype: Dtype,
        shape: Vec<usize>,
        bytes: impl Into<Cow<'a, [u8]>>,
    ) {
        self.tensors.insert(name, Entry { dtype, shape, bytes: bytes.into() });
    }

    /// Writes the file: first under a temporary name in the same folder, flushed to the disk, then
    /// renamed, so that `path` holds the whole checkpoint or what it held before.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file; the temporary file is removed.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let path = path.as_ref();
        let io = |source| Error::Io { path: path.to_path_buf(), source };
        let name = path.file_name().ok_or_else(|| {
            io(std::io::Error::new(std::io::ErrorKind::InvalidInput, "expected a file name"))
        })?;
        let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_file_name(format!(
            ".{}.{}-{unique}.tmp",
            name.to_string_lossy(),
            std::process::id()
        ));
        let written = safetensors::serialize_to_file(
            self.tensors.iter(),
            Some(self.metadata.clone()),
            &temporary,
        )
        .map_err(|e| match e {
            SafeTensorError::IoError(source) => io(source),
            source => Error::SafeTensors { path: path.to_path_buf(), source },
        })
        .and_then(|()| File::open(&temporary).and_then(|f| f.sync_all()).map_err(io))
        .and_then(|()| std::fs::rename(&temporary, path).map_err(io));
        if written.is_err() {
            // Nothing useful can be done if this fails too; the first error is the one to tell.
            let _ = std::fs::remove_file(&temporary);
        }
        written
    }
}
