//! Cases and properties over every available instruction set.
