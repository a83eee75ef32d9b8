"""The private functions of PyTorch that this package relies on, each with where and why it is used. No public function does the same.

    python -m flash_attention.torch_private     which of them the installed PyTorch lacks

checks/check_torch_private.py compares the table with the sources and with the installed PyTorch: if a new version has lost one of them,
the check fails and names it, instead of a training run.
"""

import importlib
import sys

import torch

PRIVATE = {
    # is_eager_call (shortcut.py), and the same questions elsewhere
    "torch._C._are_functorch_transforms_active": "shortcut.py: vmap, grad and the like need the op",
    "torch._C._len_torch_dispatch_stack": "shortcut.py: so does a TorchDispatchMode",
    "torch._C._get_tracing_state": "shortcut.py: and torch.jit.trace",
    "torch.autograd.profiler._is_profiler_enabled": "shortcut.py: and a profiler, which shows ops",
    "torch.autograd.forward_ad._current_level": "shortcut.py, interface.py, autograd.py: forward mode, 0 or more inside dual_level()",
    # autograd.py: the ops' own derivatives
    "torch._C._AutoDispatchBelowAutograd": "the op below autograd, from its autograd kernel",
    "torch._C._after_autograd_keyset": "the same, for the keys it is redispatched with",
    "torch._C._any_requires_grad": "whether an op records a derivative",
    "torch._C._is_fwd_grad_enabled": "whether tangents count",
    "torch.autograd.forward_ad._set_fwd_grad_enabled": "an op runs without the tangents that it has taken off",
    "torch._C._functorch.is_legacy_batchedtensor": "is_grads_batched=True, which maps gradients by the old vmap",
    "torch._functorch.utils.enable_single_level_autograd_function": "an autograd.Function inside torch.func's transforms",
    # a tensor's address, and the launch of a kernel
    "torch._C._get_cublas_allow_tf32": "call.py: torch.backends.cuda.matmul.allow_tf32 in a tenth of its time",
    "torch._C._functorch.is_functorch_wrapped_tensor": "call.py: such a tensor has no address",
    "torch._C._cuda_getCurrentRawStream": "launch.py, masks.py, rotary.py: a stream without the cost of torch.cuda.current_stream()",
    "torch._C.DisableTorchFunctionSubclass": "workers.py: a thread computes as the one that called it",
    # integrations
    "torch._C._nn.scaled_dot_product_attention": "sdpa.py: PyTorch's own function, whatever the module holds",
    "torch._C._len_torch_function_stack": "sdpa.py: TorchFunctionModes see PyTorch's function",
    "torch.overrides._pop_mode": "sdpa.py: the same",
    "torch.overrides._push_mode": "sdpa.py: the same",
    "torch.jit._builtins._register_builtin": "sdpa.py: torch.jit.script knows the patched function as PyTorch's",
    "torch._C._disabled_torch_function_impl": "hugging_face.py: a mask that is written out only if an operation reads it",
    "torch.Tensor._make_wrapper_subclass": "hugging_face.py: the same",
    "torch.utils._pytree.tree_map_only": "hugging_face.py: the same",
    "torch.ops.aten._to_copy.default": "hugging_face.py: the same, moved or cast",
}


def missing() -> list[str]:
    """The entries of `PRIVATE` that the installed PyTorch lacks. A build without CUDA has no streams, but calls no kernels either."""
    without_cuda = torch.version.cuda is None
    return [name for name in PRIVATE if not _exists(name) and not (without_cuda and name.startswith("torch._C._cuda_"))]


def _exists(name: str) -> bool:
    parts = name.split(".")
    found = importlib.import_module(parts[0])
    for n, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[:n]))  # a module that has not been imported yet
            except ImportError:
                return False
        found = getattr(found, part, None)
    return True


if __name__ == "__main__":
    lost = missing()
    print(*(f"{name}: {PRIVATE[name]}" for name in lost), sep="\n", end="\n" if lost else "")
    sys.exit(bool(lost))
