// Attention over packs with shared prompts, forward and backward, for compute capability 8.0 and later; compiled at run time.
//
// Rows of all tensors are row-major: queries, outputs and their gradients [rows, heads * HD], keys, values and their
// gradients [rows, kv_heads * HD], statistics [heads, rows]. Query head h uses key head h / (heads / kv_heads).
//
// Macros of one compilation:
//   HD      columns of a head, a multiple of 4 up to 256; the kernels of bf16 are there for multiples of 16 alone
//   WINDOW  1 if a query sees only the last `window` positions, its own included (1 <= window <= 2^30), else 0
//   CAP     1 if scores s become cap * tanh(s / cap), else 0
//   ROOM    which tiles: 0 for blocks with 99 KiB of shared memory (compute capabilities 8.6, 8.9 and 12), 1 with 163 KiB
//           (8.0), 2 with 227 KiB (9.0 and 10)
// The scale must be positive.
//
// Every kernel gives the same bits on every run: no sum's order depends on timing.
//
// Work lists. A part is a prompt or one completion of it. Keys of a part have the positions 0, 1, ... without a gap:
// first the prompt's rows, then the part's own. The host cuts parts into tiles and the kernels look nothing else up, so
// a row's result depends on its own segment alone, bit for bit. Tiles may come in any order; long ones first balance
// best. Rows in no tile are not written.
//
// Launches. One block per tile and head, in one dimension; `blockIdx.x = tile * heads + head`:
//
//   kernel                     grid                           threads        dynamic shared bytes
//   attention_forward          query tiles * heads            FORWARD_WARPS  (QUERY_ROWS + 4 * FORWARD_KEYS) * PITCH
//   attention_backward_query   query tiles * heads            QUERY_WARPS    (2 * QUERY_ROWS + 4 * QUERY_KEYS) * PITCH
//   attention_backward_key     key tiles * kv_heads, SPLITS   KEY_WARPS      (2 * KEY_ROWS + 4 * KEY_QUERIES) * PITCH
//                                                                              + 16 * KEY_QUERIES
//   attention_delta            ceil(rows * heads * DELTA_LANES / 256), 256 threads, none
//   attention_delta_f32        ceil(rows * heads / 8), 256 threads, none
//   other *_f32                as without the suffix, but one dimension, 128 threads, none
//
// with PITCH = 2 * HD + 16 bytes, 32 threads a warp, and
//
//   HD         ROOM  QUERY_ROWS  FORWARD_WARPS, _KEYS  QUERY_WARPS, _KEYS  KEY_ROWS  KEY_WARPS, _QUERIES  SPLITS
//   16..=64    any   128         4, 64                 8, 64               128       4, 32                1
//   80..=128   1, 2  128         4, 64                 4, 32               64        4, 64                1
//              0     128         4, 32                 4, 16               64        4, 32                1
//   144..=256  2     128         8, 32                 8, 32               128       8, 32                2
//              1     64          4, 32                 4, 32               64        4, 32                2
//              0     64          4, 16                 4, 16               32        2, 16                2
//
// DELTA_LANES is HD / 8 rounded up to a power of two, at least 2. Query tiles have at most QUERY_ROWS rows, key tiles
// KEY_ROWS; empty ones are not listed.

#ifndef WINDOW
#define WINDOW 0
#endif
#ifndef CAP
#define CAP 0
#endif
#ifndef ROOM
#define ROOM 2
#endif

#if HD <= 64
#define QUERY_ROWS 128
#define FORWARD_WARPS 4
#define FORWARD_KEYS 64
#define QUERY_WARPS 8
#define QUERY_KEYS 64
#define KEY_ROWS 128
#define KEY_WARPS 4
#define KEY_QUERIES 32
#elif HD <= 128
#define QUERY_ROWS 128
#define FORWARD_WARPS 4
#define FORWARD_KEYS (ROOM ? 64 : 32)
#define QUERY_WARPS 4
#define QUERY_KEYS (ROOM ? 32 : 16)
#define KEY_ROWS 64
#define KEY_WARPS 4
#define KEY_QUERIES (ROOM ? 64 : 32)
#else
#define QUERY_ROWS (ROOM == 2 ? 128 : 64)
#define FORWARD_WARPS (QUERY_ROWS / 16)
#define FORWARD_KEYS (ROOM ? 32 : 16)
#define QUERY_WARPS (QUERY_ROWS / 16)
#define QUERY_KEYS (ROOM ? 32 : 16)
#define KEY_ROWS (32 << ROOM)
#define KEY_WARPS (KEY_ROWS / 16)
#define KEY_QUERIES (ROOM ? 32 : 16)
#endif

// Blocks that shall fit on a multiprocessor at once; bounds the registers.
#define FORWARD_BLOCKS (HD <= 64 ? 3 : HD <= 128 ? 2 : 1)
#define QUERY_BLOCKS (HD <= 128 ? 2 : 1)
#define KEY_BLOCKS (HD <= 128 ? 2 : 1)

static_assert(HD % 4 == 0 && HD >= 4 && HD <= 256, "HD");

typedef unsigned int u32;
typedef unsigned short bf16;

