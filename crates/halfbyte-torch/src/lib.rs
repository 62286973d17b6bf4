//! PyTorch extension.
