"""Route every CPU call of upstream bitsandbytes through its portable (pure torch) path.

Upstream registers two kernels for several of its operators: a portable one written with torch
functions (dispatch key ``CompositeExplicitAutograd``) and a native one for the CPU. The native
ones are not usable as an oracle: ``dequantize_4bit`` reads the wrong scales whenever the columns do
not divide by the block size, and ``quantize_blockwise`` rounds through a table. This module puts a
forwarding kernel in the CPU slot, so that everything above the operators (``functional``, ``nn``,
checkpoints) computes with the portable kernels, with no change to upstream's files.

It is imported only inside the environment that holds upstream.
"""

from __future__ import annotations

from typing import Any

import torch

REROUTED = (
    "dequantize_4bit",
    "quantize_blockwise",
    "dequantize_blockwise",
    "gemv_4bit",
    "int8_linear_matmul",
)
"""Operators that have both a native CPU kernel and a portable one."""

_library: torch.library.Library | None = None


def portable(name: str, *arguments: Any) -> Any:
    """Call one operator's portable kernel directly, whatever the CPU slot holds."""
    op = getattr(torch.ops.bitsandbytes, name).default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    return op.redispatch(keys, *arguments)


def force_portable() -> None:
    """Make the portable kernels answer every CPU call of this process (idempotent)."""
    global _library
    if _library is not None:
        return
    import bitsandbytes.nn.modules
    import torch._dynamo

    # The portable dequantize_4bit is wrapped in torch.compile; eager gives the same bytes at once.
    torch._dynamo.config.disable = True

    # An eval-mode Linear4bit rewrites its weight into another layout where it finds this feature,
    # and fails on the way if the columns do not divide by the block size.
    for module in (bitsandbytes.functional, bitsandbytes.nn.modules):
        module.has_avx512bf16 = lambda: False

    _library = torch.library.Library("bitsandbytes", "IMPL", "CPU")
    for name in REROUTED:

        def kernel(*arguments: Any, _name: str = name) -> Any:
            return portable(_name, *arguments)

        _library.impl(name, kernel, "CPU", allow_override=True)
