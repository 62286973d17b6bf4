//! Machine code as `build.rs` packs it.

use lzma_rust2::LzmaReader;
use std::io::Read;

/// More than a reader of what `build/pack.rs` made needs, in KiB.
const MEMORY_KIB: u32 = 64 << 10;

/// Unpacks it.
///
/// # Errors
/// When it is damaged.
pub(crate) fn unpack(packed: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut code = Vec::new();
    LzmaReader::new_mem_limit(packed, MEMORY_KIB, None)?.read_to_end(&mut code)?;
    Ok(code)
}