// Up to QUERY_ROWS consecutive queries of one part: 7 ints.
struct QueryTile {
    int q_row;       // row of the first query
    int q_pos;       // its position
    int q_count;     // number of queries
    int prompt_row;  // row of position 0, if the prompt is not the part itself
    int prompt_len;  // keys at positions below are prompt rows; 0 for a prompt's own queries
    int part_row;    // row of the part's first token
    int part_pos;    // its position: prompt_len
};

// Consecutive queries that may see a key tile.
struct QueryRange {
    int row;
    int pos;
    int count;
};

// Up to KEY_ROWS consecutive keys of one part: 12 ints. For a prompt's keys, the ranges are the whole prompt and both
// completions; for a completion's keys, the completion itself and two empty ones.
struct KeyTile {
    int k_row;
    int k_pos;
    int k_count;
    QueryRange queries[3];
};

#define DEVICE __device__ __forceinline__

// ---- Instructions without a C++ form ----

DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// Copies 16 bytes to shared memory in the background, or zeros.
DEVICE void copy16(u32 to, const void* from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}

DEVICE void copy4(u32 to, const void* from, bool real) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(real ? 4 : 0) : "memory");
}

// Waits for all copies of this thread.
DEVICE void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8x8 matrices whose rows start at the addresses of lanes 0-7, 8-15, 16-23 and 24-31. A lane gets columns
// 2 * (lane % 4) and the next of row lane / 4 of each.
DEVICE void load_matrices(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

// The same, each matrix transposed.
DEVICE void load_transposed(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

// c += a * b for a 16x16 and b 16x8. With g = lane / 4 and t = lane % 4, a lane holds of a: rows g, g + 8, g, g + 8 at
// columns 2t, 2t, 2t + 8, 2t + 8 and the next; of b: rows 2t and 2t + 8 and the next at column g; of c: row g at
// columns 2t and 2t + 1, then row g + 8.
DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats as bf16, the first in the low half.
DEVICE u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- End of instructions ----

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
// Bytes from one row to the next in shared memory. An odd number of 16-byte chunks, so that eight consecutive rows lie in
// different banks and no matrix load conflicts.
constexpr int PITCH = 2 * HD + 16;
constexpr int CHUNKS = HD / 8;

DEVICE float infinity() { return __int_as_float(0x7f800000); }

// Row of the key at a position, for the queries of a tile.
DEVICE int key_row(const QueryTile& tile, int position) {
    return position < tile.prompt_len ? tile.prompt_row + position : tile.part_row + (position - tile.part_pos);
}

// What turns a product q * k into an exponent of two.
struct Scores {
    float inner;   // scale / cap
    float factor;  // exponent per product, or per tanh

    DEVICE Scores(float scale, float cap) : inner(CAP ? scale / cap : 0.f), factor((CAP ? cap : scale) * LOG2E) {}

    // Products to soft-capped scores in units of the cap. By way of exp rather than the approximate tanh, whose error
    // times the cap would show.
    template <int M, int N>
    DEVICE void bend(float (&s)[M][N][4]) const {
        if (!CAP) return;
        const float twice = 2.f * LOG2E * inner;
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) s[m][n][i] = 1.f - __fdividef(2.f, 1.f + exp2_fast(twice * s[m][n][i]));
            }
        }
    }

    // A weight times what capping leaves of the score's derivative. A hidden score is minus infinity here.
    DEVICE static float bent_weight(float weight, float bent) {
        if (!CAP) return weight;
        return weight > 0.f ? weight * (1.f - bent * bent) : 0.f;
    }
};

// Sets scores of keys that a query does not see to minus infinity. `distance` is the first row's position less the first
// column's, negated if keys are rows.
template <bool KEYS_ARE_ROWS, int M, int N>
DEVICE void hide(float (&s)[M][N][4], int distance, int window) {
    const int lane = threadIdx.x % 32;
    const int lane_distance = lane / 4 - lane % 4 * 2;
    distance += KEYS_ARE_ROWS ? -lane_distance : lane_distance;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int offset = m * 16 + i / 2 * 8 - (n * 8 + i % 2);
                const int back = distance + (KEYS_ARE_ROWS ? -offset : offset);
                if (back < 0 || (WINDOW && back >= window)) s[m][n][i] = -infinity();
            }
        }
    }
}

// Starts copying ROWS rows of one or two matrices of equal shape to shared memory. `row_of` gives the row of the source,
// or a negative number for zeros: they keep whatever lies past a tile's end out of the sums.
template <int ROWS, int THREADS, bool TWO, class RowOf>
DEVICE void copy_rows(u32 to, const bf16* from, u32 to_other, const bf16* from_other, int stride, RowOf row_of) {
    static_assert(ROWS * CHUNKS % 32 == 0, "whole warps");
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const int source = row_of(row);
        const size_t offset = static_cast<size_t>(max(source, 0)) * stride + chunk * 8;
        const int place = row * PITCH + chunk * 16;
        copy16(to + place, from + offset, source >= 0);
        if (TWO) copy16(to_other + place, from_other + offset, source >= 0);
    }
}

