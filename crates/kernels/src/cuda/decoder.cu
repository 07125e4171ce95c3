// The row-wise and element-wise operations of a decoder. Matrix products are cuBLASLt's, attention has a file of its own.
//
// Sums are f32 whatever the elements are. Every sum has a fixed order, so a kernel gives the same bits every time, and a row's
// result does not depend on the rows beside it. Rows are dense. Macros choose element types: 0 is f32, 1 is bf16.
//   X  the operand, or the residual stream
//   D  a gradient that comes in
//   F  the activation: 0 silu, 1 gelu by tanh, 2 gelu

#include <cuda_bf16.h>

#ifndef X
#define X 0
#endif
#ifndef D
#define D 0
#endif
#ifndef F
#define F 0
#endif

typedef __nv_bfloat16 bf16;
template <int KIND> struct Kind { typedef float Element; };
template <> struct Kind<1> { typedef bf16 Element; };
typedef Kind<X>::Element XE;
typedef Kind<D>::Element DE;

__device__ __forceinline__ float get(const float* p, long long i) { return p[i]; }
__device__ __forceinline__ float get(const bf16* p, long long i) { return __bfloat162float(p[i]); }
__device__ __forceinline__ void put(float* p, long long i, float v) { p[i] = v; }
__device__ __forceinline__ void put(bf16* p, long long i, float v) { p[i] = __float2bfloat16_rn(v); }

// Four neighbours at once: rows are a multiple of four wide wherever these are used, and their memory is aligned to it.
struct Four { float v[4]; };
__device__ __forceinline__ Four get4(const float* p, long long i) {
  float4 w = *reinterpret_cast<const float4*>(p + i);
  return {{w.x, w.y, w.z, w.w}};
}
__device__ __forceinline__ Four get4(const bf16* p, long long i) {
  uint2 w = *reinterpret_cast<const uint2*>(p + i);
  return {{__uint_as_float(w.x << 16), __uint_as_float(w.x & 0xffff0000u),
           __uint_as_float(w.y << 16), __uint_as_float(w.y & 0xffff0000u)}};
}
__device__ __forceinline__ void put4(float* p, long long i, const Four& f) {
  *reinterpret_cast<float4*>(p + i) = make_float4(f.v[0], f.v[1], f.v[2], f.v[3]);
}
__device__ __forceinline__ void put4(bf16* p, long long i, const Four& f) {
  __nv_bfloat162 low = __floats2bfloat162_rn(f.v[0], f.v[1]);
  __nv_bfloat162 high = __floats2bfloat162_rn(f.v[2], f.v[3]);
  uint2 w;
  w.x = *reinterpret_cast<unsigned*>(&low);
  w.y = *reinterpret_cast<unsigned*>(&high);
  *reinterpret_cast<uint2*>(p + i) = w;
}

