"""`flash_attention()`: checks its arguments, gives the mask one shape, picks a backend and calls it."""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from flash_attention import shortcut
from flash_attention.autograd import attention, plain_attention
from flash_attention.backends import as_chosen, check_name, choose
from flash_attention.backends.cuda import FORWARD
from flash_attention.call import Call, Settings, allows_tf32
from flash_attention.reference.score import broadcast_alibi, broadcast_bias
from flash_attention.reference.tiles import broadcast_mask, sum_dtype

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    window: tuple[int | None, int | None] | None = None,
    spans: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    backend: str | None = None,
    block_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v, exactly, without ever holding the Nq × Nk matrix.

    FlashAttention: Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691.

    Args:
        q: (B, H, Nq, D), float32, float16, bfloat16 or float64, any strides.
        k: (B, Hkv, Nk, D). Hkv divides H: query head h reads key/value head h // (H / Hkv) (grouped-query attention).
        v: (B, Hkv, Nk, Dv).
        mask: bool, True = may attend. (B, Nk) is a key mask; any other shape broadcasts to (B, H, Nq, Nk). Read through its strides.
        causal: row r sees columns c ≤ r + Nk − Nq, aligned bottom-right. With a mask, both must allow.
        scale: of the scores; 1/√D unless given.
        dropout_p: probability in [0, 1) of dropping an entry of softmax's result, rounded to a multiple of 1/256; what is kept is divided
            by the exact keep probability. Active whenever it is not 0. `torch.manual_seed` governs it.
        return_lse: return LSE = log Σ exp(scores) too. It is differentiable.
        window: (left, right), each None for no limit: row r, which stands at column p = r + Nk − Nq, sees columns p − left ≤ c ≤ p + right.
            With causal, right is 0.
        spans: int32 (B or 1, H or 1, Nq, 2): row r sees columns spans[…, r, 0] ≤ c < spans[…, r, 1]. `flash_attention.spans` makes them,
            for documents packed one after another. Read through its strides. With causal, window or a mask, all must allow; columns that
            no row of a tile sees cost nothing.
        softcap: c > 0: a scaled score s becomes c · tanh(s / c), before bias and mask (Bello et al. 2016, arXiv:1611.09940; Gemma 2).
        bias: float, broadcasts to (B, H, Nq, Nk): added to the scaled, capped score (T5's relative positions, AlphaFold's pairs). A value
            below −2¹²⁶ hides its element as a mask does. Read through its strides, differentiable in its own shape.
        alibi: float, a slope a head, (H,) or (B, H): row r, which stands at column p, has slope · |p − c| subtracted from its score of
            column c (Press et al. 2021, arXiv:2108.12409). `flash_attention.scores.alibi_slopes` gives the paper's. No gradient.
        backend: None takes the fastest that serves this call; a name from `flash_attention.backends.BACKENDS` asks for one.
        block_size: rows and columns of a tile of scores. It makes the call run on the reference, on any device: a kernel's tiles are fixed.

    Returns:
        O (B, H, Nq, Dv) in q's dtype, and LSE (B, H, Nq) in float32 (float64 for float64) if asked for. A row that may attend nothing has
        O = 0, LSE = −inf and zero gradients.

    Raises:
        TypeError: an argument's type or dtype is wrong. ValueError: shapes, devices or values do not fit.
        NotImplementedError: the backend asked for cannot serve this call. flash_attention.build.BuildError (a RuntimeError): its kernel
        cannot be built. Each message names what is at fault; nothing has been launched.

    Under autocast, float32, float16 and bfloat16 inputs are cast as for torch's own attention. After
    `torch.set_float32_matmul_precision("high")` or `"medium"`, float32 may be computed with TF32's accuracy, relative to a head's largest
    entries; a backward does as its forward did. Subclasses of Tensor with a
    `__torch_function__`, TorchFunctionModes and torch.fx see one call, of this function. NumPy scalars are taken as Python's numbers.

    >>> q, k, v = torch.randn(3, 2, 8, 100, 64).unbind()
    >>> flash_attention(q, k, v, causal=True).shape
    torch.Size([2, 8, 100, 64])
    """
    if has_torch_function_variadic(q, k, v, mask, spans, bias, alibi):
        options = {"causal": causal, "scale": scale, "dropout_p": dropout_p, "return_lse": return_lse, "window": window, "spans": spans}
        options |= {"backend": backend, "block_size": block_size, "softcap": softcap, "bias": bias, "alibi": alibi}
        return handle_torch_function(flash_attention, (q, k, v, mask, spans, bias, alibi), q, k, v, mask, **options)
    key = None
    if spans is None and block_size is None and softcap is None and bias is None and alibi is None:
        key = shortcut.signature(q, k, v, mask, causal, scale, dropout_p, window, backend)
    kept = None if key is None else shortcut.kept(key, q, k, v)
    if kept is None:
        scored = softcap, bias, alibi
        result = _attention(q, k, v, mask, causal, scale, dropout_p, window, spans, scored, backend, block_size, key)
    elif kept.needs_nothing and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        result = kept.plan.repeat(q, k, v, return_lse)
    elif kept.needs_nothing and kept.has_backward and not return_lse:
        return plain_attention(kept.plan, q, k, v)
    else:
        mask = broadcast_mask(mask, *q.shape[:3], k.shape[2])
        result = attention(kept.plan, q, k, v, mask, None, _seed(q) if dropout_p else None, kept.settings)  # type: ignore[arg-type]
    return result if return_lse else result[0]


def _attention(q, k, v, mask, causal, scale, dropout_p, window, spans, scored, backend, block_size, key) -> tuple[Tensor, Tensor]:
    """O and LSE of any call, from unchecked arguments. Its plan is kept under `key`, if there is one."""
    softcap, bias, alibi = scored
    causal, scale, dropout_p, block_size, softcap = map(_python_number, (causal, scale, dropout_p, block_size, softcap))
    if isinstance(window, (tuple, list)):
        window = tuple(map(_python_number, window))
    _check(q, k, v, causal, scale, dropout_p, window, spans, block_size)
    if _autocasts(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if mask is not None:
        mask = broadcast_mask(mask, *q.shape[:3], k.shape[2])
        if mask.device != q.device:
            raise ValueError(f"q and mask must be on one device, got {q.device} and {mask.device}")
    if spans is not None:
        spans = spans.expand(*q.shape[:3], 2)
    if softcap is not None or bias is not None or alibi is not None:
        softcap, bias, alibi = _checked_scores(softcap, bias, alibi, q, k)
    seed = _seed(q) if dropout_p else None
    scale = q.shape[3] ** -0.5 if scale is None else torch.sym_float(scale)
    left, right = window or (None, None)
    right = 0 if bool(causal) else right
    tf32 = q.dtype == torch.float32 and allows_tf32()
    settings = Settings(scale, float(dropout_p), left, right, check_name(backend) or "", block_size, softcap=softcap, tf32=tf32)
    # Choosing a backend needs the machine and real tensors. For placeholders (while compiling, on the meta device, FakeTensors and other
    # subclasses) the op chooses when it runs.
    if torch.compiler.is_compiling() or q.is_meta or type(q) is not Tensor:
        return attention(None, q, k, v, mask, spans, seed, settings, bias, alibi)
    call = Call.of(q, k, v, mask, spans, settings, bias=bias, alibi=alibi)
    settings = settings._replace(backend=as_chosen(backend, choose(backend, call)))
    if not shortcut.is_eager_call(q, k, v) or forward_ad._current_level >= 0:
        return attention(None, q, k, v, mask, spans, seed, settings, bias, alibi)
    plan = shortcut.plan(FORWARD, call._replace(settings=settings))
    if key is not None:
        shortcut.keep(key, plan, settings)
    return attention(plan, q, k, v, mask, spans, seed, settings, bias, alibi)


def _python_number(x):
    """A NumPy scalar as a Python number; anything else unchanged."""
    return x.item() if type(x).__module__ == "numpy" and getattr(x, "shape", None) == () else x


def _seed(q: Tensor) -> Tensor:
    limit = torch.iinfo(torch.int64).max
    if type(q) is Tensor:
        return torch.randint(limit, (), dtype=torch.int64, device=q.device)
    return q.new_empty((), dtype=torch.int64).random_(limit)  # draws the same number, in a tensor of q's class: fake for a FakeTensor


def _autocasts(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _check(q, k, v, causal, scale, dropout_p, window, spans, block_size) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.is_nested or x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense (torch.strided) tensor, got {'a nested tensor of layout ' * x.is_nested}{x.layout}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, length, head size), got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if not q.dtype == k.dtype == v.dtype and (not _autocasts(q.device.type) or torch.float64 in (q.dtype, k.dtype, v.dtype)):
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    (B, H, _, D), (k_B, Hkv, Nk, k_D), (v_B, v_H, v_N, Dv) = q.shape, k.shape, v.shape
    wrong = None
    if not B == k_B == v_B:
        wrong = "q, k and v must have one batch size"
    elif Hkv != v_H or Nk != v_N:
        wrong = "k and v must have the same heads and length"
    elif k_D != D:
        wrong = "q and k must have the same head size"
    elif 0 in (H, Hkv, D, Dv) or H % Hkv:
        wrong = "heads and head sizes must not be 0, and k's heads must divide q's"
    if wrong:
        raise ValueError(f"{wrong}, got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if not isinstance(causal, (bool, torch.SymBool)):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    if scale is not None and (not isinstance(scale, NUMBERS) or isinstance(scale, bool)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    if not isinstance(dropout_p, NUMBERS) or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be a probability in [0, 1), got {dropout_p!r}")
    if window is not None:
        check_window(window)
    if spans is not None:
        _check_spans(spans, q)
    if block_size is not None and (not isinstance(block_size, int) or isinstance(block_size, bool)):
        raise TypeError(f"block_size must be an integer or None, got {block_size!r}")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")


def _checked_scores(softcap, bias, alibi, q: Tensor, k: Tensor) -> tuple[float | None, Tensor | None, Tensor | None]:
    """Checks the three and returns them as backends take them: a bias (B or 1, H or 1, Nq or 1, Nk or 1), slopes (B, H)."""
    (B, H, Nq, _), Nk = q.shape, k.shape[2]
    if softcap is not None:
        check_softcap(softcap)
        softcap = torch.sym_float(softcap)
    if bias is not None:
        bias = broadcast_bias(bias, B, H, Nq, Nk)
    if alibi is not None:
        alibi = broadcast_alibi(alibi, B, H).to(sum_dtype(q)).expand(B, H)
        if alibi.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("alibi gets no gradient: pass alibi.detach(), or slopes to be learned in a bias")
    for name, x in (("bias", bias), ("alibi", alibi)):
        if x is not None and x.device != q.device:
            raise ValueError(f"q and {name} must be on one device, got {q.device} and {x.device}")
    return softcap, bias, alibi


def check_softcap(softcap) -> None:
    if not isinstance(softcap, NUMBERS) or isinstance(softcap, bool):
        raise TypeError(f"softcap must be a number or None, got {type(softcap).__name__}")
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite (None is no cap), got {softcap}")


def check_window(window) -> None:
    if not isinstance(window, tuple) or len(window) != 2:
        raise TypeError(f"window must be None or a pair (left, right), got {window!r}")
    for name, limit in zip(("left", "right"), window, strict=True):
        if limit is not None and (not isinstance(limit, (int, torch.SymInt)) or isinstance(limit, bool)):
            raise TypeError(f"window must hold integers or None, got {limit!r} for its {name}")
        if limit is not None and limit < 0:
            raise ValueError(f"window must not be negative (None is no limit), got {limit} for its {name}")


def _check_spans(spans, q: Tensor) -> None:
    if not isinstance(spans, Tensor):
        raise TypeError(f"spans must be an int32 tensor (B or 1, H or 1, Nq, 2) or None, got {type(spans).__name__}")
    if spans.dtype != torch.int32:
        raise TypeError(f"spans must be int32, got {spans.dtype}")
    B, H, Nq, _ = q.shape
    shape = tuple(spans.shape)
    if len(shape) != 4 or shape[0] not in (1, B) or shape[1] not in (1, H) or shape[2:] != (Nq, 2):
        raise ValueError(f"spans must have shape (B or 1, H or 1, Nq, 2) = ({B} or 1, {H} or 1, {Nq}, 2), got {shape}")
    if spans.device != q.device:
        raise ValueError(f"q and spans must be on one device, got {q.device} and {spans.device}")
