"""LLM.int8() beside upstream: codes, products, layers, files, gradients and signatures.

Upstream's arithmetic differs from the definition in five places, and each has its own term here:
127 / r is rounded twice (``upstream_scales``), which decides ties; the layers round input and
weight to float16 first; 1/127² is taken as 6.200124e-05 (1.8e-5 too large); the outlier part is
computed in the input's type on top of an output that was rounded already; and the portable integer
product runs in float32 (exact up to 1,040 columns).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import eight_bit
import int8_reference as ref
import numpy as np
import pytest
import torch
from cases import DTYPES
from compare import assert_same_bits
from oracle_client import Batch, Reply
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]

CONSTANT = 2e-5
"""Upstream's 6.200124e-05 over 1/127², less one, rounded up."""

SHAPES = [(1, 7, 3), (4, 64, 16), (6, 129, 33), (16, 300, 70), (8, 1000, 48)]
THRESHOLDS = [0.0, 3.0, 6.0]
KINDS = ["gaussian", "heavy", "planted"]
PRODUCTS = [
    (dtype, threshold, shape, KINDS[(i + j) % 3], (i + j) % 2 == 0)
    for dtype in DTYPES
    for i, threshold in enumerate(THRESHOLDS)
    for j, shape in enumerate(SHAPES)
]
Product = tuple[str, float, tuple[int, int, int], str, bool]

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "int8-mixed": {"load_in_8bit": True, "llm_int8_threshold": 1.5},
    "int8-skip": {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "down_proj"]},
}


def upstream_scales(stats: np.ndarray) -> np.ndarray:
    """The reciprocal first, then 127 times it: torch's ``127.0 / tensor``."""
    with np.errstate(all="ignore"):
        return (np.float32(1) / stats) * np.float32(127)


def _assert_ties_only(mine: np.ndarray, theirs: np.ndarray, x: np.ndarray) -> None:
    """Codes of the rows of ``x`` differ by one where the exact value lies between two of them."""
    rows, columns = np.nonzero(mine != theirs)
    exact = x.astype(np.float64) * 127 / np.abs(x).max(axis=1, keepdims=True)
    exact = exact[rows, columns]
    between = (mine[rows, columns].astype(np.float64) + theirs[rows, columns]) / 2
    assert (np.abs(mine[rows, columns].astype(int) - theirs[rows, columns]) == 1).all()
    assert (np.abs(exact - between) <= 127 * 2.0**-22).all(), "codes differ away from ties"


def _name(kind: str, *parts: object) -> str:
    """The name of a job."""
    return f"{kind}-" + "-".join(map(str, parts))


