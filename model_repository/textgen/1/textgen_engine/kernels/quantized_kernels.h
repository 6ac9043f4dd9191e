// Coded weights: a byte, a half byte that chooses from a table, or an 8-bit float stands for each, and a group of
// neighbours in depth shares a scale and, where there are any, an offset: a weight is code * scale + offset.
//
// Codes lie in memory by blocks of kBlock outputs, as other weights do: bytes [blocks][depth][kBlock], half bytes as words
// [blocks][depth / 8][kBlock], each of an output's eight neighbours in depth, the first in its lowest bits; scales and
// offsets [blocks][groups][kBlock]. Some steps of a block's depth at a time become floats (or, beside rows of bfloat16,
// pairs of it), which stay in the first cache while all rows are multiplied by them: memory is read once in its small
// form, and everything behind that is what plain weights have.

enum Code : int64_t { kInt8 = 0, kNibble = 1, kFloat8 = 2 };

constexpr int kCodesTogether = 8;      // in depth; groups are multiples of it
constexpr int64_t kDecodedStep = 128;  // of depth; a multiple of kCodesTogether: 16 KiB of floats
constexpr int kDirectRows = 8;         // as many or fewer are multiplied by weights that are still in registers

using Weights = Vector[kBlockVectors];  // of one block and one place in depth

// Each decoder turns a block's codes at place k + i of its depth into floats that are kUnit times too small; k is a multiple
// of kCodesTogether, i less than it.

struct Int8Decoder {
    static constexpr float kUnit = 1.0f;
    explicit Int8Decoder(const Linear&) {}
    static int64_t block_bytes(int64_t depth) { return depth * kBlock; }

    void decode(const uint8_t* block, int64_t k, int i, Weights& to) const {
#pragma GCC unroll 16
        for (int v = 0; v < kBlockVectors; ++v) {
            const uint8_t* from = block + (k + i) * kBlock + v * kLanes;
#if defined(__AVX512F__)  // which compilers do not make of the generic form
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
            to[v] = (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(__AVX2__)
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
            to[v] = (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
            for (int lane = 0; lane < kLanes; ++lane) to[v][lane] = static_cast<int8_t>(from[lane]);
#endif
        }
    }
};

class NibbleDecoder {
  public:
    static constexpr float kUnit = 1.0f;
    explicit NibbleDecoder(const Linear& linear) : table_(linear.table) {}
    static int64_t block_bytes(int64_t depth) { return depth / 2 * kBlock; }

    void decode(const uint8_t* block, int64_t k, int i, Weights& to) const {
#pragma GCC unroll 16
        for (int v = 0; v < kBlockVectors; ++v) {
            const uint8_t* from = block + k / 2 * kBlock + v * kLanes * sizeof(uint32_t);
#if defined(__AVX512F__)
            const __m512i place = _mm512_srli_epi32(_mm512_loadu_si512(from), 4 * i);  // upper bits are not looked at
            to[v] = (Vector)_mm512_permutexvar_ps(place, _mm512_loadu_ps(table_));
#elif defined(__AVX2__)
            const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
            const __m256i place = _mm256_srli_epi32(words, 4 * i);
            const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(place, 28));  // its fourth bit as the sign
            to[v] = (Vector)_mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table_), place),
                                             _mm256_permutevar8x32_ps(_mm256_loadu_ps(table_ + kLanes), place), is_high);
#else
            for (int lane = 0; lane < kLanes; ++lane) {
                uint32_t word;
                std::memcpy(&word, from + lane * sizeof(word), sizeof(word));
                to[v][lane] = table_[word >> 4 * i & 15];
            }
#endif
        }
    }

  private:
    const float* table_;
};

#if defined(__AVX512VBMI__)
// What codes without their sign are in bfloat16, its upper and its lower bytes; and which bytes of two vectors of these,
// of 64 codes, become the upper halves of the floats of each quarter of them.
struct Float8Tables {
    alignas(64) uint8_t upper[128] = {}, lower[128] = {}, places[4][64] = {};

