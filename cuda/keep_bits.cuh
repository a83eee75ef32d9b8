// Dropout in the hopper kernels: a bit for each of a lane's elements, drawn while the products that compute these elements run.
//
// A call of Philox serves 4 rows × 4 columns, each 8 apart (dropout_bytes in common.cuh), but a lane holds two rows of a warpgroup's accumulator. So the
// rows of the tile are permuted: two lanes of a warp, 16 apart, share the four rows of a call, two each. One lane draws the bits of the even columns for
// both, the other those of the odd columns, and they exchange them.
#pragma once

#include <type_traits>

#include "ptx_hopper.cuh"
#include "swizzle.cuh"
#include "tensor_core.cuh"

// Of 32 rows, position 16·h + 4·w + r holds row 8·w + 4·h + r (h < 2, w < 4, r < 4).
struct PermutedRows {
    static constexpr int AT_ONCE = 4;  // consecutive positions with consecutive rows
    __host__ __device__ static constexpr int row(int position) { return (position & ~28) | (position & 12) << 1 | (position & 16) >> 2; }
    __host__ __device__ static constexpr int distance(int positions) { return row(positions); }
};
using RowOrder = std::conditional_t<DROPOUT, PermutedRows, InOrder>;
constexpr int ROW_STEP = RowOrder::distance(8);  // between a lane's two rows of an accumulator
template <class Tile, class Order>
constexpr int BOX_ROWS = std::is_same_v<Order, PermutedRows> ? PermutedRows::AT_ONCE : Tile::ROWS;  // of the tensor map from which a tile comes

// Issues the loads of a tile; its first row is row `first` of head h of batch b. A tile may hold the head in parts of PART columns, each with its own
// panels: then panels do not begin at every 64th column.
template <class Tile, class Order = InOrder, int PART = 64 * Tile::PANELS>
__device__ inline void load_boxes(uint32_t smem, const CUtensorMap& map, int first, int h, int b, uint32_t full) {
#pragma unroll
    for (int panel = 0; panel < Tile::PANELS; ++panel) {
        constexpr int OF_PART = (PART + 63) / 64;  // panels
        const int column = panel / OF_PART * PART + panel % OF_PART * 64;
#pragma unroll 1
        for (int position = 0; position < Tile::ROWS; position += BOX_ROWS<Tile, Order>)
            ptx::cp_async_bulk_tensor_4d(smem + panel * Tile::PANEL_BYTES + position * ROW_BYTES, &map, column, first + Order::row(position), h, b, full);
    }
}

// Which elements of an accumulator of COLUMNS columns are kept. Bit k of byte n of bits[r], counted from the last one drawn, belongs to row
// first_row + ROW_STEP·r, column 32·w + 8·n + 2·t + c, with k = 2·w + c.
template <int COLUMNS>
struct KeepBits {
    static constexpr int DRAWN = COLUMNS / 32 * 2;  // bits of a byte
    static_assert(DRAWN <= 8, "bits of one register");
    uint32_t bits[2];

    // Draws for query rows `row` and row + ROW_STEP, keys from j0 on.
    __device__ void draw_rows(const AttentionParams& p, int b, int h, int row, int j0, int lane) {
        draw(p, lane, [&](uint2 key, int column, bool upper, uint32_t(&mine)[2], uint32_t(&theirs)[2]) {
            const uint4 words = dropout_bytes(key, b, h, global_row(p, row), global_column(p, j0 + column));
            mine[0] = upper ? words.y : words.x, mine[1] = upper ? words.w : words.z;
            theirs[0] = upper ? words.x : words.y, theirs[1] = upper ? words.z : words.w;
        });
    }
    // Draws for keys `row` and row + ROW_STEP, queries from i0 on: byte y of a word belongs to key 8·y, so bytes are transposed with words between the lanes.
    __device__ void draw_keys(const AttentionParams& p, int b, int h, int row, int i0, int lane) {
        draw(p, lane, [&](uint2 key, int column, bool upper, uint32_t(&mine)[2], uint32_t(&theirs)[2]) {
            const uint4 words = dropout_bytes(key, b, h, global_row(p, i0 + column), global_column(p, row));
            const uint32_t my_bytes = upper ? 0x7351 : 0x6240, their_bytes = upper ? 0x6240 : 0x7351;
            auto gather = [&](uint32_t(&to)[2], uint32_t bytes) {
                const uint32_t xy = ptx::prmt(words.x, words.y, bytes), zw = ptx::prmt(words.z, words.w, bytes);
                to[0] = ptx::prmt(xy, zw, 0x5410), to[1] = ptx::prmt(xy, zw, 0x7632);
            };
            gather(mine, my_bytes);
            gather(theirs, their_bytes);
        });
    }

    // A mask for a pair of 16-bit elements, row r, columns 8·n + 2·t and the next: all ones in the halves of kept elements.
    __device__ uint32_t pair(int r, int n) const { return ptx::prmt(signs(r, n, 0), signs(r, n, 1), 0xcc88 + n % 4 * 0x1111); }
    // x if the element of row r, column 8·n + 2·t + c is kept, else 0.
    __device__ float kept(float x, int r, int n, int c) const {
        return __uint_as_float(__float_as_uint(x) & ptx::prmt(signs(r, n, c), 0, 0x8888 + n % 4 * 0x1111));
    }

private:
    // The bit of column 8·n + 2·t + c as the sign of byte n % 4.
    __device__ uint32_t signs(int r, int n, int c) const { return bits[r] << (DRAWN - 1 - (n / 4 * 2 + c)); }

    template <class Draw>
    __device__ void draw(const AttentionParams& p, int lane, Draw draw) {
        const uint2 key = dropout_key(p);
        const bool upper = lane >= 16;
        bits[0] = bits[1] = 0;
#pragma unroll 2  // two chains of ten rounds at a time; in a loop, because the compiler does not move the wait for a product over one
        for (int w = 0; w < COLUMNS / 32; ++w) {
            uint32_t mine[2], theirs[2];
            draw(key, 32 * w + lane % 4 * 2 + upper, upper, mine, theirs);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const uint32_t from_other = __shfl_xor_sync(0xffffffff, theirs[r], 16);
                push(r, upper ? from_other : mine[r], p);
                push(r, upper ? mine[r] : from_other, p);
            }
        }
    }
    // One bit for each byte of `word`: whether the byte is at least drop_below.
    __device__ void push(int r, uint32_t word, const AttentionParams& p) {
        constexpr uint32_t SIGNS = 0x80808080;
        // The sign bit of each byte becomes: its low seven bits are at least those of drop_below. No byte borrows from the next.
        const uint32_t low = (word | SIGNS) - (p.drop_below & 0x7f) * 0x01010101u;
        const uint32_t either = (p.drop_below >> 7) - 1;  // all ones if either this sign bit or the byte's own suffices, else both are needed
        const uint32_t kept = (low & word) | (either & (low | word));
        bits[r] = (bits[r] >> 1 & ~SIGNS) | (kept & SIGNS);
    }
};
