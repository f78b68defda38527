"""Pythons by Tritons: the package installed beside each, and a choice of its tests; `make compatibility`.

python -m tests.compatibility [--python PYTHON ...] [--triton VERSION ...] [--torch VERSION] [--lowest]

Each Python gets an environment under build/compatibility, kept for the next run: torch, the package as a user installs
it, pytest. Each Triton is put into it in turn, and "none" takes it out. From a folder that holds the tests alone run
each op's forward and backward in the interpreter, in fp32 and bf16, the model on its kernels, and beside them the model
in PyTorch, under `python -W error` and torch.compile too; without a Triton checkpoints, training and the command line.
`--lowest` installs the lowest requirements that the metadata takes, of the package and its extra `cli`, and runs the
last of these too. A row that is not run again stays in tests/results/compatibility.json.
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

from benchmarks import records
from tests import counts

HOME = counts.ROOT / "build" / "compatibility"
NEEDS = ("pytest", "pytest-timeout", "hypothesis", "setuptools>=77")
MINORS = range(10, 15)  # of Python 3
# Of each op a case whose sizes no tile divides.
CASES = "no_tile_divides or every_operand or first_key_of_a_second_tile or heads_of_72 or two_prefix_tokens"
KERNELS = [
    *("-m", "interpret", "-k", f"first_use or ((output_and_gradients or maps) and ({CASES}) and (fp32 or bf16))"),
    *("tests/test_first_use.py", "tests/ops"),
]
# What no Triton has a part in runs once a Python, where there is none.
PLAIN = ["-m", "not interpret", "-k", "not training and not command", "tests/test_first_use.py"]
ALONE = [
    *("-m", "not interpret and not slow", "-k", "not timm"),
    *("tests/test_first_use.py", "tests/test_checkpoint.py"),
]
LIMIT = 900  # seconds that a choice of tests may take


def pythons() -> dict[str, str]:
    """Version → an interpreter of it, of each that the package takes: on the PATH, or where pyenv keeps them."""
    found = {}
    for version in (f"3.{minor}" for minor in MINORS):
        kept = sorted(map(str, pathlib.Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
        for here in (shutil.which(f"python{version}"), *kept):  # on the PATH may be a shim of pyenv's, and no more
            if here and run(here, "--version").returncode == 0:
                found.setdefault(version, here)
    return found


def run(*command, **options) -> subprocess.CompletedProcess:
    options = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    return subprocess.run([str(part) for part in command], **options)


def install(python: pathlib.Path, *arguments) -> None:
    """pip install, and what pip said where it fails."""
    quietly = ("--quiet", "--disable-pip-version-check", "--only-binary", ":all:")  # old ones build on no new Python
    done = run(python, "-m", "pip", "install", *quietly, *arguments)
    if done.returncode:
        raise RuntimeError(f"pip install {' '.join(map(str, arguments))}:\n{done.stdout}")


def requirements(torch: str, lowest: bool) -> list[str]:
    """torch as it is asked for, and what else the package requires: the newest, or the lowest that it takes."""
    project = (counts.ROOT / "pyproject.toml").read_text()  # Python 3.10 reads no TOML
    needed = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)[1]
    extra = re.search(r"^cli = \[(.*?)\]", project, re.DOTALL | re.MULTILINE)[1]
    floors = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', needed + extra))
    if lowest:
        return [f"{name}=={floor}.*" if name == "numpy" else f"{name}=={floor}" for name, floor in floors.items()]
    return [f"torch=={torch}", *(name for name in floors if name != "torch")]


def environment(base: str, torch: str, lowest: bool) -> pathlib.Path:
    """The interpreter of an environment of this Python with torch, this package and what it requires."""
    version = said(base, "import sys; print(*sys.version_info[:2], sep='.')")
    home = HOME / f"python{version}{'-lowest' if lowest else ''}"
    python = home / "bin" / "python"
    if not python.is_file():
        run(base, "-m", "venv", home, check=True)
        install(python, "--upgrade", "pip", "setuptools")
    with tempfile.TemporaryDirectory() as name:  # setuptools leaves build/ in the source
        source = pathlib.Path(name) / "source"
        kept_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results", "tests")
        shutil.copytree(counts.ROOT, source, ignore=kept_out)
        install(python, "--no-build-isolation", *requirements(torch, lowest), *NEEDS, f"{source}[cli]")
        install(python, "--no-deps", "--no-build-isolation", "--force-reinstall", source)
    return python


def said(python: str | pathlib.Path, code: str) -> str:
    return run(python, "-c", code, check=True, stderr=None).stdout.strip()


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


def try_out(python: pathlib.Path, triton: str, lowest: bool) -> dict:
    """A row of the table."""
    begin = time.monotonic()
    if triton == "none":
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "triton")
    else:
        install(python, "--no-deps", f"triton=={triton}")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tests", "benchmarks"):
            left_out = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(counts.ROOT / name, f"{folder}/{name}", ignore=left_out)
        shutil.copy(counts.ROOT / "pyproject.toml", folder)
        choices = [(ALONE if lowest or triton == "none" else PLAIN, False)]
        if triton != "none":
            choices.append((KERNELS, True))
        done = [outcome(python, folder, choice, interpret) for choice, interpret in choices]
    total = {word: sum(found.get(word, 0) for found, _ in done) for word in ("passed", "failed", "skipped")}
    note = " ".join(wrong for _, wrong in done if wrong)
    versions = "import platform, torch, numpy; print(platform.python_version(), torch.__version__, numpy.__version__)"
    version, torch, numpy = said(python, versions).split()
    row = {"python": version, "torch": torch, "triton": triton, "numpy": numpy} | total
    return row | {"seconds": round(time.monotonic() - begin), "commit": records.commit(), "note": note or "-"}


def keep(new: list[dict], unreachable: dict[str, str], reached: set[str]) -> list[dict]:
    """Rows of this run and of those before, as they stand in the file; what could not be run until it has been."""

    def key(row: dict) -> tuple:
        return tuple(tuple(map(int, re.findall(r"\d+", row[name]))) for name in ("python", "torch", "triton", "numpy"))

    path = counts.RESULTS / "compatibility.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    missed = before.get("missed", {})
    rows = sorted({key(row): row for row in [*before.get("table", []), *new]}.values(), key=key)
    ran = {row["python"].rpartition(".")[0] for row in rows}
    counts.keep(
        "compatibility",
        "Pythons by Tritons beside torch, the package as it installs: each op forward and backward and the model in "
        "the interpreter, in fp32 and bf16, and in PyTorch, compiled and under `python -W error` too; where there is "
        "no Triton, checkpoints, training and the command line. No test may fail.",
        "make compatibility",
        sum(row["seconds"] for row in rows),
        {
            "combinations": len(rows),
            "tests passed": sum(row["passed"] for row in rows),
            "tests failed": sum(row["failed"] for row in rows),
            "combinations with a failure": sum(bool(row["failed"]) for row in rows),
        },
        missed={
            name: why
            for name, why in (missed | unreachable).items()
            if name not in reached and name.removeprefix("Python ") not in ran
        },
        table=rows,
    )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compatibility", description=__doc__.partition("\n")[0])
    parser.add_argument("--python", nargs="+", help="interpreters, or versions as 3.12 (each that is found)")
    parser.add_argument("--triton", nargs="+", default=["3.6.0", "3.7.0", "3.9.0", "none"], help="versions, or none")
    parser.add_argument("--torch", default="2.13.0", help="version (2.13.0)")
    parser.add_argument("--lowest", action="store_true", help="what is required as old as the package takes it")
    given = parser.parse_args()
    found, rows, reached = pythons(), [], set()
    unreachable = {f"Python 3.{minor}": "no interpreter" for minor in MINORS if f"3.{minor}" not in found}
    for name in given.python or found:
        what = f"Python {name}" + ", lowest" * given.lowest
        try:
            python = environment(found.get(name, name), given.torch, given.lowest)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            unreachable[what] = str(error).strip().splitlines()[-1]
            print(f"{what}: {error}", file=sys.stderr)
            keep(rows, unreachable, reached)
            continue
        reached.add(what)
        for triton in given.triton:
            try:
                rows.append(try_out(python, triton, given.lowest))
                reached.add(f"{what}, Triton {triton}")
                print(json.dumps(rows[-1]), flush=True)
            except RuntimeError as error:  # of pip
                unreachable[f"{what}, Triton {triton}"] = str(error).strip().splitlines()[-1]
                print(error, file=sys.stderr)
            keep(rows, unreachable, reached)
    return 1 if not rows or any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