static const float INFINITE = 3.402823466e38f;
__device__ __forceinline__ float warp_sum(float v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
  for (int offset = 16; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}

// ---- Norms: a warp a row. -------------------------------------------------------------------------------------------------

// y = w · (x / sqrt(mean(x²) + eps)); y in D, x in X.
extern "C" __global__ void rms_norm(const XE* x, const float* w, DE* y, float* inverse, int rows, int width, float eps) {
  int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  long long base = (long long)row * width;
  float sum = 0.0f;
  for (int i = lane * 4; i < width; i += 128) {
    Four a = get4(x, base + i);
    for (int j = 0; j < 4; j++) sum += a.v[j] * a.v[j];
  }
  float inv = 1.0f / sqrtf(warp_sum(sum) / (float)width + eps);
  if (lane == 0) inverse[row] = inv;
  for (int i = lane * 4; i < width; i += 128) {
    Four a = get4(x, base + i), b = get4(w, i);
    for (int j = 0; j < 4; j++) a.v[j] = b.v[j] * (a.v[j] * inv);
    put4(y, base + i, a);
  }
}

// dx = inverse · (w·dy − x · inverse² · mean(w·dy·x)); dy in D, x and dx in X. `plus`, f32, is added where it is given.
extern "C" __global__ void rms_norm_backward(const DE* dy, const XE* x, const float* w, const float* inverse,
                                             const float* plus, XE* dx, int rows, int width) {
  int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  long long base = (long long)row * width;
  float inv = inverse[row], sum = 0.0f;
  for (int i = lane * 4; i < width; i += 128) {
    Four a = get4(dy, base + i), b = get4(w, i), c = get4(x, base + i);
    for (int j = 0; j < 4; j++) sum += a.v[j] * b.v[j] * c.v[j];
  }
  float shared = warp_sum(sum) / (float)width * inv * inv;
  for (int i = lane * 4; i < width; i += 128) {
    Four a = get4(dy, base + i), b = get4(w, i), c = get4(x, base + i);
    for (int j = 0; j < 4; j++) a.v[j] = inv * (a.v[j] * b.v[j] - c.v[j] * shared);
    if (plus) {
      Four p = get4(plus, base + i);
      for (int j = 0; j < 4; j++) a.v[j] += p.v[j];
    }
    put4(dx, base + i, a);
  }
}

// y = w · (x − mean) / sqrt(variance + eps) + b; y is f32, x in X.
extern "C" __global__ void layer_norm(const XE* x, const float* w, const float* b, float* y, float* means, float* inverse,
                                      int rows, int width, float eps) {
  int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  long long base = (long long)row * width;
  float sum = 0.0f, squares = 0.0f;
  for (int i = lane * 4; i < width; i += 128) {
    Four a = get4(x, base + i);
    for (int j = 0; j < 4; j++) sum += a.v[j];
  }
  float mean = warp_sum(sum) / (float)width;
  for (int i = lane * 4; i < width; i += 128) {
    Four a = get4(x, base + i);
    for (int j = 0; j < 4; j++) squares += (a.v[j] - mean) * (a.v[j] - mean);
  }
  float inv = 1.0f / sqrtf(warp_sum(squares) / (float)width + eps);
  if (lane == 0) {
    means[row] = mean;
    inverse[row] = inv;
  }
  for (int i = lane * 4; i < width; i += 128) {
    Four a = get4(x, base + i), c = get4(w, i), d = get4(b, i);
    for (int j = 0; j < 4; j++) a.v[j] = (a.v[j] - mean) * inv * c.v[j] + d.v[j];
    put4(y, base + i, a);
  }
}

// dx = inverse · (w·dy − mean(w·dy) − normal · mean(w·dy·normal)); dy in D, x and dx in X.
extern "C" __global__ void layer_norm_backward(const DE* dy, const XE* x, const float* w, const float* means,
                                               const float* inverse, XE* dx, int rows, int width) {
  int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  long long base = (long long)row * width;
  float mean = means[row], inv = inverse[row], level = 0.0f, shared = 0.0f;
  for (int i = lane * 4; i < width; i += 128) {
    Four a = get4(dy, base + i), b = get4(w, i), c = get4(x, base + i);
    for (int j = 0; j < 4; j++) {
      level += a.v[j] * b.v[j];
      shared += a.v[j] * b.v[j] * ((c.v[j] - mean) * inv);
    }
  }
  level = warp_sum(level) / (float)width;
  shared = warp_sum(shared) / (float)width;
  for (int i = lane * 4; i < width; i += 128) {
    Four a = get4(dy, base + i), b = get4(w, i), c = get4(x, base + i);
    for (int j = 0; j < 4; j++) a.v[j] = inv * (a.v[j] * b.v[j] - level - (c.v[j] - mean) * inv * shared);
    put4(dx, base + i, a);
  }
}

// ---- Column sums: slices of rows first, then slice by slice. ---------------------------------------------------------------

// partial[slice, c] = Σ dy[r, c] · (x[r, c] − mean[r]) · inverse[r] over the slice's rows; no mean is 0, and without x it is Σ dy.
// 32 × 8 threads.
extern "C" __global__ void column_sums(const DE* dy, const XE* x, const float* mean, const float* inverse, float* partial,
                                       int rows, int width, int slice) {
  __shared__ float sums[8][33];
  int lane = threadIdx.x % 32, part = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
  int first = blockIdx.y * slice, last = min(rows, first + slice);
  float sum = 0.0f;
  if (column < width)
    for (int r = first + part; r < last; r += 8) {
      long long at = (long long)r * width + column;
      float v = get(dy, at);
      sum += x ? v * ((get(x, at) - (mean ? mean[r] : 0.0f)) * inverse[r]) : v;
    }
  sums[part][lane] = sum;
  __syncthreads();
  if (part == 0 && column < width) {
    for (int p = 1; p < 8; p++) sum += sums[p][lane];
    partial[(long long)blockIdx.y * width + column] = sum;
  }
}

extern "C" __global__ void column_sums_add(const float* partial, float* gradient, int slices, int width) {
  int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= width) return;
  float sum = 0.0f;
  for (int s = 0; s < slices; s++) sum += partial[(long long)s * width + column];
  gradient[column] += sum;
}

