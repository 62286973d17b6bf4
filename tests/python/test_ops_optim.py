"""The optimizer ops: schemas, rules, checks before changes, groups, autograd, tracing."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import reference as ref
import torch
from halfbyte import _ops
from halfbyte import functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

ops = torch.ops.halfbyte
OP32, OP8 = ops.optimizer_update_32bit, ops.optimizer_update_8bit_blockwise

# As upstream bitsandbytes 0.50.2 has them under torch.ops.bitsandbytes.
UPSTREAM = """
optimizer_update_32bit(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, float beta3, float alpha, float eps, float weight_decay, int step, float lr, float gnorm_scale, bool skip_zeros=False) -> ()
optimizer_update_8bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr, Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, float gnorm_scale, bool skip_zeros=False) -> ()
""".strip().splitlines()  # noqa: E501

FREE = "schedule_free_adamw"
NAMES = ["adam", "lamb", "momentum", "lars", "rmsprop", "adagrad", "lion", "ademamix", FREE]
SAME = {"lamb": "adam", "lars": "momentum"}
TWO = ("adam", "lamb", "ademamix", FREE)

B1, B2, B3, ALPHA, EPS = 0.9, 0.99, 0.999, 2.0, 1e-6
RATES = (B1, B2, B3, ALPHA, EPS)
WD, LR, SCALE = 0.1, 1e-2, 0.5
Q1, Q2 = (F.create_dynamic_map(signed).to(ref.DEVICE) for signed in (True, False))
SIZES = [(), (1,), (255,), (256,), (3, 257), (0,), (5, 7, 11), (4099,)]


@pytest.mark.parametrize("line", UPSTREAM, ids=lambda line: line.partition("(")[0])
def test_schemas_are_upstreams(line):
    name = line.partition("(")[0]
    got = str(getattr(ops, name).default._schema).removeprefix("halfbyte::")
    for i in range(8):  # only the sets matter, not their names
        line = line.replace(f"(a{i}!)", "(!)")
        got = got.replace(f"(a{i}!)", "(!)").replace(f"(${i}! -> )", "(!)")
    assert got == line


# ---- what a parameter needs ----------------------------------------------------------------------


def blocks(n: int) -> int:
    return -(-n // 256)


def states(name: str, shape: tuple[int, ...], bits: int, seed: int = 5) -> dict[str, Tensor]:
    """Random states as they may stand in the middle of training."""
    generator = torch.Generator().manual_seed(seed)
    n = torch.Size(shape).numel()
    first = (2, *shape) if name == "ademamix" else shape
    leading = (2,) if name == "ademamix" else ()
    made = {}
    for key, two in (("1", False), ("2", True)):
        if two and name not in TWO:
            continue
        whole = shape if two else first
        if bits == 32 or (name == FREE and key == "1"):
            made["state" + key] = torch.rand(whole, generator=generator)
        else:
            made["state" + key] = torch.randint(0, 256, whole, generator=generator).byte()
            scales = torch.rand((*(() if two else leading), blocks(n)), generator=generator)
            made["absmax" + key] = scales
    return made


def single(name: str, bits: int, g: Tensor, p: Tensor, s: dict[str, Tensor], **more: Any) -> None:
    """One step through the functions of upstream."""
    step, wd, skip = more.get("step", 3), more.get("wd", WD), more.get("skip", False)
    if bits == 32:
        F.optimizer_update_32bit(
            name, g, p, s["state1"], B1, EPS, step, LR, s.get("state2"), B2, B3, ALPHA, wd, SCALE,
            more.get("unorm"), more.get("max_unorm", 0.0), skip,
        )  # fmt: skip
        return
    F.optimizer_update_8bit_blockwise(
        name, g, p, s["state1"], s.get("state2"), *RATES, step, LR, Q1,
        Q2 if "state2" in s else None, s.get("absmax1", torch.zeros(0)), s.get("absmax2"),
        wd, SCALE, skip,
    )  # fmt: skip


def group(
    name: str, bits: int, g: list[Tensor], p: list[Tensor], s: list[dict[str, Tensor]], **more: Any
) -> None:
    """One step of all through the ops for groups."""

    def column(key: str) -> list[Tensor]:
        return [each[key] for each in s if key in each]

    step, wd, skip = more.get("step", 3), more.get("wd", WD), more.get("skip", False)
    first = (name, g, p, column("state1"), column("state2"))
    rest = (*RATES, wd, step, LR, SCALE, skip, more.get("streams", []), more.get("seed", 0))
    extra = more.get("compensation", [])
    if bits == 32:
        OP32.group(*first, more.get("unorm", []), extra, more.get("max_unorm", 0.0), *rest)
    else:
        scales = (column("absmax1"), column("absmax2"))
        OP8.group(*first, *scales, extra, Q1, Q2 if name in TWO else None, *rest)


def copies(tensors: Any) -> Any:
    if isinstance(tensors, dict):
        return {key: value.clone() for key, value in tensors.items()}
    return [copies(t) if isinstance(t, dict) else t.clone() for t in tensors]


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(ref.raw(a), ref.raw(b))


# ---- the rules -----------------------------------------------------------------------------------


def formula(name: str, g: Tensor, p: Tensor, s1: Tensor, s2: Tensor | None, step: int, wd: float):
    """The parameter, the states and the update without the learning rate, in float64."""
    name = SAME.get(name, name)
    g, p, s1 = SCALE * g.double(), p.double(), s1.double()
    s2 = s2.double() if s2 is not None else None
    c1, c2 = 1 - B1**step, math.sqrt(1 - B2**step)
    if name == "lion":
        u = (B1 * s1 + (1 - B1) * g).sign()
        return p * (1 - LR * wd) - LR * u, B2 * s1 + (1 - B2) * g, None, u
    if name == "adam":
        s1, s2 = B1 * s1 + (1 - B1) * g, B2 * s2 + (1 - B2) * g * g
        u = s1 / (s2.sqrt() + EPS * c2)
        return p * (1 - LR * wd) - LR * c2 / c1 * u, s1, s2, u
    if name == FREE:
        s2 = B2 * s2 + (1 - B2) * g * g
        u = g / (s2.sqrt() / c2 + EPS) + wd * p
        return p + ALPHA * (s1 - p) - LR * (1 - B1 * (1 - ALPHA)) * u, s1 - LR * u, s2, u
    if name == "ademamix":
        m1, m2 = B1 * s1[0] + (1 - B1) * g, B3 * s1[1] + (1 - B3) * g
        s2 = B2 * s2 + (1 - B2) * g * g
        u = (m1 / c1 + ALPHA * m2) / (s2.sqrt() / c2 + EPS)
        return p * (1 - LR * wd) - LR * u, torch.stack((m1, m2)), s2, u
    g = g + wd * p
    if name == "momentum":
        s1 = g if step == 1 else B1 * s1 + g
        return p - LR * s1, s1, None, s1
    s1 = s1 + g * g if name == "adagrad" else B1 * s1 + (1 - B1) * g * g
    u = g / (s1.sqrt() + EPS)
    return p - LR * u, s1, None, u


@pytest.mark.parametrize("wd", [0.0, WD])
@pytest.mark.parametrize("step", [1, 7])
@pytest.mark.parametrize("name", NAMES)
def test_rules_with_32_bit_states(name, step, wd):
    shape = (37, 41)
    g, p = ref.samples(shape, seed=1), ref.samples(shape, seed=2)
    s = states(name, shape, 32)
    want = formula(name, g, p, s["state1"], s.get("state2"), step, wd)
    single(name, 32, g, p, s, step=step, wd=wd)
    for got, exact in zip((p, s["state1"], s.get("state2")), want, strict=False):
        if exact is not None:
            torch.testing.assert_close(got.double(), exact, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_rules_with_8_bit_states(name):
    shape = (5, 301)
    g, p = ref.samples(shape, seed=1), ref.samples(shape, seed=2)
    s = states(name, shape, 8)
    n, parts = p.numel(), 2 if name == "ademamix" else 1

    def decode(key: str, code: Tensor, whole: tuple[int, ...], parts: int) -> Tensor:
        flat = [
            ref.decode_8bit(q.flatten(), a, 256, code, torch.float32)
            for q, a in zip(
                s["state" + key].reshape(parts, n),
                s["absmax" + key].reshape(parts, -1),
                strict=True,
            )
        ]
        return torch.stack(flat).reshape(whole)

    first = (2, *shape) if parts == 2 else shape
    if name in ("rmsprop", "adagrad"):  # second moments are not negative
        s["state1"] = s["state1"].clamp(min=127)
    s1 = s["state1"].clone() if name == FREE else decode("1", Q1, first, parts)
    s2 = decode("2", Q2, shape, 1) if name in TWO else None
    want_p, want_1, want_2, _ = formula(name, g, p, s1, s2, 3, WD)
    single(name, 8, g, p, s)
    torch.testing.assert_close(p.double(), want_p, rtol=1e-5, atol=1e-6)
    for key, want, code, whole, count in (
        ("1", want_1, Q1, first, parts),
        ("2", want_2, Q2, shape, 1),
    ):
        if want is None:
            continue
        if "absmax" + key not in s:
            torch.testing.assert_close(s["state" + key].double(), want, rtol=1e-5, atol=1e-6)
            continue
        for part, absmax in zip(
            want.reshape(count, n), s["absmax" + key].reshape(count, -1), strict=True
        ):
            _, exact = ref.blocked(part, 256)
            torch.testing.assert_close(absmax, exact, rtol=1e-5, atol=1e-7)
        got = decode(key, code, whole, count)
        # No further off than half the widest gap of the code, of the block's scale.
        widest = (code[1:] - code[:-1]).max() / 2
        scale = s["absmax" + key].reshape(count, -1).repeat_interleave(256, 1)[:, :n]
        assert ((got - want).abs().reshape(count, n) <= (widest + 1e-5) * scale).all()


@pytest.mark.parametrize("name", ["lamb", "lars", "rmsprop", "lion", "adagrad", "ademamix"])
def test_trust_ratio(name):
    shape = (37, 41)
    bound = 1e-3
    g, p = ref.samples(shape, seed=1), ref.samples(shape, seed=2)
    s = states(name, shape, 32)
    want, *_, update = formula(name, g, p, s["state1"], s.get("state2"), 3, 0.0)
    before, norm = p.double(), torch.full((1,), -1.0)
    single(name, 32, g, p, s, wd=0.0, max_unorm=bound, unorm=norm)
    if name in ("lamb", "lars", "rmsprop"):
        torch.testing.assert_close(norm.double(), update.norm()[None], rtol=1e-5, atol=0)
        ratio = bound * before.norm() / update.norm()
        assert ratio < 0.5
        want = before + ratio * (want - before)
    else:
        assert norm.item() == -1
    torch.testing.assert_close(p.double(), want, rtol=1e-6, atol=1e-7)


def test_a_norm_that_is_passed_counts():
    p = [torch.ones(100) for _ in range(3)]
    for each, norm in zip(p, (10.0, 5.0, -1.0), strict=True):
        s1, unorm = torch.zeros(100), torch.zeros(1)
        OP32(
            "momentum", torch.ones(100), each, s1, None, unorm, 0.01, norm, *RATES, 0.0, 1, 1.0, 1.0
        )
        assert unorm.item() == pytest.approx(10)
    assert (1 - p[0]).tolist() == pytest.approx([0.01] * 100, rel=1e-4)
    assert (1 - p[1]).tolist() == pytest.approx([0.005] * 100, rel=1e-4)
    assert same(p[2], p[0])  # the norm of 100 ones is 10


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", NAMES)
def test_skip_zeros(name, bits):
    g, p, s = torch.zeros(600), ref.samples((600,)), states(name, (600,), bits)
    s = {k: v if v.dtype == torch.float32 else v.fill_(200) for k, v in s.items()}
    s = {k: v.fill_(0.5) if k.startswith("absmax") else v for k, v in s.items()}
    old, old_s = p.clone(), copies(s)
    g[::3] = 1.0
    single(name, bits, g, p, s, skip=True)
    still = g == 0
    assert torch.equal(p[still], old[still])
    assert not (p[~still] == old[~still]).any()
    if bits == 32:
        for key, value in s.items():
            rows, before = value.reshape(-1, 600), old_s[key].reshape(-1, 600)
            assert torch.equal(rows[:, still], before[:, still])


# ---- layouts and dtypes --------------------------------------------------------------------------


def layouts() -> dict[str, Any]:
    def spread(t: Tensor) -> Tensor:
        wide = torch.zeros(t.shape[0], 2 * t.shape[1] + 3, dtype=t.dtype)
        wide[:, 1 : 2 * t.shape[1] + 1 : 2] = t
        return wide[:, 1 : 2 * t.shape[1] + 1 : 2]

    def shifted(t: Tensor) -> Tensor:
        return torch.cat((torch.zeros(1, dtype=t.dtype), t.flatten()))[1:].view(t.shape)

    return {"transposed": lambda t: t.t().contiguous().t(), "spread": spread, "shifted": shifted}


@pytest.mark.parametrize("where", ["p", "g", "state"])
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("bits", [8, 32])
def test_strides_do_not_matter(bits, layout, where):
    shape, lay = (61, 67), layouts()[layout]
    g, p, s = ref.samples(shape, seed=1), ref.samples(shape, seed=2), states("adam", shape, bits)
    g2, p2, s2 = g.clone(), p.clone(), copies(s)
    single("adam", bits, g, p, s)
    if where == "g":
        g2 = lay(g2)
    elif where == "p":
        p2 = lay(p2)
    else:
        s2["state1"], s2["state2"] = lay(s2["state1"]), lay(s2["state2"])
    pointer = p2.data_ptr()
    single("adam", bits, g2, p2, s2)
    assert p2.data_ptr() == pointer
    assert same(p, p2)
    for key in s:
        assert same(s[key], s2[key]), key


@pytest.mark.parametrize("bits", [8, 32])
def test_expanded_gradient(bits):
    p, s = ref.samples((61, 67)), states("adam", (61, 67), bits)
    p2, s2 = p.clone(), copies(s)
    row = ref.samples((1, 67), seed=1)
    single("adam", bits, row.expand(61, 67), p, s)
    single("adam", bits, row.repeat(61, 1), p2, s2)
    assert same(p, p2)
    assert all(same(s[key], s2[key]) for key in s)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("gradient", ref.FLOATS, ids=str)
@pytest.mark.parametrize("parameter", ref.FLOATS, ids=str)
def test_dtypes(parameter, gradient, bits):
    g = ref.samples((1000,), gradient, 1)
    p, s = ref.samples((1000,), parameter, 2), states("adam", (1000,), bits)
    exact, s2 = p.float(), copies(s)
    single("adam", bits, g, p, s)
    single("adam", bits, g.float(), exact, s2)
    assert p.dtype == parameter
    assert same(p, exact.to(parameter))
    assert all(same(s[key], s2[key]) for key in s)


# ---- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", NAMES)
def test_a_group_is_its_members(name, bits):
    p, g, s = [], [], []
    for i in range(304):
        shape = SIZES[i % len(SIZES)]
        p.append(ref.samples(shape, ref.FLOATS[i % 3], i))
        g.append(ref.samples(shape, ref.FLOATS[i % 2], i + 1000))
        s.append(states(name, shape, bits, i))
    p2, s2 = copies(p), copies(s)
    group(name, bits, g, p, s)
    for each in zip(g, p2, s2, strict=True):
        single(name, bits, *each)
    for i in range(304):
        assert same(p[i], p2[i]), i
        assert all(same(s[i][key], s2[i][key]) for key in s[i]), i


def test_a_group_with_norms():
    shapes = [(300,), (17, 19), (1,)]
    p, g = [ref.samples(s, seed=1) for s in shapes], [ref.samples(s, seed=2) for s in shapes]
    s = [states("lamb", shape, 32) for shape in shapes]
    p2, s2, unorm = copies(p), copies(s), [torch.zeros(1) for _ in shapes]
    group("lamb", 32, g, p, s, max_unorm=0.01, unorm=unorm)
    for i in range(3):
        one = torch.zeros(1)
        single("lamb", 32, g[i], p2[i], s2[i], max_unorm=0.01, unorm=one)
        assert same(one, unorm[i])
        assert one > 0
        assert same(p[i], p2[i])


def test_an_empty_group():
    fast_group([], [])
    assert group("adam", 8, [], [], []) is None


def calm_states(shape: tuple[int, ...], bits: int) -> dict[str, Tensor]:
    """With second moments of about 1, so that updates are small."""
    s = states("adam", shape, bits)
    s["state2"].fill_(1.0 if bits == 32 else 255)
    s.get("absmax2", s["state2"]).fill_(1.0)
    return s


@pytest.mark.parametrize("bits", [8, 32])
def test_stochastic_rounding(bits):
    n = 20_000
    shape, bf16 = (n,), torch.bfloat16

    def run(streams: list[int], seed: int = 1, step: int = 3) -> list[Tensor]:
        p = [torch.ones(shape, dtype=bf16) for _ in range(2)]
        s = [calm_states(shape, bits) for _ in p]
        g = [ref.samples(shape, seed=1)] * 2
        group("adam", bits, g, p, s, streams=streams, seed=seed, step=step)
        return p

    nearest, first = run([]), run([7, 8])
    assert same(nearest[0], nearest[1])
    assert not same(first[0], first[1])  # other streams
    assert all(map(same, first, run([7, 8])))
    assert same(first[0], run([7, 9])[0])
    assert not same(first[0], run([7, 8], seed=2)[0])
    # Every value is a neighbour of the exact one, and on average it is the exact one.
    exact = torch.ones(shape)
    single("adam", bits, ref.samples(shape, seed=1), exact, calm_states(shape, bits))
    assert ((first[0].float() - exact).abs() < 2**-7).all()
    assert abs((first[0].double() - exact.double()).mean()) < 5 * 2**-8 / math.sqrt(n)


@pytest.mark.parametrize("bits", [8, 32])
def test_compensated_rounding(bits):
    shape = (700,)
    p, c = torch.ones(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16)
    exact, lost = torch.ones(shape), torch.ones(shape, dtype=torch.bfloat16)
    s = [calm_states(shape, bits) for _ in range(3)]
    for step in range(1, 21):
        g = 1e-3 * ref.samples(shape, seed=step)
        group("adam", bits, [g], [p], s[:1], compensation=[c], step=step)
        single("adam", bits, g, exact, s[1], step=step)
        single("adam", bits, g, lost, s[2], step=step)
    assert c.any()
    error = (p.float() + c.float() - exact).abs().max()
    assert error < (lost.float() - exact).abs().max() / 10


# ---- everything is checked before anything is changed --------------------------------------------


def bad_groups(bits: int) -> dict[str, tuple[Any, type[Exception], str]]:
    """Changes that spoil the last of three parameters, and what is said of each."""

    def put(container: str, key: Any, value: Any) -> Any:
        def change(call: dict[str, Any]) -> None:
            target = call[container]
            if key is None:
                call[container] = value(target) if callable(value) else value
            else:
                target[2][key] = value(target[2][key])

        return change

    def last(container: str, value: Any) -> Any:
        def change(call: dict[str, Any]) -> None:
            call[container][2] = value(call[container][2])

        return change

    def share(call: dict[str, Any]) -> None:
        call["p"][2] = call["p"][0]

    def share_parts(call: dict[str, Any]) -> None:
        memory = torch.ones(900)
        call["p"][0], call["p"][2] = memory[:500], memory[400:].view(500)

    def share_columns(call: dict[str, Any]) -> None:
        memory = torch.ones(500, 3)
        call["p"][0], call["p"][2] = memory[:, 1], memory[:, 1:].t()[0]

    def grad_is_parameter(call: dict[str, Any]) -> None:
        call["g"][2] = call["p"][2]

    def grad_is_other_parameter(call: dict[str, Any]) -> None:
        call["g"][0] = call["p"][2]

    def share_states(call: dict[str, Any]) -> None:
        call["s"][2]["state1"] = call["s"][1]["state1"]

    state = "float32" if bits == 32 else "uint8"
    other = torch.uint8 if bits == 32 else torch.float32
    both = {"streams": [1, 2, 3], "compensation": [torch.zeros(500)] * 3}
    cases = {
        "name": (put("name", None, "sgd"), ValueError, "optimizer_name must be one of adam, "),
        "step": (put("step", None, 0), ValueError, "step must count from 1, got 0"),
        "p dtype": (last("p", Tensor.double), ValueError, "parameter 2 must be float32, float16"),
        "g dtype": (last("g", Tensor.int), ValueError, "g of parameter 2 must be float32, float16"),
        "complex": (
            last("g", lambda t: t + 1j),
            TypeError,
            "g of parameter 2: tensors of complex64 are not",
        ),
        "g shape": (
            *(last("g", lambda t: t.view(5, 100)), ValueError),
            r"g of parameter 2 must have the parameter's shape \[500\], got \[5, 100\]",
        ),
        "g count": (put("g", None, lambda g: g[:2]), ValueError, "g must list 3 tensors .*, got 2"),
        "state1 dtype": (
            *(put("s", "state1", lambda t: t.to(other)), TypeError),
            f"state1 of parameter 2 must be {state}, got ",
        ),
        "state1 length": (
            *(put("s", "state1", lambda t: t[:499]), ValueError),
            "state1 of parameter 2 must hold 500 elements, got 499",
        ),
        "state2 length": (
            *(put("s", "state2", lambda t: torch.cat((t, t))), ValueError),
            "state2 of parameter 2 must hold 500 elements, got 1000",
        ),
        "no state2": (
            *(put("s", None, lambda s: [{**x} for x in s if x.pop("state2") is not None]),),
            *(ValueError, "state2 must list 3 tensors for these parameters and adam, got 0"),
        ),
        "expanded p": (
            *(last("p", lambda t: t[:1].expand(500)), ValueError),
            "parameter 2 must have a place of its own for every element",
        ),
        "expanded state": (
            *(put("s", "state1", lambda t: t[:1].expand(500)), ValueError),
            "state1 of parameter 2 must have a place of its own",
        ),
        "p twice": (share, ValueError, "parameter [02] must not overlap parameter [02]"),
        "p overlap": (share_parts, ValueError, "parameter [02] must not overlap parameter [02]"),
        "columns": (share_columns, ValueError, "parameter [02] must not overlap parameter [02]"),
        "g is p": (grad_is_parameter, ValueError, "parameter 2 must not overlap g of parameter 2"),
        "g is other p": (
            *(grad_is_other_parameter, ValueError),
            "parameter 2 must not overlap g of parameter 0",
        ),
        "state twice": (
            *(share_states, ValueError),
            "state1 of parameter [12] must not overlap state1 of parameter [12]",
        ),
        "streams": (
            *(put("streams", None, [1, 2]), ValueError),
            "streams must hold 3 integers for these parameters or none, got 2",
        ),
        "both roundings": (lambda call: call.update(both), ValueError, "got both"),
        "compensation": (
            *(put("compensation", None, [torch.zeros(500, dtype=torch.bfloat16)] * 3), TypeError),
            "parameter 0 must be bfloat16 to be compensated, got float32",
        ),
        "meta": (last("g", lambda t: t.to("meta")), ValueError, "same device, got cpu, meta"),
    }
    if bits == 8:
        cases["absmax1 length"] = (
            *(put("s", "absmax1", lambda t: t[:1]), ValueError),
            "absmax1 of parameter 2 must hold 2 elements, got 1",
        )
        cases["absmax2 dtype"] = (
            *(put("s", "absmax2", Tensor.half), TypeError),
            "absmax2 of parameter 2 must be float32, got float16",
        )
    else:
        cases["unorm_vec"] = (
            *(put("unorm", None, [torch.zeros(2)] * 3), ValueError),
            "unorm_vec of parameter 0 must hold 1 elements, got 2",
        )
    return cases


@pytest.mark.parametrize(
    ("bits", "case"), [(bits, case) for bits in (8, 32) for case in bad_groups(bits)]
)
def test_refusals_change_nothing(bits, case):
    change, error, message = bad_groups(bits)[case]
    call: dict[str, Any] = {
        "name": "adam",
        "p": [torch.ones(500) * i for i in range(3)],
        "g": [torch.ones(500) * i for i in range(3)],
        "s": [states("adam", (500,), bits, i) for i in range(3)],
        "step": 3,
        "unorm": [],
        "streams": [],
        "compensation": [],
    }
    change(call)
    every = [*call["p"], *call["g"], *(t for s in call["s"] for t in s.values())]
    before = [t.clone() for t in every]
    rest = {k: call[k] for k in ("step", "unorm", "streams", "compensation")}
    with pytest.raises((RuntimeError, ValueError)) as raised:
        group(call["name"], bits, call["g"], call["p"], call["s"], **rest)
    meant = _ops.failure(raised.value)
    assert type(meant) is error
    assert re.search(message, str(meant))
    for now, then in zip(every, before, strict=True):
        assert now.is_meta or same(now, then)


@pytest.mark.parametrize("case", ["short", "descending", "missing"])
def test_codes_are_checked(case):
    p, s = torch.ones(500), states("adam", (500,), 8)
    q1, q2 = Q1, Q2
    if case == "short":
        q1, message = Q1[:16], "qmap1 must hold 256 values, got 16"
    elif case == "descending":
        q2, message = Q2.flip(0), "qmap2: code must hold finite values in ascending order"
    else:
        q2, message = None, "qmap2 must hold 256 values for adam, got none"
    with pytest.raises(ValueError, match=message):
        F.optimizer_update_8bit_blockwise(
            "adam", torch.ones(500), p, s["state1"], s["state2"], *RATES, 1, LR, q1, q2,
            s["absmax1"], s["absmax2"],
        )  # fmt: skip
    assert torch.equal(p, torch.ones(500))


def test_functions_name_no_parameter():
    p = torch.ones(500)
    with pytest.raises(ValueError, match=r"^optimizer_update_32bit: state2 must be given for adam"):
        F.optimizer_update_32bit("adam", p * 1, p, p * 1, B1, EPS, 1, LR)
    with pytest.raises(ValueError, match="state1 must hold 500 elements, got 1000"):
        F.optimizer_update_32bit("lion", p * 1, p, torch.ones(1000), B1, EPS, 1, LR)
    with pytest.raises(NotImplementedError, match="on dense tensors, got a sparse one"):
        F.optimizer_update_32bit("lion", p.to_sparse(), p, p * 1, B1, EPS, 1, LR)
    with pytest.raises(TypeError, match="optimizer_name"):
        F.optimizer_update_32bit(3, p * 1, p, p * 1, B1, EPS, 1, LR)
    assert torch.equal(p, torch.ones(500))


def test_views_that_share_no_element_are_fine():
    # A projection that was cut into columns, and rows of one buffer.
    memory, rows = ref.samples((64, 96)), ref.samples((3, 500), seed=3)
    want = memory.clone()
    p = [memory[:, :32], memory[:, 32:64], memory[:, 64:], *rows]
    g = [ref.samples(tuple(x.shape), seed=4) for x in p]
    s = [states("adam", tuple(x.shape), 8) for x in p]
    apart, s2 = [x.clone() for x in p], copies(s)
    group("adam", 8, g, p, s)
    group("adam", 8, g, apart, s2)
    assert all(map(same, p, apart))
    assert same(memory, torch.cat(apart[:3], 1))
    assert not torch.equal(memory, want)


def test_one_gradient_for_several_parameters():
    g = ref.samples((500,))
    p, s = [torch.ones(500) for _ in range(4)], [states("lion", (500,), 8) for _ in range(4)]
    group("lion", 8, [g] * 4, p, s)
    assert all(same(x, p[0]) for x in p)


def test_memory_does_not_grow(python):
    # Every handle that the dispatcher hands over is freed, also by calls that fail.
    python("""