def _half(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Values that the type and float16 both hold exactly (but for tiny bfloat16 ones)."""
    return ref.rounded(x, torch.float16).to(dtype)


def _inputs(seed: int, case: Product) -> Tensors:
    """Input, weight and bias of one product; the weight's codes come from the definition."""
    dtype, _, (rows, inner, outer), kind, bias = case
    rng = np.random.default_rng([seed, 70_000 + PRODUCTS.index(case)])
    weight = _half(ref.matrix(rng, "heavy", (outer, inner)) * np.float32(0.02), torch.float32)
    coded = ref.quantize(weight.numpy())
    out = {
        "x": ref.rounded(ref.matrix(rng, kind, (rows, inner)), DTYPES[dtype]),
        "weight": weight,
        "codes": torch.from_numpy(coded.codes),
        "stats": torch.from_numpy(coded.stats),
    }
    rows = ref.quantize(ref.array32(out["x"]), case[1])
    out |= {"row_codes": torch.from_numpy(rows.codes), "row_stats": torch.from_numpy(rows.stats)}
    if case[1] > 0:
        out["columns"] = torch.from_numpy(rows.outliers)
    if bias:
        noise = ref.matrix(rng, "gaussian", (1, outer))[0]
        out["bias"] = ref.rounded(noise, torch.bfloat16).to(DTYPES[dtype])
    return out


@pytest.fixture(scope="module")
def answers(
    upstream: None, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Reply]:
    """Upstream's answers to every product, embedding and training step, from one run."""
    batch = Batch(tmp_path_factory.mktemp("oracle"))
    batch.add("facts", "int8_facts", {})
    for case in PRODUCTS:
        tensors = _inputs(seed, case)
        batch.add(_name("quant", *case), "int8_quant", {"x": tensors["x"]}, threshold=case[1])
        del tensors["weight"]
        batch.add(_name("products", *case), "int8_products", tensors)
    for dtype in DTYPES:
        batch.add(f"embed-{dtype}", "embed8", *_embedding(seed, dtype)[:1], dtype=_torch(dtype))
        for weights in (False, True):
            tensors, options = _training(seed, dtype, weights)
            batch.add(_name("train", dtype, weights), "train_linear8", tensors, **options)
    return batch.run()


def _torch(dtype: str) -> str:
    """The name that torch gives a dtype."""
    return str(DTYPES[dtype]).removeprefix("torch.")


# ---- codes and products --------------------------------------------------------------------------


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda c: "-".join(map(str, c)))
def test_quant(answers: dict[str, Reply], seed: int, case: Product) -> None:
    """Scales and columns are the same bits in every type; codes and values too, but for ties."""
    theirs = answers[_name("quant", *case)]
    x = _inputs(seed, case)["x"]
    mine, facts = eight_bit.int8_quant({"x": x}, {"threshold": case[1]})
    assert facts["untouched"]
    assert facts["columns"] == theirs.facts["columns"] == (case[1] > 0)
    for key in ("stats", *(("columns",) if facts["columns"] else ())):
        assert_same_bits(mine[key], theirs[key], key)
    array = ref.array32(x)
    rows = ref.quantize(array, case[1])
    theirs_rows = ref.quantize(array, case[1], upstream_scales)
    assert_same_bits(mine["codes"], torch.from_numpy(rows.codes), "codes")
    assert_same_bits(theirs["codes"], torch.from_numpy(theirs_rows.codes), "upstream's codes")
    held = np.where(ref.outlier_mask(array, case[1])[None, :], 0, array)
    if case[1] == 0:
        _assert_ties_only(rows.codes, theirs_rows.codes, held)
    same = torch.from_numpy(rows.codes == theirs_rows.codes)
    assert_same_bits(mine["decoded"][same], theirs["decoded"][same], "decoded")


