"""Ask the oracle: batches of jobs for upstream, run in its own process and environment."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
PYTHON_VARIABLE = "HALFBYTE_UPSTREAM_PYTHON"
SEED_VARIABLE = "HALFBYTE_PARITY_SEED"
TIMEOUT_S = 1200


def upstream_python() -> Path:
    """The interpreter of the environment that holds upstream."""
    named = os.environ.get(PYTHON_VARIABLE)
    return Path(named) if named else ROOT / ".venv-upstream" / "bin" / "python"


def missing() -> str | None:
    """One sentence that says what to do when the oracle cannot run, or None."""
    python = upstream_python()
    if python.exists():
        return None
    return (
        f"the parity tests need upstream bitsandbytes in an environment of its own and found no "
        f"{python}: run `make upstream-env`, or point {PYTHON_VARIABLE} at its interpreter"
    )


@dataclass
class Reply:
    """What the oracle answered to one job."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor of the answer."""
        return self.tensors[name]


@dataclass
class Batch:
    """Jobs collected for one run of the oracle, by default through upstream's portable kernels."""

    folder: Path
    portable: bool = True
    jobs: list[dict[str, Any]] = field(default_factory=list)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, op: str, tensors: dict[str, torch.Tensor], **options: Any) -> None:
        """Add a job under a name of its own."""
        names = {}
        for key, value in tensors.items():
            names[key] = f"{name}/{key}"
            self.inputs[names[key]] = value.detach().contiguous().clone()
        self.jobs.append({"id": name, "op": op, "tensors": names, "options": options})

    def run(self) -> dict[str, Reply]:
        """Start the oracle once and return its answers by job name."""
        problem = missing()
        if problem:
            raise RuntimeError(problem)
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(self.inputs, self.folder / "inputs.safetensors")
        (self.folder / "request.json").write_text(
            json.dumps({"portable": self.portable, "jobs": self.jobs})
        )
        environment = {
            key: value
            for key, value in os.environ.items()
            if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        }
        environment["OMP_NUM_THREADS"] = "1"  # upstream's kernels spin on a busy machine
        done = subprocess.run(
            [str(upstream_python()), str(Path(__file__).with_name("oracle.py")), str(self.folder)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the oracle failed:\n{done.stderr[-4000:]}")
        reply = json.loads((self.folder / "reply.json").read_text())
        outputs = load_file(self.folder / "outputs.safetensors")
        errors = {k: v["error"] for k, v in reply["jobs"].items() if v["error"]}
        if errors:
            raise RuntimeError(f"the oracle could not answer {errors}\n{done.stderr[-4000:]}")
        answers: dict[str, Reply] = {}
        for name, facts in reply["jobs"].items():
            prefix = f"{name}/"
            answers[name] = Reply(
                {k.removeprefix(prefix): v for k, v in outputs.items() if k.startswith(prefix)},
                {**facts, "versions": reply["versions"]},
            )
        return answers
