// Linear layers on packed weights: one form for a single row and for a prompt's thousands.
//
// A weight [num_outputs, depth] is packed as [blocks of kBlock outputs][depth][kBlock], the last block padded with
// zeros: a step over depth loads kBlock neighbouring weights and multiplies them by one element of each of several
// rows, so nothing is added across the lanes of a vector, and a weight is read from memory once per step of the engine.
// Every output adds its products in the order of depth, whatever rows stand beside it: a row's result is the same to
// the last bit in any batch.

constexpr int kBlockVectors = 2, kBlock = kBlockVectors * kLanes;
#if defined(__AVX512F__)
constexpr int kBlockRows = 12;  // with 2 vectors 24 accumulators of 32 registers
#else
constexpr int kBlockRows = 6;  // 12 of 16
#endif
constexpr int64_t kDepthStep = 2048;  // of a block: 256 KiB of weights, which stay in the second cache for all rows

inline int64_t blocks_of(int64_t num_outputs) { return (num_outputs + kBlock - 1) / kBlock; }

// out[r][0..kBlock) (+)= x[r] . block for R rows, over `depth` elements. Turned: element k of row r is x[k * x_stride +
// r] instead of x[r * x_stride + k].
template <int R, bool Turned>
void packed_tile(const float* x, int64_t x_stride, const float* block, float* out, int64_t out_stride, int64_t depth,
                 bool adds) {
    Vector acc[R][kBlockVectors] = {};
    if (adds)
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < kBlockVectors; ++v) acc[r][v] = load(out + r * out_stride + v * kLanes);
    for (int64_t k = 0; k < depth; ++k) {
        Vector w[kBlockVectors];
        for (int v = 0; v < kBlockVectors; ++v) w[v] = load(block + k * kBlock + v * kLanes);
        for (int r = 0; r < R; ++r) {
            const float element = Turned ? x[k * x_stride + r] : x[r * x_stride + k];
            for (int v = 0; v < kBlockVectors; ++v) acc[r][v] += element * w[v];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kBlockVectors; ++v) put(out + r * out_stride + v * kLanes, acc[r][v]);
}

template <int R = kBlockRows, bool Turned = false>
void packed_rows(int rows, const float* x, int64_t x_stride, const float* block, float* out, int64_t out_stride,
                 int64_t depth, bool adds) {
    if constexpr (R > 1) {
        if (rows < R) return packed_rows<R - 1, Turned>(rows, x, x_stride, block, out, out_stride, depth, adds);
    }
    packed_tile<R, Turned>(x, x_stride, block, out, out_stride, depth, adds);
}

// All rows for one block of kBlock outputs. The rows are dealt evenly to tiles: 14 rows are 7 + 7, not 12 + 2.
void packed_block(const float* x, int64_t depth, const float* block, float* out, int64_t out_stride,
                  int64_t num_rows) {
    const int64_t num_tiles = (num_rows + kBlockRows - 1) / kBlockRows;
    for (int64_t begin = 0; begin < depth; begin += kDepthStep) {
        const int64_t step = std::min(kDepthStep, depth - begin);
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
            const int64_t first = num_rows * tile / num_tiles, last = num_rows * (tile + 1) / num_tiles;
            packed_rows<>(static_cast<int>(last - first), x + first * depth + begin, depth, block + begin * kBlock,
                          out + first * out_stride, out_stride, step, begin > 0);
        }
    }
}

// Room of the calling thread, kept for its next use.
inline float* scratch(int64_t size) {
    static thread_local std::vector<float> room;
    if (static_cast<int64_t>(room.size()) < size) room.resize(size);
    return room.data();
}

// work(block, first_row, end_row) for every block and row. Few rows: runs of blocks that lie side by side in memory,
// some per thread, for a busy machine stalls one thread or the other. Many rows and few blocks: parts of the rows.
template <class Work>
void by_blocks(Pool* pool, int64_t num_rows, int64_t num_blocks, Work work) {
    constexpr int64_t kItemsPerThread = 6, kLeastRows = 8 * kBlockRows;
    const int64_t wanted = kItemsPerThread * pool->size();
    const int64_t run = std::max<int64_t>(1, num_blocks / wanted);
    const int64_t num_runs = (num_blocks + run - 1) / run;
    const int64_t most_parts = std::max<int64_t>(1, num_rows / kLeastRows);
    const int64_t num_parts = std::min(most_parts, (wanted + num_runs - 1) / num_runs);
    pool->run(num_runs * num_parts, [&](int64_t item) {
        const int64_t part = item % num_parts, first = item / num_parts * run;
        for (int64_t block = first; block < std::min(first + run, num_blocks); ++block)
            work(block, num_rows * part / num_parts, num_rows * (part + 1) / num_parts);
    });
}

// work(row) for every row, on one thread if they are few.
template <class Work>
void by_rows(Pool* pool, int64_t num_rows, Work work) {
    constexpr int64_t kTogether = 16;
    pool->run((num_rows + kTogether - 1) / kTogether, [&](int64_t item) {
        for (int64_t row = item * kTogether; row < std::min(num_rows, (item + 1) * kTogether); ++row) work(row);
    });
}

// out [num_rows, num_outputs] = x @ weight^T (+ bias) (+ residual), the weight packed.
void packed_linear(Pool* pool, const float* x, const float* packed, const float* bias, const float* residual,
                   float* out, int64_t num_rows, int64_t depth, int64_t num_outputs) {
    by_blocks(pool, num_rows, blocks_of(num_outputs), [&](int64_t block, int64_t first, int64_t end) {
        const int64_t column = block * kBlock, width = std::min<int64_t>(kBlock, num_outputs - column);
        const float* weight = packed + block * depth * kBlock;
        float* to = out + first * num_outputs + column;
        if (width == kBlock) {
            packed_block(x + first * depth, depth, weight, to, num_outputs, end - first);
        } else {
            float* room = scratch((end - first) * kBlock);
            packed_block(x + first * depth, depth, weight, room, kBlock, end - first);
            for (int64_t row = 0; row < end - first; ++row)
                std::copy(room + row * kBlock, room + row * kBlock + width, to + row * num_outputs);
        }
        for (int64_t row = 0; row < end - first && (bias || residual); ++row)
            for (int64_t i = 0; i < width; ++i) {
                if (bias) to[row * num_outputs + i] += bias[column + i];
                if (residual) to[row * num_outputs + i] += residual[(first + row) * num_outputs + column + i];
            }
    });
}
