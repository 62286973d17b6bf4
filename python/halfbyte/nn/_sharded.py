"""Quantized weights under FSDP2 (``torch.distributed.fsdp.fully_shard``).

FSDP2 puts a DTensor in place of a layer's weight, and sets the layer's ``weight`` again whenever it
swaps the sharded for the gathered one; the layers take notice (``_enter``). The rank's part of the
DTensor becomes a :class:`LocalShard`, which carries this rank's part of the scales as well, and
which FSDP2 asks for what to gather (its ``fsdp_pre_all_gather`` and ``fsdp_post_all_gather``
hooks). Codes and scales travel in one all-gather, as bytes: no mixed-precision policy concerns
them.

Every tensor is cut alike, and on its own: of ``n`` elements (int8 weights: rows) in ``world``
parts, part ``r`` has those from ``r * ceil(n / world)`` on. Blocks and parts need not align.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._dtensor import is_dtensor
from ..functional import QuantState, create_dynamic_map, get_4bit_type
from . import _packed


def part(length: int, world: int, rank: int) -> tuple[int, int]:
    """Where part ``rank`` of ``length`` elements in ``world`` parts starts and stops."""
    size = -(-length // world)
    return min(rank * size, length), min((rank + 1) * size, length)


class Whole4bit:
    """What every rank knows of a 4-bit weight: its state but for the scales.

    Args:
        state: the state of the whole weight; its scales may be anything.
    """

    def __init__(self, state: QuantState) -> None:
        blocks = -(-math.prod(state.shape) // state.blocksize)
        self.lengths: tuple[int, ...] = (blocks,)
        """Elements of each tensor of scales of the whole weight."""
        if state.nested:
            self.lengths = (blocks, -(-blocks // state.state2.blocksize))
        self._state = state
        self._state = self.state([None] * len(self.lengths))  # lets go of the scales

    @staticmethod
    def scales(state: QuantState) -> tuple[Tensor, ...]:
        """The tensors of scales of ``state``: ``absmax`` and, where nested, its own."""
        return (state.absmax, state.state2.absmax) if state.nested else (state.absmax,)

    def state(self, scales: Sequence[Any]) -> QuantState:
        """The state of the weight with these scales."""
        known, state2 = self._state, None
        if known.nested:
            inner = known.state2
            state2 = QuantState(
                absmax=scales[1], code=inner.code, blocksize=inner.blocksize, dtype=inner.dtype
            )
        return QuantState(
            absmax=scales[0],
            shape=known.shape,
            blocksize=known.blocksize,
            quant_type=known.quant_type,
            dtype=known.dtype,
            offset=known.offset,
            state2=state2,
        )._take_code(known)

    def on(self, device: torch.device) -> Whole4bit:
        """The same with its tables on ``device``. Off the meta device they are made anew; the
        offset, which only a checkpoint knows, is 0 then."""
        known = self._state
        if known.code.device == device:
            return self
        fresh = known.code.device.type == "meta"
        state = self.state([None] * len(self.lengths))
        standard = fresh or known.code is known._standard
        state.code = get_4bit_type(known.quant_type, device) if fresh else known.code.to(device)
        state._standard = state.code if standard else None
        if known.nested:
            table = create_dynamic_map() if fresh else known.state2.code
            state.state2.code = table.to(device)
            state.offset = torch.zeros((), device=device) if fresh else known.offset.to(device)
        return Whole4bit(state)

    def differs(self, state: QuantState) -> str | None:
        """What of ``state`` cannot replace that of a weight which is sharded already, if
        anything."""
        for name in ("quant_type", "blocksize", "nested"):
            mine, other = getattr(self._state, name), getattr(state, name)
            if mine != other:
                return f"{name} must stay {mine!r} while the layer is sharded, got {other!r}"
        return None


class Whole8bit:
    """What every rank knows of an int8 weight but for its scales: how many there are.

    Args:
        rows: of the weight.
    """

    def __init__(self, rows: int) -> None:
        self.lengths = (rows,)

    @staticmethod
    def state(scales: Sequence[Any]) -> Any:
        """The scales."""
        return scales[0]

    def on(self, device: torch.device) -> Whole8bit:
        """Itself: there is nothing to move."""
        return self


class LocalShard(Tensor):
    """A rank's part of a quantized weight: ``_local_tensor`` of a layer's sharded weight.

    As a tensor it is the rank's codes: ``[units, 1]`` (4-bit) or ``[rows, columns]`` (int8).

    Attributes:
        whole: what all ranks know of the weight.
        scales: this rank's part of each tensor of scales, 1-D.
        rows: length of the whole weight's first dimension.
        world: how many parts there are.
        gathered: the state of the gathered weight (QuantState, or the scales of an int8 one), once
            FSDP has gathered it. Its tensors have memory only while FSDP keeps the weight gathered.
        memory: the gathered codes, likewise.
    """

    whole: Any
    scales: tuple[Tensor, ...]
    rows: int
    world: int
    gathered: Any
    memory: Tensor | None

    # Functions by which FSDP moves or pads a rank's part.
    _KEEP: ClassVar[frozenset[Any]] = frozenset(
        {Tensor.new_zeros, Tensor.narrow, Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.pin_memory}
    )

    @classmethod
    def make(
        cls, codes: Tensor, whole: Any, scales: Sequence[Tensor], rows: int, world: int
    ) -> LocalShard:
        """``codes`` and ``scales`` as a shard; they are shared, not copied."""
        self = Tensor._make_subclass(cls, codes, False)
        self.whole, self.scales, self.rows, self.world = whole, tuple(scales), rows, world
        self.gathered = self.memory = None
        return self

    def plain(self) -> Tensor:
        """The codes as a plain tensor over the same memory."""
        return self.as_subclass(Tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalShard:
        """A copy with codes and scales of its own, not gathered yet."""
        if id(self) not in memo:
            scales = [scale.clone() for scale in self.scales]
            codes = self.plain().clone()
            memo[id(self)] = self.make(codes, self.whole, scales, self.rows, self.world)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the plain tensor of its codes: what is saved of a shard is its state dict."""
        return self.plain().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if func not in cls._KEEP or not isinstance(source, cls) or isinstance(result, cls):
            return result
        scales = source.scales
        if func is Tensor.pin_memory:
            scales = tuple(scale.pin_memory() for scale in scales)
        else:
            scales = tuple(scale.to(result.device) for scale in scales)
        whole = source.whole.on(result.device)
        return cls.make(result, whole, scales, source.rows, source.world)

    # FSDP2 also takes a hook with more arguments, but wants everything that such a one returns to
    # have the shape of the (padded) codes wherever these do not divide evenly.
    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], None]:
        """What this rank sends: its codes and scales, padded to what the longest part has."""
        if self.world == 1:
            return (self.plain().reshape(-1),), None
        columns = self.shape[1:].numel()
        sent = [_padded(self.plain().reshape(-1), -(-self.rows // self.world) * columns)]
        for scale, length in zip(self.scales, self.whole.lengths, strict=True):
            sent.append(_padded(scale, -(-length // self.world)))
        return tuple(sent), None

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: Sequence[Tensor],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The gathered codes, whose first elements are the weight; :attr:`gathered` gets the
        scales. FSDP reuses the memory of ``all_gather_outputs`` every time."""
        codes, *scales = all_gather_outputs
        if self.gathered is None:
            if self.world == 1:
                scales = [scale.to(codes.device) for scale in self.scales]
            ends = zip(scales, self.whole.lengths, strict=True)
            whole = self.whole.on(codes.device)
            self.gathered = whole.state([scale.reshape(-1)[:length] for scale, length in ends])
            self.memory = codes
        return (codes, ()) if out is None else None

    def holds(self, gathered: Tensor) -> bool:
        """Whether ``gathered`` is over the memory that FSDP gathers this weight into."""
        memory = self.memory
        return (
            memory is not None
            and gathered.untyped_storage()._cdata == memory.untyped_storage()._cdata
        )


def _padded(flat: Tensor, size: int) -> Tensor:
    """``flat`` with zeros behind it, ``size`` elements."""
    if flat.numel() == size:
        return flat
    padded = flat.new_zeros(size)
    padded[: flat.numel()] = flat
    return padded


# ---- sharded parameters --------------------------------------------------------------------------


def shard_of(weight: Any) -> LocalShard | None:
    """This rank's part of ``weight``; None unless it is a sharded quantized one."""
    local = getattr(weight, "_local_tensor", None)
    return local if isinstance(local, LocalShard) else None


def place(weight: Any) -> tuple[int, int]:
    """``(world, rank)``: in how many parts a DTensor is cut, and which one this process has.

    NotImplementedError unless it is cut along its first dimension, in one dimension of the mesh.
    """
    found = [(index, p) for index, p in enumerate(weight.placements) if p.is_shard()]
    if not found:
        return 1, 0
    if len(found) > 1 or found[0][1].dim != 0:
        raise NotImplementedError(
            "a quantized weight can be sharded along its first dimension only, by one dimension of "
            f"the device mesh; got placements {list(weight.placements)}"
        )
    index = found[0][0]
    return weight.device_mesh.size(index), weight.device_mesh.get_local_rank(index)


def adopt(weight: Any, whole: Any, scales: Sequence[Tensor]) -> None:
    """Make the local part of a DTensor of codes a :class:`LocalShard`.

    weight: the DTensor, as FSDP has made it. scales: of the whole weight; this rank's parts are
    copied.
    """
    world, rank = place(weight)
    local = weight._local_tensor
    parts = []
    for scale, length in zip(scales, whole.lengths, strict=True):
        start, stop = part(length, world, rank)
        parts.append(scale.reshape(-1)[start:stop].to(local.device, copy=True))
    on = whole.on(local.device) if local.device.type != "meta" else whole
    weight._local_tensor = LocalShard.make(local, on, parts, weight.shape[0], world)
    describe(weight)


def describe(weight: Any) -> None:
    """Give a sharded weight the attributes of a quantized one, scales as DTensors: state dicts, and
    who walks along their keys (torch.distributed.checkpoint), find them there."""
    from torch.distributed.tensor import DTensor

    shard = weight._local_tensor
    scales = [
        DTensor.from_local(
            scale,
            weight.device_mesh,
            weight.placements,
            run_check=False,
            shape=torch.Size((length,)),
            stride=(1,),
        )
        for scale, length in zip(shard.scales, shard.whole.lengths, strict=True)
    ]
    state = shard.whole.state(scales)
    if isinstance(shard.whole, Whole8bit):
        weight.SCB = state
        return
    weight.quant_state = state
    weight.absmax, weight.quant_map = state.absmax, state.code
    if state.nested:
        weight.nested_absmax, weight.nested_quant_map = state.state2.absmax, state.state2.code


def beside(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """What a layer's state dict holds beside its sharded weight; nothing where that is not sharded.

    ``torch.distributed.checkpoint.state_dict`` broadcasts from rank 0 what it finds among
    parameters and ``named_buffers(recurse=False)``.
    """
    if shard_of(module._parameters.get("weight")) is None:
        return
    saved: dict[str, Tensor] = {}
    module._save_to_state_dict(saved, "", keep_vars=True)
    for name, tensor in saved.items():
        if name not in module._parameters and name not in module._buffers:
            yield f"{prefix}.{name}" if prefix else name, tensor


def moved(weight: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """What ``nn.Module._apply(fn)`` makes of a sharded weight: codes and scales move, and never
    change their dtype."""

    def move(tensor: Tensor) -> Tensor:
        with torch.no_grad():
            result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    shard = weight._local_tensor
    codes = move(shard.plain())
    scales = [move(scale) for scale in shard.scales]
    if codes.data_ptr() == shard.data_ptr() and codes.device == shard.device:
        return weight
    whole = shard.whole.on(codes.device) if codes.device.type != "meta" else shard.whole
    return _parameter(weight, LocalShard.make(codes, whole, scales, shard.rows, shard.world))


def _parameter(like: Any, shard: LocalShard) -> Any:
    """A sharded weight laid out as ``like`` whose local part is ``shard``."""
    from torch.distributed.tensor import DTensor

    made = DTensor.from_local(
        shard.plain(),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    weight: Any = nn.Parameter(made, requires_grad=False)
    weight._local_tensor = shard
    describe(weight)
    return weight


def local_part(tensor: Tensor, weight: Any, length: int) -> Tensor:
    """This rank's part, 1-D, of a tensor which is cut as ``weight`` is.

    tensor: the whole tensor, or a DTensor. length: of what is cut: rows of the weight, or scales.
    """
    if is_dtensor(tensor):
        like: Any = tensor
        if like.device_mesh == weight.device_mesh:
            return like.redistribute(placements=weight.placements)._local_tensor.reshape(-1)
        tensor = like.full_tensor()
    start, stop = part(length, *place(weight))
    flat = tensor.reshape(-1)
    width = flat.numel() // length if length else 0
    return flat[start * width : stop * width]


def put(weight: Any, codes: Tensor, whole: Any, scales: Sequence[Tensor]) -> Any:
    """Give a sharded weight new codes and scales: this rank's parts, 1-D.

    Returns the weight: the same object, written to, or a new one in place of one on the meta device
    (the caller sets it as the layer's weight, and FSDP learns of it through the layer's
    ``load_state_dict`` hooks). A storage dtype other than the weight's is the caller's to restore.
    """
    shard = weight._local_tensor
    if shard.device.type == "meta":
        fresh = codes.reshape(shard.shape).clone()
        kept = [scale.clone() for scale in scales]
        return _parameter(weight, LocalShard.make(fresh, whole, kept, shard.rows, shard.world))
    with torch.no_grad():
        shard.plain().copy_(codes.reshape(shard.shape))
        for mine, new in zip(shard.scales, scales, strict=True):
            mine.copy_(new)
    shard.whole = whole.on(shard.device)
    shard.gathered = None
    describe(weight)
    return weight


def put_4bit(weight: Any, packed: Tensor, state: QuantState) -> Any:
    """:func:`put` of a whole 4-bit weight, plain or DTensors; another storage dtype is taken as the
    bytes that it is."""
    shard = weight._local_tensor
    if packed.dtype != shard.dtype:
        packed = packed.full_tensor() if is_dtensor(packed) else packed  # type: ignore[attr-defined]
        packed = _packed.restore(packed, shard.dtype, state.shape)
    whole = Whole4bit(state)
    scales = [
        local_part(scale, weight, length)
        for scale, length in zip(Whole4bit.scales(state), whole.lengths, strict=True)
    ]
    return put(weight, local_part(packed, weight, shard.rows), whole, scales)


def put_8bit(weight: Any, codes: Tensor, scales: Tensor) -> Any:
    """:func:`put` of a whole int8 weight, plain or DTensors."""
    rows = weight._local_tensor.rows
    parts = local_part(codes, weight, rows), [local_part(scales, weight, rows)]
    return put(weight, parts[0], Whole8bit(rows), parts[1])


def entering(
    module: nn.Module, weight: Any, known: Callable[[], tuple[Any, Sequence[Tensor]] | None]
) -> LocalShard | None:
    """Take notice of a weight that is about to be set as that of a layer.

    A DTensor of codes becomes a sharded quantized weight. known: what the layer has so far,
    described and its scales, or None where that is not quantized.

    Returns the shard if ``weight`` is what FSDP2 has gathered of it, None otherwise.
    """
    if is_dtensor(weight):
        found = known() if shard_of(weight) is None else None
        if found is not None:
            adopt(weight, *found)
        module.__dict__[_NOTED] = weight
        return None
    shard = noted(module)
    return shard if shard is not None and shard.holds(weight) else None


_NOTED = "_sharded_weight"
"""Attribute of a layer: the DTensor that FSDP2 has put in place of its weight, also while that is
gathered."""


def noted(module: nn.Module) -> LocalShard | None:
    """The shard of the weight that FSDP2 has in place, or had before it gathered it; None where
    there is none, or where it is one of float numbers."""
    return shard_of(module.__dict__.get(_NOTED))


def refusal(module: nn.Module, weight: Any) -> str | None:
    """Why a layer cannot compute with a weight that FSDP2 has sharded; None where it can."""
    name = type(module).__name__
    if shard_of(weight) is not None:
        return (
            f"the weight of this {name} is sharded by FSDP2 and not gathered: call the module that "
            "fully_shard() was applied to (its forward gathers the weight), or its unshard() first"
        )
    known: Any = module.__dict__.get(_NOTED)
    is_float = weight.is_floating_point() and known is not None and weight.shape == known.shape
    if is_float and noted(module) is None:
        return (
            f"{name} is not quantized: its weight of shape {list(known.shape)} was "
            "sharded as a float one. Quantize before fully_shard(), with .to(device), or let "
            "distributed.prepare() and distributed.load() quantize while loading"
        )
    return None
