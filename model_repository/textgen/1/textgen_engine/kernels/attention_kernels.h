// Attention over the paged cache [blocks, kv_heads, block_size, dim], keys and values in float32, bfloat16 or floats of 8
// bits (`Stored`).
//
// Sequences with one query are decode_kernels.h's. Chunks of prompts: kBlock query rows of one head stand side by side in
// the lanes of vectors, keys come one by one, and maximum, sum and result are kept as the keys go by (online softmax, as
// in FlashAttention), so that nothing is added across lanes and no matrix of scores is ever whole. Keys and values of
// bfloat16 are multiplied as they are, by queries and weights in bfloat16, where the processor can; sums are float32.
// Those of 8 bits are widened as they are read, to what the rest of the model computes in.

// The layout of these structures is known to cpu_records.py.
struct Scoring {
    float scale, soft_cap;  // soft_cap 0: none
    int64_t window, chunk;  // 0: none
    const float* sinks;
    const float* alibi_slopes;
};

struct Shape {
    int64_t num_heads, num_kv_heads, block_size, dim, value_dim;
    int64_t cache;     // Cache: what it keeps
    int64_t in_pairs;  // one of 8 bits is multiplied in bfloat16, where the processor can
};

enum Cache : int64_t { kFloatCache = 0, kBfloat16Cache = 1, kE4m3Cache = 2, kE5m2Cache = 3 };

struct Step {
    int64_t num_decodes, num_chunks, num_tokens;
    const int64_t* block_tables;
    int64_t table_stride;
    const int64_t* lengths;       // of all sequences, decodes first
    const int64_t* chunk_starts;  // first row of each chunk, and behind the last
    const int64_t* slot_blocks;
    const int64_t* slot_offsets;
};

// The rows of a step whose results are wanted, which attend as sequences of one query each.
struct Wanted {
    const int64_t* rows;
    Step step;  // no slots: keys and values of all rows are stored before
};

// Rows of heads: from one token to the next, and from one head to the next, in floats.
struct Rows {
    const float* data;
    int64_t token_stride, head_stride;
};

inline Vector capped(Vector score, float cap) {  // cap * tanh(score / cap)
    return cap - 2.0f * cap / (1.0f + exponential(score * (2.0f / cap)));
}

inline int64_t first_visible(int64_t position, const Scoring& how) {
    const int64_t first = how.window > 0 ? std::max<int64_t>(0, position - how.window + 1) : 0;
    return how.chunk > 0 ? std::max(first, position / how.chunk * how.chunk) : first;
}

inline void put_stored(float* to, float value) { *to = value; }
inline void put_stored(uint16_t* to, float value) { *to = to_bfloat16(value); }
template <class Float8>
inline void put_stored(Float8* to, float value) {
    *to = narrowed<Float8>(value);
}

inline float most_of(const float*) { return 3.4028234663852886e38f; }
inline float most_of(const uint16_t*) { return 3.3895313892515355e38f; }
template <class Float8>
inline float most_of(const Float8*) {
    return Float8::kMost;
}

// What is no number as 0, infinities as the largest that the cache holds.
template <class Stored>
inline float finite(float value, const Stored* stored) {
    if (std::isnan(value)) return 0.0f;
    return std::min(std::max(value, -most_of(stored)), most_of(stored));
}

#include "decode_kernels.h"

constexpr int64_t kKeysTogether = 64;
constexpr int64_t kHeadsTogether = 4;  // of those that share keys and values: what is gathered serves them all
constexpr float kHidden = -1e30f;

inline float as_float(float value) { return value; }
inline float as_float(uint16_t value) { return from_bfloat16(value); }
template <class Float8>
inline float as_float(Float8 value) {
    return widened(value);
}

// A value's row as pairs, whose other half is the value of the next key.
inline void gather_value(const uint16_t* value, Pair* values, int64_t j, int64_t dim) {
    Pair* to = values + j / 2 * dim;
    if (j % 2 == 0)
        for (int64_t d = 0; d < dim; ++d) to[d].bits = value[d];
    else
        for (int64_t d = 0; d < dim; ++d) to[d].bits |= static_cast<uint32_t>(value[d]) << 16;
}

