"""Files of results: what each says of itself, and that it says it.

A file is one run, JSON:

device, driver    the GPU and its driver; or the CPU and its threads, and "". "rehearsal": no figure of it counts
architecture      of a GPU the name of its table of tiles; of a CPU ""
versions          package → version
date, commit      of the run, and of the tree that was measured, "+" where it had been changed
command           what was run
ceilings          matrix_tflops, copy_tbs and, of later files, sustained_tflops, reached in the same run; none on a CPU
state             clock, temperature and power before and after, where the driver says them
blocks, tiles     of benchmarks/sweep.py: launches of blocks as they are, and a table of the tiles that won
results           a list of objects, each one case; times, "us", are microseconds, the 20, 50 and 80 % quantiles or the
                  median, of "samples", which the oldest files lack

A file may grow in several calls on one device, tree and versions. Then date, ceilings and state above are those of the
last call, and each line has those of the call that measured it.
"""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
import sys

import torch
from vit_fast.kernels import tile_table

from benchmarks import timing

TAKES = {
    **{"device": str, "driver": str, "architecture": str, "versions": dict, "date": str, "commit": (str, list)},
    **{"command": str, "results": list},
}
MAY_HAVE = {
    **{"ceilings": dict, "ceilings_of": str},
    **{"state": list, "note": str, "blocks": list, "tiles": dict},
}
# Ours, and whose code is timed beside it; those that are not installed are not named.
PACKAGES = (
    *("torch", "triton", "vit-fast", "timm", "transformers", "torchvision", "flash-attn", "xformers"),
    *("transformer-engine", "liger-kernel"),
)


def cpu_name() -> str:
    facts = pathlib.Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Of the tree that was measured, "+" where it was changed since; "" outside a clone.

    What a run writes changes nothing: results, and the page of them. VIT_FAST_COMMIT names the commit where only the
    files were copied.
    """
    written = (":!tests/results", ":!tests/README.md", ":!benchmarks/results")

    def git(*arguments: str) -> str:
        root = pathlib.Path(__file__).parent.parent
        return subprocess.run(("git", *arguments), cwd=root, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return os.environ.get("VIT_FAST_COMMIT") or git("rev-parse", "--short=12", "HEAD") + "+" * bool(changed)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # as vit-fast in a clone that was not installed
        return None


def record(results: list, rehearsal: bool = False, **more) -> dict:
    """A file of results of this run on this machine.

    Raises:
        ValueError: as `validate`; and where a result has times without their samples.
    """
    gpu = timing.DEVICE == "cuda"
    device = torch.cuda.get_device_name() if gpu else f"{cpu_name()}, {torch.get_num_threads()} threads"
    found = {
        "device": "rehearsal" if rehearsal else device,
        "driver": "".join(timing.ask_the_driver("driver_version")),
        "architecture": tile_table.architecture(torch.device("cuda")) if gpu else "",
        "versions": {name: found for name in PACKAGES if (found := version(name))},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),  # as it was typed: sys.argv has no -m
        **more,
        "results": results,
    }
    validate(found)
    for line in results:
        if "us" in line and "samples" not in line:
            raise ValueError(f"results: got times without samples in {line}, takes both")
    return found


def validate(found: dict) -> None:
    """Refuse what is no file of results.

    Raises:
        ValueError: naming the key, what it holds and what it takes.
    """
    if not isinstance(found, dict):
        raise ValueError(f"a file of results: got {type(found).__name__}, takes an object")
    for name, kind in TAKES.items():
        if not isinstance(found.get(name), kind):
            raise ValueError(f"{name}: got {found.get(name)!r}, takes {kind}")
    for name in found.keys() - TAKES.keys():
        if name not in MAY_HAVE or not isinstance(found[name], MAY_HAVE[name]):
            raise ValueError(f"{name}: got {found[name]!r}, takes {MAY_HAVE.get(name, 'no such key')}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"]):
        raise ValueError(f"date: got {found['date']!r}, takes one such as 2026-01-31")
    if not all(isinstance(one, dict) for one in found["results"]):
        raise ValueError("results: takes objects")
