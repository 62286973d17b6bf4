"""Paged states that are several times a memory limit: the same results, and no more memory."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import warnings
from pathlib import Path

import optim_cases as cases
import pytest

HERE = Path(__file__).resolve().parent
BENCH = HERE.parent.parent / "bench"
sys.path.append(str(BENCH))

from cgroup import MemoryLimit, Unavailable  # noqa: E402

LIMIT = 32 << 20
SHAPES = [(1024, 1024)] * 16
STATE = 128 << 20

# Parameters, gradients, PyTorch and what a step loads once are there before the limit holds.
RUN = """
import os, sys
sys.path.insert(0, {here!r})
import optim_cases as cases
from test_optim_paged_limit import outcome
params = cases.parameters(*{shapes!r})
first = cases.parameters((64, 64))
cases.train(cases.make({name!r}, first), first, range(2))
cases.set_grads(params, 0)
made = cases.make({name!r}, params)
with open({folder!r} + "/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
for step in range(3):
    made.step()
print(*outcome(made, params))
"""


def outcome(made, params) -> tuple[int, str]:
    """Bytes of state, and a hash of parameters and states."""
    states = [made.state[p][key] for p in params for key in ("state1", "state2")]
    out = hashlib.sha256()
    for tensor in (*params, *states):
        out.update(tensor.detach().numpy().data)
    return sum(s.nbytes for s in states), out.hexdigest()


@pytest.fixture
def limit():
    """A control group with the limit. Where there can be none, the summary says why."""
    try:
        with MemoryLimit(LIMIT) as made:
            yield made
    except Unavailable as reason:
        warnings.warn(f"not tested under a memory limit: {reason}", stacklevel=1)
        pytest.skip(str(reason))


def run(name: str, limit: MemoryLimit) -> subprocess.CompletedProcess[str]:
    code = RUN.format(here=str(HERE), shapes=SHAPES, name=name, folder=str(limit.folder))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )


def test_a_state_of_four_times_the_limit(limit):
    done = run("PagedAdamW32bit", limit)
    assert done.returncode == 0, done.stderr[-2000:]
    assert limit.kills() == 0
    assert limit.peak() <= LIMIT
    assert limit.peak() > 0.9 * LIMIT  # it did hold

    params = cases.parameters(*SHAPES)
    cases.set_grads(params, 0)
    made = cases.make("AdamW32bit", params)
    for _ in range(3):
        made.step()
    nbytes, result = outcome(made, params)
    assert nbytes == STATE == 4 * LIMIT
    assert done.stdout.split() == [str(nbytes), result]


def test_without_paging_the_limit_ends_it(limit):
    """So the test above tests something."""
    done = run("AdamW32bit", limit)
    assert done.returncode != 0
    assert limit.kills() >= 1
