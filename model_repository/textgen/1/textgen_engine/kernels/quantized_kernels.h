// Linear layers with coded weights, for cpu_kernels.cpp, whose threads and vectors they use.
//
// A code (a byte, a half byte that chooses from a table, an 8-bit float) becomes a float in a register, so memory is read
// once in its small form and the arithmetic is float32.

#include <immintrin.h>

namespace {

// ---- codes ----------------------------------------------------------------------------------------------------------

enum Code : int64_t { kInt8 = 0, kNibble = 1, kFloat8 = 2 };

typedef int8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

// Rows are read in chunks of 32 weights. Each decoder turns kLanes weights of a row into floats, those that begin with
// number `place` (a multiple of kLanes) of the chunk that begins with weight k; they are kUnit times too small.
constexpr int64_t kChunk = 32;

struct Int8Decoder {
    static constexpr float kUnit = 1.0f;
    static int64_t row_bytes(int64_t depth) { return depth; }
    static void prepare(const float*) {}
    static Vector decode(const uint8_t* row, int64_t k, int place) {
#if defined(__AVX512F__)  // which compilers do not make of the generic form
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + k + place));
        return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(__AVX2__)
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + k + place));
        return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
        return __builtin_convertvector(*reinterpret_cast<const Bytes*>(row + k + place), Vector);
#endif
    }
};

// Half bytes in chunks of 32: byte i holds weight i in its low half and weight 16 + i in its high half.
struct NibbleDecoder {
    static constexpr float kUnit = 1.0f;
    static int64_t row_bytes(int64_t depth) { return depth / 2; }
    Vector low, high;  // the table; `high` is used where a vector holds only half of it
    void prepare(const float* table) {
        low = load(table);
        if (kLanes < 16) high = load(table + 16 - kLanes);
    }
    Vector decode(const uint8_t* row, int64_t k, int place) const {
        const uint8_t* bytes = row + k / 2 + place % 16;
        const int shift = place < 16 ? 0 : 4;
#if defined(__AVX512F__)
        const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
        const __m512i index = shift ? _mm512_srli_epi32(wide, 4) : wide;  // whose upper bits are not looked at
        return (Vector)_mm512_permutexvar_ps(index, (__m512)low);
#else
        typedef uint8_t Codes __attribute__((vector_size(kLanes), aligned(1), may_alias));
        const Integers index =
            __builtin_convertvector((*reinterpret_cast<const Codes*>(bytes) >> shift) & 15, Integers);
        if constexpr (kLanes == 16) return __builtin_shuffle(low, index);
        return __builtin_shuffle(low, high, index);
#endif
    }
};

// Floats of 4 exponent and 3 mantissa bits: moved into the place of a half float's bits they are 256 times too small.
struct Float8Decoder {
    static constexpr float kUnit = 256.0f;
    static int64_t row_bytes(int64_t depth) { return depth; }
    static void prepare(const float*) {}
    static Vector decode(const uint8_t* row, int64_t k, int place) {
#if defined(__AVX512F__)
        const __m256i wide =
            _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + k + place)));
        // Widened with its sign, which then stands in the place where a half float has it.
        return (Vector)_mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(0x3f80)) |
                                       _mm256_and_si256(wide, _mm256_set1_epi16(static_cast<int16_t>(0x8000))));
#else
        typedef uint8_t Raw __attribute__((vector_size(kLanes), aligned(1), may_alias));
        typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
        const Halves wide = __builtin_convertvector(*reinterpret_cast<const Raw*>(row + k + place), Halves);
        const Halves half = ((wide & 0x80) << 8) | ((wide & 0x7f) << 7);
        Vector value;
#if defined(__F16C__)
        value = reinterpret_cast<const Vector&>(static_cast<const __m256&>(
            _mm256_cvtph_ps(reinterpret_cast<const __m128i&>(half))));
#else
        for (int lane = 0; lane < kLanes; ++lane) {
            const int bits = half[lane] & 0x7fff, exponent = bits >> 10, mantissa = bits & 1023;
            const float size = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
            value[lane] = half[lane] & 0x8000 ? -size : size;
        }
#endif
        return value;
#endif
    }
};

// out[r][o] = sum over groups g of (x[r] . codes[o] within g) * scale[o][g] + offset[o][g] * (sum of x[r] within g).
// `depth` and `group` are multiples of kChunk.
template <class Decoder, int R, int O>
void coded_tile(const Decoder& decoder, const float* x, const uint8_t* weight, const float* scales,
                const float* offsets, const float* bias, float* out, int64_t depth, int64_t group, int64_t stride) {
    const int64_t num_groups = depth / group, row_bytes = Decoder::row_bytes(depth);
    Vector acc[R][O] = {};
    for (int64_t g = 0; g < num_groups; ++g) {
        const int64_t end = (g + 1) * group;
        float scale[O], offset[O];
        for (int o = 0; o < O; ++o) {
            scale[o] = scales[o * num_groups + g] * Decoder::kUnit;
            offset[o] = offsets ? offsets[o * num_groups + g] : 0.0f;
        }
        for (int64_t k = g * group; k < end; k += kChunk) {
#pragma GCC unroll 4
            for (int place = 0; place < kChunk; place += kLanes) {
                Vector w[O];
                for (int o = 0; o < O; ++o)
                    w[o] = decoder.decode(weight + o * row_bytes, k, place) * scale[o] + offset[o];
                for (int r = 0; r < R; ++r) {
                    const Vector row = load(x + r * depth + k + place);
                    for (int o = 0; o < O; ++o) acc[r][o] += row * w[o];
                }
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int o = 0; o < O; ++o) out[r * stride + o] = sum(acc[r][o]) + (bias ? bias[o] : 0.0f);
}

// Rows that share a decoded weight: with two outputs, half of AVX-512's registers.
constexpr int kCodedRows = kLanes == 16 ? 8 : 3;

template <class Decoder, int O, int R = kCodedRows>
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
    const int64_t num_tiles = (num_rows + kCodedRows - 1) / kCodedRows;
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