def _upstream_limit(
    tensors: Tensors, rows: ref.Rows, dtype: torch.dtype, *, mixed: bool
) -> np.ndarray:
    """How far upstream's product may be from that of the codes, by the roundings it does."""
    x = ref.array32(tensors["x"])
    weight = tensors["codes"].double().numpy() * ref.values(tensors["stats"])[:, None] / 127
    coded = rows.codes.astype(np.float64) * rows.stats.astype(np.float64)[:, None] / 127
    bias = ref.values(tensors["bias"])[None, :] if "bias" in tensors else 0.0
    product = coded @ weight.T
    limit = CONSTANT * np.abs(product) + ref.gamma(8) * (np.abs(product) + np.abs(bias))
    u = max(ref.ROUNDOFF[dtype], ref.U32)
    limit = limit + u * (np.abs(product + bias) + limit)
    if mixed and len(rows.outliers):
        beyond, heavy = x[:, rows.outliers].astype(np.float64), weight[:, rows.outliers]
        moved = np.abs(beyond) @ np.abs(heavy).T
        limit = limit + (u + ref.gamma(len(rows.outliers) + 5)) * moved
        limit = limit + u * (np.abs(product + bias + beyond @ heavy.T) + limit)
    return limit + 2 * ref.UNDERFLOW[dtype]


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda c: "-".join(map(str, c)))
def test_products(answers: dict[str, Reply], seed: int, case: Product) -> None:
    """Integer sums equal; the rest within the roundings of either side, ours the nearer one."""
    theirs = answers[_name("products", *case)]
    tensors = _inputs(seed, case)
    dtype, threshold = DTYPES[case[0]], case[1]
    mine, facts = eight_bit.int8_products(tensors, {})
    assert facts["sub"] == theirs.facts["sub"]
    for key in ("acc", "filled"):
        assert_same_bits(mine[key], theirs[key], key)
    if facts["sub"]:  # without outliers it is empty, of upstream in one dimension
        assert mine["sub"].numel() == theirs["sub"].numel()
        assert_same_bits(mine["sub"].reshape(theirs["sub"].shape), theirs["sub"], "sub")

    x = ref.array32(tensors["x"])
    rows = ref.quantize(x, threshold)
    inner = ref.Rows(rows.codes, rows.stats, rows.outliers[:0])
    codes, stats = tensors["codes"].numpy(), tensors["stats"].numpy()
    bias = ref.values(tensors["bias"]) if "bias" in tensors else None
    kinds = {
        "half": (inner, torch.float16, bias),
        "float": (inner, torch.float32, bias),
        "scaled": (inner, dtype, bias),
        "default": (inner, torch.float16, None),
        "mixed": (rows, dtype, bias),
    }
    for key, (held, kind, offset) in kinds.items():
        bound = ref.stored_bound(x, held, codes, stats, offset, kind)
        assert mine[key].dtype == theirs[key].dtype == kind, key
        assert mine[key].shape == theirs[key].shape, key
        assert bound.worst(mine[key]) <= 1, f"{key}: ours"
        given = tensors if offset is not None else _without_bias(tensors)
        limit = _upstream_limit(given, rows, kind, mixed=key == "mixed")
        error = np.abs(ref.values(theirs[key]) - bound.exact)
        assert (error <= limit).all(), f"{key}: upstream's, by {(error / limit).max()}"
        ours = np.linalg.norm(ref.values(mine[key]) - bound.exact)
        assert ours <= np.linalg.norm(error) * 1.05 + 1e-12, f"{key}: upstream's is nearer"


def _without_bias(tensors: Tensors) -> Tensors:
    """The same inputs for a call that takes no bias."""
    return {key: value for key, value in tensors.items() if key != "bias"}


# ---- layers and files ----------------------------------------------------------------------------

LAYERS = [
    ("fp16", 0.0, (6, 64, 16), True),
    ("fp16", 6.0, (6, 129, 33), True),
    ("bf16", 0.0, (8, 300, 70), False),
    ("bf16", 6.0, (8, 300, 70), True),
    ("fp32", 0.0, (4, 65, 17), True),
    ("fp32", 6.0, (4, 256, 48), False),
]
Layer = tuple[str, float, tuple[int, int, int], bool]


@dataclass
class Crossing:
    """Files and answers of both sides."""

    folder: Path
    replies: dict[str, Any]


def _layer(seed: int, case: Layer, path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and options of one layer; input, weight and bias fit float16."""
    dtype, threshold, (rows, inner, outer), bias = case
    rng = np.random.default_rng([seed, 80_000 + LAYERS.index(case)])
    tensors = {
        "weight": _half(ref.matrix(rng, "heavy", (outer, inner)) * np.float32(0.02), torch.float32),
        "input": _half(ref.matrix(rng, "planted", (rows, inner)), DTYPES[dtype]),
    }
    if bias:
        noise = ref.matrix(rng, "gaussian", (1, outer))[0]
        tensors["bias"] = ref.rounded(noise, torch.bfloat16).float()
    options = {"in_features": inner, "out_features": outer, "bias": bias, "threshold": threshold}
    return tensors, options | {"path": str(path / f"{_name('layer', *case)}.safetensors")}


@pytest.fixture(scope="module")
def ids(seed: int) -> torch.Tensor:
    """A batch of token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, LLAMA["vocab_size"], (2, 12), generator=generator)


