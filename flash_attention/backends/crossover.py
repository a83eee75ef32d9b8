"""When packing heads, or taller tiles, is faster: the cost of a tile, timed on an H200, times the number of tiles.

`Rung.min_rows` and `Rung.min_scores` are the other crossovers: a number for each head size.
"""

from flash_attention.backends import libraries
from flash_attention.call import Call

# Cost of a tile of packed rows for each key, relative to a 128-row tile of one head in hopper, as timed on an H200:
# (max head size, (rows, cost) of each tile). PACKED_START and HEAD_START: prologue and epilogue of a tile, in keys.
PACKED_TILES = ((128, ((16, 0.5), (32, 0.8))), (256, ((16, 0.72),)))
PACKED_START, HEAD_START = 400, 200
MOST_QUERIES = 256  # larger groups have not been timed


def _multiprocessors(call: Call) -> int:
    return libraries.sm_count(call.q.device.index) if call.q.device.type == "cuda" else 132  # an H200's


def worth_packing(call: Call) -> bool:
    """Whether tiles that pack the heads of a group, with keys split evenly over the multiprocessors, take less time than tiles of one head,
    which are spread over the multiprocessors whole."""
    (B, H, Nq, _), (_, Hkv, Nk, _) = call.q.shape, call.k.shape
    multiprocessors = _multiprocessors(call)
    kinds = next((kinds for up_to, kinds in PACKED_TILES if call.head_dim <= up_to), PACKED_TILES[-1][1])
    packed = Nq * (H // Hkv)
    rows, cost = next((kind for kind in kinds if packed <= kind[0]), kinds[-1])
    whole_rounds = -(-B * H * -(-Nq // 128) // multiprocessors)
    time = cost * B * Hkv * -(-packed // rows) * (Nk + PACKED_START) / multiprocessors
    return Nq <= MOST_QUERIES and not call.has_dropout and time <= whole_rounds * (Nk + HEAD_START)


# Time of a tile of 192 rows relative to one of 128, dense and causal, as timed on an H200: of head sizes 72 and 88, of 80, of 96.
TALL_TILE = (1.22, 1.20), (1.36, 1.39), (1.41, 1.43)


def worth_tall(call: Call) -> bool:
    """Whether tiles of 192 rows of Q take less time than tiles of 128: fewer copies, but also fewer tiles, which fill a round less well."""
    B, H, Nq, D = call.q.shape
    causal = call.visible == "causal"
    kind = 0 if D % 16 or call.v.shape[3] % 16 else 1 if call.head_dim <= 80 else 2
    multiprocessors = _multiprocessors(call)

    def rounds(rows: int) -> int:
        tiles = -(-Nq // rows)
        units = B * H * ((tiles + 1) // 2 if causal else tiles)  # causal, a block takes a long tile and a short one together
        return -(-units // multiprocessors)

    return TALL_TILE[kind][causal] * rounds(192) < 0.98 * rounds(128)
