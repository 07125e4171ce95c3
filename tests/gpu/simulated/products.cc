// libcublasLt.so on a machine without CUDA: the part of it that gpu/product.rs calls. Sums are f32, in the order of the summands
// whatever else is computed, so a row's bits do not depend on the rows beside it.
#include <algorithm>
#include <cstring>
#include <thread>
#include <vector>

#include "simulated_gpu.h"

enum { SUCCESS = 0, INVALID_VALUE = 7, F32 = 0, BF16 = 14 };

struct Operation {
    int compute, scale, transposed[2] = {0, 0};
};
struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t stride;
};
struct Algorithm { uint64_t data[8]; };
struct Found {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

EXPORT int cublasLtCreate(void** handle) {
    *handle = new char;
    return SUCCESS;
}

EXPORT int cublasLtMatmulDescCreate(Operation** operation, int compute, int scale) {
    if (compute != 68 || scale != F32) die("a product that is not computed in f32");
    *operation = new Operation{compute, scale};
    return SUCCESS;
}

EXPORT int cublasLtMatmulDescSetAttribute(Operation* operation, int attribute, const void* value, size_t bytes) {
    if ((attribute != 3 && attribute != 4) || bytes != 4) die("attribute %d of a product is not simulated", attribute);
    memcpy(&operation->transposed[attribute - 3], value, 4);
    return SUCCESS;
}

EXPORT int cublasLtMatmulDescDestroy(Operation* operation) {
    delete operation;
    return SUCCESS;
}

EXPORT int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    if (type != F32 && type != BF16) die("elements of type %d", type);
    if (stride < (int64_t)rows) return INVALID_VALUE;
    *layout = new Layout{type, rows, columns, stride};
    return SUCCESS;
}

EXPORT int cublasLtMatrixLayoutDestroy(Layout* layout) {
    delete layout;
    return SUCCESS;
}

EXPORT int cublasLtMatmulPreferenceCreate(void** wish) {
    *wish = new char;
    return SUCCESS;
}
EXPORT int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return SUCCESS; }
EXPORT int cublasLtMatmulPreferenceDestroy(char* wish) {
    delete wish;
    return SUCCESS;
}

static bool fits(const Operation* op, const Layout* a, const Layout* b, const Layout* d) {
    uint64_t m = op->transposed[0] ? a->columns : a->rows, k = op->transposed[0] ? a->rows : a->columns;
    uint64_t n = op->transposed[1] ? b->rows : b->columns, inner = op->transposed[1] ? b->columns : b->rows;
    return k == inner && d->rows == m && d->columns == n && a->type == b->type;
}

EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, Operation* op, Layout* a, Layout* b, Layout* c, Layout* d, void*, int wanted, Found* found, int* count) {
    *count = wanted && fits(op, a, b, d) && c->rows == d->rows && c->columns == d->columns;
    if (*count) *found = Found{};
    return *count ? SUCCESS : 15;
}

EXPORT int cublasLtMatmulAlgoCheck(void*, Operation* op, Layout* a, Layout* b, Layout*, Layout* d, const Algorithm*, Found* found) {
    if (!fits(op, a, b, d)) return INVALID_VALUE;
    *found = Found{};
    return SUCCESS;
}