@pytest.fixture(scope="module")
def from_upstream(
    upstream: None, seed: int, ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Crossing:
    """Layers and models that upstream quantized and saved."""
    folder = tmp_path_factory.mktemp("upstream8")
    batch = Batch(tmp_path_factory.mktemp("oracle"))
    for case in LAYERS:
        tensors, options = _layer(seed, case, folder)
        batch.add(_name("layer", *case), "write_linear8", tensors, **options)
    batch.add("llama", "make_llama", {}, seed=seed, config=LLAMA, path=str(folder / "llama"))
    for name, quantization in MODELS.items():
        batch.add(
            name,
            "write_llama8",
            {"ids": ids},
            source=str(folder / "llama"),
            path=str(folder / name),
            quantization=quantization,
        )
    return Crossing(folder, batch.run())


@dataclass
class Written:
    """What we wrote and computed, and what upstream made of our files."""

    mine: dict[str, tuple[Tensors, dict[str, Any]]]
    theirs: dict[str, Reply]


@pytest.fixture(scope="module")
def to_upstream(
    from_upstream: Crossing,
    seed: int,
    ids: torch.Tensor,
    tmp_path_factory: pytest.TempPathFactory,
) -> Written:
    """Layers and models that halfbyte quantized and saved, as upstream reads them."""
    folder = tmp_path_factory.mktemp("halfbyte8")
    batch = Batch(tmp_path_factory.mktemp("oracle"))
    mine: dict[str, tuple[Tensors, dict[str, Any]]] = {}
    for case in LAYERS:
        tensors, options = _layer(seed, case, folder)
        name = _name("layer", *case)
        mine[name] = eight_bit.write_linear8(tensors, options)
        batch.add(name, "read_linear8", tensors, **options)
    for name, quantization in MODELS.items():
        options = {
            "source": str(from_upstream.folder / "llama"),
            "path": str(folder / name),
            "quantization": quantization,
        }
        mine[name] = eight_bit.write_llama8({"ids": ids}, options)
        batch.add(name, "read_llama8", {"ids": ids}, path=options["path"])
    return Written(mine, batch.run())


def _check_state(mine: Tensors, theirs: Reply, weight: torch.Tensor | None = None) -> None:
    """The same keys and bits in the state dict; of the codes of one float weight but for ties."""
    keys = [key for key in mine if key.startswith("state/")]
    assert sorted(keys) == sorted(k for k in theirs.tensors if k.startswith("state/"))
    assert {"state/weight", "state/SCB", "state/weight_format"} <= set(keys)
    for key in keys:
        if weight is not None and key == "state/weight":
            _assert_ties_only(mine[key].numpy(), theirs[key].numpy(), weight.numpy())
        else:
            assert_same_bits(mine[key], theirs[key], key)


def _check_outputs(mine: Tensors, theirs: Reply, tensors: Tensors, case: Layer) -> None:
    """Either side within its own limit of the product of its codes."""
    kind, threshold = DTYPES[case[0]], case[1]
    assert mine["y"].dtype == theirs["y"].dtype == kind
    for key in ("y", "cube"):
        assert mine[key].shape == theirs[key].shape
    bound, _ = _product(mine, tensors, threshold, kind, ref.scales)
    assert bound.worst(mine["y"]) <= 1
    bound, limit = _product(theirs.tensors, tensors, threshold, kind, upstream_scales)
    assert (np.abs(ref.values(theirs["y"]) - bound.exact) <= limit).all()
    if threshold == 0:  # with outliers the rows share their columns, and the halves differ
        assert_same_bits(mine["cube"].reshape(mine["y"].shape), mine["y"], "3-D input")


def _product(
    state: Tensors,
    tensors: Tensors,
    threshold: float,
    kind: torch.dtype,
    scaling: Callable[[np.ndarray], np.ndarray],
) -> tuple[ref.Bounded, np.ndarray]:
    """The product of a layer's codes, with our bound and upstream's limit."""
    x = ref.array32(tensors["input"])
    rows = ref.quantize(x, threshold, scaling)
    given = {"x": tensors["input"], "codes": state["state/weight"], "stats": state["state/SCB"]}
    bias = None
    if "bias" in tensors:
        given["bias"] = tensors["bias"]
        bias = ref.values(tensors["bias"])
    codes, stats = given["codes"].numpy(), given["stats"].numpy()
    bound = ref.stored_bound(x, rows, codes, stats, bias, kind)
    return bound, _upstream_limit(given, rows, kind, mixed=True)


@pytest.mark.parametrize("case", LAYERS, ids=lambda c: "-".join(map(str, c)))
def test_same_layer(from_upstream: Crossing, to_upstream: Written, seed: int, case: Layer) -> None:
    """Quantized on either side from one float weight: the same state dict, the same product."""
    name = _name("layer", *case)
    mine, theirs = to_upstream.mine[name][0], from_upstream.replies[name]
    assert sorted(to_upstream.mine[name][1]["keys"]) == sorted(theirs.facts["keys"])
    tensors = _layer(seed, case, from_upstream.folder)[0]
    _check_state(mine, theirs, tensors["weight"])
    _check_outputs(mine, theirs, tensors, case)


@pytest.mark.parametrize("case", LAYERS, ids=lambda c: "-".join(map(str, c)))
def test_layer_from_upstream(from_upstream: Crossing, seed: int, case: Layer) -> None:
    """Upstream's file into a quantized layer, and into one that never was."""
    theirs = from_upstream.replies[_name("layer", *case)]
    tensors, options = _layer(seed, case, from_upstream.folder)
    mine, _ = eight_bit.read_linear8(tensors, options)
    _check_state(mine, theirs)
    _check_outputs(mine, theirs, tensors, case)

    fresh = eight_bit._layer(options)
    fresh.load_state_dict(load_file(options["path"]), strict=True)
    loaded, _ = eight_bit._apply(fresh, tensors)
    _check_state(loaded, theirs)
    assert_same_bits(loaded["y"], mine["y"], "product of the layer that never was quantized")


@pytest.mark.parametrize("case", LAYERS, ids=lambda c: "-".join(map(str, c)))
def test_layer_to_upstream(to_upstream: Written, seed: int, case: Layer, tmp_path: Path) -> None:
    """Our file in upstream's layer."""
    name = _name("layer", *case)
    mine, theirs = to_upstream.mine[name][0], to_upstream.theirs[name]
    _check_state(mine, theirs)
    _check_outputs(mine, theirs, _layer(seed, case, tmp_path)[0], case)


def _check_model(
    mine: tuple[Tensors, dict[str, Any]], theirs: Reply, name: str, ties: int = 0
) -> None:
    """The same layers, int8 weights and scales; logits within int8's own error.

    ``ties``: how many codes of a layer may differ, by one.
    """
    tensors, facts = mine
    assert sorted(facts["layers"]) == sorted(theirs.facts["layers"])
    assert facts["layers"], "nothing was quantized"
    skipped = MODELS[name].get("llm_int8_skip_modules", ["lm_head"])
    assert not any(layer.endswith(tuple(skipped)) for layer in facts["layers"])
    for layer in facts["layers"]:
        assert_same_bits(tensors[f"{layer}/SCB"], theirs[f"{layer}/SCB"], layer)
        apart = (tensors[f"{layer}/weight"].int() - theirs[f"{layer}/weight"].int()).abs()
        assert apart.max() <= 1, layer
        assert apart.sum() <= ties, layer
    # Upstream rounds these float32 activations to float16 and adds outliers to rounded sums.
    assert ref.relative(tensors["logits"], ref.values(theirs["logits"])) < 0.01


@pytest.mark.parametrize("name", MODELS)
def test_same_model(from_upstream: Crossing, to_upstream: Written, name: str) -> None:
    """Transformers quantizes a model to the same codes with either package, but for ties."""
    _check_model(to_upstream.mine[name], from_upstream.replies[name], name, ties=20)


@pytest.mark.parametrize("name", MODELS)
def test_model_from_upstream(from_upstream: Crossing, ids: torch.Tensor, name: str) -> None:
    """We load what upstream saved."""
    mine = eight_bit.read_llama8({"ids": ids}, {"path": str(from_upstream.folder / name)})
    _check_model(mine, from_upstream.replies[name], name)


@pytest.mark.parametrize("name", MODELS)
def test_model_to_upstream(to_upstream: Written, name: str) -> None:
    """Upstream loads what we saved."""
    _check_model(to_upstream.mine[name], to_upstream.theirs[name], name)


# ---- embeddings and training ---------------------------------------------------------------------


def _embedding(seed: int, dtype: str) -> tuple[Tensors, dict[str, Any]]:
    """A table whose values fit float16, and ids with repetitions."""
    rng = np.random.default_rng([seed, 90_000 + list(DTYPES).index(dtype)])
    weight = _half(ref.matrix(rng, "heavy", (37, 65)), DTYPES[dtype])
    ids = torch.from_numpy(rng.integers(0, 37, (3, 11)))
    return {"weight": weight, "ids": ids}, {"dtype": _torch(dtype)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(answers: dict[str, Reply], seed: int, dtype: str) -> None:
    """The same codes; rows apart by the order of two float32 products, before one rounding."""
    theirs = answers[f"embed-{dtype}"]
    tensors, options = _embedding(seed, dtype)
    mine, _ = eight_bit.embed8(tensors, options)
    assert_same_bits(mine["stats"], theirs["stats"], "stats")
    weight = ref.array32(tensors["weight"])
    _assert_ties_only(mine["codes"].numpy(), theirs["codes"].numpy(), weight)
    assert mine["rows"].dtype == theirs["rows"].dtype == DTYPES[dtype]
    same = (mine["codes"] == theirs["codes"]).all(1)[tensors["ids"]]
    assert same.float().mean() > 0.5
    a, b = ref.values(mine["rows"][same]), ref.values(theirs["rows"][same])
    near = 2 * ref.ROUNDOFF[DTYPES[dtype]] + 4 * ref.U32
    assert (np.abs(a - b) <= near * np.abs(b) + ref.UNDERFLOW[DTYPES[dtype]]).all()


def _training(seed: int, dtype: str, weights: bool) -> tuple[Tensors, dict[str, Any]]:
    """One step of a layer with a float16-sized weight, and the gradient of its output."""
    rng = np.random.default_rng([seed, 95_000 + 2 * list(DTYPES).index(dtype) + weights])
    rows, inner, outer = 12, 96, 40
    kind = DTYPES[dtype]
    tensors = {
        "weight": _half(ref.matrix(rng, "gaussian", (outer, inner)) * np.float32(0.05), kind),
        "bias": ref.rounded(ref.matrix(rng, "gaussian", (1, outer))[0], torch.bfloat16).to(kind),
        "input": _half(ref.matrix(rng, "planted", (rows, inner)), kind),
        "grad": ref.rounded(ref.matrix(rng, "gaussian", (rows, outer)), kind),
    }
    options = {"in_features": inner, "out_features": outer, "threshold": 6.0}
    return tensors, options | {"has_fp16_weights": weights}


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_training(answers: dict[str, Reply], seed: int, dtype: str, weights: bool) -> None:
    """Gradients of input, bias and (when it is kept in floats) weight."""
    theirs = answers[_name("train", dtype, weights)]
    tensors, options = _training(seed, dtype, weights)
    mine, facts = eight_bit.train_linear8(tensors, options)
    assert facts["weight"] == theirs.facts["weight"] == weights
    kind = DTYPES[dtype]
    u = max(ref.ROUNDOFF[kind], ref.U32)
    x, w, grad = (ref.values(tensors[key]) for key in ("input", "weight", "grad"))
    weight, theirs_weight = (
        coded.codes * coded.stats.astype(np.float64)[:, None] / 127
        for coded in (
            ref.quantize(w.astype(np.float32), 0.0, scaling)
            for scaling in (ref.scales, upstream_scales)
        )
    )

    # Upstream's product in training does not quantize the input; its error is the weight's alone.
    bound = ref.linear_bound(x, w, ref.values(tensors["bias"]), 6.0, kind)
    assert bound.worst(mine["y"]) <= 1
    assert bound.worst(theirs["y"]) <= 1

    exact = {"input": (grad, weight.T, theirs_weight.T), "weight": (grad.T, x.T, x.T)}
    for key in ("input", *(("weight",) if weights else ())):
        left, right, other = exact[key]
        assert mine[key].shape == theirs[key].shape
        assert ref.product_bound(left, right, 3, kind).worst(mine[key]) <= 1, key
        # Theirs multiplies a weight rounded to the input's type.
        loose = ref.product_bound(left, other, 3, kind)
        limit = loose.limit + u * (np.abs(left) @ np.abs(other).T) + 2 * u * np.abs(loose.exact)
        assert (np.abs(ref.values(theirs[key]) - loose.exact) <= limit).all(), key
    total = grad.sum(0)
    for side in (mine["bias"], theirs["bias"]):
        limit = (2 * u + ref.gamma(12)) * np.abs(grad).sum(0)
        assert (np.abs(ref.values(side) - total) <= limit).all()


# ---- signatures ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    """Ours."""
    return eight_bit.int8_facts({}, {})[1]


def test_signatures(answers: dict[str, Reply], facts: dict[str, Any]) -> None:
    """Every argument of every class and function, its kind and its default."""
    theirs = answers["facts"].facts["signatures"]
    assert len(theirs) > 15
    # Upstream's default state of this one is the class itself, which its own body cannot use.
    theirs["MatMul8bitFp.forward"][-1][-1] = "None"
    for name, arguments in theirs.items():
        assert facts["signatures"].get(name) == arguments, name


def test_schemas(answers: dict[str, Reply], facts: dict[str, Any]) -> None:
    """The ops, letter by letter but for the name of what an ``out`` argument aliases."""
    theirs = answers["facts"].facts["schemas"]
    assert len(theirs) == len(eight_bit.INT8_OPS) + 1
    for name, schema in theirs.items():
        written = [
            re.sub(r"Tensor\([^)]*\)", "Tensor(!)", s) for s in (facts["schemas"][name], schema)
        ]
        assert written[0] == written[1]


def test_state(answers: dict[str, Reply], facts: dict[str, Any]) -> None:
    """Fields and defaults of MatmulLtState, what a layer sets there, and where classes live."""
    for key in ("fields", "state", "pool", "modules"):
        assert facts[key] == answers["facts"].facts[key], key


def test_double_quant_agrees_with_the_definition() -> None:
    """Upstream has no CPU kernel for this one, so the definition is what is left to compare to."""
    rng = np.random.default_rng(3)
    for dtype in DTYPES.values():
        x = ref.rounded(ref.matrix(rng, "planted", (9, 70)), dtype)
        rows, columns = ref.quantize_both(ref.array32(x), 6.0)
        got = eight_bit.F.int8_double_quant(x, threshold=6.0)
        expected = (rows.codes, columns.codes, rows.stats, columns.stats, rows.outliers)
        for name, mine, array in zip(
            ("row codes", "column codes", "row stats", "column stats", "columns"),
            got,
            expected,
            strict=True,
        ):
            assert_same_bits(mine, torch.from_numpy(array), name)