// ---- Rotary embedding, halves apart. ---------------------------------------------------------------------------------------

// cos and sin of position · frequency, times `factor`; row r reads frequency list lists[r].
extern "C" __global__ void rotary_table(const int* positions, const int* lists, const float* frequencies, float* cosines,
                                        float* sines, int rows, int half, float factor) {
  long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= (long long)rows * half) return;
  int row = at / half, i = at % half;
  float sine, cosine;
  sincosf((float)positions[row] * frequencies[lists[row] * half + i], &sine, &cosine);
  cosines[at] = cosine * factor;
  sines[at] = sine * factor;
}

extern "C" __global__ void rotary(const XE* x, XE* y, const float* cosines, const float* sines, int rows, int heads,
                                  int head_dim, int half, float sign) {
  long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  int pairs = head_dim - half;  // Columns past the turned ones are only copied.
  if (at >= (long long)rows * heads * pairs) return;
  int i = at % pairs;
  long long head = at / pairs, row = head / heads, base = head * head_dim;
  if (i >= half) {
    if (x != y) put(y, base + half + i, get(x, base + half + i));
    return;
  }
  float a = get(x, base + i), b = get(x, base + half + i);
  float c = cosines[row * half + i], s = sign * sines[row * half + i];
  put(y, base + i, a * c - b * s);
  put(y, base + half + i, b * c + a * s);
}

// ---- Activations. ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void curve(float x, float* value, float* slope) {
#if F == 0
  float s = 1.0f / (1.0f + expf(-x));
  *value = x * s;
  *slope = s * (1.0f + x * (1.0f - s));
#elif F == 1
  float t = tanhf(0.7978846f * (x + 0.044715f * x * x * x));
  *value = 0.5f * x * (1.0f + t);
  *slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.7978846f * (1.0f + 3.0f * 0.044715f * x * x);
#else
  float below = 0.5f * (1.0f + erff(x * 0.70710678f));
  *value = x * below;
  *slope = below + x * 0.3989423f * expf(-0.5f * x * x);
#endif
}

// y = f(gate) · up; f(gate) where up is not given.
extern "C" __global__ void gated(const XE* gate, const XE* up, XE* y, long long quarter) {
  long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= quarter) return;
  Four a = get4(gate, 4 * at), b;
  if (up) b = get4(up, 4 * at);
  for (int j = 0; j < 4; j++) {
    float value, slope;
    curve(a.v[j], &value, &slope);
    a.v[j] = up ? value * b.v[j] : value;
  }
  put4(y, 4 * at, a);
}

// `inner` gets f(gate) · up where it is given.
extern "C" __global__ void gated_backward(const DE* dy, const XE* gate, const XE* up, XE* dgate, XE* dup, XE* inner,
                                          long long quarter) {
  long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= quarter) return;
  Four d = get4(dy, 4 * at), a = get4(gate, 4 * at), b, y;
  if (up) b = get4(up, 4 * at);
  for (int j = 0; j < 4; j++) {
    float value, slope;
    curve(a.v[j], &value, &slope);
    a.v[j] = d.v[j] * slope * (up ? b.v[j] : 1.0f);
    y.v[j] = up ? value * b.v[j] : value;
    b.v[j] = d.v[j] * value;
  }
  put4(dgate, 4 * at, a);
  if (up) put4(dup, 4 * at, b);
  if (inner) put4(inner, 4 * at, y);
}

// ---- Queries, keys and values that lie head by head (q0 k0 v0 q1 k1 v1 …): third `part` of them, to and fro. ----------------

extern "C" __global__ void split_heads(const XE* whole, XE* third, long long elements, int head_dim, int part) {
  long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at < elements) third[at] = whole[(at / head_dim * 3 + part) * head_dim + at % head_dim];
}

