//! # halfbyte: the bitsandbytes formats in Rust
//!
//! 4-bit (NF4, FP4) and 8-bit blockwise quantization and the fused 4-bit matrix product, on the
//! CPU, with kernels chosen at run time (AVX-512, AVX2, NEON, scalar) and spread over threads by
//! rayon. Same input, any thread count, any instruction set: identical bytes.

pub mod code;

mod arch;
mod blocks;
mod element;
mod error;
pub mod isa;
mod ops;
pub mod threads;

pub use blocks::{BlockSize, Blocks};
pub use code::{Code4, Code8};
pub use element::{DType, Element};
pub use error::{Error, Result};
pub use half::{bf16, f16};
pub use isa::Isa;
pub use ops::{
    NestedScales, NonFinite, Scales, Weight4, dequantize_4bit, dequantize_blockwise, matmul_4bit,
    matmul_4bit_grad_input, quantize_4bit, quantize_absmax, quantize_blockwise,
};
