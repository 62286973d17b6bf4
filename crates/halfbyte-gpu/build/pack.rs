//! Packs machine code: LZMA finds what the kernels of a module have in common, which lies further apart
//! than the 32 KiB that deflate looks back. `src/packed.rs` unpacks it.

use lzma_rust2::{LzmaOptions, LzmaWriter};
use std::io::Write;

/// Larger than any of them; whoever unpacks takes as much memory.
const WINDOW: u32 = 1 << 20;

pub(crate) fn pack(code: &[u8]) -> Vec<u8> {
    let mut options = LzmaOptions::with_preset(9);
    options.dict_size = WINDOW;
    // Instructions are multiples of eight bytes.
    (options.lc, options.lp, options.pb) = (0, 3, 3);
    let size = Some(code.len() as u64);
    let mut writer = LzmaWriter::new_use_header(Vec::new(), &options, size).expect("fair options");
    writer.write_all(code).expect("memory is written to");
    writer.finish().expect("memory is written to")
}