extern "C" __global__ void join_heads(XE* whole, const XE* third, long long elements, int head_dim, int part) {
  long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at < elements) whole[(at / head_dim * 3 + part) * head_dim + at % head_dim] = third[at];
}

// ---- Elementwise. ----------------------------------------------------------------------------------------------------------

// out = a + b, f32; a in X, b in D.
extern "C" __global__ void add(const XE* a, const DE* b, float* out, long long quarter) {
  long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= quarter) return;
  Four p = get4(a, 4 * at), q = get4(b, 4 * at);
  for (int j = 0; j < 4; j++) p.v[j] += q.v[j];
  put4(out, 4 * at, p);
}

// x + bias, row by row; in place.
extern "C" __global__ void add_bias(XE* x, const float* bias, long long elements, int width) {
  long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at < elements) put(x, at, get(x, at) + bias[at % width]);
}

// out = x · factor + plus; x in X, out in D. A cast where the factor is 1.
extern "C" __global__ void affine(const XE* x, DE* out, long long elements, float factor, float plus) {
  long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at < elements) put(out, at, get(x, at) * factor + plus);
}

// ---- Rows. A block a row. --------------------------------------------------------------------------------------------------

extern "C" __global__ void gather_rows(const XE* x, const int* rows, XE* y, int width) {
  long long from = (long long)rows[blockIdx.x] * width, to = (long long)blockIdx.x * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) y[to + i] = x[from + i];
}

// Row targets[b] of `out`: what was there where `keep`, and rows members[starts[b]..starts[b + 1]] of dy in that order.
extern "C" __global__ void scatter_add_rows(const DE* dy, const int* targets, const int* starts, const int* members,
                                            float* out, int width, int keep) {
  long long to = (long long)targets[blockIdx.x] * width;
  int first = starts[blockIdx.x], last = starts[blockIdx.x + 1];
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    float sum = keep ? out[to + i] : 0.0f;
    for (int m = first; m < last; m++) sum += get(dy, (long long)members[m] * width + i);
    out[to + i] = sum;
  }
}

// ---- The log-prob head, over f32 logits. A block of 256 a row. -------------------------------------------------------------

__device__ __forceinline__ float capped(float logit, float cap) { return cap > 0.0f ? cap * tanhf(logit / cap) : logit; }

extern "C" __global__ void head_logprobs(const float* logits, const int* targets, float* logps, float* lses, int vocabulary,
                                         float cap) {
  __shared__ float maxima[8], sums[8];
  const float* row = logits + (long long)blockIdx.x * vocabulary;
  float max = -INFINITE, sum = 0.0f;
  for (int i = threadIdx.x; i < vocabulary; i += 256) {
    float l = capped(row[i], cap);
    if (l > max) {
      sum = sum * expf(max - l) + 1.0f;
      max = l;
    } else {
      sum += expf(l - max);
    }
  }
  float top = warp_max(max);
  sum = warp_sum(max == -INFINITE ? 0.0f : sum * expf(max - top));
  if (threadIdx.x % 32 == 0) {
    maxima[threadIdx.x / 32] = top;
    sums[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float all = -INFINITE, total = 0.0f;
    for (int w = 0; w < 8; w++) all = fmaxf(all, maxima[w]);
    for (int w = 0; w < 8; w++)
      if (maxima[w] > -INFINITE) total += sums[w] * expf(maxima[w] - all);
    float lse = all + logf(total);
    lses[blockIdx.x] = lse;
    logps[blockIdx.x] = capped(row[targets[blockIdx.x]], cap) - lse;
  }
}

// dlogits = dlogp · (1 at the target − softmax), times the cap's slope; in X.
extern "C" __global__ void head_gradients(const float* logits, const int* targets, const float* lses, const float* dlogps,
                                          XE* dlogits, int vocabulary, float cap) {
  long long base = (long long)blockIdx.x * vocabulary;
  float lse = lses[blockIdx.x], dlogp = dlogps[blockIdx.x];
  int target = targets[blockIdx.x];
  for (int i = threadIdx.x; i < vocabulary; i += 256) {
    float l = capped(logits[base + i], cap);
    float d = dlogp * ((i == target ? 1.0f : 0.0f) - expf(l - lse));
    if (cap > 0.0f) d *= 1.0f - (l / cap) * (l / cap);
    put(dlogits, base + i, d);
  }
}
