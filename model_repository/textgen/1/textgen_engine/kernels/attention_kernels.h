// Attention over the paged cache [blocks, kv_heads, block_size, dim], keys and values where they lie, in float32 or
// bfloat16 (a `Stored`, turned into floats as it is read).
//
// One query per sequence (decodes): scores are dot products, kLanes keys at a time, and each block is read once for all
// query heads that share it. Chunks of prompts: kBlock query rows of one head stand side by side in the lanes of
// vectors, keys come one by one, and maximum, sum and result are kept as the keys go by (online softmax, as in
// FlashAttention), so that nothing is added across lanes and no matrix of scores is ever whole.

// The layout of these three is known to cpu.py.
struct Scoring {
    float scale, soft_cap;  // soft_cap 0: none
    int64_t window, chunk;  // 0: none
    const float* sinks;
    const float* alibi_slopes;
};

struct Shape {
    int64_t num_heads, num_kv_heads, block_size, dim, value_dim;
    int64_t is_bfloat16;  // the cache: else float32
};

struct Step {
    int64_t num_decodes, num_chunks, num_tokens;
    const int64_t* block_tables;
    int64_t table_stride;
    const int64_t* lengths;       // of all sequences, decodes first
    const int64_t* chunk_starts;  // first row of each chunk, and behind the last
    const int64_t* slot_blocks;
    const int64_t* slot_offsets;
};

// Rows of heads: from one token to the next, and from one head to the next, in floats.
struct Rows {
    const float* data;
    int64_t token_stride, head_stride;
};

// Lanes 0, 2, 4 ... (or 1, 3, 5 ...) of a and b behind one another.
template <int First, int... I>
inline Vector every_second(Vector a, Vector b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (2 * I + First)...);
}

// The sums of kLanes vectors, one per lane: pairs of vectors become one, until one is left.
template <int Count = kLanes>
inline Vector sums(const Vector* of) {
    if constexpr (Count == 1) {
        return of[0];
    } else {
        constexpr std::make_integer_sequence<int, kLanes> lanes{};
        Vector half[Count / 2];
#pragma GCC unroll 8
        for (int i = 0; i < Count / 2; ++i)
            half[i] = every_second<0>(of[2 * i], of[2 * i + 1], lanes) + every_second<1>(of[2 * i], of[2 * i + 1], lanes);
        return sums<Count / 2>(half);
    }
}

inline Vector capped(Vector score, float cap) {  // cap * tanh(score / cap)
    return cap - 2.0f * cap / (1.0f + exponential(score * (2.0f / cap)));
}

// scores[h * stride + j] = query[h] . keys[j] for H heads and `count` keys of one block. `next` is where the block that
// follows lies: blocks lie anywhere, so the processor does not see by itself what is read next. It is asked for bit by
// bit, as fast as it can come.
template <int H, class Stored>
void score_block(const float* query, const float* keys, const Stored* next, float* scores, int64_t stride,
                 int64_t count, int64_t dim) {
    constexpr int kAhead = (kLanes + H - 1) / H;
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) {
        const Stored* ahead = next + j * dim;
        for (int h = 0; h < H; ++h) {
            Vector acc[kLanes] = {};
            for (int64_t d = 0; d < dim; d += kLanes) {
                const Vector q = load(query + h * dim + d);
#pragma GCC unroll 16
                for (int i = 0; i < kAhead; ++i, ahead += kLanes) __builtin_prefetch(ahead);
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) acc[i] += q * load(keys + (j + i) * dim + d);
            }
            put(scores + h * stride + j, sums(acc));
        }
    }
    for (; j < count; ++j)
        for (int h = 0; h < H; ++h) {
            Vector acc = {};
            for (int64_t d = 0; d < dim; d += kLanes) acc += load(query + h * dim + d) * load(keys + j * dim + d);
            scores[h * stride + j] = sum(acc);
        }
}

