// Floats of 8 bits, as caches keep them: to floats or bfloat16, which hold all of them exactly, and back.

// Sign, exponent and mantissa, with PyTorch's names and limits; `bits` all ones but the sign is no number.
struct E4m3 {  // float8_e4m3fn, which has no infinities
    static constexpr int kMantissa = 3, kBias = 7;
    static constexpr float kMost = 448.0f;
    uint8_t bits;
};

struct E5m2 {
    static constexpr int kMantissa = 2, kBias = 15;
    static constexpr float kMost = 57344.0f;
    uint8_t bits;
};

template <class Stored>
constexpr bool kIsFloat8 = std::is_same_v<Stored, E4m3> || std::is_same_v<Stored, E5m2>;

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// Without branches, for the compiler to make vectors of.
template <class Float8>
inline float widened(Float8 value) {
    const uint32_t size = value.bits & 0x7f, is_small = size >> Float8::kMantissa == 0;
    const uint32_t rebased = (size << (23 - Float8::kMantissa)) + ((127u - Float8::kBias) << 23);
    const float smallest = float_of((128u - Float8::kBias - Float8::kMantissa) << 23);  // above zero
    const uint32_t finite = is_small ? bits_of(static_cast<float>(static_cast<int32_t>(size)) * smallest) : rebased;
    constexpr uint32_t kInfinite = std::is_same_v<Float8, E5m2> ? 0x7c : 0x80;
    const uint32_t number = size == kInfinite ? 0x7f800000 : size > kInfinite || size == 0x7f ? 0x7fc00000 : finite;
    return float_of(number | static_cast<uint32_t>(value.bits & 0x80) << 24);
}

// To the nearest, ties to even; what is too large, infinities included, becomes the largest.
template <class Float8>
inline Float8 narrowed(float value) {
    constexpr int kDropped = 23 - Float8::kMantissa;
    const float absolute = std::fabs(value), size = absolute > Float8::kMost ? Float8::kMost : absolute;
    const uint32_t bits = bits_of(size);
    const uint32_t large = ((bits + (1u << (kDropped - 1)) - 1 + (bits >> kDropped & 1)) >> kDropped) -
                           ((127u - Float8::kBias) << Float8::kMantissa);
    // Below 2^(1 - bias) all steps are alike: a number whose last bit is one of them rounds what is added to it.
    const uint32_t rounding = (127u + 24 - Float8::kBias - Float8::kMantissa) << 23;
    const uint32_t small = bits_of(size + float_of(rounding)) - rounding;
    const uint32_t number = size < float_of((128u - Float8::kBias) << 23) ? small : large;
    return {static_cast<uint8_t>((absolute != absolute ? 0x7f : number) | (bits_of(value) >> 24 & 0x80))};
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
// 32 of them as half floats, those of E4m3 256 times too small.
inline __m512i as_halves(const E5m2* from) {
    return _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 8);
}

inline __m512i as_halves(const E4m3* from) {
    // Widened with its sign, which then stands in the place where a half float has it, too.
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    const __m512i number =
        _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(static_cast<int16_t>(0xbf80)));
    const __m512i all = _mm512_set1_epi16(0x3f80);
    const __mmask32 is_none = _mm512_cmpeq_epi16_mask(_mm512_and_si512(number, all), all);
    return _mm512_mask_mov_epi16(number, is_none, _mm512_set1_epi16(0x7e00));
}

// The first or the second half of what as_halves gives, as floats.
template <class Float8, int Second>
inline Vector floats_of(__m512i halves) {
    const Vector floats = (Vector)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, Second));
    return std::is_same_v<Float8, E4m3> ? floats * 256.0f : floats;
}
#endif

// to[0..count) = from[0..count). Meanwhile `next` is asked for, as much of it, for it will be read then.
template <class Float8>
void widen(const Float8* from, const Float8* next, int64_t count, float* to) {
    int64_t i = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__)
    for (; i + 32 <= count; i += 32) {
        const __m512i halves = as_halves(from + i);
        put(to + i, floats_of<Float8, 0>(halves));
        put(to + i + 16, floats_of<Float8, 1>(halves));
        if (i % 64 == 0) __builtin_prefetch(next + i);
    }
#else
    for (int64_t line = 0; line < count; line += 64) __builtin_prefetch(next + line);
#endif
    for (; i < count; ++i) to[i] = widened(from[i]);
}

// The same in bfloat16.
template <class Float8>
void widen(const Float8* from, const Float8* next, int64_t count, uint16_t* to) {
    int64_t i = 0;
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    for (; i + 32 <= count; i += 32) {
        const __m512i halves = as_halves(from + i);
        const __m512bh pairs =
            _mm512_cvtne2ps_pbh((__m512)floats_of<Float8, 1>(halves), (__m512)floats_of<Float8, 0>(halves));
        _mm512_storeu_si512(to + i, (__m512i)pairs);
        if (i % 64 == 0) __builtin_prefetch(next + i);
    }
#else
    for (int64_t line = 0; line < count; line += 64) __builtin_prefetch(next + line);
#endif
    for (; i < count; ++i) to[i] = to_bfloat16(widened(from[i]));
}
