//! The kernels: a [`Source`] for each `kernels/*.cu`, with its includes expanded, and the cubins that
//! the build made of it if it had an NVRTC.

use crate::Source;

include!(concat!(env!("OUT_DIR"), "/sources.rs"));
