//! Layers of experts: each row of activations times the quantized weight of the expert that its
//! token is routed to, and the gradient of the activations. One grouped product on the device:
//! nothing waits for the routing, so that a layer can be captured in a CUDA graph and replayed
//! with other routes.
//!
//! [`route`] sorts the rows by expert. The product's grid then has as many groups as the rows
//! could need however they are routed; a group finds its expert and rows in the lists, and ends at
//! once when none are left for it. Rows are gathered as they are read and scattered as they are
//! written. Results are the same in every run. In 4 bits a row's result does not depend on the other
//! rows' routes; in 8 bits only through the outlier columns of the rows that share its expert.
//!
//! Rows without an expert (id `experts`) are zero. **Rows whose id is out of range are NaN**: the
//! device cannot refuse them. Nothing is read or written out of bounds for them.

mod four;
mod int8;
mod route;

pub use four::*;
pub use int8::*;
pub use route::*;
