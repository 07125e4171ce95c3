// The optimizer's share of a step on flat f32 parameters: one pass over weights, moments and gradient, and the sum of squares
// that the global norm is made of. The rules and their factors are the caller's.

#include <cuda_bf16.h>

// How a weight becomes an operand of bf16: to the nearest, or by a threshold of its place (`rounding.rs`, which has the same on the
// host).
struct Rounding {
  int dithered;
  unsigned first;  // place of the first element

  __device__ __nv_bfloat16 operand(float weight, long long at) const {
    if (!dithered || weight != weight) return __float2bfloat16_rn(weight);
    unsigned mixed = first + (unsigned)at;
    mixed ^= mixed >> 16;
    mixed *= 0x7feb352du;
    mixed ^= mixed >> 15;
    mixed *= 0x846ca68bu;
    mixed ^= mixed >> 16;
    return __ushort_as_bfloat16((unsigned short)((__float_as_uint(weight) + (mixed & 0xffffu)) >> 16));
  }
};

// Operands of weights that are elsewhere.
extern "C" __global__ void rounded(const float* weights, __nv_bfloat16* operands, long long elements, int dithered,
                                   unsigned first_place) {
  long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at < elements) operands[at] = Rounding{dithered, first_place}.operand(weights[at], at);
}

// AdamW. `operands` gets what the new weights are as operands where it is given.
extern "C" __global__ void adamw(float* weights, float* first, float* second, const float* gradient, __nv_bfloat16* operands,
                                 long long elements, int dithered, unsigned first_place, float clip, float keep_first,
                                 float add_first, float keep_second, float add_second, float step_size,
                                 float root_correction, float eps, float keep_weight) {
  long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= elements) return;
  float g = gradient[at] * clip;
  float m = keep_first * first[at] + add_first * g;
  float v = keep_second * second[at] + add_second * g * g;
  float w = weights[at] * keep_weight - step_size * (m / (sqrtf(v) * root_correction + eps));
  first[at] = m;
  second[at] = v;
  weights[at] = w;
  if (operands) operands[at] = Rounding{dithered, first_place}.operand(w, at);
}

extern "C" __global__ void rmsprop(float* weights, float* second, const float* gradient, __nv_bfloat16* operands,
                                   long long elements, int dithered, unsigned first_place, float clip, float keep,
                                   float add, float step_size, float eps) {
  long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= elements) return;
  float g = gradient[at] * clip;
  float v = keep * second[at] + add * g * g;
  float w = weights[at] - step_size * (g / (sqrtf(v) + eps));
  second[at] = v;
  weights[at] = w;
  if (operands) operands[at] = Rounding{dithered, first_place}.operand(w, at);
}

// Sums over packs of a gradient's shard.
extern "C" __global__ void add_to(float* sums, const float* part, long long elements) {
  long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at < elements) sums[at] += part[at];
}

__device__ double block_sum(double v) {
  __shared__ double sums[8];
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0.0;
  if (threadIdx.x == 0)
    for (int w = 0; w < 8; w++) v += sums[w];
  return v;
}

// partial[block] = Σ x² of every gridDim.x-th piece; 256 threads. Squares of f32 cannot overflow f64.
extern "C" __global__ void squares(const float* x, double* partial, long long elements) {
  double sum = 0.0;
  for (long long at = (long long)blockIdx.x * 256 + threadIdx.x; at < elements; at += (long long)gridDim.x * 256)
    sum += (double)x[at] * (double)x[at];
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// total += Σ partial; one block of 256.
extern "C" __global__ void squares_total(const double* partial, double* total, int blocks) {
  double sum = 0.0;
  for (int b = threadIdx.x; b < blocks; b += 256) sum += partial[b];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *total += sum;
}