// output[h] += weights[h] @ values of one block, for H heads and W vectors of their dimensions; `next` as above.
template <int H, int W, class Stored>
void add_part(const float* weights, int64_t stride, const float* values, const Stored* next, float* output,
              int64_t count, int64_t dim) {
    Vector acc[H][W];
    for (int h = 0; h < H; ++h)
        for (int w = 0; w < W; ++w) acc[h][w] = load(output + h * dim + w * kLanes);
    for (int64_t j = 0; j < count; ++j) {
        Vector value[W];
        for (int w = 0; w < W; ++w) {
            value[w] = load(values + j * dim + w * kLanes);
            __builtin_prefetch(next + j * dim + w * kLanes);
        }
        for (int h = 0; h < H; ++h)
            for (int w = 0; w < W; ++w) acc[h][w] += weights[h * stride + j] * value[w];
    }
    for (int h = 0; h < H; ++h)
        for (int w = 0; w < W; ++w) put(output + h * dim + w * kLanes, acc[h][w]);
}

template <int H, class Stored>
void add_block(const float* weights, int64_t stride, const float* values, const Stored* next, float* output,
               int64_t count, int64_t dim) {
    constexpr int kWidth = kLanes == 16 ? 4 : 2;  // as many as registers hold for four heads
    int64_t d = 0;
    for (; d + kWidth * kLanes <= dim; d += kWidth * kLanes)
        add_part<H, kWidth>(weights, stride, values + d, next + d, output + d, count, dim);
    for (; d < dim; d += kLanes) add_part<H, 1>(weights, stride, values + d, next + d, output + d, count, dim);
}

// Scores of one head become weights, which add up to the inverse of what is returned; the last of them is the query's
// own position.
float soften(float* scores, int64_t count, int64_t head, const Scoring& how) {
    if (how.soft_cap > 0.0f)
        by_vectors(count, [&](int64_t j, int64_t some) {
            put_some(scores + j, capped(load_some(scores + j, some), how.soft_cap), some);
        });
    if (how.alibi_slopes)
        for (int64_t j = 0; j < count; ++j) scores[j] += how.alibi_slopes[head] * static_cast<float>(j + 1 - count);
    const Vector first = Vector{} + (how.sinks ? how.sinks[head] : scores[0]);
    Vector highest = first;
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) highest = larger(highest, load(scores + j));
    float top = largest(highest);
    for (; j < count; ++j) top = std::max(top, scores[j]);
    Vector total = {};
    by_vectors(count, [&](int64_t at, int64_t some) {
        const Vector weights = exponential(load_some(scores + at, some) - top);
        put_some(scores + at, weights, some);
        total += some == kLanes ? weights : Vector{};
    });
    float all = sum(total) + (how.sinks ? std::exp(how.sinks[head] - top) : 0.0f);
    for (int64_t at = count / kLanes * kLanes; at < count; ++at) all += scores[at];
    return 1.0f / all;
}

inline int64_t first_visible(int64_t position, const Scoring& how) {
    const int64_t first = how.window > 0 ? std::max<int64_t>(0, position - how.window + 1) : 0;
    return how.chunk > 0 ? std::max(first, position / how.chunk * how.chunk) : first;
}

inline const float* as_floats(const float* stored, int64_t, float*) { return stored; }

inline const float* as_floats(const uint16_t* stored, int64_t count, float* room) {
    for (int64_t i = 0; i < count; ++i) room[i] = from_bfloat16(stored[i]);
    return room;
}

inline void put_stored(float* to, float value) { *to = value; }
inline void put_stored(uint16_t* to, float value) { *to = to_bfloat16(value); }

