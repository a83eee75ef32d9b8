// A tile of 16-bit elements in shared memory that ldmatrix reads without bank conflicts.
//
// Shared memory has 32 banks of 4 bytes: 128 bytes come out at a time if they lie in different banks. ldmatrix reads 16 bytes from each of eight
// rows. If rows were plain 128-byte lines, those eight chunks would all start at one bank. So chunk c of row r is stored at position c ^ (r % 8): the
// chunks of eight rows lie in eight different groups of banks. A row longer than 128 bytes (64 elements) is cut into panels, one after another.
#pragma once

#include <stdint.h>

constexpr int ROW_BYTES = 128;  // of a panel

template <int ROWS_, int COLUMNS>
struct SwizzledTile {
    static constexpr int ROWS = ROWS_;
    static constexpr int PANELS = (COLUMNS + 63) / 64;
    static constexpr int PANEL_BYTES = ROWS * ROW_BYTES;
    static constexpr int BYTES = PANELS * PANEL_BYTES;

    // Byte offset of the 16-byte chunk (8 elements) number `chunk` of a row.
    __device__ static uint32_t offset(int row, int chunk) {
        return chunk / 8 * PANEL_BYTES + row * ROW_BYTES + ((chunk % 8) ^ (row % 8)) * 16;
    }

    // Where a lane's ldmatrix row lies, for columns 0 … 15 of the tile; `step` moves it along the columns, adding 16·ROW_BYTES along the rows.
    // A operand, 16 rows × 16 columns: lanes 0–15 give the rows of the left half, 16–31 of the right half.
    __device__ static uint32_t lane_a(int first_row, int lane) { return offset(first_row + lane % 16, lane / 16); }
    // A operand from a tile whose rows are A's columns (dSᵀ in dQ = dS K), read with ldmatrix.trans.
    __device__ static uint32_t lane_a_trans(int lane) { return offset(lane % 8 + lane / 16 * 8, lane / 8 % 2); }
    // B operand from a tile whose rows are B's columns (K in Q Kᵀ): 16 rows × 16 columns as two 8-column fragments of B one after another.
    __device__ static uint32_t lane_b(int first_row, int lane) { return offset(first_row + lane % 8 + lane / 16 * 8, lane / 8 % 2); }
    // B operand from a tile whose rows are B's rows (V in P V), read with ldmatrix.trans: again two 8-column fragments.
    __device__ static uint32_t lane_b_trans(int lane) { return offset(lane % 16, lane / 16); }

    // The same lane, 16·k columns further: chunk numbers grow by 2k, and xor with the row commutes with setting those bits.
    __device__ static uint32_t step(uint32_t lane_address, int k) { return (lane_address ^ (k % 4 * 32)) + k / 4 * PANEL_BYTES; }
};