// A lane's place in a matrix load of 16 rows and 16 columns: for the left operand, and transposed for the right one.
DEVICE int left_place(int lane) { return lane % 16 * PITCH + lane / 16 * 16; }

// The same for a right operand whose columns lie in rows.
DEVICE int right_place(int lane) { return (lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 16; }

// c += a * b^T over the HD columns of both: 16 * M rows of a, N rows of b.
template <int M, int N>
DEVICE void products(float (&c)[M][N / 8][4], u32 a, u32 b) {
#pragma unroll
    for (int k = 0; k < HD / 16; k++) {
        u32 left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) load_matrices(left[m], a + m * 16 * PITCH + k * 32);
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            u32 right[4];
            load_matrices(right, b + n * 16 * PITCH + k * 32);
#pragma unroll
            for (int m = 0; m < M; m++) {
                multiply(c[m][2 * n], left[m], right[0], right[1]);
                multiply(c[m][2 * n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

// c += a * b over the K rows of b, of which it takes COLS columns.
template <int M, int K, int COLS>
DEVICE void combine(float (&c)[M][COLS / 8][4], const u32 (&a)[M][K / 16][4], u32 b) {
#pragma unroll
    for (int k = 0; k < K / 16; k++) {
#pragma unroll
        for (int n = 0; n < COLS / 16; n++) {
            u32 right[4];
            load_transposed(right, b + k * 16 * PITCH + n * 32);
#pragma unroll
            for (int m = 0; m < M; m++) {
                multiply(c[m][2 * n], a[m][k], right[0], right[1]);
                multiply(c[m][2 * n + 1], a[m][k], right[2], right[3]);
            }
        }
    }
}

// Results of one product as the left operand of the next: a lane already holds the right elements.
template <int M, int N>
DEVICE void as_left(u32 (&a)[M][N / 16][4], const float (&c)[M][N / 8][4]) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int k = 0; k < N / 16; k++) {
            a[m][k][0] = pack(c[m][2 * k][0], c[m][2 * k][1]);
            a[m][k][1] = pack(c[m][2 * k][2], c[m][2 * k][3]);
            a[m][k][2] = pack(c[m][2 * k + 1][0], c[m][2 * k + 1][1]);
            a[m][k][3] = pack(c[m][2 * k + 1][2], c[m][2 * k + 1][3]);
        }
    }
}

template <int M, int N>
DEVICE void clear(float (&c)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) c[m][n][i] = 0.f;
        }
    }
}

// Writes the first `count` rows of a warp's results as bf16. They pass through shared memory that no other warp uses, so
// that a store is 16 bytes wide.
template <int M, int N>
DEVICE void store_rows(const float (&c)[M][N][4], unsigned char* through, bf16* to, int stride, int count) {
    const int lane = threadIdx.x % 32;
    unsigned char* place = through + lane / 4 * PITCH + lane % 4 * 4;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            *reinterpret_cast<u32*>(place + m * 16 * PITCH + n * 16) = pack(c[m][n][0], c[m][n][1]);
            *reinterpret_cast<u32*>(place + (m * 16 + 8) * PITCH + n * 16) = pack(c[m][n][2], c[m][n][3]);
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < M * 16 * N; i += 32) {
        const int row = i / N, chunk = i % N;
        if (row < count) {
            *reinterpret_cast<uint4*>(to + static_cast<size_t>(row) * stride + chunk * 8) =
                *reinterpret_cast<const uint4*>(through + row * PITCH + chunk * 16);
        }
    }
}

// The queries of a warp, and which tiles of KEYS keys concern them.
template <int KEYS>
struct WarpQueries {
    int count;  // may be negative
    int first, last, window;

    DEVICE WarpQueries(const QueryTile& tile, int skipped, int rows, int window)
        : count(min(rows, tile.q_count - skipped)),
          first(tile.q_pos + skipped),
          last(first + count - 1),
          window(window) {}

    DEVICE bool see_any(int key) const {
        return count > 0 && key <= last && (!WINDOW || first - (key + KEYS - 1) < window);
    }

    DEVICE bool see_all(int key) const { return key + KEYS - 1 <= first && (!WINDOW || last - key < window); }
};

// The first key that some query of the tile sees, rounded down so that tiles lie at the same positions for all queries.
DEVICE int first_key(const QueryTile& tile, int window, int keys) {
    return WINDOW ? max(0, tile.q_pos - window + 1) / keys * keys : 0;
}

#if HD % 16 == 0

