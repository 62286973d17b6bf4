"""A paged optimizer whose state is several times a memory limit, beside the same one in memory.

    make paged                                                    3 GiB of state, 0.75 GiB of memory
    .venv/bin/python bench/paged.py --state 0.8 --limit 0.5       a quick look
    .venv/bin/python bench/paged.py --limit 1.25 --resident       with the parameters in memory

Three processes, one after the other, take the same steps: the optimizer in memory, the paged one
without a limit, and the paged one in a control group whose memory limit holds for everything in
it: Python and PyTorch (about 0.4 GiB), gradients, and those pages of files that are in memory.
Their parameters and states must be equal bit for bit. The model is layers of bfloat16 parameters,
made with ``functional.get_paged`` where the optimizer is paged: a float32 state is four times the
parameters, so a state of several times the limit leaves no room for them. As in training that frees
gradients early, each layer is stepped when its gradient is there, and the gradient is dropped.

The time of a step stands beside what the disk would need at best: all that is paged is read once
and written once in a step, and the disk's bandwidth is measured in the same run, past the page
cache.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from cgroup import MemoryLimit, Unavailable  # noqa: E402
from definitions import THREADS  # noqa: E402

GIB = 1 << 30
LAYER = 1 << 23
"""Parameters in a layer: 16 MiB in bfloat16."""

BYTES = {"AdamW32bit": 8.0, "AdamW8bit": 2 + 8 / 256, "AdEMAMix32bit": 12.0, "Lion32bit": 4.0}
"""State of a parameter."""


def train(name: str, layers: int, steps: int, pages: bool) -> dict[str, Any]:
    """Seconds of every step (the optimizer's alone), and what came out."""
    import torch
    from halfbyte import functional, optim

    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for _ in range(layers):
        if pages:
            values = functional.get_paged(LAYER, dtype=torch.bfloat16, device="cpu")
        else:
            values = torch.empty(LAYER, dtype=torch.bfloat16)
        parameters.append(torch.nn.Parameter(values.normal_(0, 0.02, generator=generator)))
    optimizer = getattr(optim, name)(parameters, lr=1e-3)
    gradient = torch.empty(LAYER, dtype=torch.bfloat16)
    seconds = []
    before = storage()
    for _ in range(steps):
        spent = 0.0
        for parameter in parameters:
            gradient.normal_(0, 0.01, generator=generator)
            parameter.grad = gradient
            began = time.perf_counter()
            optimizer.step()
            spent += time.perf_counter() - began
            parameter.grad = None
        seconds.append(spent)
    after = storage()
    result = hashlib.sha256()
    state = hashlib.sha256()
    size = 0
    with torch.no_grad():
        for parameter in parameters:
            result.update(parameter.view(torch.int16).numpy().data)
            for key, value in sorted(optimizer.state[parameter].items()):
                if isinstance(value, torch.Tensor) and not key.startswith("qmap"):
                    state.update(value.view(-1).view(torch.uint8).numpy().data)
                    size += value.nbytes
    return {
        "seconds": seconds,
        "parameters": layers * LAYER,
        "state_bytes": size,
        "paged_bytes": (size if name.startswith("Paged") else 0) + (2 * layers * LAYER * pages),
        "parameters_sha256": result.hexdigest()[:16],
        "states_sha256": state.hexdigest()[:16],
        "folder": optim.paged_dir(),
        "read_bytes": after[0] - before[0],
        "written_bytes": after[1] - before[1],
    }


def storage() -> tuple[int, int]:
    """Bytes that this process has had read from storage, and written to it."""
    lines = Path("/proc/self/io").read_text().splitlines()
    fields = {key: int(value) for key, value in (line.split(": ") for line in lines)}
    return fields["read_bytes"], fields["write_bytes"]


def disk(folder: str, nbytes: int = GIB) -> dict[str, float]:
    """Bytes per second of the disk below a folder: sequential, past the page cache."""
    piece = 8 << 20
    buffer = mmap.mmap(-1, piece)  # aligned, as O_DIRECT wants it
    buffer.write(os.urandom(piece))
    path = Path(folder) / f"halfbyte-disk-{os.getpid()}"
    out = {}
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_DIRECT", 0)
    file = os.open(path, flags, 0o600)
    try:
        path.unlink()
        os.posix_fallocate(file, 0, nbytes)
        for name, move in (("write", os.pwritev), ("read", os.preadv)):
            times = []
            for _ in range(2):
                began = time.perf_counter()
                for start in range(0, nbytes, piece):
                    move(file, [buffer], start)
                if name == "write":
                    os.fsync(file)
                times.append(time.perf_counter() - began)
            out[f"{name}_bytes_per_s"] = nbytes / min(times)
    finally:
        os.close(file)
    return out


def child(
    name: str, layers: int, steps: int, pages: bool, limit: MemoryLimit | None = None
) -> dict[str, Any]:
    """Train in a process of its own, from its first instruction within the limit."""
    command = [sys.executable, __file__, "--train", name, str(layers), str(steps), str(int(pages))]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        preexec_fn=limit.enter if limit is not None else None,
    )
    if done.returncode != 0:
        killed = " (killed by the limit)" if limit is not None and limit.kills() else ""
        raise SystemExit(f"{name} ended with code {done.returncode}{killed}")
    out = json.loads(done.stdout.splitlines()[-1])
    if limit is not None:
        out["limit_bytes"] = limit.nbytes
        out["peak_bytes"] = limit.peak()
    return out


