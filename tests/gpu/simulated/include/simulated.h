// What CUDA C++ has beyond C++, for kernels that run on the CPU: seen by every kernel before its own text (compiler.cc).
//
// The threads of a block are fibers of one thread of the CPU (driver.cc). A fiber runs until it waits for its warp or its
// block, so whatever threads tell each other passes through `warp` and `block` below. Blocks run one after the other.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
// Blocks do not overlap in time.
#define __shared__ static

using std::max;
using std::min;

struct uint2 { unsigned x, y; } __attribute__((aligned(8)));
struct float2 { float x, y; } __attribute__((aligned(8)));
struct uint4 { unsigned x, y, z, w; } __attribute__((aligned(16)));
struct float4 { float x, y, z, w; } __attribute__((aligned(16)));
struct uint3 { unsigned x, y, z; };

// What is under way. The same struct is in driver.cc, which fills it whenever another fiber goes on.
struct Simulated {
    uint3 thread, block, block_size, grid_size;
    unsigned char* shared;        // the block's dynamic shared memory
    unsigned shared_bytes;
    bool copies_at_once;
    const unsigned* round;        // how often its warp has waited for all of it
    unsigned char (*places)[32][64];  // two for each lane of the warp, used in turns
    void (*wait_for_warp)();
    void (*wait_for_block)();
};
extern "C" {
__attribute__((visibility("default"))) Simulated simulated;
}

#define threadIdx simulated.thread
#define blockIdx simulated.block
#define blockDim simulated.block_size
#define gridDim simulated.grid_size

[[noreturn]] static void simulated_fault(const char* what) {
    fprintf(stderr, "simulated GPU: %s, thread %u of block %u\n", what, threadIdx.x, blockIdx.x);
    abort();
}

static inline void __syncthreads() { simulated.wait_for_block(); }
static inline void __syncwarp() { simulated.wait_for_warp(); }

// ---- What lanes tell each other ----

template <class T>
static inline const unsigned char (*simulated_exchange(const T& mine))[64] {
    static_assert(sizeof(T) <= 64, "a lane's place");
    auto* places = simulated.places[*simulated.round % 2];
    memcpy(places[threadIdx.x % 32], &mine, sizeof mine);
    simulated.wait_for_warp();
    return places;
}

template <class T>
static inline T simulated_of(const unsigned char (*places)[64], int lane) {
    T value;
    memcpy(&value, places[lane], sizeof value);
    return value;
}

static inline void simulated_whole(unsigned mask) {
    if (mask != ~0u) simulated_fault("only whole warps are simulated");
}

template <class T>
static inline T __shfl_sync(unsigned mask, T mine, int lane) {
    simulated_whole(mask);
    return simulated_of<T>(simulated_exchange(mine), lane % 32);
}

template <class T>
static inline T __shfl_xor_sync(unsigned mask, T mine, int lanes) {
    simulated_whole(mask);
    return simulated_of<T>(simulated_exchange(mine), (threadIdx.x % 32) ^ lanes);
}

// ---- Arithmetic ----

template <class To, class From>
static inline To simulated_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