template <class Stored>
void attend_decodes(Pool* pool, Rows query, const Stored* keys, const Stored* values, float* output, const Shape& shape,
                    const Step& step, const Scoring& how) {
    const int64_t group = shape.num_heads / shape.num_kv_heads, dim = shape.dim, value_dim = shape.value_dim;
    pool->run(step.num_decodes * shape.num_kv_heads, [&](int64_t item) {
        const int64_t sequence = item / shape.num_kv_heads, kv_head = item % shape.num_kv_heads;
        const int64_t length = step.lengths[sequence], first = first_visible(length - 1, how), count = length - first;
        const int64_t* table = step.block_tables + sequence * step.table_stride;
        float* room = scratch(shape.block_size * std::max(dim, value_dim) + group * (dim + count + 1));
        float* scaled = room + shape.block_size * std::max(dim, value_dim);
        float* scores = scaled + group * dim;
        for (int64_t h = 0; h < group; ++h) {
            const float* from =
                query.data + sequence * query.token_stride + (kv_head * group + h) * query.head_stride;
            for (int64_t d = 0; d < dim; ++d) scaled[h * dim + d] = from[d] * how.scale;
        }
        float* out = output + (sequence * shape.num_heads + kv_head * group) * value_dim;
        std::fill(out, out + group * value_dim, 0.0f);

        auto place_of = [&](int64_t block) {
            return (table[block] * shape.num_kv_heads + kv_head) * shape.block_size;
        };
        auto each_block = [&](auto&& visit) {  // with the place of the block that follows
            for (int64_t block = first / shape.block_size; block * shape.block_size < length; ++block) {
                const int64_t begin = std::max(first, block * shape.block_size);
                const int64_t end = std::min(length, (block + 1) * shape.block_size);
                visit(place_of(block) + begin % shape.block_size, begin - first, end - begin,
                      place_of(end < length ? block + 1 : block));
            }
        };
        auto by_heads = [&](auto&& call) {  // in fours, then what is left
            int64_t h = 0;
            for (; h + 4 <= group; h += 4) call(h, std::integral_constant<int, 4>());
            if (group - h == 3) call(h, std::integral_constant<int, 3>());
            if (group - h == 2) call(h, std::integral_constant<int, 2>());
            if (group - h == 1) call(h, std::integral_constant<int, 1>());
        };
        each_block([&](int64_t place, int64_t key, int64_t some, int64_t next) {
            const float* block = as_floats(keys + place * dim, some * dim, room);
            by_heads([&](int64_t h, auto heads) {
                score_block<decltype(heads)::value>(scaled + h * dim, block, keys + next * dim,
                                                    scores + h * count + key, count, some, dim);
            });
        });
        float* factors = scores + group * count;
        for (int64_t h = 0; h < group; ++h)
            factors[h] = soften(scores + h * count, count, kv_head * group + h, how);
        each_block([&](int64_t place, int64_t key, int64_t some, int64_t next) {
            const float* block = as_floats(values + place * value_dim, some * value_dim, room);
            by_heads([&](int64_t h, auto heads) {
                add_block<decltype(heads)::value>(scores + h * count + key, count, block, values + next * value_dim,
                                                  out + h * value_dim, some, value_dim);
            });
        });
        for (int64_t h = 0; h < group; ++h)
            for (int64_t d = 0; d < value_dim; ++d) out[h * value_dim + d] *= factors[h];
    });
}

constexpr int64_t kKeysTogether = 64;
constexpr float kHidden = -1e30f;

