//! Decoder families as data over the kernels: packs in, sequence log-probs out.
