//! Kernels of one device: found by source and name without a lock once they have been used.

use crate::device::{Device, Function, Module};
use crate::error::{Error, Result};
use crate::packed::Packed;
use crate::sources;
use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, PoisonError};

/// One file of `kernels/`, with the headers it includes expanded. `build.rs` makes them.
#[derive(Debug)]
pub struct Source {
    /// File name without ending, for example `quantize_4bit`.
    pub name: &'static str,
    /// The text, except of [`crate::sources`], whose texts are packed: see [`Source::text`].
    pub text: Option<&'static str>,
    /// True when results equal the scalar definition bit for bit: compiled without contraction.
    pub exact: bool,
    /// True for what only CUDA can compile.
    pub cuda_only: bool,
    /// Machine code by compute capability (75, 80, ...). Empty when the build had no NVRTC.
    pub cubins: Packed<u32>,
}

impl Source {
    /// A source of one's own, from its parts.
    #[must_use]
    pub const fn new(
        name: &'static str,
        text: &'static str,
        exact: bool,
        cuda_only: bool,
        cubins: Packed<u32>,
    ) -> Self {
        Self { name, text: Some(text), exact, cuda_only, cubins }
    }

    /// The text, headers expanded.
    ///
    /// # Errors
    /// [`Error::Damaged`] when this build's texts cannot be unpacked.
    pub fn text(&self) -> Result<Cow<'static, str>> {
        if let Some(text) = self.text {
            return Ok(Cow::Borrowed(text));
        }
        let damaged = || Error::Damaged { what: "text", source_name: self.name };
        let text = sources::TEXTS.unpack(self.name).map_err(|_| damaged())?;
        String::from_utf8(text).map(Cow::Owned).map_err(|_| damaged())
    }
}

/// Slots of the table that launches read without a lock. There are fewer than two hundred
/// kernels; what finds no slot still works, through the lock.
const SLOTS: usize = 1024;

struct Entry {
    source: *const Source,
    kernel: CString,
    function: Function,
}

/// The loaded kernels of one device.
///
/// The table is open-addressed and only grows: a slot goes from null to an entry that lives as
/// long as the process, so readers need no lock.
pub(crate) struct Kernels {
    slots: Box<[AtomicPtr<Entry>]>,
    loading: Mutex<Vec<Loaded>>,
}

/// A source that has been loaded, or that cannot be compiled.
struct Loaded {
    source: *const Source,
    module: Result<Module>,
}

// SAFETY: `source` is the address of a static, compared and never read through.
unsafe impl Send for Loaded {}

impl Kernels {
    pub(crate) fn new() -> Self {
        let slots = (0..SLOTS).map(|_| AtomicPtr::new(ptr::null_mut())).collect();
        Self { slots, loading: Mutex::new(Vec::new()) }
    }

    /// The kernel `kernel` of `source`, loaded on first use.
    pub(crate) fn get(
        &self,
        device: &Device,
        source: &'static Source,
        kernel: &CStr,
    ) -> Result<Function> {
        match self.find(source, kernel) {
            Ok(function) => Ok(function),
            Err(_) => self.load(device, source, kernel),
        }
    }

    /// The function, or the first free slot (none when the table is full).
    fn find(&self, source: *const Source, kernel: &CStr) -> Result<Function, Option<usize>> {
        let start = hash(source, kernel);
        for step in 0..SLOTS {
            let slot = (start + step) % SLOTS;
            let entry = self.slots[slot].load(Ordering::Acquire);
            if entry.is_null() {
                return Err(Some(slot));
            }
            // SAFETY: a slot that is not null holds a leaked entry, complete before it was stored.
            let entry = unsafe { &*entry };
            if ptr::eq(entry.source, source) && entry.kernel.as_c_str() == kernel {
                return Ok(entry.function);
            }
        }
        Err(None)
    }

    #[cold]
    fn load(&self, device: &Device, source: &'static Source, kernel: &CStr) -> Result<Function> {
        let mut loaded = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = match self.find(source, kernel) {
            Ok(function) => return Ok(function), // another thread was faster
            Err(slot) => slot,
        };
        let known = loaded.iter().find(|loaded| ptr::eq(loaded.source, source));
        let module = if let Some(known) = known {
            known.module.clone()?
        } else {
            let module = device.driver().load(source);
            // A text that does not compile will not compile next time; every other failure
            // (memory, a missing library, a graph being captured) can pass.
            if matches!(module, Ok(_) | Err(Error::Compile { .. })) {
                loaded.push(Loaded { source, module: module.clone() });
            }
            module?
        };
        let function = device.driver().function(module, kernel)?;
        if let Some(slot) = slot {
            let entry = Entry { source, kernel: kernel.to_owned(), function };
            self.slots[slot].store(Box::into_raw(Box::new(entry)), Ordering::Release);
        }
        Ok(function)
    }
}

/// Where a kernel's slot is looked for first: from the address of its source and the text of its
/// name, eight bytes at a time.
fn hash(source: *const Source, kernel: &CStr) -> usize {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut state = (source.addr() as u64).wrapping_mul(ODD);
    let mut chunks = kernel.to_bytes().chunks_exact(8);
    for chunk in &mut chunks {
        let mut word = [0; 8];
        word.copy_from_slice(chunk);
        state = (state ^ u64::from_le_bytes(word)).wrapping_mul(ODD).rotate_left(23);
    }
    for &byte in chunks.remainder() {
        state = (state ^ u64::from(byte)).wrapping_mul(ODD);
    }
    (state >> 40) as usize
}
