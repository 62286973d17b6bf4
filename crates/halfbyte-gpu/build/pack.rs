//! Packs what the build makes of the kernels. LZMA finds what kernels, dtypes and architectures have in
//! common, which lies further apart than the 32 KiB that deflate looks back. `src/packed.rs` unpacks it.

use lzma_rust2::{LzmaOptions, LzmaWriter};
use std::fmt::{Debug, Write as _};
use std::io::Write;
use std::path::Path;

/// The largest window, which whoever unpacks allocates. Smaller where all fits in less.
const WINDOW: usize = 8 << 20;

/// Bytes of what kind, which decides how they are modelled.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    /// Instructions are multiples of eight bytes.
    Code,
    Text,
}

pub(crate) fn pack(bytes: &[u8], kind: Kind) -> Vec<u8> {
    let mut options = LzmaOptions::with_preset(9);
    options.dict_size = bytes.len().next_power_of_two().clamp(1 << 12, WINDOW) as u32;
    (options.lc, options.lp, options.pb) = match kind {
        Kind::Code => (0, 3, 3),
        Kind::Text => (3, 0, 0),
    };
    let size = Some(bytes.len() as u64);
    let mut writer = LzmaWriter::new_use_header(Vec::new(), &options, size).expect("fair options");
    writer.write_all(bytes).expect("memory is written to");
    writer.finish().expect("memory is written to")
}

/// The value of a `Packed` in Rust: the stream in `file`, and where in it each part ends.
pub(crate) fn expression<K: Debug>(file: &Path, parts: &[(K, usize)]) -> String {
    let mut text = format!("Packed::new(include_bytes!({}), &[", crate::literal(file));
    let mut end = 0;
    for (key, length) in parts {
        end += length;
        let _ = write!(text, "({key:?}, {end}), ");
    }
    text + "])"
}
