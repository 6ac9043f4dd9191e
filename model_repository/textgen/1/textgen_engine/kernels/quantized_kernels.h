// Linear layers with coded weights, for cpu_kernels.cpp, whose threads and vectors they use.
//
// A code (a byte, a half byte that chooses from a table, an 8-bit float) becomes a float in a register, so memory is read
// once in its small form and the arithmetic is float32.

#include <immintrin.h>

namespace {

// ---- codes ----------------------------------------------------------------------------------------------------------

enum Code : int64_t { kInt8 = 0, kNibble = 1, kFloat8 = 2 };

typedef int8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

// Both decoders turn kLanes weights, beginning with weight k (a multiple of kLanes) of a row, into floats.

struct Int8Decoder {
    static int64_t row_bytes(int64_t depth) { return depth; }
    static void prepare(const float*) {}
    static Vector decode(const uint8_t* row, int64_t k) {
        return __builtin_convertvector(*reinterpret_cast<const Bytes*>(row + k), Vector);
    }
};

// Half bytes in chunks of 32: byte i holds weight i in its low half and weight 16 + i in its high half.
struct NibbleDecoder {
    static constexpr int64_t kChunk = 32;
    static int64_t row_bytes(int64_t depth) { return depth / 2; }
    Vector low, high;  // the table; `high` is used where a vector holds only half of it
    void prepare(const float* table) {
        low = load(table);
        if (kLanes < 16) high = load(table + 16 - kLanes);
    }
    Vector decode(const uint8_t* row, int64_t k) const {
        const uint8_t* bytes = row + k / kChunk * 16 + k % 16;
        const int shift = k % kChunk < 16 ? 0 : 4;
        typedef uint8_t Codes __attribute__((vector_size(kLanes), aligned(1), may_alias));
        const Integers index =
            __builtin_convertvector((*reinterpret_cast<const Codes*>(bytes) >> shift) & 15, Integers);
        if constexpr (kLanes == 16) return __builtin_shuffle(low, index);
        return __builtin_shuffle(low, high, index);
    }
};

// Floats of 4 exponent and 3 mantissa bits: moved into the place of a half float's bits they are 256 times too small.
struct Float8Decoder {
    static int64_t row_bytes(int64_t depth) { return depth; }
    static void prepare(const float*) {}
    static Vector decode(const uint8_t* row, int64_t k) {
        typedef uint8_t Raw __attribute__((vector_size(kLanes), aligned(1), may_alias));
        typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
        const Halves wide = __builtin_convertvector(*reinterpret_cast<const Raw*>(row + k), Halves);
        const Halves half = ((wide & 0x80) << 8) | ((wide & 0x7f) << 7);
#if defined(__AVX512F__)
        const Vector value = reinterpret_cast<const Vector&>(static_cast<const __m512&>(
            _mm512_cvtph_ps(reinterpret_cast<const __m256i&>(half))));
#elif defined(__F16C__)
        const Vector value = reinterpret_cast<const Vector&>(static_cast<const __m256&>(
            _mm256_cvtph_ps(reinterpret_cast<const __m128i&>(half))));
#else
        Vector value;
        for (int lane = 0; lane < kLanes; ++lane) {
            const int bits = half[lane] & 0x7fff, exponent = bits >> 10, mantissa = bits & 1023;
            const float size = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
            value[lane] = half[lane] & 0x8000 ? -size : size;
        }
#endif
        return value * 256.0f;
    }
};

// out[r][o] = sum over groups g of (x[r] . codes[o] within g) * scale[o][g] + offset[o][g] * (sum of x[r] within g).
// `depth` and `group` are multiples of 16 (of 32 for half bytes).
template <class Decoder, int R, int O>
void coded_tile(const Decoder& decoder, const float* x, const uint8_t* weight, const float* scales,
                const float* offsets, const float* bias, float* out, int64_t depth, int64_t group, int64_t stride) {
    const int64_t num_groups = depth / group, row_bytes = Decoder::row_bytes(depth);
    Vector acc[R][O] = {};
    for (int64_t g = 0; g < num_groups; ++g) {
        const int64_t end = (g + 1) * group;
        float scale[O], offset[O];
        for (int o = 0; o < O; ++o) {
            scale[o] = scales[o * num_groups + g];
            offset[o] = offsets ? offsets[o * num_groups + g] : 0.0f;
        }
        for (int64_t k = g * group; k < end; k += kLanes) {
            Vector w[O];
            for (int o = 0; o < O; ++o) w[o] = decoder.decode(weight + o * row_bytes, k) * scale[o] + offset[o];
            for (int r = 0; r < R; ++r) {
                const Vector row = load(x + r * depth + k);
                for (int o = 0; o < O; ++o) acc[r][o] += row * w[o];
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int o = 0; o < O; ++o) out[r * stride + o] = sum(acc[r][o]) + (bias ? bias[o] : 0.0f);
}

template <class Decoder, int O, int R = kTileRows>
void coded_rows(int rows, const Decoder& decoder, const float* x, const uint8_t* w, const float* s, const float* z,
                const float* b, float* out, int64_t depth, int64_t group, int64_t stride) {
    if constexpr (R > 1) {
        if (rows < R)
            return coded_rows<Decoder, O, R - 1>(rows, decoder, x, w, s, z, b, out, depth, group, stride);
    }
    coded_tile<Decoder, R, O>(decoder, x, w, s, z, b, out, depth, group, stride);
}

template <class Decoder>
void coded_linear(Pool* pool, const float* table, const float* x, const uint8_t* weight, const float* scales,
                  const float* offsets, const float* bias, float* out, int64_t num_rows, int64_t depth,
                  int64_t num_outputs, int64_t group) {
    Decoder decoder;
    decoder.prepare(table);
    const int64_t num_groups = depth / group, row_bytes = Decoder::row_bytes(depth);
    const int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows;
    by_pieces(pool, num_outputs, [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end;) {
            const bool pair = o + 2 <= end;
            for (int64_t tile = 0; tile < num_tiles; ++tile) {
                const int64_t first = num_rows * tile / num_tiles, last = num_rows * (tile + 1) / num_tiles;
                const int rows = static_cast<int>(last - first);
                const float* offset = offsets ? offsets + o * num_groups : nullptr;
                const float* b = bias ? bias + o : nullptr;
                float* to = out + first * num_outputs + o;
                if (pair)
                    coded_rows<Decoder, 2>(rows, decoder, x + first * depth, weight + o * row_bytes,
                                           scales + o * num_groups, offset, b, to, depth, group, num_outputs);
                else
                    coded_rows<Decoder, 1>(rows, decoder, x + first * depth, weight + o * row_bytes,
                                           scales + o * num_groups, offset, b, to, depth, group, num_outputs);
            }
            o += pair ? 2 : 1;
        }
    });
}

}  // namespace

extern "C" {

void textgen_coded_linear(void* handle, int64_t code, const float* table, const float* x, const uint8_t* weight,
                          const float* scales, const float* offsets, const float* bias, float* out, int64_t num_rows,
                          int64_t depth, int64_t num_outputs, int64_t group) {
    Pool* pool = static_cast<Pool*>(handle);
    if (code == kInt8)
        coded_linear<Int8Decoder>(pool, table, x, weight, scales, offsets, bias, out, num_rows, depth, num_outputs, group);
    else if (code == kNibble)
        coded_linear<NibbleDecoder>(pool, table, x, weight, scales, offsets, bias, out, num_rows, depth, num_outputs,
                                    group);
    else
        coded_linear<Float8Decoder>(pool, table, x, weight, scales, offsets, bias, out, num_rows, depth, num_outputs,
                                    group);
}

}  // extern "C"
