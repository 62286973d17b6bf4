"""The project's encode rule in plain numpy float32: what both sides are measured against.

It is a definition, not a fast path, and imports neither halfbyte nor upstream.
"""

from __future__ import annotations

import numpy as np

ABSMAX_FLOOR = np.float32(1e-38)
"""Upstream alone raises smaller scales to this before taking the reciprocal, which flattens such
blocks; the project's rule keeps their ratios."""

NO_RECIPROCAL = np.float32(2.0**-128)
"""Up to this magnitude 1 / absmax overflows float32: block and scale are lifted by 2^64 first."""

NESTED_BLOCK = 256
"""Block size of the second quantization of the scales."""


class Rule:
    """The encode rule of the project, in plain numpy float32, for any ascending code."""

    def __init__(self, code: np.ndarray) -> None:
        """Keep the ascending code and its float32 midpoints."""
        self.code = code.astype(np.float32)
        self.mid = ((self.code[1:] + self.code[:-1]) * np.float32(0.5)).astype(np.float32)

    @staticmethod
    def scale(x: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the absmax of each block and every element scaled into [-1, 1]."""
        flat = x.astype(np.float32).ravel()
        blocks = -(-flat.size // block)
        padded = np.zeros(blocks * block, np.float32)
        padded[: flat.size] = flat
        padded = padded.reshape(blocks, block)
        absmax = np.abs(padded).max(axis=1) if blocks else np.zeros(0, np.float32)
        lift = np.where(absmax <= NO_RECIPROCAL, np.float32(2.0**64), np.float32(1))
        inverse = np.float32(1) / np.where(absmax == 0, np.float32(1), absmax * lift)
        scaled = np.clip((padded * lift[:, None]) * inverse[:, None], np.float32(-1), np.float32(1))
        return absmax, scaled.ravel()[: flat.size]

    def encode(self, scaled: np.ndarray) -> np.ndarray:
        """Count the midpoints strictly below each value: a tie goes to the lower code."""
        return np.searchsorted(self.mid, scaled, side="left").astype(np.uint8)


def encode_fp4(scaled: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Encode by sign bit and nearest magnitude; a tie goes to the smaller magnitude."""
    order = np.argsort(table[:8], kind="stable").astype(np.uint8)
    magnitudes = Rule(table[:8][order])
    return order[magnitudes.encode(np.abs(scaled))] | np.where(scaled < 0, 8, 0).astype(np.uint8)


def pack(codes: np.ndarray, pad: int) -> np.ndarray:
    """Put two codes in a byte, the first one in the high nibble."""
    if codes.size % 2:
        codes = np.append(codes, np.uint8(pad))
    return ((codes[0::2] << 4) | codes[1::2]).astype(np.uint8).reshape(-1, 1)


def unpack(packed: np.ndarray, count: int) -> np.ndarray:
    """Undo ``pack``."""
    flat = packed.ravel()
    return np.stack([flat >> 4, flat & 15], axis=1).ravel()[:count]
