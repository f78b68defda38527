"""Pythons by Tritons: the package installed beside each, and a choice of its tests; `make compatibility`.

python -m tests.compatibility [--python PYTHON ...] [--triton VERSION ...] [--torch VERSION]

Each Python gets an environment under build/compatibility, kept for the next run: torch, the package as a user installs
it, pytest. Each Triton is put into it in turn, and "none" takes it out. From a folder that holds the tests alone run
each op's forward and backward in the interpreter, in fp32 and bf16, and beside them inference, checkpoints, tiles and
the choice of a backend, under torch.compile too. The last run is kept in tests/results/compatibility.json.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

from tests import counts

ROOT = pathlib.Path(__file__).parent.parent
HOME = ROOT / "build" / "compatibility"
NEEDS = ("numpy", "safetensors", "Pillow", "pytest", "pytest-timeout", "hypothesis", "setuptools>=77")
# Of each op a case whose sizes no tile divides.
CASES = "no_tile_divides or every_operand or first_key_of_a_second_tile or heads_of_72 or two_prefix_tokens"
KERNELS = ["-m", "interpret", "-k", f"output_and_gradients and ({CASES}) and (fp32 or bf16)", "tests/ops"]
PLAIN = [
    *("-m", "not interpret and not slow", "tests/test_inference.py", "tests/test_checkpoint.py"),
    *("tests/test_tiles.py", "tests/test_backend.py"),
]
LIMIT = 900  # seconds that a choice of tests may take


def pythons() -> list[str]:
    """One interpreter a version that the package takes: on the PATH, or where pyenv keeps them."""
    found = {}
    for minor in range(10, 15):
        kept = sorted(pathlib.Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
        if here := shutil.which(f"python3.{minor}") or next(map(str, kept), None):
            found[minor] = here
    return list(found.values())


def run(*command, **options) -> subprocess.CompletedProcess:
    options = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    return subprocess.run([str(part) for part in command], **options)


def install(python: pathlib.Path, *arguments) -> None:
    """pip install, and what pip said where it fails."""
    done = run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)
    if done.returncode:
        raise RuntimeError(f"pip install {' '.join(map(str, arguments))}:\n{done.stdout}")


def environment(base: str, torch: str) -> tuple[str, pathlib.Path]:
    """A version of Python, and the interpreter of an environment of it with torch and this package."""
    version = run(base, "-c", "import platform; print(platform.python_version())").stdout.strip()
    home = HOME / f"python{version.rpartition('.')[0]}"
    python = home / "bin" / "python"
    if not python.is_file():
        run(base, "-m", "venv", home, check=True)
        install(python, "--upgrade", "pip", "setuptools")
    install(python, f"torch=={torch}", *NEEDS)
    with tempfile.TemporaryDirectory() as name:  # setuptools leaves build/ in the source
        source = pathlib.Path(name) / "source"
        kept_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results", "tests")
        shutil.copytree(ROOT, source, ignore=kept_out)
        install(python, "--no-deps", "--no-build-isolation", "--force-reinstall", source)
    return version, python


def outcome(python: pathlib.Path, folder: str, choice: list[str], interpret: bool) -> tuple[dict, str]:
    """How many tests passed, failed and were skipped, and the first that failed."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    inherited |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    command = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *choice)
    try:
        said = run(*command, cwd=folder, env=inherited, timeout=LIMIT).stdout
    except subprocess.TimeoutExpired:
        return {"failed": 1}, f"no end in {LIMIT} s"
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", said)}
    wrong = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if not found.get("passed") and not wrong:
        wrong = [said[-300:]]
    found["failed"] = found.get("failed", 0) + found.get("error", 0) + found.get("errors", 0) or bool(wrong) * 1
    return found, " ".join(wrong[:1])


def try_out(version: str, python: pathlib.Path, torch: str, triton: str) -> dict:
    """A row of the table."""
    begin = time.monotonic()
    if triton == "none":
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "triton")
    else:
        install(python, "--no-deps", f"triton=={triton}")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tests", "benchmarks"):
            shutil.copytree(ROOT / name, f"{folder}/{name}", ignore=shutil.ignore_patterns("__pycache__", "results"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        choices = [(PLAIN, False), *([(KERNELS, True)] if triton != "none" else [])]
        done = [outcome(python, folder, choice, interpret) for choice, interpret in choices]
    total = {word: sum(found.get(word, 0) for found, _ in done) for word in ("passed", "failed", "skipped")}
    note = " ".join(wrong for _, wrong in done if wrong)
    row = {"python": version, "torch": torch, "triton": triton} | total
    return row | {"seconds": round(time.monotonic() - begin), "note": note or "-"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compatibility", description=__doc__.partition("\n")[0])
    parser.add_argument("--python", nargs="+", default=pythons(), help="interpreters (one a version that is found)")
    parser.add_argument("--triton", nargs="+", default=["3.6.0", "3.7.0", "3.9.0", "none"], help="versions, or none")
    parser.add_argument("--torch", default="2.13.0", help="version (2.13.0)")
    given = parser.parse_args()
    begin, rows = time.monotonic(), []
    for base in given.python:
        version, python = environment(base, given.torch)
        for triton in given.triton:
            rows.append(try_out(version, python, given.torch, triton))
            print(json.dumps(rows[-1]), flush=True)
    failed = sum(row["failed"] for row in rows)
    counts.keep(
        "compatibility",
        "Pythons by Tritons beside one torch, the package as it installs: each op forward and backward in the "
        "interpreter, and inference, checkpoints, tiles and backends in PyTorch.",
        " ".join(["python -m tests.compatibility", *sys.argv[1:]]),
        time.monotonic() - begin,
        {
            "combinations": len(rows),
            "tests passed": sum(row["passed"] for row in rows),
            "tests failed": failed,
            "combinations with a failure": sum(bool(row["failed"]) for row in rows),
        },
        table=rows,
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