// The rows of `some` keys that lie side by side and of their values go to places j, j + 1 ...; a key's neighbours in `dim`
// stay together.
template <class Stored>
inline void gather(const Stored* from_keys, const Stored* from_values, int64_t some, float* keys, float* values,
                   int64_t j, int64_t dim, int64_t value_dim) {
    auto copy = [](const Stored* from, int64_t count, float* to) {
        if constexpr (kIsFloat8<Stored>)
            widen(from, from + count, count, to);
        else
            for (int64_t i = 0; i < count; ++i) to[i] = as_float(from[i]);
    };
    copy(from_keys, some * dim, keys + j * dim);
    copy(from_values, some * value_dim, values + j * value_dim);
}

template <class Stored>
inline void gather(const Stored* from_keys, const Stored* from_values, int64_t some, Pair* keys, Pair* values, int64_t j,
                   int64_t dim, int64_t value_dim) {
    Half* to = reinterpret_cast<Half*>(keys + j * dim / 2);
    static thread_local std::vector<uint16_t> widened_value;
    if (static_cast<int64_t>(widened_value.size()) < value_dim) widened_value.resize(value_dim);
    if constexpr (kIsFloat8<Stored>)
        widen(from_keys, from_keys + some * dim, some * dim, to);
    else
        std::memcpy(to, from_keys, some * dim * sizeof(Half));
    for (int64_t i = 0; i < some; ++i) {
        const Stored* value = from_values + i * value_dim;
        if constexpr (kIsFloat8<Stored>) {
            widen(value, value + value_dim, value_dim, widened_value.data());
            gather_value(widened_value.data(), values, j + i, value_dim);
        } else {
            gather_value(value, values, j + i, value_dim);
        }
    }
}

// Rows of queries side by side in lanes: [dim or pairs of it][kBlock], what is missing zero.
inline void turn_query(const float* query, int64_t token_stride, int64_t num_rows, int64_t dim, float scale, float* to) {
    std::fill(to, to + dim * kBlock, 0.0f);
    for (int64_t row = 0; row < num_rows; ++row)
        for (int64_t d = 0; d < dim; ++d) to[d * kBlock + row] = query[row * token_stride + d] * scale;
}

inline void turn_query(const float* query, int64_t token_stride, int64_t num_rows, int64_t dim, float scale, Pair* to) {
    static thread_local std::vector<float> room;
    if (static_cast<int64_t>(room.size()) < 2 * dim) room.resize(2 * dim);
    float* scaled = room.data();
    Half* rounded = reinterpret_cast<Half*>(scaled + dim);
    std::fill(to, to + dim / 2 * kBlock, Pair{0});
    for (int64_t row = 0; row < num_rows; ++row) {
        for (int64_t d = 0; d < dim; ++d) scaled[d] = query[row * token_stride + d] * scale;
        round_row(scaled, rounded, dim);
        for (int64_t pair = 0; pair < dim / 2; ++pair) std::memcpy(to + pair * kBlock + row, rounded + 2 * pair, sizeof(Pair));
    }
}

inline void put_weights(float* to, int64_t j, int64_t vector, Vector one, Vector two) {
    put(to + j * kBlock + vector * kLanes, one);
    put(to + (j + 1) * kBlock + vector * kLanes, two);
}

inline void put_weights(Pair* to, int64_t j, int64_t vector, Vector one, Vector two) {
#if defined(__AVX512BF16__)
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)one));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)two));
    _mm512_storeu_si512(to + j / 2 * kBlock + vector * kLanes, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#endif
}

// kBlock consecutive query rows, or fewer, of some heads that share keys and values, the first row at `position`.
struct Tile {
    int64_t position, num_rows, first_head, num_heads;
    const float* query;  // of the first row and head
    float* output;
    const int64_t* table;
};

