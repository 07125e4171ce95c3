// The part of CUDA's header of this name that our kernels use.
#pragma once
#include "simulated.h"

struct __nv_bfloat16 { unsigned short bits; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; } __attribute__((aligned(4)));

static inline float __bfloat162float(__nv_bfloat16 value) { return simulated_from_bf16(value.bits); }
static inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {simulated_round_to_bf16(value)}; }
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
