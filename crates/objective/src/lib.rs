//! Cal-DPO and its relatives as functions of sequence log-probs, with their derivatives.