extern "C" __global__ void __launch_bounds__(32 * FORWARD_WARPS, FORWARD_BLOCKS)
    attention_forward(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v,
                      bf16* __restrict__ out, float* __restrict__ lse, const QueryTile* __restrict__ tiles, int rows,
                      int heads, int kv_heads, float scale, int window, float cap) {
    constexpr int KEYS = FORWARD_KEYS, THREADS = 32 * FORWARD_WARPS, WARP_ROWS = QUERY_ROWS / FORWARD_WARPS;
    constexpr int M = WARP_ROWS / 16, N = KEYS / 8;
    constexpr int STAGE = 2 * KEYS * PITCH;
    static_assert(WARP_ROWS % 16 == 0 && KEYS % 16 == 0, "tiles");
    extern __shared__ __align__(16) unsigned char shared[];

    const QueryTile tile = tiles[blockIdx.x / heads];
    const int head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
    const int stride = heads * HD, kv_stride = kv_heads * HD;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Scores scores(scale, cap);
    const WarpQueries<KEYS> queries(tile, warp * WARP_ROWS, WARP_ROWS, window);
    const int end = tile.q_pos + tile.q_count;
    k += kv_head * HD;
    v += kv_head * HD;

    const u32 q_tile = shared_address(shared), kv_tiles = q_tile + QUERY_ROWS * PITCH;
    const u32 q_left = q_tile + warp * WARP_ROWS * PITCH + left_place(lane);
    auto copy_keys = [&](int key, int stage) {
        const u32 to = kv_tiles + stage * STAGE;
        copy_rows<KEYS, THREADS, true>(to, k, to + KEYS * PITCH, v, kv_stride, [&](int row) {
            return key + row < end ? key_row(tile, key + row) : -1;
        });
    };

    const int start = first_key(tile, window, KEYS);
    copy_rows<QUERY_ROWS, THREADS, false>(q_tile, q + head * HD, 0, nullptr, stride, [&](int row) {
        return row < tile.q_count ? tile.q_row + row : -1;
    });
    copy_keys(start, 0);

    float sums[M][HD / 8][4];
    float top[M][2], total[M][2];
    clear(sums);
#pragma unroll
    for (int m = 0; m < M; m++) {
        top[m][0] = top[m][1] = -infinity();
        total[m][0] = total[m][1] = 0.f;
    }

    int stage = 0;
    for (int key = start; key < end; key += KEYS, stage ^= 1) {
        // This tile is there, and every warp is done with the one before, whose place the next one takes.
        copies_done();
        __syncthreads();
        if (key + KEYS < end) copy_keys(key + KEYS, stage ^ 1);
        if (!queries.see_any(key)) continue;

        const u32 k_tile = kv_tiles + stage * STAGE, v_tile = k_tile + KEYS * PITCH;
        float s[M][N][4];
        clear(s);
        products<M, KEYS>(s, q_left, k_tile + right_place(lane));
        scores.bend(s);
        if (!queries.see_all(key)) hide<false>(s, queries.first - key, window);
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float highest = top[m][half];
#pragma unroll
                for (int n = 0; n < N; n++) highest = fmaxf(highest, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
                highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
                // A row may have seen nothing yet, in a window that starts later.
                const float base = highest == -infinity() ? 0.f : highest * scores.factor;
                const float shrink = exp2_fast(top[m][half] * scores.factor - base);
                top[m][half] = highest;
                float sum = total[m][half] * shrink;
#pragma unroll
                for (int n = 0; n < N; n++) {
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++) {
                        s[m][n][i] = exp2_fast(s[m][n][i] * scores.factor - base);
                        sum += s[m][n][i];
                    }
                }
                total[m][half] = sum;
#pragma unroll
                for (int n = 0; n < HD / 8; n++) {
                    sums[m][n][2 * half] *= shrink;
                    sums[m][n][2 * half + 1] *= shrink;
                }
            }
        }
        u32 weights[M][KEYS / 16][4];
        as_left<M, KEYS>(weights, s);
        combine<M, KEYS, HD>(sums, weights, v_tile + left_place(lane));
    }

#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = total[m][half];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const float inverse = 1.f / sum;
#pragma unroll
            for (int n = 0; n < HD / 8; n++) {
                sums[m][n][2 * half] *= inverse;
                sums[m][n][2 * half + 1] *= inverse;
            }
            const int row = m * 16 + half * 8 + lane / 4;
            if (lane % 4 == 0 && row < queries.count) {
                lse[static_cast<size_t>(head) * rows + tile.q_row + warp * WARP_ROWS + row] =
                    top[m][half] * (scores.factor * LN2) + logf(sum);
            }
        }
    }
    bf16* to = out + static_cast<size_t>(tile.q_row + warp * WARP_ROWS) * stride + head * HD;
    store_rows(sums, shared + warp * WARP_ROWS * PITCH, to, stride, queries.count);
}

// delta[head, row] = sum of dout * out over the head's columns: what the softmax's derivative subtracts.
extern "C" __global__ void __launch_bounds__(256)
    attention_delta(const bf16* __restrict__ dout, const bf16* __restrict__ out, float* __restrict__ delta, int rows,
                    int heads) {
    constexpr int LANES = CHUNKS <= 2 ? 2 : CHUNKS <= 4 ? 4 : CHUNKS <= 8 ? 8 : CHUNKS <= 16 ? 16 : 32;
    const size_t item = (static_cast<size_t>(blockIdx.x) * 256 + threadIdx.x) / LANES;
    const int lane = threadIdx.x % LANES;
    const bool real = item < static_cast<size_t>(rows) * heads;
    float sum = 0.f;
    if (real && lane < CHUNKS) {
        const uint4 a = *reinterpret_cast<const uint4*>(dout + item * HD + lane * 8);
        const uint4 b = *reinterpret_cast<const uint4*>(out + item * HD + lane * 8);
        const u32 left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum = fmaf(__int_as_float(left[i] << 16), __int_as_float(right[i] << 16), sum);
            sum = fmaf(__int_as_float(left[i] & 0xffff0000u), __int_as_float(right[i] & 0xffff0000u), sum);
        }
    }
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (real && lane == 0) delta[item % heads * rows + item / heads] = sum;
}