// Up to kBlock consecutive query rows of one head, the first at `position`; room for the transposed query, a tile of
// scores and the transposed result.
template <class Stored>
void attend_tile(const float* query, int64_t token_stride, const Stored* keys, const Stored* values, float* output,
                 int64_t output_stride, int64_t num_rows, int64_t position, int64_t head, const int64_t* table,
                 const Shape& shape, const Scoring& how) {
    const int64_t dim = shape.dim, value_dim = shape.value_dim, block_size = shape.block_size;
    const int64_t kv_head = head / (shape.num_heads / shape.num_kv_heads);
    const int64_t room_size = std::min(block_size, kKeysTogether) * std::max(dim, value_dim);
    float* room = scratch(room_size + (dim + value_dim + kKeysTogether) * kBlock);
    float* turned = room + room_size;                                      // [dim][kBlock]
    float* result = turned + dim * kBlock;                                 // [value_dim][kBlock]
    float* scores = result + value_dim * kBlock;                           // [keys][kBlock]
    std::fill(turned, turned + dim * kBlock, 0.0f);
    std::fill(result, result + value_dim * kBlock, 0.0f);
    for (int64_t row = 0; row < num_rows; ++row)
        for (int64_t d = 0; d < dim; ++d) turned[d * kBlock + row] = query[row * token_stride + d] * how.scale;
    float counting[kLanes];
    for (int i = 0; i < kLanes; ++i) counting[i] = static_cast<float>(i);
    // Positions as float: exact up to 2^24.
    Vector rows[kBlockVectors], firsts[kBlockVectors], highest[kBlockVectors], total[kBlockVectors] = {};
    for (int v = 0; v < kBlockVectors; ++v) {
        rows[v] = load(counting) + static_cast<float>(position + v * kLanes);
        float first[kLanes];
        for (int i = 0; i < kLanes; ++i) first[i] = static_cast<float>(first_visible(position + v * kLanes + i, how));
        firsts[v] = load(first);
        highest[v] = Vector{} + kHidden;
    }
    const int64_t end = position + num_rows;
    const bool limited = how.window > 0 || how.chunk > 0;
    for (int64_t begin = first_visible(position, how) / block_size * block_size; begin < end;) {
        const int64_t stop = std::min(end, begin + std::max(kKeysTogether / block_size, int64_t{1}) * block_size);
        const int64_t count = std::min(stop - begin, kKeysTogether);
        auto each_block = [&](auto&& visit) {  // keys of one block lie side by side
            for (int64_t key = begin; key < begin + count;) {
                const int64_t some = std::min(block_size - key % block_size, begin + count - key);
                visit((table[key / block_size] * shape.num_kv_heads + kv_head) * block_size + key % block_size,
                      key - begin, some);
                key += some;
            }
        };
        each_block([&](int64_t place, int64_t key, int64_t some) {
            const float* block = as_floats(keys + place * dim, some * dim, room);
            for (int64_t i = 0; i < some; i += kBlockRows)
                packed_rows<>(static_cast<int>(std::min<int64_t>(kBlockRows, some - i)), block + i * dim, dim, turned,
                              scores + (key + i) * kBlock, kBlock, dim, false);
        });
        const bool masked = limited || begin + count > position + 1;
        Vector top[kBlockVectors], shrunk[kBlockVectors];
        for (int v = 0; v < kBlockVectors; ++v) top[v] = highest[v];
        for (int64_t j = 0; j < count; ++j)
            for (int v = 0; v < kBlockVectors; ++v) {
                Vector score = load(scores + j * kBlock + v * kLanes);
                const float key = static_cast<float>(begin + j);
                if (how.soft_cap > 0.0f) score = capped(score, how.soft_cap);
                if (how.alibi_slopes) score += how.alibi_slopes[head] * (key - rows[v]);
                if (masked) score = (rows[v] >= key) & (firsts[v] <= key) ? score : Vector{} + kHidden;
                top[v] = larger(top[v], score);
                put(scores + j * kBlock + v * kLanes, score);
            }
        for (int v = 0; v < kBlockVectors; ++v) {
            shrunk[v] = exponential(highest[v] - top[v]);
            total[v] *= shrunk[v];
            highest[v] = top[v];
        }
        for (int64_t d = 0; d < value_dim; ++d)
            for (int v = 0; v < kBlockVectors; ++v) {
                float* at = result + d * kBlock + v * kLanes;
                put(at, load(at) * shrunk[v]);
            }
        for (int64_t j = 0; j < count; ++j)
            for (int v = 0; v < kBlockVectors; ++v) {
                float* at = scores + j * kBlock + v * kLanes;
                const Vector score = load(at);
                Vector weight = exponential(score - top[v]);
                if (masked) weight = score > kHidden ? weight : Vector{};
                total[v] += weight;
                put(at, weight);
            }
        each_block([&](int64_t place, int64_t key, int64_t some) {
            const float* block = as_floats(values + place * value_dim, some * value_dim, room);
            for (int64_t d = 0; d < value_dim; d += kBlockRows)
                packed_rows<kBlockRows, true>(static_cast<int>(std::min<int64_t>(kBlockRows, value_dim - d)), block + d,
                                              value_dim, scores + key * kBlock, result + d * kBlock, kBlock, some, true);
        });
        begin += count;
    }
    for (int v = 0; v < kBlockVectors; ++v) {
        Vector factor = 1.0f / total[v];
        if (how.sinks) {
            const Vector sink = Vector{} + how.sinks[head], top = larger(highest[v], sink);
            factor = exponential(highest[v] - top) / (total[v] * exponential(highest[v] - top) + exponential(sink - top));
        }
        for (int64_t d = 0; d < value_dim; ++d) {
            float* at = result + d * kBlock + v * kLanes;
            put(at, load(at) * factor);
        }
    }
    for (int64_t row = 0; row < num_rows; ++row)
        for (int64_t d = 0; d < value_dim; ++d) output[row * output_stride + d] = result[d * kBlock + row];
}

