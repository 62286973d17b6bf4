"""Products with quantized weights, and their gradients."""

from . import _functions
from ._functions import MatMul4Bit, matmul_4bit

__all__ = ["MatMul4Bit", "_functions", "matmul_4bit"]