// The gradient of the queries. Scores are computed again, a tile of keys at a time:
// p = exp(s - lse), ds = p * (dout * v^T - delta), dq = scale * ds * k.
extern "C" __global__ void __launch_bounds__(32 * QUERY_WARPS, QUERY_BLOCKS)
    attention_backward_query(const bf16* __restrict__ dout, const bf16* __restrict__ q, const bf16* __restrict__ k,
                             const bf16* __restrict__ v, const float* __restrict__ lse, const float* __restrict__ delta,
                             bf16* __restrict__ dq, const QueryTile* __restrict__ tiles, int rows, int heads,
                             int kv_heads, float scale, int window, float cap) {
    constexpr int KEYS = QUERY_KEYS, THREADS = 32 * QUERY_WARPS, WARP_ROWS = QUERY_ROWS / QUERY_WARPS;
    constexpr int M = WARP_ROWS / 16, N = KEYS / 8;
    constexpr int STAGE = 2 * KEYS * PITCH;
    static_assert(WARP_ROWS % 16 == 0 && KEYS % 16 == 0, "tiles");
    extern __shared__ __align__(16) unsigned char shared[];

    const QueryTile tile = tiles[blockIdx.x / heads];
    const int head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
    const int stride = heads * HD, kv_stride = kv_heads * HD;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Scores scores(scale, cap);
    const WarpQueries<KEYS> queries(tile, warp * WARP_ROWS, WARP_ROWS, window);
    const int end = tile.q_pos + tile.q_count;
    k += kv_head * HD;
    v += kv_head * HD;

    const u32 q_tile = shared_address(shared), dout_tile = q_tile + QUERY_ROWS * PITCH;
    const u32 kv_tiles = dout_tile + QUERY_ROWS * PITCH;
    const int left = warp * WARP_ROWS * PITCH + left_place(lane);
    auto copy_keys = [&](int key, int stage) {
        const u32 to = kv_tiles + stage * STAGE;
        copy_rows<KEYS, THREADS, true>(to, k, to + KEYS * PITCH, v, kv_stride, [&](int row) {
            return key + row < end ? key_row(tile, key + row) : -1;
        });
    };

    const int start = first_key(tile, window, KEYS);
    copy_rows<QUERY_ROWS, THREADS, true>(q_tile, q + head * HD, dout_tile, dout + head * HD, stride, [&](int row) {
        return row < tile.q_count ? tile.q_row + row : -1;
    });
    copy_keys(start, 0);

    float row_lse[M][2], row_delta[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = m * 16 + half * 8 + lane / 4;
            const size_t at = static_cast<size_t>(head) * rows + tile.q_row + warp * WARP_ROWS + row;
            row_lse[m][half] = row < queries.count ? lse[at] * LOG2E : 0.f;
            row_delta[m][half] = row < queries.count ? delta[at] : 0.f;
        }
    }
    float sums[M][HD / 8][4];
    clear(sums);

    int stage = 0;
    for (int key = start; key < end; key += KEYS, stage ^= 1) {
        copies_done();
        __syncthreads();
        if (key + KEYS < end) copy_keys(key + KEYS, stage ^ 1);
        if (!queries.see_any(key)) continue;

        const u32 k_tile = kv_tiles + stage * STAGE, v_tile = k_tile + KEYS * PITCH;
        float s[M][N][4];
        clear(s);
        products<M, KEYS>(s, q_tile + left, k_tile + right_place(lane));
        scores.bend(s);
        if (!queries.see_all(key)) hide<false>(s, queries.first - key, window);
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float p = exp2_fast(s[m][n][i] * scores.factor - row_lse[m][i / 2]);
                    s[m][n][i] = scores.bent_weight(p, s[m][n][i]);
                }
            }
        }
        float dp[M][N][4];
        clear(dp);
        products<M, KEYS>(dp, dout_tile + left, v_tile + right_place(lane));
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) s[m][n][i] *= dp[m][n][i] - row_delta[m][i / 2];
            }
        }
        u32 ds[M][KEYS / 16][4];
        as_left<M, KEYS>(ds, s);
        combine<M, KEYS, HD>(sums, ds, k_tile + left_place(lane));
    }

#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < HD / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sums[m][n][i] *= scale;
        }
    }
    bf16* to = dq + static_cast<size_t>(tile.q_row + warp * WARP_ROWS) * stride + head * HD;
    store_rows(sums, shared + warp * WARP_ROWS * PITCH, to, stride, queries.count);
}

// Queries of a range that a key tile's keys can be seen by.
struct Reach {
    int row, pos, count;

    DEVICE Reach(const KeyTile& tile, const QueryRange& range, int window) {
        const int begin = max(0, tile.k_pos - range.pos);
        const int end = WINDOW ? min(range.count, tile.k_pos + tile.k_count - 1 + window - range.pos) : range.count;
        row = range.row + begin;
        pos = range.pos + begin;
        count = max(0, end - begin);
    }
};

