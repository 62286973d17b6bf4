"""Quantized models on several ranks: loading into shards, checkpoints, faults, memory plans.

Layers and optimizers shard under FSDP and FSDP2 by themselves; nothing here is needed for that. Not
imported by ``import halfbyte``.

================================  ==================================================================
:func:`prepare`, :func:`load`     read a checkpoint straight into FSDP2 shards, packed or quantizing
:func:`load_sharded`              the two around a function that shards the model
:func:`shard_rows`,               tensor-parallel parts of a packed weight
:func:`shard_columns`,
:func:`take_slices`
:func:`shard_linear`              a layer's tensor-parallel part
:func:`save_checkpoint`,          sharded checkpoints that are whole or not there, and load on any
:func:`load_checkpoint`, ...      number of ranks
:func:`watch`                     names the rank that died
:func:`plan`                      memory and traffic of a run, before it is started
================================  ==================================================================
"""

from ._checkpoint import Restored, load_checkpoint, save_checkpoint
from ._faults import DeadRankError, Watcher, watch
from ._folder import latest_checkpoint, verify_checkpoint
from ._loading import Loaded, load, load_sharded
from ._manifest import CheckpointError
from ._plan import Plan, plan
from ._prepare import prepare
from ._reader import ModelFiles
from ._tensor_parallel import shard_columns, shard_linear, shard_rows, take_slices

__all__ = [
    "CheckpointError",
    "DeadRankError",
    "Loaded",
    "ModelFiles",
    "Plan",
    "Restored",
    "Watcher",
    "latest_checkpoint",
    "load",
    "load_checkpoint",
    "load_sharded",
    "plan",
    "prepare",
    "save_checkpoint",
    "shard_columns",
    "shard_linear",
    "shard_rows",
    "take_slices",
    "verify_checkpoint",
    "watch",
]