    constexpr Float8Tables() {
        for (int code = 0; code < 128; ++code) {
            const int exponent = code >> E4m3::kMantissa, mantissa = code & 7;
            int bits = (exponent + 127 - E4m3::kBias) << 7 | mantissa << 4;
            if (exponent == 0) {
                const int top = mantissa >= 4 ? 2 : mantissa >= 2 ? 1 : 0;  // its highest bit
                bits = mantissa == 0 ? 0 : (128 - E4m3::kBias - E4m3::kMantissa + top) << 7 | (mantissa << (7 - top) & 127);
            }
            if (code == 127) bits = 0x7fc0;
            upper[code] = static_cast<uint8_t>(bits >> 8);
            lower[code] = static_cast<uint8_t>(bits & 255);
        }
        for (int quarter = 0; quarter < 4; ++quarter)
            for (int lane = 0; lane < 16; ++lane) {
                places[quarter][4 * lane + 2] = static_cast<uint8_t>(64 + 16 * quarter + lane);  // of the lower bytes
                places[quarter][4 * lane + 3] = static_cast<uint8_t>(16 * quarter + lane);
            }
    }
};

constexpr Float8Tables kFloat8Tables;
#endif

struct Float8Decoder {
#if defined(__AVX512F__) && defined(__AVX512BW__) && !defined(__AVX512VBMI__)
    static constexpr float kUnit = 256.0f;
#else
    static constexpr float kUnit = 1.0f;
#endif
    explicit Float8Decoder(const Linear&) {}
    static int64_t block_bytes(int64_t depth) { return depth * kBlock; }

    void decode(const uint8_t* block, int64_t k, int i, Weights& to) const {
        const E4m3* from = reinterpret_cast<const E4m3*>(block + (k + i) * kBlock);
#if defined(__AVX512VBMI__)
        // Two places of depth at once: compilers see that the next call begins as this one.
        auto table = [](const uint8_t* of, __m512i codes) {
            return _mm512_permutex2var_epi8(_mm512_load_si512(of), codes, _mm512_load_si512(of + 64));
        };
        const __m512i codes = _mm512_loadu_si512(from - i % 2 * kBlock);
        const __m512i sign = _mm512_and_si512(codes, _mm512_set1_epi8(static_cast<int8_t>(0x80)));
        const __m512i upper = _mm512_or_si512(table(kFloat8Tables.upper, codes), sign);
        const __m512i lower = table(kFloat8Tables.lower, codes);
        for (int v = 0; v < kBlockVectors; ++v) {
            const __m512i places = _mm512_load_si512(kFloat8Tables.places[i % 2 * kBlockVectors + v]);
            to[v] = (Vector)_mm512_maskz_permutex2var_epi8(0xccccccccccccccccull, upper, places, lower);
        }
#elif defined(__AVX512F__) && defined(__AVX512BW__)
        const __m512i halves = as_halves(from);
        to[0] = (Vector)_mm512_cvtph_ps(_mm512_castsi512_si256(halves));
        to[1] = (Vector)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
#else
        float floats[kBlock];
        for (int lane = 0; lane < kBlock; ++lane) floats[lane] = widened(from[lane]);
        for (int v = 0; v < kBlockVectors; ++v) to[v] = load(floats + v * kLanes);
#endif
    }
};

// What weights are multiplied as: a vector has kTogether neighbours in depth of each output.
template <class Element>
struct Decoded;

template <>
struct Decoded<float> {
    static constexpr int kTogether = 1;

    template <class Decoder>
    static void decode(const Decoder& decoder, const uint8_t* block, int64_t k, int i, const Weights& scale,
                       const Weights& offset, Weights& to) {
        decoder.decode(block, k, i, to);
#pragma GCC unroll 16
        for (int v = 0; v < kBlockVectors; ++v) to[v] = to[v] * scale[v] + offset[v];
    }

    static Vector product(float x, Vector weights, Vector sum) { return sum + x * weights; }
};

#if defined(__AVX512BF16__)
template <>
struct Decoded<Pair> {
    static constexpr int kTogether = 2;