// What a tile keeps of one head: rows stand in the lanes.
struct Running {
    Vector highest[kBlockVectors], total[kBlockVectors];
};

// Element: what keys and values are multiplied as, floats or pairs.
template <class Element, class Stored>
void attend_tile(const Tile& tile, Rows query, const Stored* keys, const Stored* values, const Shape& shape,
                 const Scoring& how) {
    constexpr int64_t kTogether = std::is_same_v<Element, Pair> ? 2 : 1;
    const int64_t dim = shape.dim, value_dim = shape.value_dim, block_size = shape.block_size;
    const int64_t kv_head = tile.first_head / (shape.num_heads / shape.num_kv_heads);
    const int64_t depth = dim / kTogether, output_stride = shape.num_heads * value_dim;
    // Elements are as large as floats.
    float* room = scratch(kKeysTogether * (dim + value_dim) + 2 * kKeysTogether * kBlock +
                          tile.num_heads * (dim + value_dim) * kBlock);
    Element* gathered_keys = reinterpret_cast<Element*>(room);
    Element* gathered_values = gathered_keys + kKeysTogether * dim;
    float* scores = room + kKeysTogether * (dim + value_dim);                        // [keys][kBlock]
    Element* weights = reinterpret_cast<Element*>(scores + kKeysTogether * kBlock);  // [keys, or pairs of them][kBlock]
    Element* turned = weights + kKeysTogether * kBlock;                              // [heads][depth][kBlock]
    float* results = reinterpret_cast<float*>(turned + tile.num_heads * dim * kBlock);  // [heads][value_dim][kBlock]
    std::fill(results, results + tile.num_heads * value_dim * kBlock, 0.0f);
    Running running[kHeadsTogether];
    for (int64_t h = 0; h < tile.num_heads; ++h) {
        turn_query(tile.query + h * query.head_stride, query.token_stride, tile.num_rows, dim, how.scale,
                   turned + h * depth * kBlock);
        for (int v = 0; v < kBlockVectors; ++v) running[h].highest[v] = Vector{} + kHidden, running[h].total[v] = Vector{};
    }
    float counting[kLanes];
    for (int i = 0; i < kLanes; ++i) counting[i] = static_cast<float>(i);
    // Positions as float: exact up to 2^24.
    Vector rows[kBlockVectors], firsts[kBlockVectors];
    for (int v = 0; v < kBlockVectors; ++v) {
        rows[v] = load(counting) + static_cast<float>(tile.position + v * kLanes);
        float first[kLanes];
        for (int i = 0; i < kLanes; ++i) first[i] = static_cast<float>(first_visible(tile.position + v * kLanes + i, how));
        firsts[v] = load(first);
    }
    const int64_t end = tile.position + tile.num_rows;
    const bool limited = how.window > 0 || how.chunk > 0;
    int64_t count = 0;
    for (int64_t begin = first_visible(tile.position, how); begin < end; begin += count) {
        count = std::min(end - begin, kKeysTogether);
        for (int64_t j = 0; j < count;) {
            const int64_t block = (begin + j) / block_size, offset = begin + j - block * block_size;
            const int64_t place = (tile.table[block] * shape.num_kv_heads + kv_head) * block_size + offset;
            const int64_t some = std::min(block_size - offset, count - j);
            gather(keys + place * dim, values + place * value_dim, some, gathered_keys, gathered_values, j, dim,
                   value_dim);
            j += some;
        }
        const bool masked = limited || begin + count > tile.position + 1;
        const bool changed = masked || how.soft_cap > 0.0f || how.alibi_slopes;
        for (int64_t h = 0; h < tile.num_heads; ++h) {
            const int64_t head = tile.first_head + h;
            float* result = results + h * value_dim * kBlock;
            Running& kept = running[h];
            packed_block(gathered_keys, depth, turned + h * depth * kBlock, scores, kBlock, count);
            Vector top[kBlockVectors], shrunk[kBlockVectors];
            for (int v = 0; v < kBlockVectors; ++v) top[v] = kept.highest[v];
            for (int64_t j = 0; j < count; ++j)
                for (int v = 0; v < kBlockVectors; ++v) {
                    Vector score = load(scores + j * kBlock + v * kLanes);
                    if (changed) {
                        const float key = static_cast<float>(begin + j);
                        if (how.soft_cap > 0.0f) score = capped(score, how.soft_cap);
                        if (how.alibi_slopes) score += how.alibi_slopes[head] * (key - rows[v]);
                        if (masked) score = (rows[v] >= key) & (firsts[v] <= key) ? score : Vector{} + kHidden;
                        put(scores + j * kBlock + v * kLanes, score);
                    }
                    top[v] = larger(top[v], score);
                }
            for (int v = 0; v < kBlockVectors; ++v) {
                shrunk[v] = exponential(kept.highest[v] - top[v]);
                kept.total[v] *= shrunk[v];
                kept.highest[v] = top[v];
            }
            for (int64_t d = 0; d < value_dim; ++d)
                for (int v = 0; v < kBlockVectors; ++v) {
                    float* at = result + d * kBlock + v * kLanes;
                    put(at, load(at) * shrunk[v]);
                }
            auto weigh = [&](int64_t j, int v) {
                if (j >= count) return Vector{};
                const Vector score = load(scores + j * kBlock + v * kLanes);
                Vector weight =
                    kTogether == 2 ? rough_exponential(score - top[v]) : exponential(score - top[v]);
                if (masked) weight = score == kHidden ? Vector{} : weight;
                kept.total[v] += weight;
                return weight;
            };
            for (int64_t j = 0; j < count; j += 2)
                for (int v = 0; v < kBlockVectors; ++v) {
                    const Vector one = weigh(j, v), two = weigh(j + 1, v);
                    put_weights(weights, j, v, one, two);
                }
            const int64_t num_tiles = (value_dim + kBlockRows - 1) / kBlockRows;
            for (int64_t part = 0; part < num_tiles; ++part) {
                const int64_t d = value_dim * part / num_tiles, next = value_dim * (part + 1) / num_tiles;
                packed_rows<kBlockRows, true>(static_cast<int>(next - d), gathered_values + d, value_dim, weights,
                                              result + d * kBlock, kBlock, (count + kTogether - 1) / kTogether, true);
            }
        }
    }
    for (int64_t h = 0; h < tile.num_heads; ++h) {
        float* result = results + h * value_dim * kBlock;
        for (int v = 0; v < kBlockVectors; ++v) {
            const Vector highest = running[h].highest[v], total = running[h].total[v];
            Vector factor = 1.0f / total;
            if (how.sinks) {
                const Vector sink = Vector{} + how.sinks[tile.first_head + h], top = larger(highest, sink);
                factor = exponential(highest - top) / (total * exponential(highest - top) + exponential(sink - top));
            }
            for (int64_t d = 0; d < value_dim; ++d) {
                float* at = result + d * kBlock + v * kLanes;
                put(at, load(at) * factor);
            }
        }
        float* output = tile.output + h * value_dim;
        for (int64_t row = 0; row < tile.num_rows; ++row)
            for (int64_t d = 0; d < value_dim; ++d) output[row * output_stride + d] = result[d * kBlock + row];
    }
}

