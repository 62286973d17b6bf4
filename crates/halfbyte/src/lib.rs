//! # halfbyte: the bitsandbytes formats in Rust
//!
//! 4-bit (NF4, FP4) and 8-bit blockwise quantization, fused 4-bit matrix products, `LLM.int8()`,
//! layers of experts and 8-bit optimizers, on the CPU, with kernels chosen at run time (AVX-512,
//! AVX2, NEON, scalar) and spread over threads by rayon. Same input, any thread count, any
//! instruction set: identical bytes. (Float matrix products: within a stated bound.)
//!
//! | to | use |
//! |---|---|
//! | quantize a tensor, multiply by it, decode it | [`Params4bit`], [`Params8bit`] |
//! | read or write a checkpoint | [`checkpoint::Checkpoint`], [`checkpoint::CheckpointWriter`] |
//! | work on slices of your own | [`quantize_4bit`], [`dequantize_4bit`], [`matmul_4bit`], [`matmul_4bit_grad_input`], [`quantize_blockwise`], [`dequantize_blockwise`] |
//! | multiply in int8, with outliers | [`Weight8`], [`int8_linear`], [`int8_vectorwise_quant`] |
//! | multiply by the weights of experts | [`Routing`], [`Experts4`], [`experts_matmul_4bit`], [`Experts8`], [`experts_matmul_8bit`] |
//! | train with 8-bit optimizer states | [`optim`] |
//! | look up a code | [`Code4`], [`Code8`], [`code`] |
//! | choose threads or an instruction set | [`threads::set_num_threads`], a rayon pool, `HALFBYTE_ISA` |
//!
//! ```
//! use halfbyte::{BlockSize, Code4, Params4bit};
//!
//! let weight: Vec<f32> = (0..4096).map(|i| (i as f32).cos()).collect();
//! let params = Params4bit::quantize(&weight, &[64, 64], Code4::Nf4, BlockSize::B64)?;
//! let decoded: Vec<f32> = params.dequantize()?;
//! let worst = weight.iter().zip(&decoded).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
//! assert!(worst < 0.16); // half the widest gap between NF4 codes, times absmax
//! # Ok::<(), halfbyte::Error>(())
//! ```

mod arch;
mod blocks;
pub mod checkpoint;
pub mod code;
mod element;
mod error;
pub mod isa;
mod ops;
pub mod optim;
mod params;
mod params8;
mod state;
pub mod threads;

pub use blocks::{BlockSize, Blocks};
pub use code::{Code4, Code8};
pub use element::{DType, Element};
pub use error::{Error, Result};
pub use half::{bf16, f16};
pub use isa::Isa;
pub use ops::{
    Experts4, Experts8, INT8_MAX_DEPTH, NestedScales, NonFinite, Routing, Scales, TokenRows,
    Weight4, Weight8, dequantize_4bit, dequantize_blockwise, experts_matmul_4bit,
    experts_matmul_4bit_grad_input, experts_matmul_8bit, experts_matmul_8bit_grad_input,
    int8_double_quant, int8_linear, int8_linear_grad_input, int8_linear_matmul,
    int8_mixed_scaled_mm, int8_mm_dequant, int8_scaled_mm, int8_vectorwise_dequant,
    int8_vectorwise_quant, matmul_4bit, matmul_4bit_grad_input, quantize_4bit, quantize_absmax,
    quantize_blockwise,
};
pub use params::Params4bit;
pub use params8::Params8bit;
pub use state::{NestedMeta, OwnedScales, QuantMeta, QuantState, QuantStorage};
