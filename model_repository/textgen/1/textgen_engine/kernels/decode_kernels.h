// Attention of sequences with one query each. Each block of the cache is read once for all query heads that share it, and
// the blocks' heads in the order in which they lie in memory. Scores are dot products, kLanes keys at a time.

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

// scores[h * stride + j] = query[h] . keys[j] for H heads and `count` keys of one block. `next` is where the block that
// follows lies: blocks lie anywhere, so the processor does not see by itself what is read next. It is asked for bit by
// bit, as fast as it can come; null: somebody else has asked.
template <int H>
void score_block(const float* query, const float* keys, const float* next, float* scores, int64_t stride,
                 int64_t count, int64_t dim) {
    constexpr int kAhead = (kLanes + H - 1) / H;
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) {
        const float* ahead = next + j * dim;
        for (int h = 0; h < H; ++h) {
            Vector acc[kLanes] = {};
            for (int64_t d = 0; d < dim; d += kLanes) {
                const Vector q = load(query + h * dim + d);
#pragma GCC unroll 16
                for (int i = 0; i < kAhead && next; ++i, ahead += kLanes) __builtin_prefetch(ahead);
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
template <int H, int W>
void add_part(const float* weights, int64_t stride, const float* values, const float* next, float* output,
              int64_t count, int64_t dim) {
    Vector acc[H][W];
    for (int h = 0; h < H; ++h)
        for (int w = 0; w < W; ++w) acc[h][w] = load(output + h * dim + w * kLanes);
    for (int64_t j = 0; j < count; ++j) {
        Vector value[W];
        for (int w = 0; w < W; ++w) {
            value[w] = load(values + j * dim + w * kLanes);
            if (next) __builtin_prefetch(next + j * dim + w * kLanes);
        }
        for (int h = 0; h < H; ++h)
            for (int w = 0; w < W; ++w) acc[h][w] += weights[h * stride + j] * value[w];
    }
    for (int h = 0; h < H; ++h)
        for (int w = 0; w < W; ++w) put(output + h * dim + w * kLanes, acc[h][w]);
}

template <int H>
void add_block(const float* weights, int64_t stride, const float* values, const float* next, float* output,
               int64_t count, int64_t dim) {
    constexpr int kWidth = kLanes == 16 ? 4 : 2;  // as many as registers hold for four heads
    int64_t d = 0;
    for (; d + kWidth * kLanes <= dim; d += kWidth * kLanes)
        add_part<H, kWidth>(weights, stride, values + d, next ? next + d : next, output + d, count, dim);
    for (; d < dim; d += kLanes)
        add_part<H, 1>(weights, stride, values + d, next ? next + d : next, output + d, count, dim);
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

// What is stored of a block as it is multiplied, where it lies or in `room`; and of `next` what is still to be asked for.
template <class Element>
struct Read {
    const Element *block, *next;
};

inline Read<float> read(const float* stored, const float* next, int64_t, float*) { return {stored, next}; }
inline Read<uint16_t> read(const uint16_t* stored, const uint16_t* next, int64_t, uint16_t*) { return {stored, next}; }

inline Read<float> read(const uint16_t* stored, const uint16_t* next, int64_t count, float* room) {
    for (int64_t i = 0; i < count; ++i) {
        if (i % 32 == 0) __builtin_prefetch(next + i);
        room[i] = from_bfloat16(stored[i]);
    }
    return {room, nullptr};
}

template <class Float8, class Element>
Read<Element> read(const Float8* stored, const Float8* next, int64_t count, Element* room) {
    widen(stored, next, count, room);
    return {room, nullptr};
}

// ---- in floats ------------------------------------------------------------------------------------------------------

// One sequence's queries, weights and results, of num_heads heads.
template <class Stored>
class FloatDecode {
  public:
    static int64_t size(const Shape& shape, int64_t num_heads, int64_t count) {
        return shape.block_size * std::max(shape.dim, shape.value_dim) + num_heads * (shape.dim + count);
    }

    FloatDecode(float* room, const Shape& shape, int64_t num_heads, int64_t count, float* output)
        : dim_(shape.dim), value_dim_(shape.value_dim), count_(count), room_(room), output_(output) {
        query_ = room + shape.block_size * std::max(dim_, value_dim_);
        scores_ = query_ + num_heads * dim_;
        std::fill(output, output + num_heads * value_dim_, 0.0f);
    }

    void take_query(int64_t head, const float* query, float scale) {
        for (int64_t d = 0; d < dim_; ++d) query_[head * dim_ + d] = query[d] * scale;
    }

    float* scores(int64_t head) { return scores_ + head * count_; }
    void take_weights(int64_t) {}

    template <int H>
    void score(int64_t head, const Stored* keys, const Stored* next, int64_t key, int64_t some) {
        const Read<float> from = read(keys, next, some * dim_, room_);
        score_block<H>(query_ + head * dim_, from.block, from.next, scores(head) + key, count_, some, dim_);
    }

    template <int H>
    void add(int64_t head, const Stored* values, const Stored* next, int64_t key, int64_t some) {
        const Read<float> from = read(values, next, some * value_dim_, room_);
        add_block<H>(scores(head) + key, count_, from.block, from.next, output_ + head * value_dim_, some, value_dim_);
    }

    void finish(int64_t head, float factor) {
        for (int64_t d = 0; d < value_dim_; ++d) output_[head * value_dim_ + d] *= factor;
    }

  private:
    int64_t dim_, value_dim_, count_;
    float *room_, *query_, *scores_, *output_;
};

// ---- in pairs of bfloat16 -------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
constexpr int64_t kRun = 2 * kLanes;  // bfloat16 in a vector

inline __mmask32 first_of_run(int64_t count) { return count >= kRun ? ~__mmask32{0} : (__mmask32{1} << count) - 1; }

// Queries, weights and what is stored are multiplied two and two; sums are float32.
template <class Stored>
class PairDecode {
  public:
    static int64_t size(const Shape& shape, int64_t num_heads, int64_t count) {
        return num_heads * (runs(shape.dim) * kLanes + runs(shape.value_dim) * kRun + count + count / 2 + 1) +
               shape.block_size * std::max(shape.dim, shape.value_dim) / 2;
    }

    PairDecode(float* room, const Shape& shape, int64_t num_heads, int64_t count, float* output)
        : dim_(shape.dim), value_dim_(shape.value_dim), count_(count), output_(output) {
        query_ = reinterpret_cast<uint32_t*>(room);
        sums_ = room + num_heads * runs(dim_) * kLanes;
        scores_ = sums_ + num_heads * runs(value_dim_) * kRun;
        weights_ = reinterpret_cast<Half*>(scores_ + num_heads * count);
        room_ = reinterpret_cast<Half*>(scores_ + num_heads * (count + count / 2 + 1));
        std::fill(sums_, scores_, 0.0f);
    }

    void take_query(int64_t head, const float* query, float scale) {
        for (int64_t run = 0; run < runs(dim_); ++run) {
            float scaled[kRun] = {};
            for (int64_t d = 0; d < std::min(kRun, dim_ - run * kRun); ++d) scaled[d] = query[run * kRun + d] * scale;
            round_row(scaled, reinterpret_cast<Half*>(query_ + (head * runs(dim_) + run) * kLanes), kRun);
        }
    }

    float* scores(int64_t head) { return scores_ + head * count_; }

    void take_weights(int64_t head) { round_row(scores(head), weights_ + head * count_, count_); }

    template <int H>
    void score(int64_t head, const Stored* stored, const Stored* stored_next, int64_t key, int64_t some) {
        const auto [keys, next] = read(stored, stored_next, some * dim_, room_);
        const uint32_t* query = query_ + head * runs(dim_) * kLanes;
        int64_t j = 0;
        for (; j + kLanes <= some; j += kLanes)
            for (int h = 0; h < H; ++h) {
                __m512 acc[kLanes];
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) acc[i] = _mm512_setzero_ps();
                for (int64_t run = 0; run < runs(dim_); ++run) {
                    const __m512bh q = (__m512bh)_mm512_loadu_si512(query + (h * runs(dim_) + run) * kLanes);
                    const __mmask32 mask = first_of_run(dim_ - run * kRun);
                    const uint16_t* from = keys + j * dim_ + run * kRun;
                    const uint16_t* ahead = next + j * dim_ + run * kRun;
#pragma GCC unroll 16
                    for (int i = 0; i < kLanes; ++i) {
                        acc[i] = _mm512_dpbf16_ps(acc[i], q, (__m512bh)_mm512_maskz_loadu_epi16(mask, from + i * dim_));
                        if (h == 0 && next) __builtin_prefetch(ahead + i * dim_);
                    }
                }
                Vector each[kLanes];
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) each[i] = (Vector)acc[i];
                put(scores(head + h) + key + j, ::sums(each));
            }
        for (; j < some; ++j)
            for (int h = 0; h < H; ++h) {
                __m512 acc = _mm512_setzero_ps();
                for (int64_t run = 0; run < runs(dim_); ++run)
                    acc = _mm512_dpbf16_ps(
                        acc, (__m512bh)_mm512_loadu_si512(query + (h * runs(dim_) + run) * kLanes),
                        (__m512bh)_mm512_maskz_loadu_epi16(first_of_run(dim_ - run * kRun),
                                                           keys + j * dim_ + run * kRun));
                scores(head + h)[key + j] = sum((Vector)acc);
            }
    }

    // Values of two neighbouring keys are interleaved, which leaves a run's sums in the order that finish() undoes.
    template <int H>
    void add(int64_t head, const Stored* stored, const Stored* stored_next, int64_t key, int64_t some) {
        const auto [values, next] = read(stored, stored_next, some * value_dim_, room_);
        for (int64_t run = 0; run < runs(value_dim_); ++run) {
            const __mmask32 mask = first_of_run(value_dim_ - run * kRun);
            float* sums = sums_ + (head * runs(value_dim_) + run) * kRun;
            const int64_t stride = runs(value_dim_) * kRun;
            __m512 low[H], high[H];
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) {
                low[h] = _mm512_loadu_ps(sums + h * stride);
                high[h] = _mm512_loadu_ps(sums + h * stride + kLanes);
            }
            for (int64_t j = 0; j < some; j += 2) {
                const uint16_t* from = values + j * value_dim_ + run * kRun;
                const bool both = j + 1 < some;
                const __m512i one = _mm512_maskz_loadu_epi16(mask, from);
                const __m512i two = _mm512_maskz_loadu_epi16(both ? mask : 0, from + value_dim_);
                if (next) {
                    __builtin_prefetch(next + j * value_dim_ + run * kRun);
                    __builtin_prefetch(next + (j + 1) * value_dim_ + run * kRun);
                }
                const __m512bh first = (__m512bh)_mm512_unpacklo_epi16(one, two);
                const __m512bh second = (__m512bh)_mm512_unpackhi_epi16(one, two);
#pragma GCC unroll 4
                for (int h = 0; h < H; ++h) {
                    const Half* at = weights_ + (head + h) * count_ + key + j;
                    const uint32_t bits = at[0] | (both ? static_cast<uint32_t>(at[1]) << 16 : 0);
                    const __m512bh weight = (__m512bh)_mm512_set1_epi32(static_cast<int>(bits));
                    low[h] = _mm512_dpbf16_ps(low[h], weight, first);
                    high[h] = _mm512_dpbf16_ps(high[h], weight, second);
                }
            }
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) {
                _mm512_storeu_ps(sums + h * stride, low[h]);
                _mm512_storeu_ps(sums + h * stride + kLanes, high[h]);
            }
        }
    }

    void finish(int64_t head, float factor) {
        const float* sums = sums_ + head * runs(value_dim_) * kRun;
        for (int64_t d = 0; d < value_dim_; ++d) {
            const int64_t in_run = d % kRun, quarter = in_run / 8, lane = in_run % 8;
            const int64_t place = (lane / 4) * kLanes + quarter * 4 + lane % 4;
            output_[head * value_dim_ + d] = sums[d / kRun * kRun + place] * factor;
        }
    }

  private:
    static int64_t runs(int64_t dim) { return (dim + kRun - 1) / kRun; }

    int64_t dim_, value_dim_, count_;
    uint32_t* query_;
    float *sums_, *scores_, *output_;
    Half *weights_, *room_;
};

