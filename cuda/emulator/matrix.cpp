// Matrix fragments and mma.sync, by warps (PTX ISA 9.7.14.5.15: ldmatrix, 9.7.14.5.16: stmatrix, 9.7.14.5.8: mma.m16n8k16).
#include "block.h"
#include "half.h"

namespace emulator {

static float float_of(Type type, uint16_t x) { return type == Type::float16 ? float_of_half(x) : float_of_bfloat(x); }
static uint16_t half_of_pair(uint32_t pair, int which) { return pair >> 16 * which; }

// ---- ldmatrix and stmatrix: lane l says where row l % 8 of matrix l / 8 lies, 16 bytes

struct Fragments {
    uint32_t address;
    uint32_t* r;  // [4]: of matrix m, the lane has elements (l / 4, 2 (l % 4) and + 1), or transposed (2 (l % 4) and + 1, l / 4)
    bool transposed;
    void* site;
};

static uint8_t* row_of(Block& block, Warp& warp, int lane, const char* what, bool write) {
    const auto& mine = arguments_of<Fragments>(warp, lane);
    const int thread = warp.first + lane;
    uint8_t* row = block.shared.at(mine.address, 16, 16, what, mine.site);
    const uint32_t* seen = block.clocks.of(thread);
    block.shared.access(block.shared.offset(row), 16, {.who = thread, .when = seen[thread], .seen = seen, .site = mine.site, .write = write});
    return row;
}

static void count_addresses(Block& block, Warp& warp, bool write) {
    uint32_t addresses[32];
    for (int lane = 0; lane < 32; ++lane) addresses[lane] = arguments_of<Fragments>(warp, lane).address;
    void* site = arguments_of<Fragments>(warp, 0).site;
    count_rows(addresses, write, site);
    if (Timing* timing = block.timing.get()) timing->rows(warp.first / 32, addresses, write, timing->now(), site);
}

void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, bool transposed) {
    Fragments mine{address, r, transposed, SITE};
    meet(0xffffffff, transposed ? "ldmatrix.trans" : "ldmatrix", SITE, &mine, [](Block& block, Warp& warp, uint32_t) {
        uint16_t x[4][8][8];
        count_addresses(block, warp, false);
        for (int lane = 0; lane < 32; ++lane) memcpy(x[lane / 8][lane % 8], row_of(block, warp, lane, "ldmatrix", false), 16);
        for (int lane = 0; lane < 32; ++lane) {
            auto& mine = arguments_of<Fragments>(warp, lane);
            const int g = lane / 4, t = 2 * (lane % 4);
            for (int m = 0; m < 4; ++m) mine.r[m] = mine.transposed ? x[m][t][g] | uint32_t(x[m][t + 1][g]) << 16 : x[m][g][t] | uint32_t(x[m][g][t + 1]) << 16;
        }
    });
}

void stmatrix_x4(uint32_t address, const uint32_t (&r)[4], bool transposed) {
    uint32_t copy[4] = {r[0], r[1], r[2], r[3]};
    Fragments mine{address, copy, transposed, SITE};
    current->loads_have_come();
    meet(0xffffffff, transposed ? "stmatrix.trans" : "stmatrix", SITE, &mine, [](Block& block, Warp& warp, uint32_t) {
        count_addresses(block, warp, true);
        for (int lane = 0; lane < 32; ++lane) {
            const int m = lane / 8, i = lane % 8;
            uint16_t row[8];
            for (int j = 0; j < 8; ++j)
                row[j] = arguments_of<Fragments>(warp, 0).transposed ? half_of_pair(arguments_of<Fragments>(warp, j * 4 + i / 2).r[m], i % 2)
                                                                     : half_of_pair(arguments_of<Fragments>(warp, i * 4 + j / 2).r[m], j % 2);
            memcpy(row_of(block, warp, lane, "stmatrix", true), row, 16);
        }
    });
}

// ---- mma.sync: D (16 × 8, float32) += A (16 × 16) · B (16 × 8)

struct Mma {
    Type type;
    float* d;
    const uint32_t *a, *b;
};

void mma_m16n8k16(Type type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Mma mine{type, d, a, b};
    current->loads_have_come();
    meet(0xffffffff, type == Type::float16 ? "mma (float16)" : "mma (bfloat16)", SITE, &mine, [](Block& block, Warp& warp, uint32_t) {
        float A[16][16], B[16][8], D[16][8] = {};
        count(MMA_FLOP, 2 * 16 * 8 * 16);
        if (Timing* timing = block.timing.get()) timing->mma(warp.first / 32, timing->now(), warp.at[0].site);
        for (int lane = 0; lane < 32; ++lane) {
            const auto& mine = arguments_of<Mma>(warp, lane);
            const int g = lane / 4, t = 2 * (lane % 4);
            for (int e = 0; e < 2; ++e) {
                for (int r = 0; r < 4; ++r) A[g + r % 2 * 8][t + r / 2 * 8 + e] = float_of(mine.type, half_of_pair(mine.a[r], e));
                for (int r = 0; r < 2; ++r) B[t + r * 8 + e][g] = float_of(mine.type, half_of_pair(mine.b[r], e));
            }
        }
        for (int i = 0; i < 16; ++i)
            for (int k = 0; k < 16; ++k)
                for (int j = 0; j < 8; ++j) D[i][j] += A[i][k] * B[k][j];
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = 2 * (lane % 4);
            for (int e = 0; e < 4; ++e) arguments_of<Mma>(warp, lane).d[e] += D[g + e / 2 * 8][t + e % 2];
        }
    });
}

}  // namespace emulator
