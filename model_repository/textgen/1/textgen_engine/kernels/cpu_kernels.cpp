// Kernels for a CPU, in float32 or with weights and caches in smaller types: linear layers, the pieces of a layer around
// them, and attention that reads the paged cache.
//
// Built for the machine at hand by cpu_build.py; cpu.py states what each function must agree with. A thread pool of our
// own runs them: between two calls of one step its threads wait awake for some microseconds, and otherwise sleep. While
// they wait they offer their core to whoever wants it, so a busy machine does not stall them.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <sched.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// ---- threads --------------------------------------------------------------------------------------------------------

constexpr int kAwakeRounds = 1000;  // of sched_yield, some tenths of a microsecond each, before a waiting thread sleeps

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

    // Room for the one who runs; what is in it lasts until the next call.
    float* room(int64_t size) {
        if (static_cast<int64_t>(room_.size()) < size) room_.resize(size);
        return room_.data();
    }

    // The same for rows in another form, four bytes an element.
    void* elements(int64_t size) {
        if (static_cast<int64_t>(elements_.size()) < size) elements_.resize(size);
        return elements_.data();
    }

    // The same for rows in another order.
    float* ordered(int64_t size) {
        if (static_cast<int64_t>(ordered_.size()) < size) ordered_.resize(size);
        return ordered_.data();
    }

    int64_t size() const { return static_cast<int64_t>(threads_.size()) + 1; }

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
    std::vector<float> room_, ordered_;
    std::vector<uint32_t> elements_;
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
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
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

inline float largest(Vector value) {
    float lanes[kLanes];
    std::memcpy(lanes, &value, sizeof(lanes));
    return *std::max_element(lanes, lanes + kLanes);
}

inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef int32_t StoredIntegers __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(4), may_alias));

// e^x to about 2 units in the last place (2^n times a polynomial on +-ln(2)/2), 0 and inf replaced by the last
// numbers within range; NaN stays NaN.
inline Vector exponential(Vector x) {
    const Vector zero = {};
#if defined(__AVX512F__)
    x = (Vector)_mm512_max_ps((__m512)(zero - 87.0f), (__m512)x);  // of these the second is the result where it is NaN
    x = (Vector)_mm512_min_ps((__m512)(zero + 88.0f), (__m512)x);
    const Vector n = (Vector)_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), _MM_FROUND_TO_NEAREST_INT);
#else
    x = x < -87.0f ? zero - 87.0f : x;
    x = x > 88.0f ? zero + 88.0f : x;
    const Vector magic = zero + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    const Vector n = (x * 1.44269504088896341f + magic) - magic;
#endif
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
#if defined(__AVX512F__)
    return (Vector)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const Integers bits = (__builtin_convertvector(n, Integers) + 127) << 23;
    return p * reinterpret_cast<const Vector&>(bits);
#endif
}