    template <class Decoder>
    static void decode(const Decoder& decoder, const uint8_t* block, int64_t k, int i, const Weights& scale,
                       const Weights& offset, Weights& to) {
        alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                            21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                            11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        Weights one, two;
        Decoded<float>::decode(decoder, block, k, i, scale, offset, one);
        Decoded<float>::decode(decoder, block, k, i + 1, scale, offset, two);
#pragma GCC unroll 16
        for (int v = 0; v < kBlockVectors; ++v) {
            const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)two[v], (__m512)one[v]);
            to[v] = (Vector)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), rounded);
        }
    }

    static Vector product(Pair x, Vector weights, Vector sum) {
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(x.bits)),
                                        (__m512bh)weights);
    }
};
#endif

// Calls visit(k, i, weights) for the weights of B neighbouring blocks at every kTogether-th place k + i of depth from begin
// to end.
template <class Element, int B, class Decoder, class Visit>
inline void each_decoded(const Linear& linear, int64_t block, int64_t begin, int64_t end, Visit visit) {
    const Decoder decoder(linear);
    const int64_t block_bytes = Decoder::block_bytes(linear.depth), num_groups = linear.depth / linear.group;
    const uint8_t* codes = static_cast<const uint8_t*>(linear.packed) + block * block_bytes;
    for (int64_t k = begin; k < end;) {
        const int64_t group = k / linear.group, stop = std::min(end, (group + 1) * linear.group);
        Weights scale[B], offset[B];
        for (int b = 0; b < B; ++b)
            for (int v = 0; v < kBlockVectors; ++v) {
                const int64_t place = ((block + b) * num_groups + group) * kBlock + v * kLanes;
                scale[b][v] = load(linear.scales + place) * Decoder::kUnit;
                offset[b][v] = linear.offsets ? load(linear.offsets + place) : Vector{};
            }
        for (; k < stop; k += kCodesTogether)
#pragma GCC unroll 8
            for (int i = 0; i < kCodesTogether; i += Decoded<Element>::kTogether) {
                Weights weights[B];
#pragma GCC unroll 2
                for (int b = 0; b < B; ++b)
                    Decoded<Element>::decode(decoder, codes + b * block_bytes, k, i, scale[b], offset[b], weights[b]);
                visit(k, i, weights);
            }
    }
}

// R rows by B neighbouring blocks, all of their depth, each weight while it is in a register. Two blocks at once where few
// rows would leave the processor waiting for one sum after another.
template <class Decoder, int R, int B, class Element>
void direct_tile(const Linear& linear, const Element* x, int64_t depth, int64_t block, float* out, int64_t out_stride) {
    constexpr int kTogether = Decoded<Element>::kTogether;
    Vector acc[B][R][kBlockVectors] = {};
    each_decoded<Element, B, Decoder>(linear, block, 0, linear.depth, [&](int64_t k, int i, const Weights(&weights)[B]) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
            for (int b = 0; b < B; ++b)
#pragma GCC unroll 16
                for (int v = 0; v < kBlockVectors; ++v)
                    acc[b][r][v] =
                        Decoded<Element>::product(x[r * depth + (k + i) / kTogether], weights[b][v], acc[b][r][v]);
    });
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b)
            for (int v = 0; v < kBlockVectors; ++v) put(out + r * out_stride + b * kBlock + v * kLanes, acc[b][r][v]);
}

template <class Decoder, int R = kDirectRows, class Element>
void direct_rows(int64_t num_rows, const Linear& linear, const Element* x, int64_t depth, int64_t block,
                 int64_t num_blocks, float* out, int64_t out_stride) {
    if constexpr (R > 1) {
        if (num_rows < R)
            return direct_rows<Decoder, R - 1>(num_rows, linear, x, depth, block, num_blocks, out, out_stride);
    }
    constexpr int kMost = R <= 3 ? kMostBlocks : 1;
    int64_t b = 0;
    for (; b + kMost <= num_blocks; b += kMost)
        direct_tile<Decoder, R, kMost>(linear, x, depth, block + b, out + b * kBlock, out_stride);
    for (; b < num_blocks; ++b) direct_tile<Decoder, R, 1>(linear, x, depth, block + b, out + b * kBlock, out_stride);
}

