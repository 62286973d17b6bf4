"""Quantized layers. Everything lives in :mod:`.modules`; this is the list of what is public."""

from . import modules, parametrize
from .experts import Experts4bit, Experts8bit
from .modules import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    OutlierAwareLinear,
    Params4bit,
    StableEmbedding,
    fix_4bit_weight_quant_state_from_module,
)

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Experts4bit",
    "Experts8bit",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "Params4bit",
    "StableEmbedding",
    "fix_4bit_weight_quant_state_from_module",
    "modules",
    "parametrize",
]
