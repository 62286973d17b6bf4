//! The launchers: the core's functions, over device memory and a stream.

mod blockwise;
mod dequantize_4bit;
mod double_quant;
mod experts;
mod int8;
mod matmul_4bit;
mod matvec_4bit;
pub mod optim;
mod quantize_4bit;
mod weight;

pub use blockwise::*;
pub use dequantize_4bit::*;
pub use double_quant::*;
pub use experts::*;
pub use int8::*;
pub use matmul_4bit::*;
pub use matvec_4bit::*;
pub use quantize_4bit::*;
pub use weight::*;
