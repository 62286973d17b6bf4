"""What the Python side knows of devices, as far as it shows without a GPU."""

from __future__ import annotations

import halfbyte.functional as F
import pytest
import torch
from halfbyte import optim
from halfbyte._load import native
from halfbyte.optim import _managed, optimizer


def test_the_report_names_every_back_end():
    report = native.gpu_report()
    assert [name for name, _, _ in report] == ["cuda", "rocm", "xpu", "cpu"]
    assert report[-1][1]
    for name, usable, text in report:
        assert text.lower().startswith(name), text
        assert usable != ("not usable" in text.splitlines()[0]), text


def test_reasons():
    with pytest.raises(ValueError, match="cuda, rocm or xpu, got tpu"):
        native.gpu_error("tpu", 0)
    usable = {name: usable for name, usable, _ in native.gpu_report()}
    for runtime in ("cuda", "rocm", "xpu"):
        reason = native.gpu_error(runtime, 0)
        assert (reason is None) == usable[runtime]
        assert reason is None or len(reason) > 10
    assert native.gpu_error("cuda", 4711) is not None


@pytest.mark.parametrize(
    ("selected", "expected"),
    [
        ("cpu", {"cpu"}),
        (" CPU", {"cpu"}),
        ("", {"cpu", "cuda", "xpu"}),
        ("cuda", {"cpu", "cuda", "xpu"}),
    ],
)
def test_one_back_end_can_be_selected(python, monkeypatch, selected, expected):
    monkeypatch.setenv("HALFBYTE_BACKEND", selected)
    python(f"""
import halfbyte
assert halfbyte.supported_torch_devices == {expected!r}
from halfbyte._load import native
if {selected!r}.strip().lower() == "cpu":
    assert "HALFBYTE_BACKEND=cpu" in native.gpu_error("cuda", 0)
    assert halfbyte.functional.lib.compiled_with_cuda is False
import torch
assert halfbyte.functional.quantize_4bit(torch.ones(64))[0].numel() == 32
""")


def test_import_opens_no_driver(python):
    python("""
import halfbyte, sys
mapped = open("/proc/self/maps").read() if sys.platform == "linux" else ""
for library in ("libcuda.so", "libamdhip64", "libze_loader"):
    assert library not in mapped, library
""")


def test_managed_memory_is_of_gpus():
    with pytest.raises(ValueError, match="cuda or xpu, got cpu"):
        native.managed_zeros(16, "cpu", 0)
    with pytest.raises(NotImplementedError, match="CUDA and XPU devices, got device 'meta'"):
        _managed.zeros((3,), torch.float32, torch.device("meta"))
    x = torch.zeros(3)
    assert not _managed.is_managed(x)
    _managed.prefetch(x)
    assert not native.is_managed(x.data_ptr())
    native.prefetch_managed(x.data_ptr(), "cuda", 0, False)  # none of ours: nothing to do


def paged_batch(sizes: list[int]) -> optimizer._Batch:
    batch = optimizer._Batch()
    for index, size in enumerate(sizes):
        state = torch.empty(size, dtype=torch.uint8, device="meta")
        state.is_paged = True
        batch.params.append(torch.empty(size, device="meta"))
        batch.grads.append(torch.empty(size, device="meta"))
        batch.wholes.append(batch.params[-1])
        batch.states.append({"step": 0, "state1": state, "absmax1": torch.empty(1)})
        batch.streams.append(index)
    return batch


def test_paged_states_are_fetched_as_they_come(monkeypatch):
    events = []
    monkeypatch.setattr(F, "prefetch_tensor", lambda t, to_cpu=False: events.append(t.numel()))
    monkeypatch.setattr(optimizer, "_PAGED_BYTES", 100)
    adam = optim.PagedAdam8bit([torch.nn.Parameter(torch.zeros(1))])
    for part in adam._fetched(paged_batch([40, 50, 30, 200, 10])):
        events.append(part.streams)
    assert events == [40, 50, [0, 1], 30, [2], 200, [3], 10, [4]]

    events.clear()
    whole = paged_batch([40, 50])
    whole.params = [torch.zeros(40), torch.zeros(50)]
    assert list(adam._fetched(whole)) == [whole]
    assert events == []


def test_codes_are_shared_by_device():
    adam = optim.Adam8bit([torch.nn.Parameter(torch.zeros(1))])
    meta, cpu = torch.device("meta"), torch.device("cpu")
    assert adam._code_on("dynamic", cpu) is adam.name2qmap["dynamic"]
    copy = adam._code_on("dynamic", meta)
    assert copy.device == meta
    assert adam._code_on("dynamic", meta) is copy
    assert adam._code_on("dynamic", cpu) is adam.name2qmap["dynamic"]

    others: list[torch.Tensor] = []
    equal = adam.name2qmap["udynamic"].clone()
    assert adam._shared_code(equal, cpu, others) is adam.name2qmap["udynamic"]
    assert others == []
    foreign = torch.linspace(0, 1, 256)
    first = adam._shared_code(foreign, cpu, others)
    assert first is not foreign
    assert adam._shared_code(foreign.clone(), cpu, others) is first
    assert len(others) == 1


def test_a_standard_code_stays_known():
    packed, state = F.quantize_4bit(torch.randn(8, 64), quant_type="nf4")
    loaded = F.QuantState.from_dict(state.as_dict(packed=True), device="cpu")
    assert state._table() is None
    assert loaded._table() is None
    other = F.QuantState(state.absmax, state.shape, None, 64, "nf4", torch.float32)
    assert other._take_code(loaded)._table() is None
    own = state.code * 0.5
    changed = F.QuantState(state.absmax, state.shape, own, 64, "nf4", torch.float32)
    assert changed._table() is own
    assert other._take_code(changed)._table() is own
    assert torch.equal(F.dequantize_4bit(packed, changed), F.dequantize_4bit(packed, state) * 0.5)
