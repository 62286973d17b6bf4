//! The kernels: a [`Source`] for each `kernels/*.cu`, its text with includes expanded, and the cubins
//! that the build made of it if it had an NVRTC.

use crate::Source;
use crate::packed::Packed;

include!(concat!(env!("OUT_DIR"), "/sources.rs"));
