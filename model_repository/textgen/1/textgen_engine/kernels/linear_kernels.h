// Linear layers on packed weights: one form for a single row and for a prompt's thousands.
//
// A weight [num_outputs, depth] is packed as [blocks of kBlock outputs][depth][kBlock], the last block padded with
// zeros: a step over depth loads kBlock neighbouring weights and multiplies them by one element of each of several
// rows, so nothing is added across the lanes of a vector, and a weight is read from memory once per step of the engine.
// Every output adds its products in the order of depth, whatever rows stand beside it: a row's result is the same to
// the last bit in any batch.
//
// Weights in bfloat16 lie in pairs, [blocks][depth / 2][kBlock][2], and so do the rows they are multiplied by; sums are
// float32. Weights of 8 bits lie in fours, [blocks][depth / 4][kBlock][4]; each row is rounded to 8 bits on a scale of
// its own, and sums are integers until both scales are applied. An "element" below is a float, a Pair, or a Quad. Coded
// weights are quantized_kernels.h's.

struct Pair {  // two bfloat16 neighbours in depth, the first in the lower half
    uint32_t bits;
};

struct Quad {  // four bytes: of weights signed, of rows with 128 added
    uint32_t bits;
};

// A linear layer; the layout is known to cpu_records.py. Of weights of 8 bits scales and offsets are per output: offsets[o] is 128
// times the sum of output o's weights, which is what the 128 in rows adds.
struct Linear {
    const void* packed;
    const float* bias;  // or null
    const float *scales, *offsets;
    // Of coded weights:
    const float* table;    // of 16 numbers, for half bytes
    const int64_t* order;  // or null: which of a row's numbers meets weight k; one that it does not have is 0
    int64_t code, group;   // group 0: the weights are not coded
    int64_t depth;         // of weights; a row's, if there is no order
};

// Rows as elements; scales: per row, of 8-bit ones.
template <class Element>
struct Inputs {
    const Element* rows;
    const float* scales;
    int64_t depth;  // in elements
};

constexpr int kBlockVectors = 2, kBlock = kBlockVectors * kLanes;
#if defined(__AVX512F__)
constexpr int kBlockRows = 12;  // with 2 vectors 24 accumulators of 32 registers
#else
constexpr int kBlockRows = 6;  // 12 of 16
#endif
constexpr int64_t kMostBlocks = 2;     // that are given to a thread at once
constexpr int64_t kDepthStep = 2048;  // of a block: 256 KiB of weights, which stay in the second cache for all rows

inline int64_t blocks_of(int64_t num_outputs) { return (num_outputs + kBlock - 1) / kBlock; }

