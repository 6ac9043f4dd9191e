// Float32 kernels for decoding on a CPU: a linear layer for few rows, and attention that reads the paged cache.
//
// Built for the machine at hand by cpu.py, which also states what each function must agree with. A thread pool of our
// own runs them: between two calls of one step its threads wait awake for some microseconds, and otherwise sleep. While
// they wait they offer their core to whoever wants it, so a busy machine does not stall them.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include <sched.h>

namespace {

// ---- threads --------------------------------------------------------------------------------------------------------

constexpr int kAwakeRounds = 200;  // of sched_yield, about a microsecond each, before a waiting thread sleeps

class Pool {
  public:
    explicit Pool(int num_threads) {
        for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this] { serve(); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    // Calls work(item) for each item in [0, num_items), on all threads, and returns when all are done. One caller at
    // a time; a second one waits.
    void run(int64_t num_items, const std::function<void(int64_t)>& work) {
        if (threads_.empty() || num_items <= 1) {
            for (int64_t item = 0; item < num_items; ++item) work(item);
            return;
        }
        std::lock_guard<std::mutex> turn(turn_);
        work_ = &work;
        num_items_ = num_items;
        next_.store(0);
        num_busy_.store(static_cast<int>(threads_.size()));
        {
            std::lock_guard<std::mutex> lock(mutex_);
            epoch_.fetch_add(1);
        }
        wake_.notify_all();
        take_items();
        while (num_busy_.load() > 0) sched_yield();
    }

  private:
    void take_items() {
        for (int64_t item = next_.fetch_add(1); item < num_items_; item = next_.fetch_add(1)) (*work_)(item);
    }

    void serve() {
        uint64_t seen = 0;
        for (;;) {
            for (int round = 0; epoch_.load() == seen && round < kAwakeRounds; ++round) sched_yield();
            if (epoch_.load() == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return stopping_ || epoch_.load() != seen; });
                if (stopping_) return;
            }
            seen = epoch_.load();
            take_items();
            num_busy_.fetch_sub(1);
        }
    }

    std::vector<std::thread> threads_;
    std::mutex turn_, mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> epoch_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<int> num_busy_{0};
    const std::function<void(int64_t)>* work_ = nullptr;
    int64_t num_items_ = 0;
    bool stopping_ = false;
};

// ---- vectors --------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 6, kTileOutputs = 4;  // 24 accumulators of 32 registers
#else
constexpr int kLanes = 8, kTileRows = 3, kTileOutputs = 3;  // 9 accumulators of 16 registers
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void put(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

inline float sum(Vector value) {
    float lanes[kLanes];
    std::memcpy(lanes, &value, sizeof(lanes));
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));

// e^x to about 2 units in the last place (2^n times a polynomial on +-ln(2)/2), 0 and inf replaced by the last
// numbers within range; NaN stays NaN.
inline Vector exponential(Vector x) {
    const Vector zero = {};
    x = x < -87.0f ? zero - 87.0f : x;
    x = x > 88.0f ? zero + 88.0f : x;
    const Vector magic = zero + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    const Vector n = (x * 1.44269504088896341f + magic) - magic;
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Integers bits = (__builtin_convertvector(n, Integers) + 127) << 23;
    return p * reinterpret_cast<const Vector&>(bits);
}

// Calls change(first, count) for runs of one vector, the last one shorter.
template <class Change>
inline void by_vectors(int64_t count, Change change) {
    for (int64_t i = 0; i < count; i += kLanes) change(i, std::min<int64_t>(kLanes, count - i));
}

inline Vector load_some(const float* from, int64_t count) {
    if (count == kLanes) return load(from);
    Vector value = {};
    std::memcpy(&value, from, count * sizeof(float));
    return value;
}

inline void put_some(float* to, Vector value, int64_t count) {
    if (count == kLanes) return put(to, value);
    std::memcpy(to, &value, count * sizeof(float));
}

// ---- linear ---------------------------------------------------------------------------------------------------------

// out[r][o] = x[r] . weight[o] (+ bias[o]) for R rows and O outputs. Each weight is loaded once for all R rows.
template <int R, int O>
void linear_tile(const float* x, const float* weight, const float* bias, float* out, int64_t depth, int64_t stride) {
    Vector acc[R][O] = {};
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
        Vector w[O];
        for (int o = 0; o < O; ++o) w[o] = load(weight + o * depth + k);
        for (int r = 0; r < R; ++r) {
            const Vector row = load(x + r * depth + k);
            for (int o = 0; o < O; ++o) acc[r][o] += row * w[o];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int o = 0; o < O; ++o) {
            float total = sum(acc[r][o]);
            for (int64_t rest = k; rest < depth; ++rest) total += x[r * depth + rest] * weight[o * depth + rest];
            out[r * stride + o] = bias ? total + bias[o] : total;
        }
}