template <class Stored, class Element>
using Decode = std::conditional_t<std::is_same_v<Element, Pair>, PairDecode<Stored>, FloatDecode<Stored>>;
#else
template <class Stored, class Element>
using Decode = FloatDecode<Stored>;
#endif

// ---- all sequences --------------------------------------------------------------------------------------------------

// As many key-value heads as one thread takes at once: all, for they lie side by side in memory, unless there would be
// too few pieces for the threads or too many scores for the second cache.
inline int64_t heads_at_once(const Pool* pool, const Shape& shape, const Step& step) {
    constexpr int64_t kPiecesPerThread = 4, kScores = 1 << 16;
    if (step.num_decodes < kPiecesPerThread * pool->size()) return 1;
    const int64_t longest = *std::max_element(step.lengths, step.lengths + step.num_decodes);
    const int64_t per_head = shape.num_heads / shape.num_kv_heads * longest;
    return std::max<int64_t>(1, std::min(shape.num_kv_heads, kScores / per_head));
}

template <class Element, class Stored>
void attend_decodes(Pool* pool, Rows query, const Stored* keys, const Stored* values, float* output, const Shape& shape,
                    const Step& step, const Scoring& how) {
    if (step.num_decodes == 0) return;
    const int64_t group = shape.num_heads / shape.num_kv_heads;
    const int64_t together = heads_at_once(pool, shape, step);
    const int64_t num_parts = (shape.num_kv_heads + together - 1) / together;
    pool->run(step.num_decodes * num_parts, [&](int64_t item) {
        const int64_t sequence = item / num_parts, first_head = item % num_parts * together;
        const int64_t num_kv_heads = std::min(together, shape.num_kv_heads - first_head);
        const int64_t num_heads = num_kv_heads * group;
        const int64_t length = step.lengths[sequence], first = first_visible(length - 1, how), count = length - first;
        const int64_t* table = step.block_tables + sequence * step.table_stride;
        const int64_t size = Decode<Stored, Element>::size(shape, num_heads, count);
        float* factors = scratch(num_heads + size);
        Decode<Stored, Element> decode(factors + num_heads, shape, num_heads, count,
                                       output + (sequence * shape.num_heads + first_head * group) * shape.value_dim);
        for (int64_t h = 0; h < num_heads; ++h)
            decode.take_query(
                h, query.data + sequence * query.token_stride + (first_head * group + h) * query.head_stride, how.scale);

        auto place_of = [&](int64_t block, int64_t kv_head) {
            return (table[block] * shape.num_kv_heads + first_head + kv_head) * shape.block_size;
        };
        // With the first query head, the place in the cache, the place of what follows, the first key and the number of
        // keys; by fours of query heads, then what is left.
        auto each_block = [&](auto&& visit) {
            for (int64_t block = first / shape.block_size; block * shape.block_size < length; ++block) {
                const int64_t begin = std::max(first, block * shape.block_size);
                const int64_t some = std::min(length, (block + 1) * shape.block_size) - begin;
                for (int64_t kv_head = 0; kv_head < num_kv_heads; ++kv_head) {
                    const int64_t start = place_of(block, kv_head);
                    int64_t next = start;
                    if (kv_head + 1 < num_kv_heads)
                        next += shape.block_size;
                    else if (begin + some < length)
                        next = place_of(block + 1, 0);
                    auto call = [&](int64_t h, auto heads) {
                        visit(heads, kv_head * group + h, start + begin % shape.block_size, next, begin - first, some);
                    };
                    int64_t h = 0;
                    for (; h + 4 <= group; h += 4) call(h, std::integral_constant<int, 4>());
                    if (group - h == 3) call(h, std::integral_constant<int, 3>());
                    if (group - h == 2) call(h, std::integral_constant<int, 2>());
                    if (group - h == 1) call(h, std::integral_constant<int, 1>());
                }
            }
        };
        each_block([&](auto heads, int64_t head, int64_t place, int64_t next, int64_t key, int64_t some) {
            decode.template score<decltype(heads)::value>(head, keys + place * shape.dim, keys + next * shape.dim, key,
                                                          some);
        });
        for (int64_t h = 0; h < num_heads; ++h) {
            factors[h] = soften(decode.scores(h), count, first_head * group + h, how);
            decode.take_weights(h);
        }
        each_block([&](auto heads, int64_t head, int64_t place, int64_t next, int64_t key, int64_t some) {
            decode.template add<decltype(heads)::value>(head, values + place * shape.value_dim,
                                                        values + next * shape.value_dim, key, some);
        });
        for (int64_t h = 0; h < num_heads; ++h) decode.finish(h, factors[h]);
    });
}