// out[r][0..kBlock) (+)= x[r] . block for R rows, over `depth` elements. Turned: element k of row r is x[k * x_stride +
// r] instead of x[r * x_stride + k].
template <int R, bool Turned>
void packed_tile(const float* x, int64_t x_stride, const float* block, float* out, int64_t out_stride, int64_t depth,
                 bool adds) {
    Vector acc[R][kBlockVectors] = {};
    if (adds)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
            for (int v = 0; v < kBlockVectors; ++v) acc[r][v] = load(out + r * out_stride + v * kLanes);
    for (int64_t k = 0; k < depth; ++k) {
        Vector w[kBlockVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kBlockVectors; ++v) w[v] = load(block + k * kBlock + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const float element = Turned ? x[k * x_stride + r] : x[r * x_stride + k];
#pragma GCC unroll 16
            for (int v = 0; v < kBlockVectors; ++v) acc[r][v] += element * w[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < kBlockVectors; ++v) put(out + r * out_stride + v * kLanes, acc[r][v]);
}

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;

template <int R, bool Turned>
void packed_tile(const Pair* x, int64_t x_stride, const Pair* block, float* out, int64_t out_stride, int64_t depth,
                 bool adds) {
    __m512 acc[R][kBlockVectors];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < kBlockVectors; ++v)
            acc[r][v] = adds ? _mm512_loadu_ps(out + r * out_stride + v * kLanes) : _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; ++k) {
        __m512bh w[kBlockVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kBlockVectors; ++v)
            w[v] = (__m512bh)_mm512_loadu_si512(block + k * kBlock + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const uint32_t bits = (Turned ? x[k * x_stride + r] : x[r * x_stride + k]).bits;
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(bits));
#pragma GCC unroll 16
            for (int v = 0; v < kBlockVectors; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], pair, w[v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < kBlockVectors; ++v) _mm512_storeu_ps(out + r * out_stride + v * kLanes, acc[r][v]);
}
#else
constexpr bool kHasPairs = false;

template <int R, bool Turned>
void packed_tile(const Pair*, int64_t, const Pair*, float*, int64_t, int64_t, bool) {}  // never called
#endif

// Here `out` is left to be scaled.
template <int R, bool Turned>
void packed_tile(const Quad* x, int64_t x_stride, const Quad* block, float* out, int64_t out_stride, int64_t depth,
                 bool adds) {
#if defined(__AVX512VNNI__)
    Integers acc[R][kBlockVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Integers w[kBlockVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kBlockVectors; ++v)
            w[v] = *reinterpret_cast<const StoredIntegers*>(block + k * kBlock + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Integers four = Integers{} + static_cast<int32_t>(x[r * x_stride + k].bits);
#pragma GCC unroll 16
            for (int v = 0; v < kBlockVectors; ++v)  // by its name: GCC 12 keeps the intrinsic's sums in memory
                asm("vpdpbusd %2, %1, %0" : "+v"(acc[r][v]) : "v"(four), "v"(w[v]));
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < kBlockVectors; ++v) {
            float* to = out + r * out_stride + v * kLanes;
            const Vector sums = __builtin_convertvector(acc[r][v], Vector);
            put(to, adds ? load(to) + sums : sums);
        }
#else
    for (int r = 0; r < R; ++r) {  // for the compiler to make vectors of
        int32_t acc[kBlock] = {};
        for (int64_t k = 0; k < depth; ++k)
            for (int byte = 0; byte < 4; ++byte) {
                const int32_t element = x[r * x_stride + k].bits >> 8 * byte & 255;
                for (int i = 0; i < kBlock; ++i)
                    acc[i] += element * static_cast<int8_t>(block[k * kBlock + i].bits >> 8 * byte & 255);
            }
        for (int i = 0; i < kBlock; ++i)
            out[r * out_stride + i] = static_cast<float>(acc[i]) + (adds ? out[r * out_stride + i] : 0.0f);
    }
#endif
}

template <int R = kBlockRows, bool Turned = false, class Element>
void packed_rows(int rows, const Element* x, int64_t x_stride, const Element* block, float* out, int64_t out_stride,
                 int64_t depth, bool adds) {
    if constexpr (R > 1) {
        if (rows < R) return packed_rows<R - 1, Turned>(rows, x, x_stride, block, out, out_stride, depth, adds);
    }
    packed_tile<R, Turned>(x, x_stride, block, out, out_stride, depth, adds);
}

// All rows for one block of kBlock outputs. The rows are dealt evenly to tiles: 14 rows are 7 + 7, not 12 + 2.
template <class Element>
void packed_block(const Element* x, int64_t depth, const Element* block, float* out, int64_t out_stride,
                  int64_t num_rows) {
    const int64_t num_tiles = (num_rows + kBlockRows - 1) / kBlockRows;
    for (int64_t begin = 0; begin < depth; begin += kDepthStep) {
        const int64_t step = std::min(kDepthStep, depth - begin);
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
            const int64_t first = num_rows * tile / num_tiles, last = num_rows * (tile + 1) / num_tiles;
            packed_rows<>(static_cast<int>(last - first), x + first * depth + begin, depth, block + begin * kBlock,
                          out + first * out_stride, out_stride, step, begin > 0);
        }
    }
}

// Room of the calling thread, kept for its next use.
inline float* scratch(int64_t size) {
    static thread_local std::vector<float> room;
    if (static_cast<int64_t>(room.size()) < size) room.resize(size);
    return room.data();
}

// Blocks that a thread takes together: decoding is computation, which two at once make faster.
inline int64_t least_run(const Linear& linear) { return linear.group ? kMostBlocks : 1; }

// work(block, count, first_row, end_row) for all blocks, at most kMostBlocks neighbours at once, and rows. Few rows: runs
// of blocks that lie side by side in memory, some per thread, for a busy machine stalls one thread or the other; none
// shorter than `least_run`. Many rows and few blocks: parts of the rows.
template <class Work>
void by_blocks(Pool* pool, int64_t num_rows, int64_t num_blocks, int64_t least_run, Work work) {
    constexpr int64_t kItemsPerThread = 6, kLeastRows = 8 * kBlockRows;
    const int64_t wanted = kItemsPerThread * pool->size();
    const int64_t run = std::max(least_run, num_blocks / wanted);
    const int64_t num_runs = (num_blocks + run - 1) / run;
    const int64_t most_parts = std::max<int64_t>(1, num_rows / kLeastRows);
    const int64_t num_parts = std::min(most_parts, (wanted + num_runs - 1) / num_runs);
    pool->run(num_runs * num_parts, [&](int64_t item) {
        const int64_t part = item % num_parts, first = item / num_parts * run;
        const int64_t end = std::min(first + run, num_blocks);
        for (int64_t block = first; block < end; block += kMostBlocks)
            work(block, std::min(kMostBlocks, end - block), num_rows * part / num_parts,
                 num_rows * (part + 1) / num_parts);
    });
}

// work(row) for every row, on one thread if they are few.
template <class Work>
void by_rows(Pool* pool, int64_t num_rows, Work work) {
    constexpr int64_t kTogether = 16;
    pool->run((num_rows + kTogether - 1) / kTogether, [&](int64_t item) {
        for (int64_t row = item * kTogether; row < std::min(num_rows, (item + 1) * kTogether); ++row) work(row);
    });
}

inline uint16_t to_bfloat16(float value) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 64);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