// packed_block for coded weights, of some blocks side by side.
template <class Decoder, class Element>
void decoded_blocks(const Linear& linear, const Element* x, int64_t depth, int64_t block, int64_t num_blocks, float* out,
                    int64_t out_stride, int64_t num_rows) {
    if (num_rows <= kDirectRows)
        return direct_rows<Decoder>(num_rows, linear, x, depth, block, num_blocks, out, out_stride);
    constexpr int kTogether = Decoded<Element>::kTogether;
    const int64_t num_tiles = (num_rows + kBlockRows - 1) / kBlockRows;
    alignas(64) Element decoded[kDecodedStep / kTogether * kBlock];
    for (int64_t b = 0; b < num_blocks; ++b, out += kBlock)
        for (int64_t begin = 0; begin < linear.depth; begin += kDecodedStep) {
            const int64_t end = std::min(begin + kDecodedStep, linear.depth);
            each_decoded<Element, 1, Decoder>(linear, block + b, begin, end,
                                              [&](int64_t k, int i, const Weights(&weights)[1]) {
                float* to = reinterpret_cast<float*>(decoded) + (k + i - begin) / kTogether * kBlock;
                for (int v = 0; v < kBlockVectors; ++v) put(to + v * kLanes, weights[0][v]);
            });
            for (int64_t tile = 0; tile < num_tiles; ++tile) {
                const int64_t first = num_rows * tile / num_tiles, last = num_rows * (tile + 1) / num_tiles;
                packed_rows<>(static_cast<int>(last - first), x + first * depth + begin / kTogether, depth, decoded,
                              out + first * out_stride, out_stride, (end - begin) / kTogether, begin > 0);
            }
        }
}

template <class Element>
void coded_blocks(const Linear& linear, const Element* x, int64_t depth, int64_t block, int64_t num_blocks, float* out,
                  int64_t out_stride, int64_t num_rows) {
    if constexpr (std::is_same_v<Element, float> || (kHasPairs && std::is_same_v<Element, Pair>)) {
        if (linear.code == kInt8)
            decoded_blocks<Int8Decoder>(linear, x, depth, block, num_blocks, out, out_stride, num_rows);
        if (linear.code == kNibble)
            decoded_blocks<NibbleDecoder>(linear, x, depth, block, num_blocks, out, out_stride, num_rows);
        if (linear.code == kFloat8)
            decoded_blocks<Float8Decoder>(linear, x, depth, block, num_blocks, out, out_stride, num_rows);
    }
}

// Codes of rows that lie side by side, in the form above. weight: bytes [num_outputs][depth], or half bytes in chunks of
// 32: byte i of one has weight i in its low half and weight 16 + i in its high half. depth: a multiple of kCodesTogether.
inline void pack_codes(Pool* pool, int64_t code, const uint8_t* weight, uint8_t* packed, int64_t depth,
                       int64_t num_outputs) {
    pool->run(blocks_of(num_outputs), [&](int64_t block) {
        const int64_t width = std::min<int64_t>(kBlock, num_outputs - block * kBlock);
        if (code != kNibble) {
            const uint8_t* from = weight + block * kBlock * depth;
            uint8_t* to = packed + Int8Decoder::block_bytes(depth) * block;
            for (int64_t k = 0; k < depth; ++k)
                for (int64_t i = 0; i < kBlock; ++i) to[k * kBlock + i] = i < width ? from[i * depth + k] : 0;
            return;
        }
        uint8_t* to = packed + NibbleDecoder::block_bytes(depth) * block;
        for (int64_t k = 0; k < depth; k += kCodesTogether)
            for (int64_t i = 0; i < kBlock; ++i, to += sizeof(uint32_t)) {
                const uint8_t* chunk = weight + (block * kBlock + i) * (depth / 2) + k / 32 * 16;
                uint32_t word = 0;
                for (int64_t j = 0; j < kCodesTogether && i < width; ++j) {
                    const int64_t place = k % 32 + j;
                    word |= static_cast<uint32_t>(chunk[place % 16] >> (place < 16 ? 0 : 4) & 15) << 4 * j;
                }
                std::memcpy(to, &word, sizeof(word));
            }
    });
}
