//! Pure state machines of a training job: generations, step commits, checkpoints. No clock, no sockets.
