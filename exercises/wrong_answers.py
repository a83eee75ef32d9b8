"""Typical wrong answers, as data: a text of the solution, its replacement, and words that the message must contain.

`python exercises/check.py --wrong_answers` applies each and expects its message.
"""

from dataclasses import dataclass

# exercise: a text of the solution (found once), its replacement, words of the message
TABLE = {
    1: [
        ("m = fmaxf(m, x[j]);", "m = 0;", "subtract the row's maximum first"),
        ("l += __shfl_xor_sync(0xffffffff, l, lanes);", ";", "divides by the sum of its own columns"),
        ("m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, lanes));", ";", "subtracts the maximum of its own columns"),
        (
            "for (int j = lane; j < columns; j += 32) y[j]",
            "for (int j = lane; j < 32; j += 32) y[j]",
            "1072 of 1200 numbers of the output were not written, first [0, 32]",
        ),
    ],
    2: [
        ("__syncthreads();  // both tiles are complete", "", "between the stores and the loads"),
        ("__syncthreads();  // every thread has finished", "//", "after the loads keeps the next stores from overwriting it"),
        ("B_smem[c][k]", "B_smem[k][c]", "rows and columns of B are exchanged"),
        ("i0 + r < M && d < D ?", "d < D ?", "a tile may reach further than the matrix"),
    ],
    3: [
        ("O = alpha * O;", ";", "O is not rescaled"),
        ("l = alpha * l + sum_of_warp", "l = l + sum_of_warp", "l is not rescaled"),
        ("m = m_new;", ";", "Only the last tile counts"),
        ("expf(m - m_new)", "expf(m_new - m)", "alpha is upside down"),
        ("n < there;", "n < 32;", "there is no key n"),
    ],
    4: [
        ("(chunk ^ row % 8) * 16", "chunk * 16", "8 ×"),
        ("(chunk ^ row % 8) * 16", "(chunk ^ row % 4) * 16", "2 ×"),
        ("(chunk ^ row % 8) * 16", "(chunk ^ row) * 16", "Two chunks share a position"),
    ],
    5: [
        ("wait_all_but(1);", "wait_all_but(0);", "has been waited for already"),
        ("    for (int tile = 0; tile < tiles; ++tile) {", "    for (int tile = 0; tile + 1 < tiles; ++tile) {", "must be waited for"),
        ("wait_all_but(1);  //", "//", "wait for the copy's group"),
        (
            "__syncthreads();  // and all threads' parts",
            "//",
            "wait for the copy's group, and, for other threads' copies, meet at a barrier",
        ),
        ("__syncthreads();  // every thread has finished", "//", "A copy overwrites a stage that other threads still read"),
    ],
    6: [
        ("ptx::fence_proxy_async();", ";", "wgmma may not see what the threads stored"),
        ("ptx::wgmma_wait_group<0>();", ";", "S is read while the product still writes it"),
        ("d / 4 * PANEL_BYTES + d % 4 * 32", "d * 32", "A descriptor points outside the tile"),
        ("d < COLUMNS / 16;", "d < COLUMNS / 32;", "Only the first 64 columns are multiplied"),
        ("d > 0);", "0);", "accumulate must be 1"),
        ("ptx::wgmma_fence();", ";", "must come between the last use of S_rmem"),
    ],
    7: [
        ("parity ^ 1);", "parity);", "In the first round wait for the phase before it"),
        ("ptx::mbarrier_wait(empty(stage), parity ^ 1);", "", "wait for empty(stage) first"),
        ("ptx::mbarrier_arrive_expect_tx(full(stage), TILE_BYTES);", "ptx::mbarrier_arrive(full(stage));", "announced"),
        ("tile < tiles;", "tile + 1 < tiles;", "a stage that is never full"),
    ],
    8: [
        ("scale_rows(O_rmem, alpha[0], alpha[1]);", ";", "must shrink when a maximum grows"),
        ("hide<false>(S_rmem, p, i0 + warp_row, j0);", ";", "keys beyond the last must be hidden"),
        ("head_of(p.k, b, kv_head(p, h))", "head_of(p.k, b, h)", "query head h reads head"),
        ("__syncthreads();  // K and V are complete", "//", "One tile of keys"),
    ],
}


@dataclass(frozen=True)
class WrongAnswer:
    """`before`, which stands once in the exercise's solution, becomes `after`; `words` must be in what the learner reads."""

    exercise: int
    before: str
    after: str
    words: str

    def __str__(self) -> str:
        return f"{self.exercise}: {self.before.strip().splitlines()[0].strip()} → {self.after.strip() or 'nothing'}"

    def apply(self, solution: str) -> str:
        assert solution.count(self.before) == 1, (
            f"solution {self.exercise} has {self.before!r} {solution.count(self.before)} times, not once"
        )
        return solution.replace(self.before, self.after)


WRONG_ANSWERS = [WrongAnswer(exercise, *row) for exercise, rows in TABLE.items() for row in rows]
