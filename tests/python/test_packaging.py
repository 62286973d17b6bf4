"""One set of sources, two packages, one native module: names, versions, import cost, stubs."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
import sys
from pathlib import Path

import halfbyte
import pytest
import torch
from halfbyte._load import native

ROOT = Path(__file__).parents[2]
FOLDER = Path(halfbyte.__file__).parent
DROP_IN = ROOT / "python" / "bitsandbytes"


def test_versions_agree():
    cargo = re.search(r'^version = "(.+)"', (ROOT / "Cargo.toml").read_text(), re.M)[1]
    pyproject = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert halfbyte.__version__ == native.version() == cargo == pyproject
    assert importlib.metadata.version("halfbyte") == cargo
    drop_in = (DROP_IN / "pyproject.toml").read_text()
    assert f'version = "0.50.2+halfbyte.{cargo}"' in drop_in
    assert f'dependencies = ["halfbyte=={cargo}"]' in drop_in
    source = (DROP_IN / "src" / "bitsandbytes" / "__init__.py").read_text()
    assert f'__version__ = "0.50.2+halfbyte.{cargo}"' in source


def test_public_surface():
    assert halfbyte.supported_torch_devices == {"cpu", "cuda", "xpu"}
    assert "multi_backend" in halfbyte.features
    for name in halfbyte.__all__:
        assert hasattr(halfbyte, name), name
    assert halfbyte.matmul_4bit is halfbyte.autograd._functions.matmul_4bit
    assert (FOLDER / "py.typed").is_file()


@pytest.mark.parametrize(
    ("first", "second"), [("halfbyte", "bitsandbytes"), ("bitsandbytes", "halfbyte")]
)
def test_both_names_in_one_process(python, first, second):
    python(f"""
import sys, importlib, importlib.metadata, torch
one = importlib.import_module({first!r})
assert {second!r} not in sys.modules
assert ({second!r} in dir(torch.ops)) is False
two = importlib.import_module({second!r})
packages = {{package.__name__: package for package in (one, two)}}
hb, bnb = packages["halfbyte"], packages["bitsandbytes"]
assert bnb.__version__ == importlib.metadata.version("bitsandbytes") != hb.__version__
assert bnb.__version__.startswith("0.50.2+halfbyte.")

# The same files, under two names, around one native module.
import halfbyte.nn.modules, bitsandbytes.nn.modules
assert sys.modules["bitsandbytes._native"] is sys.modules["halfbyte._native"]
import bitsandbytes._native, halfbyte._native
from bitsandbytes.nn.modules import Params4bit, QuantState
for name, package in packages.items():
    assert package.nn.Linear4bit.__module__ == name + ".nn.modules"
    assert package.functional.QuantState.__module__ == name + ".functional"
    assert package.functional.__name__ == name + ".functional"
    assert package._ops.NAMESPACE == name
assert bnb.nn.modules.__file__ == hb.nn.modules.__file__
assert bnb.functional.QuantState is not hb.functional.QuantState
assert bnb.nn.modules.QuantState is QuantState is bnb.functional.QuantState

# Each has ops of its own, and a state of one can be used by the other.
weight = torch.randn(64, 96)
packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
raw, absmax = torch.ops.bitsandbytes.quantize_4bit(weight, 64, "nf4", torch.uint8)
same, scales = torch.ops.halfbyte.quantize_4bit(weight, 64, "nf4", torch.uint8)
assert torch.equal(raw, same) and torch.equal(absmax, scales) and torch.equal(raw, packed)
a = bnb.functional.dequantize_4bit(packed, state)
b = hb.functional.dequantize_4bit(packed, state)
assert torch.equal(a, b)
x = torch.randn(3, 96, requires_grad=True)
for package in (hb, bnb):
    x.grad = None
    package.matmul_4bit(x, packed, state).sum().backward()
    torch.testing.assert_close(x.grad, a.sum(0).expand(3, -1))
    try:
        package.functional.dequantize_4bit(packed[:3], state)
    except ValueError as error:
        assert "packed must hold" in str(error)
    else:
        raise AssertionError
""")


def test_a_second_import_changes_nothing(python):
    python("""
import sys, importlib
import halfbyte, bitsandbytes, torch
native = sys.modules["halfbyte._native"]
importlib.reload(halfbyte)
importlib.reload(halfbyte._load)
importlib.reload(halfbyte._ops)
for name in [n for n in sys.modules if n.partition(".")[0] in ("halfbyte", "bitsandbytes")]:
    if not name.endswith("._native"):
        del sys.modules[name]
import halfbyte, bitsandbytes
assert sys.modules["halfbyte._native"] is native
packed, state = bitsandbytes.functional.quantize_4bit(torch.ones(64), quant_type="nf4")
assert torch.equal(halfbyte.functional.dequantize_4bit(packed, state), torch.ones(64))
""")


def test_the_drop_in_installs_as_bitsandbytes():
    distribution = importlib.metadata.distribution("bitsandbytes")
    assert distribution.version == f"0.50.2+halfbyte.{halfbyte.__version__}"
    assert [r for r in distribution.requires if r.startswith("halfbyte==")]
    assert "bitsandbytes" in importlib.metadata.packages_distributions()


def test_the_drop_in_says_when_halfbyte_is_missing(python):
    out = python(
        f"import sys; sys.path[:] = [{str(DROP_IN / 'src')!r}, *sys.path]\n"
        "sys.path = [p for p in sys.path if not p.endswith('site-packages')]\n"
        "import bitsandbytes",
        "-S",
        "-I",
        check=False,
    )
    assert out.startswith("1\n")
    assert "ImportError: bitsandbytes here is halfbyte's drop-in" in out


LIGHT = """
import sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import {package}
spent = time.process_time() - start
heavy = {{"scipy", "transformers", "torch._dynamo", "torch._inductor", "triton", "pandas", "peft",
         "accelerate", "safetensors", "importlib.metadata"}}
