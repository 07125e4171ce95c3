//! One process's training: step, flat parameters, sharded optimizer, evaluation, reference pass.
