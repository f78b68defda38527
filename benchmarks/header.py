"""What every file of results says of itself."""

import datetime
import importlib.metadata
import pathlib
import platform
import subprocess

import torch


def cpu_name() -> str:
    facts = pathlib.Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Of the tree that was measured, "+" where it was changed since; "" outside a clone."""
    describe = ("git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+")
    return subprocess.run(describe, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def header(*packages: str) -> dict:
    """What every file of results says of itself: the device, the versions of `packages`, the date and the commit."""
    return {
        "device": f"{cpu_name()}, {torch.get_num_threads()} threads",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
    }
