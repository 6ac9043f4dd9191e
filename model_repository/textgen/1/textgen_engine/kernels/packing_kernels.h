// Weights into the form that linear_kernels.h reads, for cpu_kernels.cpp: kBlock outputs side by side.
//
// An element is four bytes whatever they are (a float, two bfloat16, four of 8 bits), so a block of kBlock rows is a
// matrix of elements to be turned. That happens in registers, a square of kLanes by kLanes at a time, at the pace at
// which memory gives and takes whole lines.

// The lower or the upper halves of two vectors, their lanes by turns.
template <bool Upper, size_t... I>
inline Integers by_turns(Integers a, Integers b, std::index_sequence<I...>) {
    constexpr int kFirst = Upper ? kLanes / 2 : 0;
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (kFirst + static_cast<int>(I / 2) + (I % 2 ? kLanes : 0))...);
#else
    return __builtin_shuffle(a, b, Integers{(kFirst + static_cast<int>(I / 2) + (I % 2 ? kLanes : 0))...});
#endif
}

// Lane i of vector k becomes lane k of vector i. Each round puts one bit of the one number into the place of the other's.
inline void turn(Integers (&square)[kLanes]) {
    constexpr auto kIndices = std::make_index_sequence<kLanes>();
#pragma GCC unroll 16
    for (int round = 1; round < kLanes; round *= 2) {
        Integers next[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes / 2; ++i) {
            next[2 * i] = by_turns<false>(square[i], square[i + kLanes / 2], kIndices);
            next[2 * i + 1] = by_turns<true>(square[i], square[i + kLanes / 2], kIndices);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = next[i];
    }
}

// What is written once and read much later only takes the place of what is read now, and would be read from memory before
// it is written.
inline void put_past_cache(uint8_t* to, Integers value) {
#if defined(__AVX512F__)
    if (reinterpret_cast<uintptr_t>(to) % sizeof(value) == 0)
        return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)value);
#elif defined(__AVX2__)
    if (reinterpret_cast<uintptr_t>(to) % sizeof(value) == 0)
        return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)value);
#endif
    *reinterpret_cast<StoredIntegers*>(to) = value;
}

// rows: num_rows <= kBlock of them, one behind the other -> to[elements of a row][kBlock], zeros where nothing is.
void pack_block(const uint8_t* rows, int64_t num_rows, int64_t row_bytes, uint8_t* to) {
    constexpr int64_t kElement = 4, kVectorBytes = kLanes * kElement;
    const int64_t num_elements = (row_bytes + kElement - 1) / kElement;
    for (int64_t k = 0; k < num_elements; k += kLanes) {
        const int64_t num_bytes = std::min(kVectorBytes, row_bytes - k * kElement);
        const int64_t count = std::min<int64_t>(kLanes, num_elements - k);
#pragma GCC unroll 2
        for (int64_t first = 0; first < kBlock; first += kLanes) {
            Integers square[kLanes];
            const uint8_t* from = rows + first * row_bytes + k * kElement;
            if (num_bytes == kVectorBytes && first + kLanes <= num_rows) {
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i)
                    square[i] = *reinterpret_cast<const StoredIntegers*>(from + i * row_bytes);
            } else {
                for (int i = 0; i < kLanes; ++i) {
                    square[i] = Integers{};
                    if (first + i < num_rows) std::memcpy(&square[i], from + i * row_bytes, num_bytes);
                }
            }
            turn(square);
            uint8_t* column = to + (k * kBlock + first) * kElement;
            for (int64_t i = 0; i < count; ++i) put_past_cache(column + i * kBlock * kElement, square[i]);
        }
    }
#if defined(__AVX2__)
    _mm_sfence();  // before anybody is told that it is there
#endif
}
