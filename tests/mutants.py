"""The tests tested: bugs that kernel authors really make, each put into a copy of the tree and run against its tests.

python -m tests.mutants [--sample 0] [--seed 0] [--workers N] [--only WORD]

A mutant of tests/mutants.txt is a place in a file and what stands there instead. It is caught where the tests of its op
fail, crash or hang, which they must not do of the tree as it is; that is noted in build/, and a run that was cut goes
on there. What is missed is answered: by a new test, or in HARMLESS by the reason why it changes nothing. The last whole
run is kept in tests/results/mutants.json; tests/test_mutants.py sees that every place is still there.
"""

import argparse
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tests import counts

LIMIT = 1200  # seconds that a mutant's tests may take: the slowest file's take half of it
NO_END = f"no end in {LIMIT} s"
NOTHING_RAN = (2, 3, 4, 5)  # pytest's exit statuses: not collected, an error of its own, wrong arguments, no test

# The tests of an op, those first that are quick to fail.
TESTS = {
    "kernels/product.py": [
        "linear_residual",
        "ln_linear",
        "swiglu",
        "offsets",
        "mlp",
        "promises",
        "descriptors",
        "numbers",
    ],
    "kernels/linear.py": ["linear_residual", "backward_ops", "offsets", "promises", "mlp", "block"],
    "kernels/layer_norm.py": ["ln_linear", "backward_ops", "offsets", "promises", "mlp", "block"],
    "kernels/ln_linear.py": ["ln_linear", "promises"],
    "kernels/linear_residual.py": ["linear_residual", "promises", "offsets"],
    "kernels/mlp.py": ["mlp", "promises", "offsets"],
    "kernels/activation.py": ["activation", "mlp"],
    "kernels/swiglu.py": ["swiglu", "promises"],
    "kernels/patch_embed.py": ["patch_embed", "promises", "offsets", "guard_pages"],
    "kernels/attention.py": ["attention", "offsets", "guard_pages"],
    "kernels/rope.py": ["rope_attention", "offsets"],
    "kernels/window_attention.py": ["window_attention", "offsets"],
    "kernels/block.py": ["block"],
    "vit_fast/ops/ln_linear.py": ["ln_linear", "promises"],
    "vit_fast/ops/linear_residual.py": ["linear_residual", "promises"],
    "vit_fast/ops/mlp.py": ["mlp", "promises"],
    "vit_fast/ops/attention.py": ["attention"],
    "vit_fast/ops/rope_attention.py": ["rope_attention", "promises"],
    "vit_fast/ops/window_attention.py": ["window_attention"],
    "vit_fast/ops/block.py": ["block", "promises"],
    "vit_fast/ops/patch_embed.py": ["patch_embed", "promises"],
}


class Mutant(NamedTuple):
    """In `file`, once there, `old` becomes `new`."""

    file: str
    bug: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file}: {self.bug}"


def read() -> list[Mutant]:
    """The mutants of tests/mutants.txt."""
    found, file = [], ""
    for part in (counts.ROOT / "tests" / "mutants.txt").read_text().strip().split("\n\n")[1:]:
        if part.startswith("# "):
            file = part[2:]
            continue
        bug, *lines = part.split("\n")
        old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
        found.append(Mutant(file, bug, old, new))
    return found


# Missed, and why nothing is wrong: mutant → reason.
HARMLESS = {
    "kernels/linear.py: a gradient that is not cast": (
        "every product casts the tiles that it loads: the same numbers, more slowly"
    ),
}


def file_of(test: str) -> str:
    """The file of a test by its name, that of an op first."""
    return next(name for where in ("ops/", "") if (counts.ROOT / (name := f"tests/{where}test_{test}.py")).is_file())


def copied_tree(folder: pathlib.Path) -> pathlib.Path:
    """A copy of what the tests need, in which `vit_fast.kernels` is found beside the rest."""
    for name in ("kernels", "vit_fast", "benchmarks", "tests"):
        left_out = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(counts.ROOT / name, folder / name, ignore=left_out)
    shutil.copy(counts.ROOT / "pyproject.toml", folder)
    (folder / "vit_fast" / "kernels").symlink_to("../kernels")
    return folder


