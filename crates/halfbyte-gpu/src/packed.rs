//! What `build.rs` packs: machine code, SPIR-V and the kernels' texts.

use lzma_rust2::LzmaReader;
use std::io::{self, Read};

/// More than a reader of what `build/pack.rs` made needs, in KiB.
const MEMORY_KIB: u32 = 64 << 10;

/// Parts with a key each, packed one behind the other: what they have in common is there once.
#[derive(Clone, Copy, Debug)]
pub struct Packed<K: 'static> {
    stream: &'static [u8],
    /// Keys, and where their parts end in what the stream unpacks to.
    ends: &'static [(K, usize)],
}

impl<K: Copy + PartialEq> Packed<K> {
    /// No parts.
    pub const NONE: Self = Self::new(&[], &[]);

    /// A stream of LZMA with its header, and for each part in order its key and its end, in bytes
    /// of what is unpacked.
    #[must_use]
    pub const fn new(stream: &'static [u8], ends: &'static [(K, usize)]) -> Self {
        Self { stream, ends }
    }

    /// The keys in the order of their parts.
    pub fn keys(&self) -> impl Iterator<Item = K> {
        self.ends.iter().map(|&(key, _)| key)
    }

    /// True for no parts.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The part with this key. What stands before it is unpacked too, and let go of.
    ///
    /// # Errors
    /// When no part has this key ([`io::ErrorKind::NotFound`]), or the stream is damaged.
    pub(crate) fn unpack(&self, key: K) -> io::Result<Vec<u8>> {
        let index = self.keys().position(|k| k == key).ok_or(io::ErrorKind::NotFound)?;
        let start = if index == 0 { 0 } else { self.ends[index - 1].1 };
        let length = self.ends[index].1.checked_sub(start).ok_or(io::ErrorKind::InvalidData)?;
        let mut reader = LzmaReader::new_mem_limit(self.stream, MEMORY_KIB, None)?;
        let skipped = io::copy(&mut reader.by_ref().take(start as u64), &mut io::sink())?;
        let mut part = Vec::new();
        reader.take(length as u64).read_to_end(&mut part)?;
        if skipped == start as u64 && part.len() == length {
            Ok(part)
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `XXXX`, packed.
    const XXXX: &[u8] =
        b"\x5d\x00\x10\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\x00\x2c\x68\xbd\xff\xff\xff\xff\xe0\0\0\0";

    #[test]
    fn parts_follow_each_other() {
        let packed = Packed::new(XXXX, &[("a", 1), ("b", 1), ("c", 4)]);
        assert_eq!(packed.unpack("a").unwrap(), b"X");
        assert_eq!(packed.unpack("b").unwrap(), b"");
        assert_eq!(packed.unpack("c").unwrap(), b"XXX");
        assert_eq!(packed.unpack("d").unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(Packed::<u32>::NONE.is_empty());
    }

    #[test]
    fn what_is_damaged_is_an_error() {
        for packed in [
            Packed::new(XXXX, &[(0, 5)]),          // ends before
            Packed::new(XXXX, &[(1, 9), (0, 10)]), // begins behind the end
            Packed::new(XXXX, &[(1, 3), (0, 2)]),  // ends before it begins
            Packed::new(&XXXX[..15], &[(0, 4)]),   // cut off
            Packed::new(b"\xff\xff", &[(0, 4)]),   // not packed
        ] {
            assert!(packed.unpack(0).is_err(), "{packed:?}");
        }
    }
}