// The same to 6 parts in a million, for what is rounded to bfloat16, which keeps 4 in a thousand; x at most 0.
inline Vector rough_exponential(Vector x) {
#if defined(__AVX512F__)
    // Of these the second is the result where it is NaN.
    x = (Vector)_mm512_max_ps((__m512)(Vector{} - 1e4f), (__m512)x);
    const Vector scaled = x * 1.44269504088896341f;
    const Vector n = (Vector)_mm512_roundscale_ps((__m512)scaled, _MM_FROUND_TO_NEAREST_INT);
    const Vector f = scaled - n;
    Vector p = Vector{} + 9.554104879e-3f;  // 2^f, of least relative error on +-1/2
    p = p * f + 5.587041005e-2f;
    p = p * f + 2.402469665e-1f;
    p = p * f + 6.931280494e-1f;
    p = p * f + 9.999994636e-1f;
    return (Vector)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return exponential(x);
#endif
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

#include "linear_kernels.h"

#include "packing_kernels.h"

#include "attention_kernels.h"

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

struct Norm {
    const float* weight;  // null: there is none
    float epsilon;

    void operator()(const float* from, float* to, int64_t size) const { normalise(from, weight, to, size, epsilon); }
};

enum Kind { kFloat32 = 0, kBfloat16 = 1, kIntegers = 2 };

// Calls run with a null pointer to what weights of this kind consist of.
template <class Run>
void by_kind(int64_t kind, Run run) {
    if (kind == kFloat32) run(static_cast<const float*>(nullptr));
    if (kind == kBfloat16) run(static_cast<const Pair*>(nullptr));
    if (kind == kIntegers) run(static_cast<const Quad*>(nullptr));
}

// A layer of the form that textgen_layers computes; the layout is known to cpu_records.py.
struct Layer {
    Norm input_norm, query_norm, key_norm, attention_norm, mlp_norm, output_norm;
    Linear qkv, output, gate_up, down;
    int64_t hidden, intermediate, activation, kind;  // kind of all weights, or of the rows that meet coded ones
    Shape shape;
    Scoring scoring;
};

inline Vector activated_by(int64_t activation, Vector x) {
    if (activation == 0) return x / (1.0f + exponential(-x));                     // SiLU
    const Vector inner = 1.5957691216057308f * (x + 0.044715f * x * x * x);        // GELU by tanh: 2 sqrt(2 / pi)
    return x / (1.0f + exponential(-inner));
}

// A decoder layer: h = x + attention(norm(x)) @ wo^T; out = h + (act(gate) * up) @ wd^T, gate and up = norm(h) @ w^T;
// what is added to x and h goes through a norm of its own where there is one. `intermediate` is a multiple of kBlock, so
// that gate and up have blocks of their own. cos and sin: [rows, dim]. wanted: the rows of h and out that there are; null:
// all. Without it out may be x.
template <class Element>
void run_layer(Pool* pool, const Element*, const Layer& layer, const Step& step, const Wanted* wanted, const float* x,
               const float* cos, const float* sin, void* keys, void* values, float* out) {
    const Shape& shape = layer.shape;
    const int64_t num_tokens = step.num_tokens, num_rows = wanted ? wanted->step.num_tokens : num_tokens, hidden = layer.hidden, intermediate = layer.intermediate;
    const int64_t dim = shape.dim, half = dim / 2, attended_size = shape.num_heads * shape.value_dim;
    const int64_t qkv_size = (shape.num_heads + shape.num_kv_heads) * dim + shape.num_kv_heads * shape.value_dim;
    float* normed = pool->room(num_tokens * (2 * hidden + std::max(qkv_size + attended_size, intermediate)));
    float* h = normed + num_tokens * hidden;
    float* qkv = h + num_tokens * hidden;
    float* attended = qkv + num_tokens * qkv_size;
    float* activated = qkv;  // when both are done with
    by_rows(pool, num_tokens,
            [&](int64_t row) { layer.input_norm(x + row * hidden, normed + row * hidden, hidden); });
    auto inputs_for = [&](const Linear& linear, const float* from, int64_t count, int64_t depth) {
        return inputs_of(pool, linear, from, count, depth, static_cast<const Element*>(nullptr));
    };
    run_linear(pool, layer.qkv, inputs_for(layer.qkv, normed, num_tokens, hidden), nullptr, qkv, num_tokens, qkv_size);
    by_rows(pool, num_tokens, [&](int64_t row) {
        for (int64_t head = 0; head < shape.num_heads + shape.num_kv_heads; ++head) {
            float* first = qkv + row * qkv_size + head * dim;
            float* second = first + half;
            const Norm& norm = head < shape.num_heads ? layer.query_norm : layer.key_norm;
            if (norm.weight) norm(first, first, dim);
            const float* c = cos + row * dim;
            const float* s = sin + row * dim;
            for (int64_t d = 0; d < half; ++d) {
                const float one = first[d], two = second[d];
                first[d] = one * c[d] - two * s[d];
                second[d] = two * c[half + d] + one * s[half + d];
            }
        }
    });
    const float* key = qkv + shape.num_heads * dim;
    store(pool, {key, qkv_size, dim}, {key + shape.num_kv_heads * dim, qkv_size, shape.value_dim}, keys, values, shape,
          step);
    const float* residual = x;
    if (wanted) {  // in ascending order, so that each goes to where nothing is left to be read
        for (int64_t row = 0; row < num_rows; ++row) {
            const int64_t from = wanted->rows[row];
            std::copy_n(x + from * hidden, hidden, normed + row * hidden);
            std::memmove(qkv + row * qkv_size, qkv + from * qkv_size, qkv_size * sizeof(float));
        }
        std::copy_n(normed, num_rows * hidden, out);
        residual = out;
    }
    attend(pool, {qkv, qkv_size, dim}, keys, values, attended, shape, wanted ? wanted->step : step, layer.scoring);
    // out = weights @ from + residual, or + norm(weights @ from).
    auto add_linear = [&](const float* from, int64_t depth, const Linear& linear, const Norm& norm,
                          const float* residual, float* to) {
        run_linear(pool, linear, inputs_for(linear, from, num_rows, depth), norm.weight ? nullptr : residual, to, num_rows,
                   hidden);
        if (norm.weight)
            by_rows(pool, num_rows, [&](int64_t row) {
                norm(to + row * hidden, to + row * hidden, hidden);
                for (int64_t i = row * hidden; i < (row + 1) * hidden; ++i) to[i] += residual[i];
            });
    };
    add_linear(attended, attended_size, layer.output, layer.attention_norm, residual, h);
    by_rows(pool, num_rows, [&](int64_t row) { layer.mlp_norm(h + row * hidden, normed + row * hidden, hidden); });
    const Inputs<Element> inputs = inputs_for(layer.gate_up, normed, num_rows, hidden);
    const int64_t num_blocks = intermediate / kBlock;
    auto gated = [&](int64_t block, int64_t count, int64_t first, int64_t end) {
        const int64_t width = count * kBlock, some = end - first;
        float* gate = scratch(2 * some * width);
        float* up = gate + some * width;
        linear_blocks(layer.gate_up, 2 * intermediate, inputs, block, count, first, some, gate, width);
        linear_blocks(layer.gate_up, 2 * intermediate, inputs, num_blocks + block, count, first, some, up, width);
        for (int64_t row = 0; row < some; ++row)
            for (int64_t i = 0; i < width; i += kLanes)
                put(activated + (first + row) * intermediate + block * kBlock + i,
                    activated_by(layer.activation, load(gate + row * width + i)) * load(up + row * width + i));
    };
    by_blocks(pool, num_rows, num_blocks, least_run(layer.gate_up), gated);
    add_linear(activated, intermediate, layer.down, layer.output_norm, h, out);
}

#include "sampling_kernels.h"

}  // namespace

