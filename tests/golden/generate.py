"""Write the golden files of this folder with upstream bitsandbytes as the oracle.

Run inside the environment that holds upstream (see README.md in this folder):

    .venv-upstream/bin/python tests/golden/generate.py            # rewrite the files
    .venv-upstream/bin/python tests/golden/generate.py --check    # compare with what is here

Every array comes from upstream's portable path (see ``tests/parity/portable.py``) or, where the
project's own rule is stricter than upstream's, from the plain numpy definition in
``tests/parity/rule.py``; both are computed and must agree, except in the ways README.md lists.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "parity"))

import portable  # noqa: E402
from rule import ABSMAX_FLOOR, NESTED_BLOCK, Rule, encode_fp4, pack, unpack  # noqa: E402

portable.force_portable()

import bitsandbytes as upstream  # noqa: E402
import bitsandbytes.functional as F  # noqa: E402
from bitsandbytes.nn import Linear4bit  # noqa: E402

SEED = 20260321
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def check_absmax(absmax: np.ndarray, theirs: np.ndarray, count: int, block: int) -> None:
    """Prove that scales are equal, save that upstream floors that of a short last block."""
    expected = absmax.copy()
    if count % block:
        expected[-1] = max(expected[-1], ABSMAX_FLOOR)
    if not np.array_equal(expected, theirs):
        raise AssertionError("a scale differs from upstream in a way that nobody described")


# --------------------------------------------------------------------------------- the book


@dataclass
class Book:
    """The tensors of each file and the index of cases, in the order they were made."""

    files: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)

    def put(self, file: str, name: str, value: torch.Tensor | np.ndarray) -> str:
        """Store one tensor under its full name and return the name."""
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.ascontiguousarray(value))
        tensors = self.files.setdefault(file, {})
        if name in tensors:
            raise ValueError(f"the tensor {name} was written twice")
        tensors[name] = value.detach().contiguous().clone()
        return name

    def case(
        self,
        op: str,
        case: str,
        file: str,
        tensors: dict[str, torch.Tensor | np.ndarray | str],
        **facts: Any,
    ) -> None:
        """Store one case; a tensor given as a string is the name of one stored before."""
        name = f"{op}/{case}"
        names = {
            key: value if isinstance(value, str) else self.put(file, f"{name}/{key}", value)
            for key, value in tensors.items()
        }
        self.cases.append({"name": name, "op": op, "file": file, **facts, "tensors": names})


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float32 values from a seed of their own."""
    return np.random.default_rng([SEED, seed]).standard_normal(shape).astype(np.float32)


# ------------------------------------------------------------------------------- the inputs