static inline float __int_as_float(int bits) { return simulated_bits<float>(bits); }
static inline unsigned __float_as_uint(float value) { return simulated_bits<unsigned>(value); }
static inline float __uint_as_float(unsigned bits) { return simulated_bits<float>(bits); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static inline unsigned short simulated_round_to_bf16(float value) {
    const unsigned bits = simulated_bits<unsigned>(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static inline float simulated_from_bf16(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }

// ---- PTX, each instruction with its outputs first ----

// Addresses of shared memory are offsets from here, so that none is taken for a pointer.
static constexpr unsigned SIMULATED_SHARED = 0x1000;

static inline size_t __cvta_generic_to_shared(const void* pointer) {
    return static_cast<const unsigned char*>(pointer) - simulated.shared + SIMULATED_SHARED;
}

static inline unsigned char* simulated_shared(unsigned address, unsigned bytes) {
    if (address % bytes) simulated_fault("an address in shared memory that is not aligned");
    if (address < SIMULATED_SHARED || address + bytes > SIMULATED_SHARED + simulated.shared_bytes)
        simulated_fault("an address past the block's shared memory");
    return simulated.shared + (address - SIMULATED_SHARED);
}

// Copies in the background happen as late as they may, so that what is read before they are waited for is not there yet, or at once, so
// that what is still to be read at their place is gone.
struct SimulatedCopy {
    unsigned char* to;
    const unsigned char* from;
    int bytes, real;

    void make() const {
        memcpy(to, from, real);
        memset(to + real, 0, bytes - real);
    }
};
static std::vector<SimulatedCopy> simulated_copies[1024];

static inline void simulated_copy(unsigned to, const void* from, int bytes, int real) {
    if (reinterpret_cast<size_t>(from) % bytes) simulated_fault("a copy from an address that is not aligned");
    const SimulatedCopy copy{simulated_shared(to, bytes), static_cast<const unsigned char*>(from), bytes, real};
    if (simulated.copies_at_once) copy.make();
    else simulated_copies[threadIdx.x].push_back(copy);
}
static inline void ptx_cp_async_cg_shared_global(unsigned to, const void* from, int real) { simulated_copy(to, from, 16, real); }
static inline void ptx_cp_async_ca_shared_global(unsigned to, const void* from, int real) { simulated_copy(to, from, 4, real); }
static inline void ptx_cp_async_wait_all() {
    for (const SimulatedCopy& copy : simulated_copies[threadIdx.x]) copy.make();
    simulated_copies[threadIdx.x].clear();
}

// The element of one of four 8x8 matrices at a row and column; rows start where lanes say.
static inline unsigned short simulated_element(const unsigned char (*rows)[64], int matrix, int row, int column) {
    unsigned short element;
    memcpy(&element, simulated_shared(simulated_of<unsigned>(rows, matrix * 8 + row), 16) + column * 2, 2);
    return element;
}

template <bool TRANSPOSED>
static inline void simulated_load_matrices(unsigned* const (&to)[4], unsigned from) {
    const int lane = threadIdx.x % 32, major = lane / 4, minor = lane % 4 * 2;
    auto* rows = simulated_exchange(from);
    for (int matrix = 0; matrix < 4; matrix++) {
        unsigned short pair[2];
        for (int i = 0; i < 2; i++)
            pair[i] = TRANSPOSED ? simulated_element(rows, matrix, minor + i, major) : simulated_element(rows, matrix, major, minor + i);
        memcpy(to[matrix], pair, 4);
    }
}

static inline void ptx_ldmatrix_sync_aligned_m8n8_x4_shared_b16(unsigned& a, unsigned& b, unsigned& c, unsigned& d,
                                                                 unsigned from) {
    simulated_load_matrices<false>({&a, &b, &c, &d}, from);
}

static inline void ptx_ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(unsigned& a, unsigned& b, unsigned& c, unsigned& d,
                                                                       unsigned from) {
    simulated_load_matrices<true>({&a, &b, &c, &d}, from);
}

struct SimulatedFragments {
    unsigned a[4], b[2];
};

static inline void ptx_mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(float& c0, float& c1, float& c2, float& c3,
                                                                            unsigned a0, unsigned a1, unsigned a2,
                                                                            unsigned a3, unsigned b0, unsigned b1) {
    const unsigned lane = threadIdx.x % 32;
    auto* places = simulated_exchange(SimulatedFragments{{a0, a1, a2, a3}, {b0, b1}});
    float rows[2][16], columns[2][16];
    for (int pair = 0; pair < 8; pair++) {
        const auto left = simulated_of<SimulatedFragments>(places, lane / 4 * 4 + pair % 4);
        for (int half = 0; half < 2; half++) {
            const unsigned both = left.a[half + pair / 4 * 2];
            rows[half][2 * pair] = simulated_from_bf16(both & 0xffff);
            rows[half][2 * pair + 1] = simulated_from_bf16(both >> 16);
            const auto right = simulated_of<SimulatedFragments>(places, (lane % 4 * 2 + half) * 4 + pair % 4);
            const unsigned down = right.b[pair / 4];
            columns[half][2 * pair] = simulated_from_bf16(down & 0xffff);
            columns[half][2 * pair + 1] = simulated_from_bf16(down >> 16);
        }
    }
    float* sums[4] = {&c0, &c1, &c2, &c3};
    for (int i = 0; i < 4; i++) {
        float sum = *sums[i];
        for (int k = 0; k < 16; k++) sum += rows[i / 2][k] * columns[i % 2][k];
        *sums[i] = sum;
    }
}

static inline void ptx_cvt_rn_bf16x2_f32(unsigned& both, float high, float low) {
    both = (unsigned)simulated_round_to_bf16(high) << 16 | simulated_round_to_bf16(low);
}

static inline void ptx_ex2_approx_ftz_f32(float& y, float x) {
    y = exp2f(x);
    if (y < 1.17549435e-38f) y = 0.f;
}

// ---- Launching ----

template <class... Arguments, size_t... I>
static inline void simulated_run(void (*kernel)(Arguments...), void** arguments, std::index_sequence<I...>) {
    simulated_copies[threadIdx.x].clear();
    kernel(*static_cast<std::remove_reference_t<Arguments>*>(arguments[I])...);
}

// Of the arguments only the size counts.
template <class... Arguments>
static inline size_t simulated_sizes(void (*)(Arguments...), size_t* sizes) {
    const size_t all[] = {sizeof(Arguments)..., 0};
    if (sizes) memcpy(sizes, all, sizeof all);
    return sizeof...(Arguments);
}

template <class... Arguments>
static inline auto simulated_order(void (*)(Arguments...)) { return std::index_sequence_for<Arguments...>(); }

#define SIMULATED_KERNEL(name)                                                                              \
    extern "C" __attribute__((visibility("default"))) void simulated_kernel_##name(void** arguments) {      \
        simulated_run(name, arguments, simulated_order(name));                                              \
    }                                                                                                       \
    extern "C" __attribute__((visibility("default"))) size_t simulated_sizes_##name(size_t* sizes) {        \
        return simulated_sizes(name, sizes);                                                                \
    }
