// What the sampler does over whole rows of logits: the largest ones in order, the finalists of the race, and what a
// grammar forbids. sampling/filters.py, sampling/randomness.py and sampling/masks.py say what they must agree with.

// Natural logarithm of positive normal numbers, to about an ulp (polynomial of Cephes' logf on [sqrt(1/2), sqrt(2))).
inline Vector logarithm(Vector x) {
    const Vector zero = {};
    const Integers bits = reinterpret_cast<const Integers&>(x);
    Integers exponent = (bits >> 23) - 126;
    const Integers fraction = (bits & 0x007fffff) | 0x3f000000;  // [1/2, 1)
    Vector m = reinterpret_cast<const Vector&>(fraction);
    const Integers small = m < 0.707106781186547524f;  // -1 where true
    exponent += small;
    m = (small ? m + m : m) - 1.0f;
    const Vector square = m * m;
    Vector p = zero + 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const Vector e = __builtin_convertvector(exponent, Vector);
    return m + (p * m * square - 0.5f * square + e * -2.12194440e-4f) + e * 0.693359375f;
}

// Standard Gumbel noise of a random word: -log(-log(1 - u)), u = |word| / 2^31.
inline Vector gumbel(Integers word) {
    Vector u = __builtin_convertvector(word, Vector);
    u = (larger(u, -u) + 0.5f) * 4.656612873077392578125e-10f;
    u = u > 0.999999940395355224609375f ? Vector{} + 0.999999940395355224609375f : u;
    const Vector rest = 1.0f - u, lost = 1.0f - rest;  // what of u is left in rest
    // log1p(-u), exact where u is tiny
    const Vector log1p = lost == 0.0f ? -u : logarithm(rest) * (u / (lost == 0.0f ? Vector{} + 1.0f : lost));
    return -logarithm(-log1p);
}

inline Integers shifted(Integers words, int count) {  // without the sign
    typedef uint32_t Unsigned __attribute__((vector_size(kLanes * sizeof(uint32_t))));
    const Unsigned result = reinterpret_cast<const Unsigned&>(words) >> count;
    return reinterpret_cast<const Integers&>(result);
}


struct Found {
    float value;
    int64_t id;

    bool operator<(const Found& other) const { return value > other.value || (value == other.value && id < other.id); }
};

// The `count` largest of a row in order, ties by lower id; what is no number comes last.
void find_largest(const float* row, int64_t size, int64_t count, float* values, int64_t* ids) {
    constexpr int64_t kSegment = kLanes * kLanes;
    static thread_local std::vector<float> maxima, sorted;
    static thread_local std::vector<Found> found;
    const float none = -std::numeric_limits<float>::infinity();
    found.clear();
    auto collect = [&](int64_t begin, int64_t end, float least) {
        for (int64_t i = begin; i < end; ++i)
            if (row[i] >= least) found.push_back({row[i], i});
    };
    if (size / kLanes <= 2 * count) {
        collect(0, size, none);
    } else {
        // Each lane of each segment has its largest; the count-th of these is a bound that at least count elements reach.
        const int64_t num_segments = size / kSegment;
        maxima.resize(num_segments * kLanes);
        for (int64_t segment = 0; segment < num_segments; ++segment) {
            Vector most = Vector{} + none;
            for (int64_t i = 0; i < kLanes; ++i) most = larger(load(row + segment * kSegment + i * kLanes), most);
            put(&maxima[segment * kLanes], most);
        }
        float least = none;
        if (static_cast<int64_t>(maxima.size()) > count) {
            sorted = maxima;
            std::nth_element(sorted.begin(), sorted.begin() + count - 1, sorted.end(), std::greater<float>());
            least = sorted[count - 1];
        }
        for (int64_t segment = 0; segment < num_segments; ++segment)
            if (largest(load(&maxima[segment * kLanes])) >= least)
                collect(segment * kSegment, (segment + 1) * kSegment, least);
        collect(num_segments * kSegment, size, least);
    }
    const int64_t num_found = std::min<int64_t>(count, found.size());
    std::partial_sort(found.begin(), found.begin() + num_found, found.end());
    for (int64_t i = 0; i < num_found; ++i) values[i] = found[i].value, ids[i] = found[i].id;
    for (int64_t i = num_found, id = 0; i < count; ++id)
        if (std::isnan(row[id])) values[i] = row[id], ids[i++] = id;
}

// -inf in a row of logits where its packed bits (bit j of word w: token 32 w + j) forbid, and beyond the last word.
void forbid(float* row, int64_t size, const int32_t* bits, int64_t num_words) {
    const Vector none = Vector{} - std::numeric_limits<float>::infinity();
    Integers lane_bits = {};
    for (int64_t i = 0; i < kLanes; ++i) lane_bits[i] = 1 << i;
    const int64_t num_whole = std::min(num_words, size / 32);
    for (int64_t word = 0; word < num_whole; ++word) {
        if (bits[word] == -1) continue;
        for (int64_t part = 0; part < 32; part += kLanes) {
            const Integers allowed = (Integers{} + (bits[word] >> part)) & lane_bits;
            float* from = row + word * 32 + part;
            put(from, allowed != 0 ? load(from) : none);
        }
    }
    for (int64_t id = num_whole * 32; id < size; ++id)
        if (id / 32 >= num_words || !(bits[id / 32] >> (id % 32) & 1)) row[id] = none[0];
}
