//! All-reduce, reduce-scatter, all-gather and broadcast over flat buffers.