def mutated(mutant: Mutant) -> str:
    """The text of the mutant's file.

    Raises:
        ValueError: where the place is not there, or not once.
    """
    text = (counts.ROOT / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant}: got the place {text.count(mutant.old)} times, takes it once")
    return text.replace(mutant.old, mutant.new)


def run(mutant: Mutant | None, tests: list[str]) -> tuple[bool, str]:
    """Whether the tests catch it, and what they said last; without a mutant they must not."""
    with tempfile.TemporaryDirectory() as name:
        folder = copied_tree(pathlib.Path(name))
        if mutant:
            (folder / mutant.file).write_text(mutated(mutant))
        files = [file_of(test) for test in tests]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "interpret and not slow", "-p", "no:cacheprovider"]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": name}
        try:
            done = subprocess.run(
                [*command, *files], cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT
            )
        except subprocess.TimeoutExpired:
            return True, NO_END
    if done.returncode in NOTHING_RAN:  # a bug that no test met is not caught
        raise RuntimeError(f"{mutant}: no test ran:\n{done.stdout}{done.stderr}")
    last = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "Fatal"))]
    return done.returncode != 0, last[0] if last else f"exit status {done.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", type=int, default=0, help="how many, drawn by chance (0: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="at a time (one a core)")
    parser.add_argument("--only", default="", help="those whose file or bug has this in it")
    given = parser.parse_args()
    mutants = read()
    chosen = [mutant for mutant in mutants if given.only in str(mutant)]
    if given.sample:
        chosen = random.Random(given.seed).sample(chosen, min(given.sample, len(chosen)))
    notes = counts.Notes(f"mutants-{counts.digest('kernels', 'vit_fast', 'tests')}")
    done = {tuple(line["mutant"]): line for line in notes.lines}
    left, missed = [mutant for mutant in chosen if mutant not in done], []
    print(f"{len(chosen) - len(left)} were caught before, {len(left)} to go, {given.workers} at a time", flush=True)

    def one(mutant: Mutant | None, tests: list[str]) -> tuple[bool, str, float]:
        begin = time.monotonic()
        return *run(mutant, tests), time.monotonic() - begin

    with ThreadPoolExecutor(given.workers) as pool:
        whole = sorted({test for mutant in left for test in TESTS[mutant.file]})
        for test, (fails, said, seconds) in zip(whole, pool.map(lambda test: one(None, [test]), whole)):
            print(f"of the tree as it is, {file_of(test)}: {seconds:.0f} s", flush=True)
            if fails:
                print(f"it fails by itself, and would catch anything: {said}")
                return 1
        found = pool.map(lambda mutant: one(mutant, TESTS[mutant.file]), left)
        for number, (mutant, (caught, said, seconds)) in enumerate(zip(left, found), 1):
            word = "caught" if caught else "MISSED"
            print(f"{number}/{len(left)} {word} {mutant} ({seconds:.0f} s) {said}", flush=True)
            done[mutant] = {"mutant": mutant, "said": said, "seconds": round(seconds)}
            if caught:
                notes.add(done[mutant])
            else:
                missed.append(mutant)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught")
    unanswered = [mutant for mutant in missed if str(mutant) not in HARMLESS]
    if len(chosen) == len(mutants):
        counts.keep(
            "mutants",
            "Bugs that kernel authors make, each put into a copy of the tree: the tests of its op must fail.",
            "python -m tests.mutants",
            sum(done[mutant]["seconds"] for mutant in mutants) / given.workers,
            {
                "mutants": len(chosen),
                "caught": len(chosen) - len(missed),
                "of these by no end": sum(done[mutant]["said"] == NO_END for mutant in mutants),
                "missed": len(missed),
            },
            {str(mutant): HARMLESS.get(str(mutant), "not answered yet") for mutant in missed},
        )
    return 1 if unanswered else 0


if __name__ == "__main__":
    sys.exit(main())