import resource, torch
import halfbyte
op = torch.ops.halfbyte.optimizer_update_32bit.group
p, g, s1, s2 = ([torch.ones(1000) for _ in range(50)] for _ in range(4))
rest = (0.0, 0.9, 0.99, 0.0, 0.0, 1e-8, 0.0, 1, 1e-3, 1.0, False)
def call():
    op("adam", g, p, s1, s2, [], [], *rest, list(range(50)), 0)
    strided = [x[::2] for x in p]
    half = [x[:500] for x in s1]
    op("momentum", [x[::2] for x in g], strided, half, [], [], [], *rest, [], 0)
    try:
        op("adam", g, p, s1, [*s2[:-1], torch.ones(1000)[:999]], [], [], *rest, [], 0)
    except RuntimeError as error:
        assert "state2 of parameter 49 must hold 1000 elements, got 999" in str(error)
    else:
        raise AssertionError
for _ in range(200): call()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(1000): call()
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 4096, grown
""")


def test_bytes_do_not_depend_on_threads():
    shapes = [(70_001,), (300, 7), (256,)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            p = [ref.samples(shape, seed=1) for shape in shapes]
            g = [ref.samples(shape, seed=2) for shape in shapes]
            s = [states("adam", shape, 8) for shape in shapes]
            group("adam", 8, g, p, s)
            results.append([*p, *(t for each in s for t in each.values())])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(same, results[0], other))


# ---- autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("recording", [True, False])
def test_parameters_stay_leaves(recording, contiguous, bits):
    start = ref.samples((30, 20)) if contiguous else ref.samples((20, 30)).t()
    p, s = torch.nn.Parameter(start), states("adam", (30, 20), bits)
    old = p.detach().clone()
    version, state_version = p._version, s["state1"]._version
    with torch.set_grad_enabled(recording):
        single("adam", bits, torch.ones(30, 20), p, s)
    assert p.is_leaf
    assert p.requires_grad
    assert p.grad_fn is None
    assert p._version > version
    assert s["state1"]._version == state_version + 1
    assert not torch.equal(p.detach(), old)


def test_backward_notices_a_step_in_between():
    p = torch.nn.Parameter(torch.ones(10))
    for step in (
        lambda: single("adam", 32, torch.ones(10), p, states("adam", (10,), 32)),
        lambda: group("adam", 32, [torch.ones(10)], [p], [states("adam", (10,), 32)]),
        lambda: fast_group([torch.ones(10)], [p]),
    ):
        loss = (p * p).sum()
        with torch.no_grad():
            step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def fast_group(g: list[Tensor], p: list[Tensor]) -> None:
    s = [torch.zeros_like(x) for x in p], [torch.zeros_like(x) for x in p]
    rest = (0.0, *RATES, WD, 3, LR, SCALE, False, [], 0)
    _ops.step_group(OP32.group, "adam", g, p, *s, [], [], *rest)


def test_step_group_is_the_op():
    p, apart = [ref.samples((500,), seed=i) for i in range(3)], []
    g = [ref.samples((500,), seed=9 + i) for i in range(3)]
    apart, versions = copies(p), [x._version for x in p]
    fast_group(g, p)
    group("adam", 32, g, apart, [{"state1": x * 0, "state2": x * 0} for x in g])
    assert all(map(same, p, apart))
    assert [x._version - v for x, v in zip(p, versions, strict=True)] == [1, 1, 1]
    assert [x._version for x in g] == [0, 0, 0]


def test_inference_mode():
    with torch.inference_mode():
        p, s = torch.ones(500), states("adam", (500,), 8)
        single("adam", 8, torch.ones(500), p, s)
        assert (p != 1).any()
        old = p.clone()
        fast_group([torch.ones(500)], [p])
        assert (p < old).all()


# ---- tracing -------------------------------------------------------------------------------------


def cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Arguments for every op, and the op."""
    shape = (40, 30)
    g, p = ref.samples(shape, seed=1), ref.samples(shape, seed=2)
    a, b = states("adam", shape, 32), states("adam", shape, 8)
    x, y = states("ademamix", shape, 8), states("lamb", shape, 32)
    half = p.bfloat16()
    numbers = (WD, 3, LR, SCALE)
    return {
        "adam 32": (
            OP32.default,
            ("adam", g, p, a["state1"], a["state2"], None, 0.0, 0.0, *RATES, *numbers),
        ),
        "lion 32": (
            OP32.default,
            ("lion", g, p, a["state1"], None, None, 0.0, 0.0, *RATES, *numbers, True),
        ),
        "lamb 32": (
            OP32.default,
            ("lamb", g, p, *y.values(), torch.zeros(1), 0.1, 3.0, *RATES, *numbers),
        ),
        "adam 32 group": (
            OP32.group,
            *(("adam", [g, g], [p, p * 1], [a["state1"], a["state1"] * 1]),),
        ),
        "adam 8": (
            OP8.default,
            (
                *("adam", g, p, b["state1"], b["state2"], *RATES, 3, LR, Q1.clone(), Q2.clone()),
                *(b["absmax1"], b["absmax2"], WD, SCALE),
            ),
        ),
        "lion 8": (
            OP8.default,
            (
                *("lion", g, p, b["state1"], None, *RATES, 3, LR, Q1.clone(), None),
                *(b["absmax1"], None, WD, SCALE),
            ),
        ),
        "adam 8 group": (
            OP8.group,
            (
                *("adam", [g], [half], [b["state1"]], [b["state2"]]),
                *([b["absmax1"]], [b["absmax2"]], [torch.zeros_like(half)]),
                *(Q1, Q2, *RATES, *numbers, False, [], 0),
            ),
        ),
        "ademamix 8 group": (
            OP8.group,
            (
                *("ademamix", [g], [half], [x["state1"]], [x["state2"]]),
                *([x["absmax1"]], [x["absmax2"]], []),
                *(Q1, Q2, *RATES, *numbers, False, [4], 1),
            ),
        ),
    }


