#!/usr/bin/env bash
# Checks and times everything on a GPU, and prints one table: the fused kernels against the host's, transformers' goldens in f32
# and bf16, NCCL, a run on the GPU against the same run on the CPU, jobs of two workers over NCCL that lose one or all, and pairs per second beside TRL on the same card.
#
# usage: tests/gpu.sh [larger|kernels|goldens|nccl|agree|job|speed|probe ...]      all but the probe without an argument
#
# MODEL         a Hugging Face directory to time and to train for 60 steps on the GPU and the CPU (larger); by default random weights in the shape of
#               SmolLM2-135M
# TOKENIZER     whose tokenizer (and shape) random models get, by default ../shared/models/smollm2-135m-instruct
# PAIRS         preference pairs, by default ../shared/data/chat-preferences-1024.jsonl: at least 192 of them
# SHORT         short pairs for 60 steps on the CPU too, by default ../shared/data/instruction-preferences.jsonl
# TOKENS        tokens at once to try, by default "8192 16384"
# PEER_PYTHON   a Python with torch, transformers and trl, by default python3; PEER_MICRO its micro-batches, by default "8 32"
# GPU_BIN       a folder with programs that were built elsewhere (coordinator, kernels_cuda, model_golden, collective_nccl, gpu_probe);
#               without it cargo builds them here
# OUT           where logs go, by default a temporary folder
# SIMULATED     if 1: on stand-ins for CUDA's libraries (tests/gpu/simulated) instead of a GPU, the parts kernels goldens nccl agree job
# PATIENCE      a factor on all time limits, by default 1, or 10 simulated
# JOB_STEPS     steps of the jobs of two workers, by default 60, or 12 simulated
#
# Needs the NVIDIA driver, the CUDA toolkit's headers and libraries and NCCL (CUDA_PATH, LD_LIBRARY_PATH), and Python 3.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${SIMULATED:-0}" = 1 ]; then
  CUDA_PATH="$(mktemp -d)"
  tests/gpu/simulated/build.sh "$CUDA_PATH"
  export PATIENCE="${PATIENCE:-10}" JOB_STEPS="${JOB_STEPS:-12}" SIMULATED_GPU_ORDER="${SIMULATED_GPU_ORDER:-1}"
  [ $# -gt 0 ] || set -- kernels goldens nccl agree job
  case " $* " in *\ larger\ *|*\ speed\ *|*\ probe\ *)
    echo "larger, speed and probe need a GPU: a simulated one takes far too long and says nothing about time; leave SIMULATED out" >&2; exit 2 ;;
  esac
fi
export CUDA_PATH="${CUDA_PATH:-/usr/local/cuda}"
export LD_LIBRARY_PATH="$CUDA_PATH/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
if [ -z "${GPU_BIN:-}" ]; then
  GPU_BIN="$(mktemp -d)"
  cargo build --release -p coordinator --features cuda
  cp target/release/coordinator "$GPU_BIN/"
  take() { # NAME CARGO_ARGUMENTS...: the test program that cargo builds with them
    local name=$1; shift
    cp "$(cargo test --release --no-run --message-format=json "$@" | python3 -c 'import json,sys
print([m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable") and m["target"]["kind"] == ["test"]][-1])')" "$GPU_BIN/$name"
  }
  take kernels_cuda -p kernels --features cuda --test cuda
  take model_golden -p model --features cuda --test golden
  take collective_nccl -p collective --features nccl --test nccl
fi
export GPU_BIN
exec "${PEER_PYTHON:-python3}" tests/gpu/run.py "$@"