template <int O, int R = kTileRows>
void linear_rows(int rows, const float* x, const float* w, const float* b, float* out, int64_t depth, int64_t stride) {
    if constexpr (R > 1) {
        if (rows < R) return linear_rows<O, R - 1>(rows, x, w, b, out, depth, stride);
    }
    linear_tile<R, O>(x, w, b, out, depth, stride);
}

// All rows for outputs [begin, end). The rows are dealt evenly to tiles: 8 rows are 4 + 4, not 6 + 2.
void linear_outputs(const float* x, const float* weight, const float* bias, float* out, int64_t num_rows, int64_t depth,
                    int64_t num_outputs, int64_t begin, int64_t end) {
    const int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows;
    for (int64_t o = begin; o < end;) {
        const bool whole = o + kTileOutputs <= end;
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
            const int64_t first = num_rows * tile / num_tiles, last = num_rows * (tile + 1) / num_tiles;
            const float* rows = x + first * depth;
            const float* w = weight + o * depth;
            const float* b = bias ? bias + o : nullptr;
            float* to = out + first * num_outputs + o;
            if (whole)
                linear_rows<kTileOutputs>(static_cast<int>(last - first), rows, w, b, to, depth, num_outputs);
            else
                linear_rows<1>(static_cast<int>(last - first), rows, w, b, to, depth, num_outputs);
        }
        o += whole ? kTileOutputs : 1;
    }
}

// ---- attention ------------------------------------------------------------------------------------------------------

// The scores of H query heads against `count` keys of one block: scores[h * stride + j] = query[h] . keys[j].
template <int H>
void score_block(const float* query, const float* keys, float* scores, int64_t stride, int64_t count, int64_t dim) {
    for (int64_t j = 0; j < count; ++j) {
        Vector acc[H] = {};
        for (int64_t d = 0; d < dim; d += kLanes) {
            const Vector key = load(keys + j * dim + d);
            for (int h = 0; h < H; ++h) acc[h] += load(query + h * dim + d) * key;
        }
        for (int h = 0; h < H; ++h) scores[h * stride + j] = sum(acc[h]);
    }
}

// output[h] += weights[h] @ values of one block, for H heads.
template <int H>
void add_block(const float* weights, int64_t stride, const float* values, float* output, int64_t count, int64_t dim) {
    for (int64_t d = 0; d < dim; d += kLanes) {
        Vector acc[H];
        for (int h = 0; h < H; ++h) acc[h] = load(output + h * dim + d);
        for (int64_t j = 0; j < count; ++j) {
            const Vector value = load(values + j * dim + d);
            for (int h = 0; h < H; ++h) acc[h] += weights[h * stride + j] * value;
        }
        for (int h = 0; h < H; ++h) put(output + h * dim + d, acc[h]);
    }
}

// ---- the pieces of a layer ------------------------------------------------------------------------------------------

// to = from / rms(from) * weight, one row of `size`.
void normalise(const float* from, const float* weight, float* to, int64_t size, float epsilon) {
    Vector squares = {};
    by_vectors(size, [&](int64_t i, int64_t count) {
        const Vector value = load_some(from + i, count);
        squares += value * value;
    });
    const float factor = 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + epsilon);
    for (int64_t i = 0; i < size; ++i) to[i] = weight[i] * (from[i] * factor);
}

// Pieces of outputs, large enough to be worth a thread's attention, small enough that unequal threads end together.
int64_t piece_of(int64_t num_outputs) { return std::max<int64_t>(16, num_outputs / 64 / 16 * 16); }

// work(begin, end) for all pieces of num_outputs.
template <class Work>
void by_pieces(Pool* pool, int64_t num_outputs, Work work) {
    const int64_t piece = piece_of(num_outputs);
    pool->run((num_outputs + piece - 1) / piece,
              [&](int64_t item) { work(item * piece, std::min(num_outputs, (item + 1) * piece)); });
}

// out = x @ weight^T (+ bias) + residual.
void linear_add(Pool* pool, const float* x, const float* weight, const float* bias, const float* residual, float* out,
                int64_t num_rows, int64_t depth, int64_t num_outputs) {
    by_pieces(pool, num_outputs, [&](int64_t begin, int64_t end) {
        linear_outputs(x, weight, bias, out, num_rows, depth, num_outputs, begin, end);
        for (int64_t row = 0; row < num_rows; ++row)
            for (int64_t o = begin; o < end; ++o) out[row * num_outputs + o] += residual[row * num_outputs + o];
    });
}

