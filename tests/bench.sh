#!/usr/bin/env bash
# Times this project beside TRL's DPOTrainer: the whole path (coordinator, workers, reference pass, votes, journal) and the peer
# in turn, on the same model, pairs and batch, and prints the README's table. Or draws growth curves of the project alone.
# Meant for an otherwise idle machine; nothing is asserted.
#
# usage: tests/bench.sh MODEL_DIR PAIRS.jsonl...     the table; ROUNDS=3 STEPS=6 WARMUP=2 BATCH_PAIRS=8 MAX_LENGTH=1024
#        tests/bench.sh growth MODEL_DIR PAIRS.jsonl seconds against tokens at once, length, model size, workers, with exponents
#
# PEER_PYTHON   a Python that has torch, transformers and trl; without one the project is timed alone
# PEER          the peer's script, by default ../shared/tools/peer_dpo.py
# PEER_MICRO    micro-batch sizes of the peer to try, by default "1 8"; the fastest counts
# WORKERS       workers of the project, by default 1, with all cores between them
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --quiet -p coordinator
exec python3 tests/bench/run.py "$@"