template <class Element, class Stored>
void attend_chunks(Pool* pool, Rows query, const Stored* keys, const Stored* values, float* output, const Shape& shape,
                   const Step& step, const Scoring& how) {
    int64_t num_tiles = 0;
    for (int64_t chunk = 0; chunk < step.num_chunks; ++chunk)
        num_tiles += (step.chunk_starts[chunk + 1] - step.chunk_starts[chunk] + kBlock - 1) / kBlock;
    const int64_t group = shape.num_heads / shape.num_kv_heads;
    const int64_t num_parts = (group + kHeadsTogether - 1) / kHeadsTogether, num_items = shape.num_kv_heads * num_parts;
    pool->run(num_tiles * num_items, [&](int64_t item) {
        const int64_t kv_head = item % num_items / num_parts, part = item % num_parts;
        int64_t number = num_tiles - 1 - item / num_items, chunk = 0;  // long ones first
        for (;; ++chunk) {
            const int64_t here = (step.chunk_starts[chunk + 1] - step.chunk_starts[chunk] + kBlock - 1) / kBlock;
            if (number < here) break;
            number -= here;
        }
        const int64_t start = step.chunk_starts[chunk], query_len = step.chunk_starts[chunk + 1] - start;
        const int64_t sequence = step.num_decodes + chunk, row = number * kBlock;
        Tile tile;
        tile.position = step.lengths[sequence] - query_len + row;
        tile.num_rows = std::min<int64_t>(kBlock, query_len - row);
        tile.first_head = kv_head * group + group * part / num_parts;
        tile.num_heads = kv_head * group + group * (part + 1) / num_parts - tile.first_head;
        tile.query = query.data + (start + row) * query.token_stride + tile.first_head * query.head_stride;
        tile.output = output + ((start + row) * shape.num_heads + tile.first_head) * shape.value_dim;
        tile.table = step.block_tables + sequence * step.table_stride;
        attend_tile<Element>(tile, query, keys, values, shape, how);
    });
}