typedef uint16_t Half __attribute__((may_alias));  // of a Pair

inline void round_row(const float* from, Half* to, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512BF16__)
    for (; i + kLanes <= count; i += kLanes)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
#endif
    for (; i < count; ++i) to[i] = to_bfloat16(from[i]);
}

inline float from_bfloat16(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}

// Elements of a row.
inline int64_t elements_of(int64_t depth, const float*) { return depth; }
inline int64_t elements_of(int64_t depth, const Pair*) { return (depth + 1) / 2; }
inline int64_t elements_of(int64_t depth, const Quad*) { return (depth + 3) / 4; }

// Rows as elements: as they are, or in the pool's room for others, which lasts until the next call.
inline Inputs<float> as_inputs(Pool*, const float* x, int64_t, int64_t depth, const float*) {
    return {x, nullptr, depth};
}

inline Inputs<Pair> as_inputs(Pool* pool, const float* x, int64_t num_rows, int64_t depth, const Pair* kind) {
    const int64_t size = elements_of(depth, kind);
    Pair* pairs = static_cast<Pair*>(pool->elements(num_rows * size));
    by_rows(pool, num_rows, [&](int64_t row) {
        round_row(x + row * depth, reinterpret_cast<Half*>(pairs + row * size), depth);
        if (depth % 2) pairs[(row + 1) * size - 1].bits &= 0xffff;
    });
    return {pairs, nullptr, size};
}

inline Inputs<Quad> as_inputs(Pool* pool, const float* x, int64_t num_rows, int64_t depth, const Quad* kind) {
    const int64_t size = elements_of(depth, kind);
    Quad* quads = static_cast<Quad*>(pool->elements(num_rows * size + num_rows));
    float* scales = reinterpret_cast<float*>(quads + num_rows * size);
    by_rows(pool, num_rows, [&](int64_t row) {  // to integers of -127 to 127, stored with 128 added
        const float* from = x + row * depth;
        Vector most = {}, wrong = {};
        by_vectors(depth, [&](int64_t k, int64_t some) {
            const Vector value = load_some(from + k, some);
            most = larger(most, larger(value, -value));
            wrong += value * 0.0f;  // what is no number must not become one
        });
        const float all = largest(most) + sum(wrong);
        scales[row] = all / 127.0f;
        const float factor = all > 0.0f ? 127.0f / all : 0.0f;
        uint8_t* to = reinterpret_cast<uint8_t*>(quads + row * size);
        int64_t k = 0;
#if defined(__AVX512F__)
        for (; k + kLanes <= depth; k += kLanes) {  // rounded as below
            const __m512i whole = _mm512_cvtps_epi32((__m512)(load(from + k) * factor));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + k),
                             _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(128))));
        }
