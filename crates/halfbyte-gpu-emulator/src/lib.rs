//! # The emulated GPU
//!
//! The kernels of `halfbyte-gpu`, compiled for the CPU over fibers (`cpp/emulator.h`), in shared
//! libraries that have the interface of a CUDA driver (`cpp/driver.cpp`). halfbyte loads such a
//! library like any driver when `HALFBYTE_CUDA_DRIVER` names it, so that everything from the
//! launcher on is what runs on a GPU. For tests; it is slow.

use std::path::Path;

/// The library that stands for `libcuda.so.1`, `libnvrtc` and `libamdhip64`.
#[must_use]
pub fn path() -> &'static Path {
    Path::new(concat!(env!("HALFBYTE_EMULATOR_DIR"), "/libcuda_emulated.so"))
}