static float at(uint64_t address, int type, size_t index) {
    if (type == F32) return ((const float*)address)[index];
    unsigned bits = (unsigned)((const unsigned short*)address)[index] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void put(uint64_t address, int type, size_t index, float value) {
    if (type == F32) {
        ((float*)address)[index] = value;
        return;
    }
    unsigned bits;
    memcpy(&bits, &value, 4);
    unsigned short half = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    ((unsigned short*)address)[index] = half;
}

static size_t bytes_of(const Layout& layout) { return (layout.stride * (layout.columns - 1) + layout.rows) * (layout.type == F32 ? 4 : 2); }

// Results of ROWS columns of the (column-major) result at a time, WIDE rows each.
enum { ROWS = 4, WIDE = 16 };

struct Work {
    Operation op;
    Layout a, b, d;
    uint64_t a_at, b_at, c_at, d_at;
    float alpha, beta;
    size_t m, n, k;
    // op(A) in panels of WIDE rows, a summand after the other.
    std::vector<float> left;
};

static void fill_left(Work& work, size_t first, size_t last) {
    const Layout& a = work.a;
    for (size_t i = first; i < last; i++)
        for (size_t p = 0; p < work.k; p++)
            work.left[(i / WIDE * work.k + p) * WIDE + i % WIDE] =
                at(work.a_at, a.type, work.op.transposed[0] ? i * a.stride + p : p * a.stride + i);
}

// Columns `first` to `last`.
static void multiply(const Work& work, size_t first, size_t last) {
    const Layout &b = work.b, &d = work.d;
    const size_t k = work.k;
    std::vector<float> right(ROWS * k);
    for (size_t j = first; j < last; j += ROWS) {
        const size_t columns = std::min<size_t>(ROWS, last - j);
        std::fill(right.begin(), right.end(), 0.f);
        for (size_t r = 0; r < columns; r++)
            for (size_t p = 0; p < k; p++)
                right[p * ROWS + r] = at(work.b_at, b.type, work.op.transposed[1] ? p * b.stride + (j + r) : (j + r) * b.stride + p);
        for (size_t row = 0; row < work.m; row += WIDE) {
            float sums[ROWS][WIDE] = {};
            const float* x = &work.left[row * k];
            for (size_t p = 0; p < k; p++)
                for (int r = 0; r < ROWS; r++)
                    for (int i = 0; i < WIDE; i++) sums[r][i] += x[p * WIDE + i] * right[p * ROWS + r];
            for (size_t r = 0; r < columns; r++)
                for (size_t i = 0; i < std::min<size_t>(WIDE, work.m - row); i++) {
                    const size_t to = (j + r) * d.stride + row + i;
                    float value = work.alpha * sums[r][i];
                    if (work.beta != 0.f) value += work.beta * at(work.c_at, d.type, to);
                    put(work.d_at, d.type, to, value);
                }
        }
    }
}

// On as many threads as there are where it is worth it: no result depends on their number.
static void on_threads(const Work& work, size_t count, const std::function<void(size_t, size_t)>& part) {
    const size_t threads = work.m * work.n * work.k < (1u << 24) ? 1 : std::max(1u, std::thread::hardware_concurrency());
    const size_t each = (count + threads - 1) / threads;
    std::vector<std::thread> others;
    for (size_t first = each; first < count; first += each) others.emplace_back(part, first, std::min(count, first + each));
    part(0, std::min(count, each));
    for (std::thread& other : others) other.join();
}

static void run(Work& work) {
    work.m = work.d.rows;
    work.n = work.d.columns;
    work.k = work.op.transposed[0] ? work.a.rows : work.a.columns;
    work.left.assign((work.m + WIDE - 1) / WIDE * WIDE * work.k, 0.f);
    on_threads(work, work.m, [&](size_t first, size_t last) { fill_left(work, first, last); });
    on_threads(work, work.n, [&](size_t first, size_t last) { multiply(work, first, last); });
}

EXPORT int cublasLtMatmul(void*, Operation* op, const float* alpha, uint64_t a_at, Layout* a, uint64_t b_at, Layout* b, const float* beta, uint64_t c_at,
                          Layout* c, uint64_t d_at, Layout* d, const Algorithm*, void*, size_t, Stream* stream) {
    if (!fits(op, a, b, d) || c->type != d->type || c->stride != d->stride) return INVALID_VALUE;
    simulated_check_memory(a_at, bytes_of(*a), "a product's left operand");
    simulated_check_memory(b_at, bytes_of(*b), "a product's right operand");
    simulated_check_memory(c_at, bytes_of(*d), "what a product is added to");
    simulated_check_memory(d_at, bytes_of(*d), "a product's result");
    enqueue(stream, [work = Work{*op, *a, *b, *d, a_at, b_at, c_at, d_at, *alpha, *beta, 0, 0, 0, {}}]() mutable { run(work); });
    return SUCCESS;
}