def arguments(case: str) -> tuple[Any, tuple[Any, ...]]:
    op, given = cases()[case]
    if case == "adam 32 group":
        second = [torch.rand(40, 30), torch.rand(40, 30)]
        given += (second, [], [], 0.0, *RATES, WD, 3, LR, SCALE, False, [1, 2], 0)
    return op, given


@pytest.mark.parametrize("case", cases())
def test_opcheck(case):
    op, given = arguments(case)
    torch.library.opcheck(op, given)


@pytest.mark.parametrize("case", cases())
def test_fakes_change_nothing(case):
    op, given = arguments(case)
    mode = FakeTensorMode()

    def fake(x: Any) -> Any:
        if isinstance(x, list):
            return [fake(y) for y in x]
        return mode.from_tensor(x) if isinstance(x, Tensor) else x

    with mode:
        assert op(*map(fake, given)) is None


def test_changed_arguments_are_marked():
    def version(x: Any) -> Any:
        if isinstance(x, list):
            return [version(y) for y in x]
        return x._version if isinstance(x, Tensor) else None

    for case in cases():
        op, given = arguments(case)
        before = [version(x) for x in given]
        op(*given)
        after = [version(x) for x in given]
        for argument, old, new in zip(op._schema.arguments, before, after, strict=False):
            written = argument.alias_info is not None
            assert (old != new) == (written and old not in (None, [])), (case, argument.name)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("bits", [8, 32])