found = heavy & (set(sys.modules) - before)
assert not found, found
print(spent)
"""


@pytest.mark.parametrize("package", ["halfbyte", "bitsandbytes"])
def test_import_is_light(python, package):
    # CPU time, up to three tries: the machine may be busy.
    tries = (float(python(LIGHT.format(package=package))) for _ in range(3))
    assert any(spent < 0.2 for spent in tries)


def test_the_native_module_without_torch_is_one_sentence(python):
    path = next(FOLDER.glob("_native*.so"), None) or next(FOLDER.glob("_native*.pyd"))
    out = python(f"""
import importlib.machinery, importlib.util
loader = importlib.machinery.ExtensionFileLoader("halfbyte._native", {str(path)!r})
spec = importlib.util.spec_from_loader("halfbyte._native", loader)
native = importlib.util.module_from_spec(spec)
loader.exec_module(native)
try:
    native.bind("2.9.1", "/nowhere")
except ImportError as error:
    print(error)
""")
    assert out.startswith("PyTorch 2.10 or newer is required")
    assert "2.9.1" in out


def test_an_unknown_instruction_set_is_refused_at_import(python, monkeypatch):
    monkeypatch.setenv("HALFBYTE_ISA", "sse9")
    out = python("import halfbyte", check=False)
    assert out.startswith("1\n")
    assert re.search(r'ImportError: HALFBYTE_ISA="sse9" is not available .* choose one of', out)


@pytest.mark.parametrize("isa", native.available_isas())
def test_each_instruction_set_can_be_chosen(python, monkeypatch, isa):
    monkeypatch.setenv("HALFBYTE_ISA", isa)
    out = python("""
import torch, halfbyte
from halfbyte._load import native
x = torch.linspace(-3, 3, 129 * 65).sin()
packed, state = halfbyte.functional.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
print(native.isa(), bytes(packed.flatten().tolist()).hex())
""")
    x = torch.linspace(-3, 3, 129 * 65).sin()
    packed = halfbyte.functional.quantize_4bit(x, quant_type="nf4")[0]
    assert out.split() == [isa, bytes(packed.flatten().tolist()).hex()]


def test_the_stub_describes_the_binary():
    stub = ast.parse((FOLDER / "_native.pyi").read_text())
    described = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    present = {
        name
        for name in dir(native)
        if not name.startswith("__") and callable(getattr(native, name))
    }
    assert set(described) == present
    for name, node in described.items():
        arguments = [argument.arg for argument in node.args.args]
        assert list(inspect.signature(getattr(native, name)).parameters) == arguments, name
        assert ast.get_docstring(node), name
        assert node.returns is not None, name


def check_diagnostics(out: str, package: str) -> None:
    assert f"{package} {importlib.metadata.version(package)}" in out
    for text in ("instruction set", native.isa(), "Self-test, cpu", "Everything works.", "CUDA"):
        assert text in out, text


def test_diagnostics(capsys):
    main = importlib.import_module("halfbyte.__main__")
    assert main.main() == 0
    check_diagnostics(capsys.readouterr().out, "halfbyte")


@pytest.mark.parametrize("asked", ["rocm", "gpu"])
def test_diagnostics_miss_what_was_asked_for(python, monkeypatch, asked):
    monkeypatch.setenv("HALFBYTE_BACKEND", asked)
    monkeypatch.setenv("HALFBYTE_HIP", "/nonexistent/libamdhip64.so")
    code = "from halfbyte import __main__ as main\nmain._TESTS = []\nprint(main.main(), end='')"
    out = python(code)
    assert out.endswith(
        f"HALFBYTE_BACKEND={asked} asks for what cannot be used here, see above.\n1"
    )


def test_failed_diagnostics(capsys, monkeypatch):
    main = importlib.import_module("halfbyte.__main__")

    def broken(*_: object) -> str:
        raise RuntimeError("a finding")

    monkeypatch.setattr(main, "_TESTS", [("one", broken), ("two", lambda *_: "fine")])
    assert main.main() == 1
    out = capsys.readouterr().out
    assert "FAILED: RuntimeError: a finding" in out
    assert re.search(r"(\d) of \d checks failed", out)[1] == str(out.count("FAILED"))


def test_diagnostics_of_the_drop_in(python):
    code = "import runpy; runpy.run_module('bitsandbytes', run_name='__main__')"
    out = python(code, check=False)
    assert out.startswith("0\n"), out
    check_diagnostics(out, "bitsandbytes")


def test_no_source_imports_its_own_package_by_name():
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                assert name.partition(".")[0] not in ("halfbyte", "bitsandbytes"), path


@pytest.mark.skipif(sys.platform == "win32", reason="ELF and Mach-O only")
def test_the_binary_does_not_link_against_torch():
    binary = next(FOLDER.glob("_native*.so")).read_bytes()
    assert b"libtorch_python" not in binary
    assert b"libc10.so" not in binary