extern "C" {

void* textgen_pool(int num_threads) { return new Pool(num_threads); }

void textgen_free_pool(void* pool) { delete static_cast<Pool*>(pool); }

int64_t textgen_block() { return kBlock; }

int64_t textgen_has_bfloat16() { return kHasPairs; }

// packed: room for blocks_of(num_outputs) * kBlock rows.
void textgen_pack(void* pool, int64_t kind, const void* weight, void* packed, int64_t depth, int64_t num_outputs) {
    const int64_t row_bytes = depth * (kind == kFloat32 ? 4 : kind == kBfloat16 ? 2 : 1);
    const int64_t block_bytes = (row_bytes + 3) / 4 * 4 * kBlock;
    static_cast<Pool*>(pool)->run(blocks_of(num_outputs), [&](int64_t block) {
        pack_block(static_cast<const uint8_t*>(weight) + block * kBlock * row_bytes,
                   std::min<int64_t>(kBlock, num_outputs - block * kBlock), row_bytes,
                   static_cast<uint8_t*>(packed) + block * block_bytes);
    });
}

// packed: room for blocks_of(num_outputs) * kBlock rows of codes.
void textgen_pack_codes(void* pool, int64_t code, const uint8_t* weight, uint8_t* packed, int64_t depth,
                        int64_t num_outputs) {
    pack_codes(static_cast<Pool*>(pool), code, weight, packed, depth, num_outputs);
}

// out [num_ids, depth]: rows of a packed float32 or bfloat16 weight, in its type.
void textgen_take(void* pool, int64_t kind, const void* packed, const int64_t* ids, void* out, int64_t num_ids,
                  int64_t depth) {
    by_rows(static_cast<Pool*>(pool), num_ids, [&](int64_t row) {
        auto copy = [&](const auto* from, auto* to, int64_t together) {
            from += (ids[row] / kBlock * ((depth + together - 1) / together) * kBlock + ids[row] % kBlock) * together;
            for (int64_t k = 0; k < depth; ++k) to[row * depth + k] = from[k / together * kBlock * together + k % together];
        };
        if (kind == kFloat32) copy(static_cast<const float*>(packed), static_cast<float*>(out), 1);
        if (kind == kBfloat16) copy(static_cast<const uint16_t*>(packed), static_cast<uint16_t*>(out), 2);
    });
}

void textgen_linear(void* handle, int64_t kind, const Linear* linear, const float* x, float* out, int64_t num_rows,
                    int64_t depth, int64_t num_outputs) {
    Pool* pool = static_cast<Pool*>(handle);
    by_kind(kind, [&](const auto* element) {
        run_linear(pool, *linear, inputs_of(pool, *linear, x, num_rows, depth, element), nullptr, out, num_rows,
                   num_outputs);
    });
}

void textgen_attend(void* pool, const Rows* query, const Rows* key, const Rows* value, void* keys, void* values,
                    float* output, const Shape* shape, const Step* step, const Scoring* scoring) {
    store(static_cast<Pool*>(pool), *key, *value, keys, values, *shape, *step);
    attend(static_cast<Pool*>(pool), *query, keys, values, output, *shape, *step, *scoring);
}

// Layers one after another: x [num_tokens, hidden] -> out [num_tokens, hidden], or with `wanted` [its rows, hidden] of the
// last layer's. cos, sin, keys and values: each layer's.
void textgen_layers(void* handle, const Layer* const* layers, int64_t num_layers, const Step* step, const Wanted* wanted,
                    const float* x, const float* const* cos, const float* const* sin, void* const* keys,
                    void* const* values, float* passed_on, float* out) {
    Pool* pool = static_cast<Pool*>(handle);
    for (int64_t i = 0; i < num_layers; ++i) {
        const bool is_last = i + 1 == num_layers;
        float* to = is_last ? out : passed_on;
        by_kind(layers[i]->kind, [&](const auto* element) {
            run_layer(pool, element, *layers[i], *step, is_last ? wanted : nullptr, x, cos[i], sin[i], keys[i], values[i],
                      to);
        });
        x = to;
    }
}

// The `count` largest of each of num_rows rows, `stride` floats apart: values and ids [num_rows, count].
void textgen_largest(void* pool, const float* logits, int64_t stride, float* values, int64_t* ids, int64_t num_rows,
                     int64_t size, int64_t count) {
    static_cast<Pool*>(pool)->run(num_rows, [&](int64_t row) {
        find_largest(logits + row * stride, size, count, values + row * count, ids + row * count);
    });
}

// The ids [num_rows, count] with the largest (logit - top) / temperature + noise; keys [num_rows, 2].
void textgen_finalists(void* pool, const float* logits, int64_t stride, const float* tops, const float* temperatures,
                       const int32_t* id_hashes, const int32_t* keys, int64_t* ids, int64_t num_rows, int64_t size,
                       int64_t count) {
    static_cast<Pool*>(pool)->run(num_rows, [&](int64_t row) {
        const float* from = logits + row * stride;
        float* scores = scratch(size + kLanes + count);
        float* values = scores + size + kLanes;
        const float top = tops[row], temperature = temperatures[row];
        by_vectors(size, [&](int64_t i, int64_t some) {
            Integers bits = {};
            if (some == kLanes)
                bits = *reinterpret_cast<const StoredIntegers*>(id_hashes + i);
            else
                std::memcpy(&bits, id_hashes + i, some * sizeof(int32_t));
            bits = (bits ^ keys[2 * row]) * 0x21F0AAAD;
            bits ^= shifted(bits, 15);
            bits = (bits + keys[2 * row + 1]) * 0x735A2D97;
            bits ^= shifted(bits, 16);
            put_some(scores + i, (load_some(from + i, some) - top) / temperature + gumbel(bits), some);
        });
        find_largest(scores, size, count, values, ids + row * count);
    });
}

// -inf in the logits of `rows` [num_masked], `stride` floats apart, that bits [num_masked, num_words] forbid.
void textgen_forbid(void* pool, float* logits, int64_t stride, const int64_t* rows, const int32_t* bits,
                    int64_t num_words, int64_t num_masked, int64_t size) {
    static_cast<Pool*>(pool)->run(num_masked, [&](int64_t index) {
        forbid(logits + rows[index] * stride, size, bits + index * num_words, num_words);
    });
}

}  // extern "C"