#endif
        for (; k < depth; ++k) {
            const float rounded = (from[k] * factor + 12582912.0f) - 12582912.0f;  // to the nearest, ties to even
            to[k] = static_cast<uint8_t>(static_cast<int32_t>(rounded) + 128);
        }
        for (int64_t k = depth; k < 4 * size; ++k) to[k] = 128;
    });
    return {quads, scales, size};
}

// The same for the rows of a linear layer [num_rows, depth], in the order of its weights.
template <class Element>
Inputs<Element> inputs_of(Pool* pool, const Linear& linear, const float* x, int64_t num_rows, int64_t depth,
                          const Element* kind) {
    if (!linear.order) return as_inputs(pool, x, num_rows, depth, kind);
    float* ordered = pool->ordered(num_rows * linear.depth);
    by_rows(pool, num_rows, [&](int64_t row) {
        for (int64_t k = 0; k < linear.depth; ++k)
            ordered[row * linear.depth + k] = linear.order[k] < depth ? x[row * depth + linear.order[k]] : 0.0f;
    });
    return as_inputs(pool, ordered, num_rows, linear.depth, kind);
}

#include "float8_kernels.h"

#include "quantized_kernels.h"

// All rows of `inputs` from `first` on for `count` blocks of outputs, with scales and bias: to[0..num_rows)[0..count *
// kBlock).
template <class Element>
void linear_blocks(const Linear& linear, int64_t num_outputs, const Inputs<Element>& inputs, int64_t block,
                   int64_t count, int64_t first, int64_t num_rows, float* to, int64_t stride) {
    const int64_t column = block * kBlock, width = std::min<int64_t>(count * kBlock, num_outputs - column);
    const Element* rows = inputs.rows + first * inputs.depth;
    if (linear.group)
        coded_blocks(linear, rows, inputs.depth, block, count, to, stride, num_rows);
    else
        for (int64_t i = 0; i < count; ++i)
            packed_block(rows, inputs.depth,
                         static_cast<const Element*>(linear.packed) + (block + i) * kBlock * inputs.depth,
                         to + i * kBlock, stride, num_rows);
    const bool is_scaled = linear.scales && !linear.group;
    if (!is_scaled && !linear.bias) return;
    for (int64_t i = 0; i < width; i += kLanes) {
        const int64_t some = std::min<int64_t>(kLanes, width - i);
        const Vector scale = is_scaled ? load_some(linear.scales + column + i, some) : Vector{} + 1.0f;
        const Vector offset = is_scaled ? load_some(linear.offsets + column + i, some) : Vector{};
        const Vector bias = linear.bias ? load_some(linear.bias + column + i, some) : Vector{};
        for (int64_t row = 0; row < num_rows; ++row) {
            float* at = to + row * stride + i;  // a whole block wide
            const float of_row = is_scaled ? inputs.scales[first + row] : 1.0f;
            put(at, (load(at) - offset) * of_row * scale + bias);
        }
    }
}

// out [num_rows, num_outputs] = x @ weight^T (+ bias) (+ residual).
template <class Element>
void run_linear(Pool* pool, const Linear& linear, const Inputs<Element>& inputs, const float* residual, float* out,
                int64_t num_rows, int64_t num_outputs) {
    if (num_rows == 0) return;
    auto work = [&](int64_t block, int64_t count, int64_t first, int64_t end) {
        const int64_t column = block * kBlock, whole = count * kBlock, width = std::min(whole, num_outputs - column);
        float* to = out + first * num_outputs + column;
        if (width == whole) {
            linear_blocks(linear, num_outputs, inputs, block, count, first, end - first, to, num_outputs);
        } else {
            float* room = scratch((end - first) * whole);
            linear_blocks(linear, num_outputs, inputs, block, count, first, end - first, room, whole);
            for (int64_t row = 0; row < end - first; ++row)
                std::copy(room + row * whole, room + row * whole + width, to + row * num_outputs);
        }
        for (int64_t row = 0; row < end - first && residual; ++row)
            for (int64_t i = 0; i < width; ++i)
                to[row * num_outputs + i] += residual[(first + row) * num_outputs + column + i];
    };
    by_blocks(pool, num_rows, blocks_of(num_outputs), least_run(linear), work);
}
