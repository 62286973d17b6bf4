"""PyTorch's CUDA tensors on a machine without a GPU.

Under the emulated CUDA runtime (crates/halfbyte-gpu-emulator) device memory is host memory, but
PyTorch's own kernels cannot run. `install` replaces each of them, by name and for the CUDA key
only: the operator runs on the CPU over the same memory, and its results become CUDA tensors. What
only moves or names memory (allocation, views, streams, events) is PyTorch's own code, and the ops
of halfbyte go to their CUDA kernels.

Kept from a real device: tensors of different devices do not mix, what reads a value back
synchronizes, a capturing stream records instead of running and refuses to synchronize.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

VARIABLE = "HALFBYTE_EMULATED_RUNTIME"

# Operators of the CUDA key that launch nothing.
_OWN = {
    "_nested_view_from_buffer",
    "_reshape_alias",
    "as_strided",
    "empty.memory_format",
    "empty_strided",
    "is_set_to",
    "record_stream",
    "resize_",
    "set_",
    "set_.source_Storage",
    "set_.source_Storage_storage_offset",
    "set_.source_Tensor",
    "unfold",
    "view",
    "view_as_complex",
    "view_as_real",
}
# Operators whose result's size or value the host needs: they wait for the device.
_WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "nonzero.out",
    "repeat_interleave.Tensor",
    "unique_consecutive",
    "unique_dim",
}
# Operators that take tensors of another device.
_MIXING = {"copy_", "_copy_from_and_resize", "_foreach_copy_", "index.Tensor", "index.Tensor_out",
           "index_put_", "_index_put_impl_", "_local_scalar_dense"}  # fmt: skip

_library: torch.library.Library | None = None
_kept: list[object] = []  # the closures that a graph calls


def is_emulated() -> bool:
    """Whether this process runs on the emulated CUDA runtime."""
    return VARIABLE in os.environ


def runtime() -> ctypes.CDLL:
    """The emulated CUDA runtime of this process, with the functions that tests ask."""
    library = ctypes.CDLL(os.environ[VARIABLE])
    library.halfbyte_emulated_device_of.argtypes = [ctypes.c_void_p]
    library.halfbyte_emulated_calls.argtypes = [ctypes.c_char_p]
    library.halfbyte_emulated_calls.restype = ctypes.c_uint64
    library.halfbyte_emulated_bytes.restype = ctypes.c_size_t
    library.halfbyte_emulated_launches.restype = ctypes.c_size_t
    library.halfbyte_emulated_launch_name.argtypes = [ctypes.c_size_t]
    library.halfbyte_emulated_launch_name.restype = ctypes.c_char_p
    library.halfbyte_emulated_launch_stream.argtypes = [ctypes.c_size_t]
    library.halfbyte_emulated_launch_stream.restype = ctypes.c_void_p
    return library


def waits() -> list[int]:
    """How often each call was made that waits for the device, or copies to or from it."""
    count = runtime().halfbyte_emulated_calls
    names = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "Memcpy", "MemcpyAsync")
    return [count(f"cuda{name}".encode()) for name in names]


def install() -> None:
    """Replaces PyTorch's CUDA kernels in this process; a second call changes nothing."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Overriding a previously registered kernel"
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
            namespace, _, short = name.partition("::")
            if namespace == "aten" and short not in _OWN:
                _library.impl(short, _on_cpu(short), "CUDA")
        _library.impl("copy_", _copy, "CUDA")
    # Attention as plain operators; convolutions and norms without cuDNN.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.enabled = False


def alias(tensor: Tensor) -> Tensor:
    """A CPU tensor over the memory of a CUDA tensor."""
    if tensor.device.type != "cuda":
        return tensor
    storage = tensor.untyped_storage()
    memory = torch._C._construct_storage_from_data_pointer(
        storage.data_ptr(), torch.device("cpu"), storage.nbytes()
    )
    result = torch.empty(0, dtype=tensor.dtype, device="cpu")
    result.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())
    if tensor.is_conj():
        result = torch._conj(result)
    return torch._neg_view(result) if tensor.is_neg() else result


def _to_device(result: Tensor, device: torch.device) -> Tensor:
    """A CUDA tensor with the values and strides of a CPU tensor."""
    out = torch.empty_strided(result.size(), result.stride(), dtype=result.dtype, device=device)
    alias(out).copy_(result)
    return out


def _tensors(values: object) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _generator(generator: torch.Generator) -> torch.Generator:
    """A CPU generator that continues where this CUDA generator stands."""
    if generator.device.type != "cuda":
        return generator
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return torch.Generator().manual_seed((generator.initial_seed() + 0x9E3779B9 * offset) % 2**63)


def _device_of(name: str, tensors: list[Tensor]) -> torch.device:
    """The one CUDA device of the arguments."""
    cuda = [tensor.device for tensor in tensors if tensor.device.type == "cuda"]
    device = cuda[0] if cuda else torch.device("cuda", torch.cuda.current_device())
    for tensor in tensors if name not in _MIXING else ():
        scalar = tensor.device.type == "cpu" and tensor.dim() == 0
        if cuda and tensor.device != device and not scalar:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{device} and {tensor.device}! (emulated: {name})"
            )
    return device


