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
    // Pieces large enough to be worth a thread's attention, small enough that threads of unequal speed end together.
    const int64_t piece = std::max<int64_t>(16, num_outputs / 64 / 16 * 16);
    static_cast<Pool*>(pool)->run((num_outputs + piece - 1) / piece, [&](int64_t item) {
        linear_outputs(x, weight, bias, out, num_rows, depth, num_outputs, item * piece,
                       std::min(num_outputs, (item + 1) * piece));
    });
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
                    int64_t dim, int64_t value_dim, float scale, int64_t window) {
    const int64_t group = num_heads / num_kv_heads;
    static_cast<Pool*>(pool)->run(num_sequences * num_kv_heads, [&](int64_t item) {
        const int64_t sequence = item / num_kv_heads, kv_head = item % num_kv_heads;
        const int64_t length = lengths[sequence], first = window > 0 ? std::max<int64_t>(0, length - window) : 0;
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
            float highest = row[0], total = 0.0f;
            for (int64_t j = 1; j < stride; ++j) highest = std::max(highest, row[j]);
            for (int64_t j = 0; j < stride; ++j) row[j] = std::exp(row[j] - highest);
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