def main() -> int:
    """Measure, write the record, print the table; 1 when results differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--optimizer", choices=tuple(BYTES), default="AdamW32bit")
    parser.add_argument("--state", type=float, default=3.0, help="GiB of state")
    parser.add_argument("--limit", type=float, default=0.75, help="GiB of memory")
    parser.add_argument("--resident", action="store_true", help="keep the parameters in memory")
    parser.add_argument("--steps", type=int, default=4, help="the first one makes the states")
    parser.add_argument("--out", type=Path, help="write the record here instead")
    parser.add_argument("--train", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        name, layers, steps, pages = options.train
        print(json.dumps(train(name, int(layers), int(steps), pages == "1")))
        return 0
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}")
    layers = max(1, round(options.state * GIB / BYTES[options.optimizer] / LAYER))

    from run import commit, load, machine, number, say, slug, table

    facts = machine()
    now = datetime.datetime.now(datetime.timezone.utc)
    before = load()
    paged, pages = "Paged" + options.optimizer, not options.resident
    runs = {}
    try:
        limit = MemoryLimit(round(options.limit * GIB))
        with limit:
            say(f"{paged}, limit of {options.limit:g} GiB (control group, version {limit.version})")
            runs["limited"] = child(paged, layers, options.steps, pages, limit)
    except Unavailable as reason:
        raise SystemExit(f"no memory limit can be set here: {reason}") from None
    say(f"{options.optimizer} in memory")
    runs["memory"] = child(options.optimizer, layers, options.steps, False)
    say(f"{paged} without a limit")
    runs["paged"] = child(paged, layers, options.steps, pages)
    say("the disk")
    speed = disk(runs["limited"]["folder"])

    state = runs["limited"]["state_bytes"]
    total = runs["limited"]["paged_bytes"]
    best = total / speed["read_bytes_per_s"] + total / speed["write_bytes_per_s"]
    same = all(
        run[key] == runs["memory"][key]
        for run in runs.values()
        for key in ("parameters_sha256", "states_sha256")
    )
    record = {
        "format": 1,
        "date": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "source": commit(),
        "machine": facts,
        "load_before": before,
        "load_after": load(),
        "optimizer": options.optimizer,
        "cgroup_version": limit.version,
        "disk": speed,
        "disk_s_per_step": best,
        "bit_identical": same,
        "runs": runs,
    }
    path = options.out or HERE / "record" / slug(facts) / f"{now:%Y-%m-%d}-paged.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")

    titles = {"memory": "in memory", "paged": "paged, no limit", "limited": "paged, limited"}
    rows = []
    for key, title in titles.items():
        run = runs[key]
        step = statistics.median(run["seconds"][1:])
        rows.append(
            [
                title,
                number(run["state_bytes"] / GIB),
                number(run["limit_bytes"] / GIB) if "limit_bytes" in run else "–",
                number(run["peak_bytes"] / GIB) if "peak_bytes" in run else "–",
                number(run["seconds"][0]),
                number(step),
                number(run["read_bytes"] / GIB),
                number(run["written_bytes"] / GIB),
            ]
        )
    header = ["run", "state, GiB", "limit, GiB", "peak, GiB", "first step, s", "step, s"]
    print(table([*header, "read, GiB", "written, GiB"], rows))
    print(
        f"\n{options.optimizer}, {runs['memory']['parameters']:,} bfloat16 parameters, "
        f"{options.steps} steps; the state is {state / runs['limited']['limit_bytes']:.1f} times "
        f"the limit.\nThe disk reads {speed['read_bytes_per_s'] / 1e9:.2f} GB/s and writes "
        f"{speed['write_bytes_per_s'] / 1e9:.2f} GB/s: {number(best)} s to read and write "
        f"the {total / GIB:.2f} GiB that are paged once.\nParameters and states are "
        f"{'bit-identical in all three' if same else 'NOT the same'}."
    )
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