// Writes the step's rows of heads to a cache; with only_finite, what is no number as 0 and infinities as the largest
// numbers.
template <class Stored>
void store_rows(Pool* pool, Rows rows, Stored* cache, const Step& step, int64_t num_heads, int64_t block_size,
                int64_t dim, bool only_finite) {
    by_rows(pool, step.num_tokens, [&](int64_t token) {
        for (int64_t head = 0; head < num_heads; ++head) {
            const float* from = rows.data + token * rows.token_stride + head * rows.head_stride;
            Stored* to = cache + ((step.slot_blocks[token] * num_heads + head) * block_size + step.slot_offsets[token]) * dim;
            for (int64_t d = 0; d < dim; ++d) put_stored(to + d, only_finite ? finite(from[d], to) : from[d]);
        }
    });
}

// Calls run with a null pointer to what the cache holds and something of what it is multiplied as.
template <class Run>
void by_stored(const Shape& shape, Run run) {
    using InPairs = std::conditional_t<kHasPairs, Pair, float>;
    auto run_float8 = [&](auto* stored) { shape.in_pairs ? run(stored, InPairs()) : run(stored, 0.0f); };
    if (shape.cache == kFloatCache) run(static_cast<float*>(nullptr), 0.0f);
    if (shape.cache == kBfloat16Cache) run(static_cast<uint16_t*>(nullptr), InPairs());
    if (shape.cache == kE4m3Cache) run_float8(static_cast<E4m3*>(nullptr));
    if (shape.cache == kE5m2Cache) run_float8(static_cast<E5m2*>(nullptr));
}

// Puts a step's keys and values where later steps find them.
void store(Pool* pool, Rows key, Rows value, void* keys, void* values, const Shape& shape, const Step& step) {
    by_stored(shape, [&](auto* stored, auto) {
        using Stored = decltype(stored);
        store_rows(pool, key, static_cast<Stored>(keys), step, shape.num_kv_heads, shape.block_size, shape.dim, false);
        store_rows(pool, value, static_cast<Stored>(values), step, shape.num_kv_heads, shape.block_size, shape.value_dim,
                   true);
    });
}

// All rows of output [num_tokens, num_heads, value_dim], from what is stored.
void attend(Pool* pool, Rows query, void* keys, void* values, float* output, const Shape& shape, const Step& step,
            const Scoring& how) {
    by_stored(shape, [&](auto* stored, auto element) {
        using Stored = decltype(stored);
        const auto from_keys = static_cast<Stored>(keys), from_values = static_cast<Stored>(values);
        attend_decodes<decltype(element)>(pool, query, from_keys, from_values, output, shape, step, how);
        attend_chunks<decltype(element)>(pool, query, from_keys, from_values, output, shape, step, how);
    });
}