def midpoint_input(code: np.ndarray) -> np.ndarray:
    """Blocks of 32 led by 1.0 that hold every midpoint, its two neighbours and every code."""
    ascending = np.unique(code)
    mid = ((ascending[1:] + ascending[:-1]) * np.float32(0.5)).astype(np.float32)
    values = np.concatenate(
        [mid, np.nextafter(mid, np.float32(2)), np.nextafter(mid, np.float32(-2)), ascending]
    )
    rows = -(-values.size // 31)
    out = np.zeros((rows, 32), np.float32)
    out[:, 0] = 1.0
    out[:, 1:].reshape(-1)[:] = 0
    flat = np.zeros(rows * 31, np.float32)
    flat[: values.size] = values
    out[:, 1:] = flat.reshape(rows, 31)
    return out


def extreme_input(kind: str, dtype: str) -> np.ndarray:
    """Rows of 64 values whose magnitudes cover the ends of the dtype's range."""
    base = np.linspace(-1, 1, 64).astype(np.float32)
    base[10] = np.float32(-0.0)
    scales = {
        ("tiny", "f32"): [1e-45, 1e-42, 1e-40, 1e-39, 2.9e-39, 3e-39, 1e-38, 1.2e-38, 1e-37],
        ("tiny", "bf16"): [1e-40, 1e-39, 3e-39, 1e-38, 1.2e-38, 1e-37],
        ("tiny", "f16"): [6e-8, 1e-6, 6.1e-5, 1e-4],
        ("large", "f32"): [1e30, 1e37, 3e38, 3.4028235e38],
        ("large", "bf16"): [1e30, 1e37, 3e38, 3.3e38],
        ("large", "f16"): [1e4, 6.5e4, 65504.0],
    }[kind, dtype]
    with np.errstate(under="ignore", over="raise"):
        return np.stack([base * np.float32(scale) for scale in scales]).astype(np.float32)


def special_input() -> np.ndarray:
    """Rows of 64: zeros, constants, signs, one outlier, signed zeros, a zero tail."""
    x = np.zeros((8, 64), np.float32)
    x[1] = 3.0
    x[2] = -0.75
    x[3] = -np.abs(numbers(1, 64))
    x[4] = numbers(2, 64) * np.float32(0.01)
    x[4, 17] = 1000.0
    x[5, ::2] = np.float32(-0.0)
    x[5, 1] = 1.0
    x[6, :32] = numbers(3, 32)
    return x


def zero_tail_input() -> np.ndarray:
    """A full block and a short last block of zeros."""
    return np.concatenate([numbers(4, 64), np.zeros(21, np.float32)])


def inputs_4bit(book: Book) -> dict[tuple[str, str], tuple[str, torch.Tensor, list[int]]]:
    """Store every input of quantize_4bit; return name, tensor and block sizes by (case, dtype)."""
    shapes = {
        "64x96": ((64, 96), [64]),
        "11x77": ((11, 77), [128, 32]),
        "5x5": ((5, 5), [64]),
        "1000": ((1000,), [256]),
        "7": ((7,), [64]),
        "1": ((1,), [64]),
        "64": ((64,), [64]),
        "3x5x7": ((3, 5, 7), [32]),
        "513": ((1, 513), [512]),
        "40x26": ((40, 26), [1024]),
        "3x683": ((3, 683), [2048]),
        "4100": ((4100,), [4096]),
        "0": ((0,), [64]),
        "0x64": ((0, 64), [64]),
    }
    out: dict[tuple[str, str], tuple[str, torch.Tensor, list[int]]] = {}
    for seed, (case, (shape, blocks)) in enumerate(shapes.items()):
        for dtype, torch_dtype in DTYPES.items():
            if max(blocks) > 1024 and dtype != "bf16":
                continue  # the largest blocks once, to keep the files small
            x = torch.from_numpy(numbers(100 + seed, *shape)).to(torch_dtype)
            name = book.put("quantize_4bit.safetensors", f"inputs/{dtype}-{case}/x", x)
            out[case, dtype] = (name, x, blocks)
    nf4, fp4 = code_of("nf4"), code_of("fp4")
    specials = {
        "midpoints-nf4": (lambda _: midpoint_input(nf4), [32]),
        "midpoints-fp4": (lambda _: midpoint_input(fp4), [32]),
        "tiny": (lambda dtype: extreme_input("tiny", dtype), [64]),
        "large": (lambda dtype: extreme_input("large", dtype), [64]),
        "special": (lambda _: special_input(), [64, 128]),
        "zero-tail": (lambda _: zero_tail_input(), [64]),
    }
    for case, (make, blocks) in specials.items():
        for dtype, torch_dtype in DTYPES.items():
            x = torch.from_numpy(make(dtype)).to(torch_dtype)
            name = book.put("quantize_4bit.safetensors", f"inputs/{dtype}-{case}/x", x)
            out[case, dtype] = (name, x, blocks)
    return out


# -------------------------------------------------------------------------------- the cases


def code_of(quant_type: str) -> np.ndarray:
    """Upstream's 16 values of a 4-bit type, in index order."""
    return F.get_4bit_type(quant_type, device="cpu").numpy()


def codes(book: Book) -> None:
    """Store the 4-bit codes and the 256-entry maps."""
    file = "codes.safetensors"
    for quant_type in ("nf4", "fp4", "af4"):
        book.case("codes", quant_type, file, {"code": code_of(quant_type)}, quant_type=quant_type)
    maps: list[tuple[str, str, dict[str, Any]]] = [
        ("dynamic-signed", "create_dynamic_map", {}),
        ("dynamic-unsigned", "create_dynamic_map", {"signed": False}),
        ("dynamic-signed-e3", "create_dynamic_map", {"max_exponent_bits": 3}),
        ("dynamic-signed-e5-b6", "create_dynamic_map", {"max_exponent_bits": 5, "total_bits": 6}),
        ("dynamic-signed-e3-b4", "create_dynamic_map", {"max_exponent_bits": 3, "total_bits": 4}),
        ("normal", "create_normal_map", {}),
        ("normal-no-extra", "create_normal_map", {"use_extra_value": False}),
        ("normal-offset-0.99", "create_normal_map", {"offset": 0.99}),
    ]
    for signed in (True, False):
        word = "signed" if signed else "unsigned"
        for bits in (8, 7, 6, 5, 4, 3, 2):
            for zero in (True, False):
                arguments = {"signed": signed, "total_bits": bits, "add_zero": zero}
                case = f"linear-{word}-b{bits}{'' if zero else '-no-zero'}"
                maps.append((case, "create_linear_map", arguments))
    for signed, exponent, precision, total in (
        (True, 5, 2, 8),
        (True, 4, 3, 8),
        (True, 3, 4, 8),
        (True, 2, 5, 8),
        (True, 6, 1, 8),
        (False, 5, 3, 8),
        (False, 4, 4, 8),
        (True, 2, 1, 4),
        (True, 3, 2, 6),
    ):
        word = "signed" if signed else "unsigned"
        arguments = {
            "signed": signed,
            "exponent_bits": exponent,
            "precision_bits": precision,
            "total_bits": total,
        }
        maps.append((f"fp8-{word}-e{exponent}m{precision}-b{total}", "create_fp8_map", arguments))
    for case, function, arguments in maps:
        code = getattr(F, function)(**arguments)
        facts = {"function": function, "arguments": arguments}
        book.case("codes", case, file, {"code": code.float()}, **facts)


def check_fp4(rule: np.ndarray, theirs: np.ndarray, scaled: np.ndarray) -> None:
    """Prove that FP4 codes differ only by the sign of zero or at exact negative midpoints."""
    table = code_of("fp4")
    ascending = np.unique(table)
    mid = ((ascending[1:] + ascending[:-1]) * np.float32(0.5)).astype(np.float32)
    differ = rule != theirs
    zeros = (rule % 8 == 0) & (theirs % 8 == 0)
    ties = np.isin(scaled, mid[mid < 0]) & (np.abs(table[theirs]) > np.abs(table[rule]))
    if (differ & ~zeros & ~ties).any():
        raise AssertionError("an FP4 code differs from upstream in a way that nobody described")


def beside_tiny_blocks(
    absmax: np.ndarray, block: int, *per_element: np.ndarray
) -> list[np.ndarray]:
    """The elements outside blocks whose absmax is below upstream's floor."""
    count = per_element[0].size
    keep = np.repeat((absmax == 0) | (absmax >= ABSMAX_FLOOR), block)[:count]
    return [values.ravel()[keep] for values in per_element]


def quantize_4bit(book: Book) -> None:
    """Store inputs, packed bytes, absmax and decoded values."""
    file = "quantize_4bit.safetensors"
    inputs = inputs_4bit(book)
    for quant_type in ("nf4", "fp4"):
        table = code_of(quant_type)
        rule = Rule(np.sort(table))
        pad = 7 if quant_type == "nf4" else 0
        for (case, dtype), (name, x, blocks) in inputs.items():
            for block in blocks:
                theirs, their_absmax = portable.portable(
                    "quantize_4bit", x, block, quant_type, torch.uint8
                )
                absmax, scaled = Rule.scale(x.float().numpy(), block)
                mine = rule.encode(scaled) if quant_type == "nf4" else encode_fp4(scaled, table)
                packed = pack(mine, pad)
                check_absmax(absmax, their_absmax.numpy(), x.numel(), block)
                tensors: dict[str, Any] = {"input": name, "packed": packed, "absmax": absmax}
                if not np.array_equal(absmax, their_absmax.numpy()):
                    tensors["upstream_absmax"] = their_absmax
                if not np.array_equal(packed, theirs.numpy()):
                    told = unpack(theirs.numpy(), mine.size)
                    ours, told, values = beside_tiny_blocks(absmax, block, mine, told, scaled)
                    if quant_type == "nf4":
                        assert np.array_equal(ours, told), (case, dtype, block)
                    else:
                        check_fp4(ours, told, values)
                    tensors["upstream_packed"] = theirs
                outputs = {"decoded": DTYPES[dtype]}
                if (case, dtype, block) == ("64x96", "f32", 64):
                    outputs |= {"decoded_f16": torch.float16, "decoded_bf16": torch.bfloat16}
                for key, out_dtype in outputs.items():
                    tensors[key] = portable.portable(
                        "dequantize_4bit",
                        torch.from_numpy(packed),
                        torch.from_numpy(absmax),
                        block,
                        quant_type,
                        list(x.shape),
                        out_dtype,
                    ).reshape(x.shape)
                book.case(
                    "quantize_4bit",
                    f"{quant_type}-{dtype}-b{block}-{case}",
                    file,
                    tensors,
                    quant_type=quant_type,
                    dtype=dtype,
                    blocksize=block,
                    shape=list(x.shape),
                )


def double_quant(book: Book) -> None:
    """Store 4-bit states whose absmax is quantized to 8 bits."""
    file = "double_quant.safetensors"
    dynamic = F.create_dynamic_map()
    rule = Rule(dynamic.numpy())
    shapes = {"64x96": (64, 96), "270x32": (270, 32), "5x5": (5, 5), "33x77": (33, 77)}
    inputs: dict[tuple[str, str], str] = {}
    for quant_type in ("nf4", "fp4"):
        for seed, (case, shape) in enumerate(shapes.items()):
            for dtype in ("f32", "bf16") if case == "64x96" else ("bf16",):
                x = torch.from_numpy(numbers(200 + seed, *shape)).to(DTYPES[dtype])
                block = 32 if case == "270x32" else 64  # 270 scales: a short second nested block
                if (case, dtype) not in inputs:
                    inputs[case, dtype] = book.put(file, f"inputs/{dtype}-{case}/x", x)
                packed, state = F.quantize_4bit(
                    x, quant_type=quant_type, blocksize=block, compress_statistics=True
                )
                plain, values = Rule.scale(x.float().numpy(), block)
                if quant_type == "fp4":
                    ours = encode_fp4(values, code_of("fp4"))
                    check_fp4(ours, unpack(packed.numpy(), ours.size), values)
                    packed = torch.from_numpy(pack(ours, 0))
                offset = np.float32(math.fsum(plain.astype(np.float64)) / plain.size)
                nested, scaled = Rule.scale(plain - offset, NESTED_BLOCK)
                absmax = rule.encode(scaled)
                tensors: dict[str, Any] = {
                    "input": inputs[case, dtype],
                    "packed": packed,
                    "absmax_f32": plain,
                    "absmax": absmax,
                    "offset": np.array(offset, np.float32),
                    "nested_absmax": nested,
                }
                same_offset = bool(state.offset.numpy() == offset)
                if same_offset:
                    assert np.array_equal(absmax, state.absmax.numpy()), case
                    check_absmax(nested, state.state2.absmax.numpy(), absmax.size, NESTED_BLOCK)
                    state.state2.absmax = torch.from_numpy(nested)
                else:
                    tensors["upstream_absmax"] = state.absmax
                    tensors["upstream_offset"] = state.offset
                    tensors["upstream_nested_absmax"] = state.state2.absmax
                    state.absmax = torch.from_numpy(absmax)
                    state.offset = torch.tensor(offset)
                    state.state2.absmax = torch.from_numpy(nested)
                scales = dynamic.numpy()[absmax] * np.repeat(nested, NESTED_BLOCK)[: absmax.size]
                tensors["absmax_decoded"] = (scales + offset).astype(np.float32)
                tensors["decoded"] = F.dequantize_4bit(packed, state).reshape(shape)
                check = portable.portable(
                    "dequantize_4bit",
                    packed,
                    torch.from_numpy(tensors["absmax_decoded"]),
                    block,
                    quant_type,
                    list(shape),
                    x.dtype,
                )
                assert torch.equal(check, tensors["decoded"]), case
                book.case(
                    "double_quant",
                    f"{quant_type}-{dtype}-b{block}-{case}",
                    file,
                    tensors,
                    quant_type=quant_type,
                    dtype=dtype,
                    blocksize=block,
                    nested_blocksize=NESTED_BLOCK,
                    shape=list(shape),
                    same_offset_as_upstream=same_offset,
                )


def blockwise(book: Book) -> None:
    """Store blockwise 8-bit quantization and its decoding."""
    file = "blockwise.safetensors"
    maps = {
        "dynamic-signed": F.create_dynamic_map(),
        "dynamic-unsigned": F.create_dynamic_map(signed=False),
        "linear-signed-b8": F.create_linear_map(),
        "fp8-signed-e4m3-b8": F.create_fp8_map(True, 4, 3),
    }
    dynamic = maps["dynamic-signed"].numpy()
    plan: list[tuple[str, str, str, np.ndarray, int]] = []
    for dtype in DTYPES:
        plan += [
            ("dynamic-signed", dtype, "24x96", numbers(300, 24, 96), 256),
            ("dynamic-signed", dtype, "1000", numbers(301, 1000), 256),
            ("dynamic-signed", dtype, "5x5", numbers(303, 5, 5), 64),
            ("dynamic-signed", dtype, "tiny", extreme_input("tiny", dtype), 64),
            ("dynamic-signed", dtype, "large", extreme_input("large", dtype), 64),
            ("dynamic-signed", dtype, "special", special_input(), 64),
            ("dynamic-signed", dtype, "zero-tail", zero_tail_input(), 64),
        ]
    plan += [
        ("dynamic-signed", "f32", "4100", numbers(302, 4100), 4096),
        ("dynamic-signed", "f32", "midpoints", midpoint_input(dynamic), 32),
        ("dynamic-signed", "f32", "0", np.zeros(0, np.float32), 64),
        ("dynamic-unsigned", "f32", "positive", np.abs(numbers(304, 40, 50)), 256),
        ("dynamic-unsigned", "f32", "signed", numbers(305, 600), 256),
        ("linear-signed-b8", "f32", "1000", numbers(306, 1000), 512),
        ("fp8-signed-e4m3-b8", "f32", "1000", numbers(307, 1000), 128),
    ]
    for code_name, dtype, case, values, block in plan:
        code = maps[code_name]
        x = torch.from_numpy(values).to(DTYPES[dtype])
        theirs, their_absmax = portable.portable("quantize_blockwise", x, code, block)
        absmax, scaled = Rule.scale(x.float().numpy(), block)
        mine = Rule(code.numpy()).encode(scaled).reshape(x.shape)
        check_absmax(absmax, their_absmax.numpy(), values.size, block)
        tensors: dict[str, Any] = {"input": x, "codes": mine, "absmax": absmax}
        if not np.array_equal(mine, theirs.numpy()):
            ours, told = beside_tiny_blocks(absmax, block, mine, theirs.numpy())
            assert np.array_equal(ours, told), (code_name, dtype, case)
            tensors["upstream_codes"] = theirs
        if not np.array_equal(absmax, their_absmax.numpy()):
            tensors["upstream_absmax"] = their_absmax
        scales = torch.from_numpy(absmax)
        tensors["decoded"] = portable.portable(
            "dequantize_blockwise", torch.from_numpy(mine), scales, code, block, x.dtype
        )
        book.case(
            "blockwise",
            f"{code_name}-{dtype}-b{block}-{case}",
            file,
            tensors,
            code=f"codes/{code_name}/code",
            dtype=dtype,
            blocksize=block,
            shape=list(x.shape),
        )


def matmul_4bit(book: Book) -> None:
    """Store small products with float64 references (forward and input gradient)."""
    file = "matmul_4bit.safetensors"
    plan = [
        # rows, out, in, block, bias
        ((1,), 40, 96, 64, True),
        ((1,), 12, 256, 64, False),
        ((3,), 7, 100, 64, True),
        ((9,), 24, 128, 64, False),
        ((5,), 33, 65, 32, True),
        ((2, 3), 20, 130, 128, True),
        ((18,), 17, 48, 1024, False),
    ]
    for seed, (rows, out, inner, block, with_bias) in enumerate(plan):
        shape = "x".join(map(str, rows))
        nested = seed % 2 == 0
        for dtype, torch_dtype in DTYPES.items():
            if dtype == "f16" and seed % 3:
                continue
            weight = torch.from_numpy(numbers(400 + seed, out, inner)).to(torch_dtype)
            a = torch.from_numpy(numbers(500 + seed, *rows, inner)).to(torch_dtype)
            grad = torch.from_numpy(numbers(600 + seed, *rows, out)).to(torch_dtype)
            bias = torch.from_numpy(numbers(700 + seed, out)).to(torch_dtype)
            names = {
                key: book.put(file, f"inputs/{dtype}-{shape}x{out}x{inner}/{key}", value)
                for key, value in {"a": a, "bias": bias, "grad_out": grad}.items()
            }
            for quant_type in ("nf4", "fp4"):
                packed, state = F.quantize_4bit(
                    weight, quant_type=quant_type, blocksize=block, compress_statistics=nested
                )
                # The reference multiplies by code[q] * scale in float64, scales as decoded in f32.
                scale = state.absmax
                if nested:
                    scale = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
                index = unpack(packed.numpy(), out * inner)
                dense = code_of(quant_type)[index].astype(np.float64)
                dense *= np.repeat(scale.numpy(), block)[: dense.size].astype(np.float64)
                dense = dense.reshape(out, inner)
                y = a.double().numpy() @ dense.T
                if with_bias:
                    y = y + bias.double().numpy()
                tensors: dict[str, Any] = dict(names)
                if not with_bias:
                    del tensors["bias"]
                tensors |= {"packed": packed, "absmax": state.absmax}
                if nested:
                    tensors["offset"] = state.offset
                    tensors["nested_absmax"] = state.state2.absmax
                tensors["y_f64"] = y
                tensors["grad_a_f64"] = grad.double().numpy() @ dense
                book.case(
                    "matmul_4bit",
                    f"{quant_type}-{dtype}-b{block}-{shape}x{out}x{inner}",
                    file,
                    tensors,
                    quant_type=quant_type,
                    dtype=dtype,
                    blocksize=block,
                    nested=nested,
                    weight_shape=[out, inner],
                )


def linear4bit(book: Book) -> None:
    """Store checkpoints written through upstream's Linear4bit, and what they decode to."""
    for quant_type in ("nf4", "fp4"):
        for nested in (False, True):
            for storage in (torch.uint8, torch.bfloat16):
                layer = Linear4bit(
                    96,
                    64,
                    bias=True,
                    compress_statistics=nested,
                    quant_type=quant_type,
                    quant_storage=storage,
                )
                with torch.no_grad():
                    layer.weight.data.copy_(torch.from_numpy(numbers(800, 64, 96)))
                    layer.bias.data.copy_(torch.from_numpy(numbers(801, 64)))
                layer = layer.to(torch.bfloat16).to("cpu")
                state = layer.state_dict()
                kind = "nested" if nested else "plain"
                word = str(storage).removeprefix("torch.")
                file = f"linear4bit-{quant_type}-{kind}-{word}.safetensors"
                book.files[file] = {k: v.detach().contiguous().clone() for k, v in state.items()}
                name = f"linear4bit/{quant_type}-{kind}/decoded"
                if storage == torch.uint8:  # the storage changes no value
                    decoded = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
                    book.put("linear4bit-expected.safetensors", name, decoded)
                book.cases.append(
                    {
                        "name": f"linear4bit/{quant_type}-{kind}-{word}",
                        "op": "linear4bit",
                        "file": file,
                        "expected_file": "linear4bit-expected.safetensors",
                        "quant_type": quant_type,
                        "nested": nested,
                        "quant_storage": word,
                        "blocksize": 64,
                        "dtype": "bf16",
                        "shape": [64, 96],
                        "tensors": {key: key for key in state} | {"decoded": name},
                    }
                )


def write(book: Book, folder: Path) -> list[str]:
    """Write every file and the index into a folder; return the names written."""
    versions = {
        "bitsandbytes": upstream.__version__,
        "torch": torch.__version__.split("+")[0],
        "numpy": np.__version__,
    }
    for file, tensors in book.files.items():
        # One metadata key only: with more, safetensors writes them in a random order.
        save_file(dict(sorted(tensors.items())), folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
    rows = ",\n  ".join(json.dumps(case) for case in book.cases)
    head = {"format": 1, "seed": SEED, "versions": versions, "files": sorted(book.files)}
    text = json.dumps(head, indent=1)[:-2] + f',\n "cases": [\n  {rows}\n ]\n}}\n'
    json.loads(text)
    (folder / "index.json").write_text(text)
    return [*sorted(book.files), "index.json"]


def main() -> int:
    """Make every case, then write or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="compare with the committed files, write nothing"
    )
    check = parser.parse_args().check
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    book = Book()
    for make in (codes, quantize_4bit, double_quant, blockwise, matmul_4bit, linear4bit):
        make(book)
    if not check:
        names = write(book, HERE)
        size = sum((HERE / name).stat().st_size for name in names)
        print(f"{len(book.cases)} cases in {len(names)} files, {size / 1e6:.2f} MB")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        names = write(book, Path(folder))
        stale = [
            name
            for name in names
            if not (HERE / name).exists()
            or (HERE / name).read_bytes() != (Path(folder) / name).read_bytes()
        ]
    for name in stale:
        print(f"{name} differs from what this machine produces", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
