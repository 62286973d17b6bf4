"""Products with quantized weights, and their gradients."""

from . import _functions
from ._functions import (
    MatMul4Bit,
    MatMul8bitFp,
    MatMul8bitLt,
    MatmulLtState,
    matmul,
    matmul_4bit,
)

__all__ = [
    "MatMul4Bit",
    "MatMul8bitFp",
    "MatMul8bitLt",
    "MatmulLtState",
    "_functions",
    "matmul",
    "matmul_4bit",
]