def _prepare(value: object) -> object:
    """An argument as the CPU operator takes it."""
    if isinstance(value, Tensor):
        return alias(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_prepare(item) for item in value)
    if isinstance(value, torch.Generator):
        return _generator(value)
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value


def _record(run: Callable[[], object]) -> None:
    """Adds a call to the graph that the current stream captures."""
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: (run(), None)[1])
    _kept.append(function)
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    runtime().halfbyte_emulated_launch(b"aten", stream, function, None, None)


def _enqueue(run: Callable[[], object]) -> None:
    if torch.cuda.is_current_stream_capturing():
        _record(run)
    else:
        run()


def _wait() -> None:
    torch.cuda.current_stream().synchronize()


def _on_cpu(name: str) -> Callable[..., Any]:
    """What stands for the CUDA kernel of `aten::name`."""
    if name in _SPECIAL:
        return _SPECIAL[name]
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")
    arguments = op._schema.arguments
    numbers = [i for i, a in enumerate(arguments) if str(a.type) == "Tensor" and not a.kwarg_only]
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    names = [arguments[i].name for i in written]
    returned = sum(1 for r in op._schema.returns if r.alias_info) if written else 0

    def call(*args: Any, **kwargs: Any) -> Any:
        everything = [*args, *kwargs.values()]
        # A number where the schema says Tensor comes as such: another overload takes it.
        takes = any(i < len(args) and not isinstance(args[i], Tensor) for i in numbers)
        run = getattr(torch.ops.aten, packet) if takes else op
        device = _device_of(name, list(_tensors(everything)))
        if name in _WAITING:
            _wait()
        targets = [args[i] if i < len(args) else kwargs.get(arguments[i].name) for i in written]
        with torch.cuda.device(device), torch._C._AutoDispatchBelowAutograd():
            if not written:
                return _functional(run, args, kwargs, device)
            if arguments[written[0]].kwarg_only:  # out=: learn the shape first
                shapes = list(_shapes(run, names, args, kwargs))
                for out, result in zip(_tensors(targets), shapes, strict=True):
                    if out.size() != result:
                        out.resize_(result)
            prepared, named = _prepare(args), {k: _prepare(v) for k, v in kwargs.items()}
            _enqueue(lambda: run(*prepared, **named))
        if not returned:
            return None
        return targets[0] if returned == 1 else tuple(targets[:returned])

    return call


def _shapes(op: Any, names: list[str], args: Any, kwargs: Any) -> Iterator[torch.Size]:
    """The sizes of the results `names` of an operator with out=, from a run into new tensors."""
    values = {k: _prepare(v) for k, v in kwargs.items()}
    for name in names:
        values[name] = tree_map_only(Tensor, lambda t: t.new_empty(0), values[name])
    op(*_prepare(args), **values)
    for tensor in _tensors([values[name] for name in names]):
        yield tensor.size()


def _functional(op: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
    prepared, named = _prepare(args), {k: _prepare(v) for k, v in kwargs.items()}
    result = op(*prepared, **named)
    out = tree_map_only(Tensor, lambda tensor: _to_device(tensor, device), result)
    if torch.cuda.is_current_stream_capturing():
        memory = [alias(tensor) for tensor in _tensors(out)]

        def again() -> None:
            for to, value in zip(memory, _tensors(op(*prepared, **named)), strict=True):
                to.copy_(value)

        _record(again)
    return out


def _copy(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """`Tensor.copy_` between any two of CPU and CUDA devices."""
    with torch._C._AutoDispatchBelowAutograd():
        device = self.device if self.device.type == "cuda" else src.device
        with torch.cuda.device(device):
            to, value = alias(self), alias(src)
            if self.device.type != src.device.type:
                pinned = (src if self.device.type == "cuda" else self).is_pinned()
                if not (non_blocking and pinned):
                    _wait()
            _enqueue(lambda: to.copy_(value))
    return self


def _softmax(log: bool) -> Callable[..., Tensor]:
    op = torch.ops.aten._log_softmax.default if log else torch.ops.aten._softmax.default

    def call(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
        args = (x.float() if half_to_float else x, dim, False)
        return _functional(op, args, {}, x.device)

    return call


def _softmax_backward(log: bool) -> Callable[..., Tensor]:
    ops = torch.ops.aten
    op = (ops._log_softmax_backward_data if log else ops._softmax_backward_data).default

    def call(grad: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
        return _functional(op, (grad, output, dim, grad.dtype), {}, grad.device).to(input_dtype)

    return call


# Operators that are not the same on the CPU: there, a softmax of halves does not return floats.
_SPECIAL: dict[str, Callable[..., Any]] = {
    "_softmax": _softmax(log=False),
    "_log_softmax": _softmax(log=True),
    "_softmax_backward_data": _softmax_backward(log=False),
    "_log_softmax_backward_data": _softmax_backward(log=True),
}
