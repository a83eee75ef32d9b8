"""The CUDA backends: the table of rungs, each a step of `cuda/` behind the same two functions as the reference.

Torch allocates every tensor; a kernel gets addresses, sizes and strides in one struct (cuda/attention.h), on the current stream of q's
device. Nothing synchronises, nothing is copied that the kernel can read where it is.

| file | what it has |
|---|---|
| rung.py | what a rung serves, and the reasons with which it refuses |
| crossover.py | when packing heads or taller tiles is faster |
| plans.py | a call's forward or backward: allocation, copies, launch |
| masks.py | masks as bytes, and packed into bits |
| launch.py | the struct that a kernel is handed |
| libraries.py | compiled libraries |
"""

from dataclasses import replace

import torch
from torch import Tensor

from flash_attention.backends.launch import BACKWARD, DTYPE_NAMES, FORWARD
from flash_attention.backends.masks import PACK_MASK, PACK_PARAMS, pack_mask
from flash_attention.backends.plans import Backward, Forward
from flash_attention.backends.rung import Rung

__all__ = [
    "BACKWARD",
    "DTYPE_NAMES",
    "FORWARD",
    "PACK_MASK",
    "PACK_PARAMS",
    "RUNGS",
    "Backward",
    "Forward",
    "Rung",
    "adds_quickly",
    "pack_mask",
]

HOPPER = Rung(
    name="hopper",
    files=("forward_4_hopper.cu", "backward_4_hopper.cu"),
    min_arch=90,
    only_min_arch=True,
    dtypes=("float16", "bfloat16"),
    head_dims=(64, 80, 96, 112, 128, 160, 192, 256),
    pairs=((192, 128),),
    multiple_of=8,
    masks=(("bits",), ("key bits",)),
    dropout=True,
    intervals=True,
    scores=("softcap", "bias", "alibi"),
    bias_as_q=True,
    bias_up_to=128,
    sums_bias=True,
    drops_dead=True,
    wide_backward=(128, "backward_4_hopper_wide.cu"),
    simpler_backward=(192, "backward_4_hopper_192.cu"),
    plain_backward=(256, "backward_4_hopper_256.cu"),
    tall_forward=((80, 96), "forward_4_hopper_tall.cu"),
    min_rows=((64, 128, 384), (128, 64, 192), (256, 64, 256)),
)
HOPPER_WIDE = replace(
    HOPPER,
    name="hopper_wide",
    files=("forward_5_wide.cu", "backward_5_wide.cu"),
    head_dims=(320, 384, 512),
    pairs=(),
    intervals=False,
    scores=(),
    bias_as_q=False,
    bias_up_to=None,
    sums_bias=False,
    drops_dead=False,
    wide_backward=None,
    simpler_backward=None,
    plain_backward=None,
    tall_forward=None,
    min_rows=(),
)
HOPPER_FLOAT32 = Rung(
    name="hopper_float32",
    files=("forward_5_float32.cu", "backward_5_float32.cu"),
    min_arch=90,
    only_min_arch=True,
    dtypes=("float32",),
    head_dims=(64, 128, 256, 512),
    multiple_of=4,
    masks=(("bits",), ("key bits",)),
    dropout=True,
    wide_forward=(128, "forward_5_float32_wide.cu"),
    wide_backward=(128, "backward_5_float32_wide.cu"),
    min_scores=((128, 1 << 22), (512, 1 << 18)),
    forward_workspace=True,
    tf32=True,
)

TENSOR_CORE_FLOAT32 = Rung(
    name="tensor_core_float32",
    files=("forward_3_float32.cu", "backward_3_float32.cu"),
    min_arch=80,
    dtypes=("float32",),
    head_dims=(64, 128),
    multiple_of=4,
    masks=(("bits",), ("bits",)),
    dropout=True,
    min_scores=((64, 1 << 22), (128, 1 << 21)),
    slower_on=(86, 89, 120, 121),  # tensor cores that multiply float16 only twice as fast as CUDA cores float32: three products take longer
    forward_workspace=True,
)

RUNGS: dict[str, Rung] = {
    rung.name: rung
    for rung in (
        Rung(
            name="split_keys",
            files=("forward_5_split_keys.cu", "backward_3_tensor_core.cu"),
            min_arch=80,
            dtypes=("float16", "bfloat16"),
            head_dims=(32, 64, 96, 128, 192, 256),
            multiple_of=8,
            masks=(("bits",), ("bits",)),
            dropout=True,
            scores=("softcap", "bias", "alibi"),
            bias_as_q=True,
            sums_bias=True,
            drops_dead=True,
            packs_heads=True,
            forward_workspace=True,
            float8_keys=True,
        ),
        HOPPER,
        Rung(
            name="tensor_core",
            files=("forward_3_tensor_core.cu", "backward_3_tensor_core.cu"),
            min_arch=80,
            dtypes=("float16", "bfloat16"),
            head_dims=(32, 64, 96, 128, 192, 256),
            multiple_of=8,
            masks=(("bits", "bytes"), ("bits",)),
            dropout=True,
            intervals=True,
            scores=("softcap", "bias", "alibi"),
            bias_as_q=True,
            sums_bias=True,
            drops_dead=True,
        ),
        HOPPER_WIDE,  # behind all that take narrower heads
        HOPPER_FLOAT32,
        TENSOR_CORE_FLOAT32,
        Rung(
            name="simple",
            files=("forward_1_simple.cu", "backward_1_simple.cu"),
            min_arch=75,
            dtypes=("float32", "float16", "bfloat16"),
            head_dims=(32, 64, 96, 128, 192, 256, 512),
            masks=(("bytes",), ("bytes",)),
            dropout=True,
            intervals=True,
            scores=("softcap", "bias", "alibi"),
            sums_bias=True,
        ),
        Rung(
            name="mma",
            files=("forward_2_mma.cu", "backward_2_mma.cu"),
            min_arch=80,
            dtypes=("float16", "bfloat16"),
            head_dims=(32, 64, 96, 128),
            multiple_of=8,
            teaching=True,
        ),
        *(
            Rung(
                name=name,
                files=(file, None),
                min_arch=min_arch,
                only_min_arch=min_arch == 90,
                dtypes=("float16", "bfloat16"),
                head_dims=(64, 128),
                multiple_of=8,
                teaching=True,
            )
            for name, file, min_arch in (
                ("swizzle", "forward_2b_swizzle.cu", 80),
                ("cp_async", "forward_2c_cp_async.cu", 80),
                ("wgmma", "forward_3b_wgmma.cu", 90),
                ("tensor_map", "forward_3c_tensor_map.cu", 90),
                ("producer", "forward_3d_producer.cu", 90),
                ("ping_pong", "forward_3e_ping_pong.cu", 90),
            )
        ),
    )
}


def adds_quickly(q: Tensor, v: Tensor) -> bool:
    """Whether a bias of q's dtype is added, and its gradient summed, by kernels on tensor cores. PyTorch's own are faster than `simple`,
    which adds all others."""
    if not q.is_cuda:
        return True
    device = torch.cuda.get_device_properties(q.device)
    rung = RUNGS["tensor_core"]
    narrow = max(q.shape[-1], v.shape[-1]) <= rung.head_dims[-1]
    return narrow and DTYPE_NAMES.get(q.dtype) in rung.dtypes and rung.runs_on(10 * device.major + device.minor)