float finite(float value) {
    if (std::isnan(value)) return 0.0f;
    return std::min(std::max(value, -3.4028234663852886e38f), 3.4028234663852886e38f);
}

}  // namespace

extern "C" {

void* textgen_pool(int num_threads) { return new Pool(num_threads); }

void textgen_free_pool(void* pool) { delete static_cast<Pool*>(pool); }

void textgen_linear(void* pool, const float* x, const float* weight, const float* bias, float* out, int64_t num_rows,
                    int64_t depth, int64_t num_outputs) {
    by_pieces(static_cast<Pool*>(pool), num_outputs, [&](int64_t begin, int64_t end) {
        linear_outputs(x, weight, bias, out, num_rows, depth, num_outputs, begin, end);
    });
}

// qkv [rows, (heads + 2 kv_heads) * dim] = norm(x) @ weight^T (+ bias), queries and keys turned by cos and sin [rows,
// dim] (the two halves of a head are the two coordinates). `normed` [rows, hidden] is room to work in.
void textgen_layer_in(void* handle, const float* x, const float* norm, const float* weight, const float* bias,
                      const float* cos, const float* sin, float* normed, float* qkv, int64_t num_rows, int64_t hidden,
                      int64_t num_heads, int64_t num_kv_heads, int64_t dim, float epsilon) {
    Pool* pool = static_cast<Pool*>(handle);
    const int64_t num_outputs = (num_heads + 2 * num_kv_heads) * dim, half = dim / 2;
    for (int64_t row = 0; row < num_rows; ++row)
        normalise(x + row * hidden, norm, normed + row * hidden, hidden, epsilon);
    by_pieces(pool, num_outputs, [&](int64_t begin, int64_t end) {
        linear_outputs(normed, weight, bias, qkv, num_rows, hidden, num_outputs, begin, end);
    });
    for (int64_t row = 0; row < num_rows; ++row)
        for (int64_t head = 0; head < num_heads + num_kv_heads; ++head) {
            float* first = qkv + row * num_outputs + head * dim;
            float* second = first + half;
            const float* c = cos + row * dim;
            const float* s = sin + row * dim;
            for (int64_t d = 0; d < half; ++d) {
                const float one = first[d], two = second[d];
                first[d] = one * c[d] - two * s[d];
                second[d] = two * c[half + d] + one * s[half + d];
            }
        }
}

// What follows attention: h = x + attended @ wo^T; out = h + (silu(gate) * up) @ wd^T, gate and up = norm(h) @ w^T.
void textgen_layer_out(void* handle, const float* attended, const float* x, const float* wo, const float* bo,
                       const float* norm, const float* w_gate_up, const float* b_gate_up, const float* wd,
                       const float* bd, float* h, float* normed, float* gate_up, float* activated, float* out,
                       int64_t num_rows, int64_t attended_size, int64_t hidden, int64_t intermediate, float epsilon) {
    Pool* pool = static_cast<Pool*>(handle);
    linear_add(pool, attended, wo, bo, x, h, num_rows, attended_size, hidden);
    for (int64_t row = 0; row < num_rows; ++row)
        normalise(h + row * hidden, norm, normed + row * hidden, hidden, epsilon);
    by_pieces(pool, intermediate, [&](int64_t begin, int64_t end) {
        const int64_t both = 2 * intermediate;
        linear_outputs(normed, w_gate_up, b_gate_up, gate_up, num_rows, hidden, both, begin, end);
        linear_outputs(normed, w_gate_up, b_gate_up, gate_up, num_rows, hidden, both, intermediate + begin,
                       intermediate + end);
        for (int64_t row = 0; row < num_rows; ++row) {
            const float* gate = gate_up + row * both + begin;
            const float* up = gate + intermediate;
            float* to = activated + row * intermediate + begin;
            by_vectors(end - begin, [&](int64_t i, int64_t count) {
                const Vector g = load_some(gate + i, count);
                put_some(to + i, g / (1.0f + exponential(-g)) * load_some(up + i, count), count);
            });
        }
    });
    linear_add(pool, activated, wd, bd, h, out, num_rows, intermediate, hidden);
}

// Strides are in floats: from one token of the source to the next, and from one head to the next.
void textgen_store(const float* source, int64_t token_stride, int64_t head_stride, float* cache, const int64_t* blocks,
                   const int64_t* offsets, int64_t num_tokens, int64_t num_heads, int64_t block_size, int64_t dim,
                   int64_t only_finite) {
    for (int64_t token = 0; token < num_tokens; ++token)
        for (int64_t head = 0; head < num_heads; ++head) {
            const float* from = source + token * token_stride + head * head_stride;
            float* to = cache + ((blocks[token] * num_heads + head) * block_size + offsets[token]) * dim;
            for (int64_t d = 0; d < dim; ++d) to[d] = only_finite ? finite(from[d]) : from[d];
        }
}

void textgen_decode(void* pool, const float* query, int64_t token_stride, int64_t head_stride, const float* keys,
                    const float* values, const int64_t* block_tables, int64_t table_stride, const int64_t* lengths,
                    float* output, int64_t num_sequences, int64_t num_heads, int64_t num_kv_heads, int64_t block_size,
                    int64_t dim, int64_t value_dim, float scale, int64_t window, int64_t chunk, float soft_cap,
                    const float* sinks, const float* alibi_slopes) {
    const int64_t group = num_heads / num_kv_heads;
    static_cast<Pool*>(pool)->run(num_sequences * num_kv_heads, [&](int64_t item) {
        const int64_t sequence = item / num_kv_heads, kv_head = item % num_kv_heads;
        const int64_t length = lengths[sequence];
        int64_t first = window > 0 ? std::max<int64_t>(0, length - window) : 0;
        if (chunk > 0) first = std::max(first, (length - 1) / chunk * chunk);
        const int64_t first_block = first / block_size, stride = length - first;
        const int64_t* table = block_tables + sequence * table_stride;
        static thread_local std::vector<float> scaled, scores;
        scaled.resize(group * dim);
        scores.resize(group * stride);
        for (int64_t h = 0; h < group; ++h)
            for (int64_t d = 0; d < dim; ++d)
                scaled[h * dim + d] =
                    query[sequence * token_stride + (kv_head * group + h) * head_stride + d] * scale;
        float* out = output + (sequence * num_heads + kv_head * group) * value_dim;
        std::fill(out, out + group * value_dim, 0.0f);

        auto each_block = [&](auto&& visit) {
            for (int64_t block = first_block; block * block_size < length; ++block) {
                const int64_t begin = std::max(first, block * block_size);
                const int64_t end = std::min(length, (block + 1) * block_size);
                const int64_t place = (table[block] * num_kv_heads + kv_head) * block_size + begin % block_size;
                visit(place, begin - first, end - begin);
            }
        };
        auto by_heads = [&](auto&& call) {  // in fours, then what is left
            int64_t h = 0;
            for (; h + 4 <= group; h += 4) call(h, std::integral_constant<int, 4>());
            if (group - h == 3) call(h, std::integral_constant<int, 3>());
            if (group - h == 2) call(h, std::integral_constant<int, 2>());
            if (group - h == 1) call(h, std::integral_constant<int, 1>());
        };
        each_block([&](int64_t place, int64_t key, int64_t count) {
            by_heads([&](int64_t h, auto heads) {
                score_block<decltype(heads)::value>(&scaled[h * dim], keys + place * dim, &scores[h * stride + key],
                                                    stride, count, dim);
            });
        });
        for (int64_t h = 0; h < group; ++h) {
            float* row = &scores[h * stride];
            const int64_t head = kv_head * group + h;
            if (soft_cap > 0.0f)
                for (int64_t j = 0; j < stride; ++j) row[j] = soft_cap * std::tanh(row[j] / soft_cap);
            if (alibi_slopes)
                for (int64_t j = 0; j < stride; ++j)
                    row[j] += alibi_slopes[head] * static_cast<float>(j + 1 - stride);
            float highest = sinks ? std::max(sinks[head], row[0]) : row[0];
            for (int64_t j = 1; j < stride; ++j) highest = std::max(highest, row[j]);
            by_vectors(stride, [&](int64_t j, int64_t count) {
                put_some(row + j, exponential(load_some(row + j, count) - highest), count);
            });
            float total = sinks ? std::exp(sinks[head] - highest) : 0.0f;
            for (int64_t j = 0; j < stride; ++j) total += row[j];
            for (int64_t j = 0; j < stride; ++j) row[j] /= total;
        }
        each_block([&](int64_t place, int64_t key, int64_t count) {
            by_heads([&](int64_t h, auto heads) {
                add_block<decltype(heads)::value>(&scores[h * stride + key], stride, values + place * value_dim,
                                                  out + h * value_dim, count, value_dim);
            });
        });
    });
}

}  // extern "C"

#include "quantized_kernels.h"
