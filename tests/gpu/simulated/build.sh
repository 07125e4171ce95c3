#!/usr/bin/env bash
# Builds stand-ins for CUDA's libraries and NCCL, with which the GPU path runs on a machine without a GPU: whatever is computed,
# copied, ordered and sent is, at the speed of a CPU. Needs g++ alone.
#
# usage: tests/gpu/simulated/build.sh FOLDER
# then:  CUDA_PATH=FOLDER LD_LIBRARY_PATH=FOLDER/lib64 coordinator ... --set cluster.backend=cuda
set -euo pipefail
cd "$(dirname "$0")"
into=$1
mkdir -p "$into/lib64" "$into/include"
cp include/* "$into/include/"
# What else kept kernels depend on in a real toolkit, and here.
touch "$into"/include/{cuda_bf16.hpp,cuda_fp16.h}
cat include/* compiler.cc | sha256sum > "$into/include/cuda_fp16.hpp"
build() { # NAME SOURCE [OPTIONS...]
  g++ -std=c++17 -O3 -march=native -Wall -Wextra -fPIC -shared -pthread -fvisibility=hidden -Wl,-soname,"$1" -o "$into/lib64/$1" "$2" "${@:3}"
}
build libcuda.so.1 driver.cc -ldl
ln -sf libcuda.so.1 "$into/lib64/libcuda.so"
build libnvrtc.so compiler.cc -DNVIDIA_COMPILER="\"$PWD/nvidia_compiler.py\""
build libcublasLt.so products.cc -L"$into/lib64" -l:libcuda.so.1
build libnvidia-ml.so.1 management.cc
build libnccl.so.2 nccl.cc -L"$into/lib64" -l:libcuda.so.1