def test_compiled_steps(bits, backend, dynamic):
    torch._dynamo.reset()
    shapes = [(40, 30), (700,)]

    def train(p: list[Tensor], g: list[Tensor], s: list[dict[str, Tensor]]) -> Tensor:
        g = [x * 2 for x in g]
        single("adam", bits, g[0], p[0], s[0])
        group("adam", bits, g, p, s)
        return p[0].sum() + p[1].sum()

    results = []
    for function in (
        train,
        torch.compile(train, fullgraph=True, backend=backend, dynamic=dynamic),
    ):
        p = [ref.samples(shape, seed=1) for shape in shapes]
        g = [ref.samples(shape, seed=2) for shape in shapes]
        s = [states("adam", shape, bits) for shape in shapes]
        sums = [function(p, g, s) for _ in range(2)]
        results.append([*p, *g, *(t for each in s for t in each.values()), *sums])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=0, atol=1e-4 if eager.dim() == 0 else 0)


def test_compiled_step_group_with_norms():
    torch._dynamo.reset()

    def train(p: Tensor, g: Tensor, s1: Tensor, s2: Tensor, unorm: Tensor) -> None:
        F.optimizer_update_32bit("lamb", g, p, s1, B1, EPS, 2, LR, s2, B2, max_unorm=0.1,
                                 unorm_vec=unorm)  # fmt: skip
        rest = (0.0, *RATES, WD, 3, LR, SCALE, False, [], 0)
        _ops.step_group(OP32.group, "adam", [g], [p], [s1], [s2], [], [], *rest)

    results = []
    for function in (train, torch.compile(train, fullgraph=True, backend="aot_eager")):
        given = [*(torch.rand(500, generator=torch.Generator().manual_seed(i)) for i in range(4))]
        given.append(torch.zeros(1))
        function(*given)
        results.append(given)
    assert all(map(same, *results))
    assert results[0][-1] > 0
