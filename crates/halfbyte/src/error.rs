//! The one error type of the crate. Every message says what was expected and what was got.

use crate::element::DType;
use crate::isa::Isa;
use std::path::PathBuf;

/// Result alias used throughout the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong. Each variant carries the facts; `Display` finishes the sentence.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A block size outside the supported set.
    #[error("blocksize must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096, got {got}")]
    BlockSize {
        /// The value that was passed.
        got: usize,
    },
    /// An unknown 4-bit data type name.
    #[error("quant_type must be \"nf4\" or \"fp4\", got {got:?}")]
    QuantType {
        /// The name that was passed.
        got: String,
    },
    /// An unknown optimizer name.
    #[error(
        "optimizer_name must be one of adam, lamb, ademamix, momentum, lars, lion, rmsprop, \
         adagrad, got {got:?}"
    )]
    Optimizer {
        /// The name that was passed.
        got: String,
    },
    /// An unknown or unsupported element type name.
    #[error("{what} must be one of {expected}, got {got:?}")]
    DTypeName {
        /// Which value is meant, for example `dtype` or `quant_storage`.
        what: &'static str,
        /// The accepted names, comma-separated.
        expected: &'static str,
        /// The name that was passed.
        got: String,
    },
    /// A buffer of the wrong length.
    #[error("{buffer} must hold {expected} {unit}, got {got}")]
    Length {
        /// Name of the buffer, for example `packed`.
        buffer: &'static str,
        /// Required length.
        expected: usize,
        /// Actual length.
        got: usize,
        /// Unit of both lengths, for example `bytes` or `float32 values`.
        unit: &'static str,
    },
    /// Rows of int8 so long that an int32 sum of their products could overflow.
    #[error(
        "an 8-bit product takes rows of at most {} elements (its int32 sums cannot overflow), \
         got {got}",
        crate::INT8_MAX_DEPTH
    )]
    Depth {
        /// The length of the rows.
        got: usize,
    },
    /// A column that the matrix does not have.
    #[error("outlier columns must be below {columns}, got {got}")]
    Column {
        /// The column.
        got: usize,
        /// Number of columns.
        columns: usize,
    },
    /// A number that names no expert.
    #[error(
        "expert_ids must lie in 0..={experts} ({experts} means no expert), got {got} for token \
         {token}, slot {slot}"
    )]
    Expert {
        /// The number.
        got: i64,
        /// Number of experts.
        experts: usize,
        /// Index of the token.
        token: usize,
        /// Index among the token's experts.
        slot: usize,
    },
    /// A code (look-up table) that is not strictly ascending or holds NaN or infinity.
    #[error(
        "code must hold finite values in ascending order, but entry {index} is {value} after {previous}"
    )]
    CodeOrder {
        /// Index of the first offending entry.
        index: usize,
        /// Its value.
        value: f32,
        /// The entry before it.
        previous: f32,
    },
    /// Arguments that describe no 8-bit map.
    #[error("{map} map: {argument} must be {expected}, got {got}")]
    MapArgument {
        /// Which map was asked for.
        map: &'static str,
        /// The offending argument.
        argument: &'static str,
        /// What it must be.
        expected: &'static str,
        /// What it was.
        got: String,
    },
    /// The input holds NaN or infinity.
    #[error(
        "cannot quantize: the input holds NaN or infinity in block {block} (elements {start}..{end})"
    )]
    NonFinite {
        /// Index of the first such block.
        block: usize,
        /// First element of that block.
        start: usize,
        /// One past its last element.
        end: usize,
    },
    /// `HALFBYTE_ISA` names an instruction set that this machine or build does not have.
    #[error(
        "HALFBYTE_ISA={got:?} is not available on this machine, choose one of {}",
        list(available)
    )]
    Isa {
        /// The value of the variable.
        got: String,
        /// What could be chosen.
        available: Vec<Isa>,
    },
    /// A quantization state (on disk or in memory) that contradicts itself or lacks a part.
    #[error("quantization state of {tensor:?}: {reason}")]
    State {
        /// The weight that the state belongs to.
        tensor: String,
        /// What was expected and what was found.
        reason: String,
    },
    /// A tensor that a checkpoint should hold and does not.
    #[error("{}: expected tensor {tensor:?}, which the file does not hold", path.display())]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
    },
    /// A tensor whose element type is not the one the format prescribes.
    #[error("tensor {tensor:?} must have dtype {expected}, got {got}")]
    TensorDType {
        /// The tensor's name.
        tensor: String,
        /// What the format prescribes.
        expected: String,
        /// What the file says.
        got: String,
    },
    /// A typed view was asked for with another element type than the data has.
    #[error("expected elements of dtype {expected}, got {got}")]
    DTypeMismatch {
        /// The dtype the data has.
        expected: DType,
        /// The dtype that was asked for.
        got: DType,
    },
    /// A file that could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A file that is not valid safetensors.
    #[error("{}: not a readable safetensors file: {source}", path.display())]
    SafeTensors {
        /// The file.
        path: PathBuf,
        /// The parser's reason.
        source: safetensors::SafeTensorError,
    },
}

fn list(isas: &[Isa]) -> String {
    isas.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", ")
}

/// Checks a buffer's length at the door of an op.
pub(crate) fn check_len(
    buffer: &'static str,
    expected: usize,
    got: usize,
    unit: &'static str,
) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::Length { buffer, expected, got, unit }) }
}