// The gradients of keys and values: dv = p^T * dout, dk = scale * ds^T * q, summed over the query heads of the key head
// and the ranges in order. Scores are computed transposed, so that a warp's keys are rows and p and ds never leave its
// registers. Above 128 columns the sums fill them, and each of two blocks computes half of the columns; where the halves
// overlap, both write the same.
extern "C" __global__ void __launch_bounds__(32 * KEY_WARPS, KEY_BLOCKS)
    attention_backward_key(const bf16* __restrict__ dout, const bf16* __restrict__ q, const bf16* __restrict__ k,
                           const bf16* __restrict__ v, const float* __restrict__ lse, const float* __restrict__ delta,
                           bf16* __restrict__ dk, bf16* __restrict__ dv, const KeyTile* __restrict__ tiles, int rows,
                           int heads, int kv_heads, float scale, int window, float cap) {
    constexpr int QUERIES = KEY_QUERIES, THREADS = 32 * KEY_WARPS, WARP_ROWS = KEY_ROWS / KEY_WARPS;
    constexpr int M = WARP_ROWS / 16, N = QUERIES / 8;
    constexpr int COLS = HD <= 128 ? HD : (HD / 2 + 15) / 16 * 16;
    constexpr int STAGE = 2 * QUERIES * PITCH;
    static_assert(WARP_ROWS % 16 == 0 && QUERIES % 16 == 0, "tiles");
    extern __shared__ __align__(16) unsigned char shared[];

    const KeyTile& tile = tiles[blockIdx.x / kv_heads];
    const int kv_head = blockIdx.x % kv_heads, group = heads / kv_heads;
    const int column = blockIdx.y * (HD - COLS);
    const int stride = heads * HD, kv_stride = kv_heads * HD;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Scores scores(scale, cap);
    const int k_row = tile.k_row, k_count = tile.k_count;
    const int count = min(WARP_ROWS, k_count - warp * WARP_ROWS);
    const int first = tile.k_pos + warp * WARP_ROWS, last = first + count - 1;

    const u32 k_tile = shared_address(shared), v_tile = k_tile + KEY_ROWS * PITCH;
    const u32 q_tiles = v_tile + KEY_ROWS * PITCH;
    // Per stage the log-sum-exps of the queries, then their deltas.
    const int statistics = 2 * KEY_ROWS * PITCH + 2 * STAGE;
    const int left = warp * WARP_ROWS * PITCH + left_place(lane);

    const Reach reach[3] = {
        {tile, tile.queries[0], window}, {tile, tile.queries[1], window}, {tile, tile.queries[2], window}};
    int steps_of[3];
#pragma unroll
    for (int r = 0; r < 3; r++) steps_of[r] = (reach[r].count + QUERIES - 1) / QUERIES;
    const int steps_per_head = steps_of[0] + steps_of[1] + steps_of[2];
    const int steps = group * steps_per_head;

    struct Step {
        int head, row, pos, count;
    };
    auto step_at = [&](int index) {
        Step step = {kv_head * group + index / steps_per_head, 0, 0, 0};
        int rest = index % steps_per_head;
#pragma unroll
        for (int r = 0; r < 3; r++) {
            if (rest >= 0 && rest < steps_of[r]) {
                step.row = reach[r].row + rest * QUERIES;
                step.pos = reach[r].pos + rest * QUERIES;
                step.count = min(QUERIES, reach[r].count - rest * QUERIES);
            }
            rest -= steps_of[r];
        }
        return step;
    };
    auto copy_queries = [&](const Step& step, int stage) {
        const u32 to = q_tiles + stage * STAGE;
        copy_rows<QUERIES, THREADS, true>(to, q + step.head * HD, to + QUERIES * PITCH, dout + step.head * HD, stride,
                                          [&](int row) { return row < step.count ? step.row + row : -1; });
        const u32 to_statistics = k_tile + statistics + stage * 8 * QUERIES;
#pragma unroll
        for (int i = threadIdx.x; i < 2 * QUERIES; i += THREADS) {
            const int row = i % QUERIES;
            const bool real = row < step.count;
            const size_t at = static_cast<size_t>(step.head) * rows + step.row + (real ? row : 0);
            copy4(to_statistics + i * 4, (i < QUERIES ? lse : delta) + at, real);
        }
    };

    copy_rows<KEY_ROWS, THREADS, true>(k_tile, k + kv_head * HD, v_tile, v + kv_head * HD, kv_stride, [&](int row) {
        return row < k_count ? k_row + row : -1;
    });
    Step next = {};
    if (steps > 0) {
        next = step_at(0);
        copy_queries(next, 0);
    }

    float dk_sums[M][COLS / 8][4], dv_sums[M][COLS / 8][4];
    clear(dk_sums);
    clear(dv_sums);

    for (int index = 0; index < steps; index++) {
        const Step step = next;
        const int stage = index % 2;
        copies_done();
        __syncthreads();
        if (index + 1 < steps) {
            next = step_at(index + 1);
            copy_queries(next, stage ^ 1);
        }
        const int last_query = step.pos + step.count - 1;
        if (count <= 0 || last_query < first || (WINDOW && step.pos - last >= window)) continue;

        const u32 q_tile = q_tiles + stage * STAGE, dout_tile = q_tile + QUERIES * PITCH;
        const float* query_lse = reinterpret_cast<const float*>(shared + statistics) + stage * 2 * QUERIES;
        const float* query_delta = query_lse + QUERIES;
        float s[M][N][4];
        clear(s);
        products<M, QUERIES>(s, k_tile + left, q_tile + right_place(lane));
        scores.bend(s);
        // Queries past the end are zeros with a log-sum-exp of zero: their weights are finite and meet zeros only.
        if (last > step.pos || (WINDOW && last_query - first >= window)) hide<true>(s, step.pos - first, window);
        u32 weights[M][QUERIES / 16][4];
        {
            float p[M][N][4];
#pragma unroll
            for (int n = 0; n < N; n++) {
                const float2 at = *reinterpret_cast<const float2*>(query_lse + n * 8 + lane % 4 * 2);
                const float base[2] = {at.x * LOG2E, at.y * LOG2E};
#pragma unroll
                for (int m = 0; m < M; m++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        p[m][n][i] = exp2_fast(s[m][n][i] * scores.factor - base[i % 2]);
                        s[m][n][i] = scores.bent_weight(p[m][n][i], s[m][n][i]);
                    }
                }
            }
            as_left<M, QUERIES>(weights, p);
        }
        combine<M, QUERIES, COLS>(dv_sums, weights, dout_tile + left_place(lane) + column * 2);
        float dp[M][N][4];
        clear(dp);
        products<M, QUERIES>(dp, v_tile + left, dout_tile + right_place(lane));
#pragma unroll
        for (int n = 0; n < N; n++) {
            const float2 at = *reinterpret_cast<const float2*>(query_delta + n * 8 + lane % 4 * 2);
#pragma unroll
            for (int m = 0; m < M; m++) {
#pragma unroll
                for (int i = 0; i < 4; i++) s[m][n][i] *= dp[m][n][i] - (i % 2 ? at.y : at.x);
            }
        }
        as_left<M, QUERIES>(weights, s);
        combine<M, QUERIES, COLS>(dk_sums, weights, q_tile + left_place(lane) + column * 2);
    }

    // Keys that no query sees: their copies may still be under way, into the memory that the results pass through.
    if (steps == 0) {
        copies_done();
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < COLS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) dk_sums[m][n][i] *= scale;
        }
    }
    const size_t to = static_cast<size_t>(k_row + warp * WARP_ROWS) * kv_stride + kv_head * HD + column;
    unsigned char* through = shared + warp * WARP_ROWS * PITCH;
    store_rows(dk_sums, through, dk + to, kv_stride, count);
    store_rows(dv_sums, through + KEY_ROWS * PITCH, dv + to, kv_stride, count);
}

