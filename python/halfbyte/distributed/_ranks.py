"""Ranks that do something together, and all fail when one of them does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ._manifest import CheckpointError

T = TypeVar("T")

_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (CheckpointError, FileExistsError, FileNotFoundError, ValueError)
}


class Ranks:
    """The ranks of ``group`` (None: of the default group), or this process alone."""

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self.group = group
        self.alone = not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.world = 1 if self.alone else dist.get_world_size(group)

    def together(self, work: Callable[[], T]) -> list[T]:
        """Call ``work`` on every rank; what each returned, or the same error on all of them."""
        value, failed, mine = None, None, None
        try:
            value = work()
        except Exception as error:
            mine, failed = error, (type(error).__name__, str(error))
        found: list[Any] = [(value, failed)]
        if not self.alone:
            import torch.distributed as dist

            found = [None] * self.world
            dist.all_gather_object(found, (value, failed), group=self.group)
        for rank, (_, failed) in enumerate(found):
            if failed is not None:
                kind, text = failed
                if kind not in _ERRORS:
                    kind, text = "CheckpointError", f"rank {rank}: {kind}: {text}"
                raise _ERRORS[kind](text) from mine
        return [value for value, _ in found]

    def each(self, work: Callable[[], T]) -> T:
        """Call ``work`` on every rank; what it returned here, or the same error on all ranks."""
        kept: list[T] = []
        self.together(lambda: kept.append(work()))
        return kept[0]

    def agree(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Call ``work`` on every rank; what it returned, or ValueError where that differs."""
        first, *others = self.together(work)
        for rank, other in enumerate(others, start=1):
            for name, value in first.items():
                if other[name] != value:
                    raise ValueError(
                        f"{name} must be the same on all ranks: rank 0 has {value}, "
                        f"rank {rank} has {other[name]}"
                    )
        return first

    def first(self, work: Callable[[], T]) -> T:
        """Call ``work`` on rank 0; what it returned, or the same error on all ranks."""
        values: list[Any] = self.together(lambda: work() if self.rank == 0 else None)
        return values[0]