template <class Stored>
void attend_chunks(Pool* pool, Rows query, const Stored* keys, const Stored* values, float* output, const Shape& shape,
                   const Step& step, const Scoring& how) {
    int64_t num_tiles = 0;
    for (int64_t chunk = 0; chunk < step.num_chunks; ++chunk)
        num_tiles += (step.chunk_starts[chunk + 1] - step.chunk_starts[chunk] + kBlock - 1) / kBlock;
    pool->run(num_tiles * shape.num_heads, [&](int64_t item) {
        const int64_t head = item % shape.num_heads;
        int64_t tile = num_tiles - 1 - item / shape.num_heads, chunk = 0;  // long ones first
        for (;; ++chunk) {
            const int64_t here = (step.chunk_starts[chunk + 1] - step.chunk_starts[chunk] + kBlock - 1) / kBlock;
            if (tile < here) break;
            tile -= here;
        }
        const int64_t start = step.chunk_starts[chunk], query_len = step.chunk_starts[chunk + 1] - start;
        const int64_t sequence = step.num_decodes + chunk, row = tile * kBlock;
        const int64_t output_stride = shape.num_heads * shape.value_dim;
        attend_tile(query.data + (start + row) * query.token_stride + head * query.head_stride, query.token_stride, keys,
                    values, output + (start + row) * output_stride + head * shape.value_dim, output_stride,
                    std::min<int64_t>(kBlock, query_len - row), step.lengths[sequence] - query_len + row, head,
                    step.block_tables + sequence * step.table_stride, shape, how);
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
            for (int64_t d = 0; d < dim; ++d) put_stored(to + d, only_finite ? finite(from[d]) : from[d]);
        }
    });
}

// Stores a step's keys and values and attends, all rows of output [num_tokens, num_heads, value_dim].
template <class Stored>
void attend_stored(Pool* pool, Rows query, Rows key, Rows value, Stored* keys, Stored* values, float* output,
                   const Shape& shape, const Step& step, const Scoring& how) {
    store_rows(pool, key, keys, step, shape.num_kv_heads, shape.block_size, shape.dim, false);
    store_rows(pool, value, values, step, shape.num_kv_heads, shape.block_size, shape.value_dim, true);
    attend_decodes(pool, query, keys, values, output, shape, step, how);
    attend_chunks(pool, query, keys, values, output, shape, step, how);
}

void attend(Pool* pool, Rows query, Rows key, Rows value, void* keys, void* values, float* output, const Shape& shape,
            const Step& step, const Scoring& how) {
    if (shape.is_bfloat16)
        attend_stored(pool, query, key, value, static_cast<uint16_t*>(keys), static_cast<uint16_t*>(values), output,
                      shape, step, how);
    else
        attend_stored(pool, query, key, value, static_cast<float*>(keys), static_cast<float*>(values), output, shape,
                      step, how);
}