#endif

// The f32 kernels trade speed for plain f32 arithmetic: a warp per row and head, first a key or query per lane for the
// scores, then a few columns per lane for the sums.

constexpr int COLUMNS = (HD + 31) / 32;

DEVICE float dot_f32(const float* __restrict__ a, const float* __restrict__ b) {
    float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
    for (int i = 0; i < HD; i += 4) {
        const float4 x = *reinterpret_cast<const float4*>(a + i), y = *reinterpret_cast<const float4*>(b + i);
        sum.x = fmaf(x.x, y.x, sum.x);
        sum.y = fmaf(x.y, y.y, sum.y);
        sum.z = fmaf(x.z, y.z, sum.z);
        sum.w = fmaf(x.w, y.w, sum.w);
    }
    return (sum.x + sum.y) + (sum.z + sum.w);
}

// sums += weight of each of the first `count` lanes * its row.
DEVICE void combine_f32(float (&sums)[COLUMNS], float weight, const float* __restrict__ matrix, size_t offset,
                        int count) {
    const int lane = threadIdx.x % 32;
#pragma unroll 4
    for (int other = 0; other < count; other++) {
        const float w = __shfl_sync(~0u, weight, other);
        const float* row = matrix + __shfl_sync(~0u, static_cast<unsigned long long>(offset), other);
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            if (i * 32 + lane < HD) sums[i] = fmaf(w, row[i * 32 + lane], sums[i]);
        }
    }
}

DEVICE void store_f32(const float (&sums)[COLUMNS], float factor, float* to) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
        if (i * 32 + lane < HD) to[i * 32 + lane] = sums[i] * factor;
    }
}

// The score of a product, and what capping leaves of its derivative.
DEVICE float score_f32(float product, float scale, float cap, float& slope) {
    const float score = product * scale;
    if (!CAP) {
        slope = 1.f;
        return score;
    }
    const float bent = tanhf(score / cap);
    slope = 1.f - bent * bent;
    return cap * bent;
}

extern "C" __global__ void __launch_bounds__(128)
    attention_forward_f32(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                          float* __restrict__ out, float* __restrict__ lse, const QueryTile* __restrict__ tiles,
                          int rows, int heads, int kv_heads, float scale, int window, float cap) {
    const QueryTile tile = tiles[blockIdx.x / heads];
    const int head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < tile.q_count; i += 4) {
        const size_t row = static_cast<size_t>(tile.q_row + i) * heads * HD + head * HD;
        const int position = tile.q_pos + i;
        float sums[COLUMNS] = {};
        float top = -infinity(), total = 0.f;
        for (int key = WINDOW ? max(0, position - window + 1) : 0; key <= position; key += 32) {
            const int count = min(32, position + 1 - key);
            const size_t at =
                static_cast<size_t>(key_row(tile, key + min(lane, count - 1))) * kv_heads * HD + kv_head * HD;
            float slope;
            const float s = lane < count ? score_f32(dot_f32(q + row, k + at), scale, cap, slope) : -infinity();
            float highest = fmaxf(top, s);
            for (int step = 16; step > 0; step /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
            const float shrink = expf(top - highest), p = expf(s - highest);
            top = highest;
            total = total * shrink + p;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) sums[c] *= shrink;
            combine_f32(sums, p, v, at, count);
        }
        for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
        if (lane == 0) lse[static_cast<size_t>(head) * rows + tile.q_row + i] = top + logf(total);
        store_f32(sums, 1.f / total, out + row);
    }
}

extern "C" __global__ void __launch_bounds__(256)
    attention_delta_f32(const float* __restrict__ dout, const float* __restrict__ out, float* __restrict__ delta,
                        int rows, int heads) {
    const size_t item = static_cast<size_t>(blockIdx.x) * 8 + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (item >= static_cast<size_t>(rows) * heads) return;
    float sum = 0.f;
    for (int i = lane; i < HD; i += 32) sum = fmaf(dout[item * HD + i], out[item * HD + i], sum);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) delta[item % heads * rows + item / heads] = sum;
}

extern "C" __global__ void __launch_bounds__(128)
    attention_backward_query_f32(const float* __restrict__ dout, const float* __restrict__ q,
                                 const float* __restrict__ k, const float* __restrict__ v,
                                 const float* __restrict__ lse, const float* __restrict__ delta,
                                 float* __restrict__ dq, const QueryTile* __restrict__ tiles, int rows, int heads,
                                 int kv_heads, float scale, int window, float cap) {
    const QueryTile tile = tiles[blockIdx.x / heads];
    const int head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < tile.q_count; i += 4) {
        const size_t row = static_cast<size_t>(tile.q_row + i) * heads * HD + head * HD;
        const size_t statistic = static_cast<size_t>(head) * rows + tile.q_row + i;
        const int position = tile.q_pos + i;
        float sums[COLUMNS] = {};
        for (int key = WINDOW ? max(0, position - window + 1) : 0; key <= position; key += 32) {
            const int count = min(32, position + 1 - key);
            const size_t at =
                static_cast<size_t>(key_row(tile, key + min(lane, count - 1))) * kv_heads * HD + kv_head * HD;
            float slope;
            const float p = expf(score_f32(dot_f32(q + row, k + at), scale, cap, slope) - lse[statistic]);
            const float ds = p * slope * (dot_f32(dout + row, v + at) - delta[statistic]);
            combine_f32(sums, ds, k, at, count);
        }
        store_f32(sums, scale, dq + row);
    }
}

extern "C" __global__ void __launch_bounds__(128)
    attention_backward_key_f32(const float* __restrict__ dout, const float* __restrict__ q,
                               const float* __restrict__ k, const float* __restrict__ v,
                               const float* __restrict__ lse, const float* __restrict__ delta, float* __restrict__ dk,
                               float* __restrict__ dv, const KeyTile* __restrict__ tiles, int rows, int heads,
                               int kv_heads, float scale, int window, float cap) {
    const KeyTile& tile = tiles[blockIdx.x / kv_heads];
    const int kv_head = blockIdx.x % kv_heads, group = heads / kv_heads;
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < tile.k_count; i += 4) {
        const size_t row = static_cast<size_t>(tile.k_row + i) * kv_heads * HD + kv_head * HD;
        const int position = tile.k_pos + i;
        float dk_sums[COLUMNS] = {}, dv_sums[COLUMNS] = {};
        for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
            for (int r = 0; r < 3; r++) {
                const QueryRange range = tile.queries[r];
                const int end = WINDOW ? min(range.count, position + window - range.pos) : range.count;
                for (int query = max(0, position - range.pos); query < end; query += 32) {
                    const int count = min(32, end - query);
                    const int at_row = range.row + query + min(lane, count - 1);
                    const size_t at = static_cast<size_t>(at_row) * heads * HD + head * HD;
                    const size_t statistic = static_cast<size_t>(head) * rows + at_row;
                    float slope;
                    const float p = expf(score_f32(dot_f32(q + at, k + row), scale, cap, slope) - lse[statistic]);
                    const float ds = p * slope * (dot_f32(dout + at, v + row) - delta[statistic]);
                    combine_f32(dv_sums, p, dout, at, count);
                    combine_f32(dk_sums, ds, q, at, count);
                }
            }
        }
        store_f32(dk_sums, scale, dk + row);
        store_f32(dv_sums, 1.f, dv + row);
    }
}
