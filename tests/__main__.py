"""`python -m tests [--slow] [--keep] [pytest's arguments]`: the pytest processes of `make test`, two at a time.

Triton reads TRITON_INTERPRET when it is imported, so what runs in its interpreter needs processes of its own: tests/ops
in one beside everything that needs no interpreter, the others in one behind that, which makes two cores about equally
busy. What the first has printed follows when the second is done. `--keep` writes how many passed of each file to
tests/results, where none failed.
"""

import collections
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from xml.etree import ElementTree

from tests import counts

PART = "VIT_FAST_TESTS"  # "ops" or "others": which of the interpreted tests tests/conftest.py leaves
NO_TESTS = 5  # pytest's exit status where nothing was selected


def command(marker: str, arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "pytest", "-m", marker, *arguments]


def keep(reports: pathlib.Path, slow: bool, begin: float) -> None:
    """The counts of a whole run, from pytest's reports."""
    duration = time.monotonic() - begin
    by_file = collections.defaultdict(collections.Counter)
    for report in reports.iterdir():
        for test in ElementTree.parse(report).iter("testcase"):
            outcome = "passed" if test.find("skipped") is None else "skipped"
            by_file[test.get("file") or test.get("name")].update({outcome: 1, "seconds": float(test.get("time"))})
    rows = [
        {"tests": name, **{what: round(found[what]) for what in ("passed", "skipped", "seconds")}}
        for name, found in sorted(by_file.items())
    ]
    counts.keep(
        "test-all" if slow else "test",
        "The tests by their files. None may fail; those that are skipped need a GPU, or say why. Two processes run at "
        "a time: their seconds are more than the run took.",
        "python -m tests --keep" + " --slow" * slow,
        duration,
        {
            "passed": sum(row["passed"] for row in rows),
            "failed": 0,
            "skipped": sum(row["skipped"] for row in rows),
        },
        table=rows,
    )


def main(arguments: list[str]) -> int:
    begin, slow, kept = time.monotonic(), "--slow" in arguments, "--keep" in arguments
    arguments = [argument for argument in arguments if argument not in ("--slow", "--keep")]
    if kept and arguments:
        sys.exit(f"--keep: counts all tests, takes no choice of them, got {' '.join(arguments)}")
    with tempfile.TemporaryDirectory() as reports:
        code = run(arguments, slow, reports if kept else None)
        if kept and not code:
            keep(pathlib.Path(reports), slow, begin)
    return code


def run(arguments: list[str], slow: bool, reports: str | None) -> int:
    """The exit status: pytest's largest."""
    speed = "" if slow else " and not slow"
    # One thread each: two processes share what may be two cores, and most tests are small.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    interpreting = {**environment, "TRITON_INTERPRET": "1"}
    environment.pop("TRITON_INTERPRET", None)

    def reported(part: str) -> list[str]:
        report = ["--junit-xml", f"{reports}/{part}.xml", "-o", "junit_family=xunit1"] if reports else []
        return [*arguments, *report]

    def interpreted(part: str) -> dict:
        given = [*reported(part), "-o", f"cache_dir=.pytest_cache/{part}"]
        return {"args": command(f"interpret{speed}", given), "env": {**interpreting, PART: part}}

    with tempfile.TemporaryFile() as output:
        kernels = subprocess.Popen(**interpreted("ops"), stdout=output, stderr=subprocess.STDOUT)
        try:
            print("everything but the interpreted kernels, of which a second process runs tests/ops:", flush=True)
            plain = subprocess.run(command(f"not interpret{speed}", reported("plain")), env=environment).returncode
            print("\nwhat else runs in Triton's interpreter:", flush=True)
            others = subprocess.run(**interpreted("others")).returncode
            print("\ntests/ops in Triton's interpreter:", flush=True)
            output_read = 0
            while True:
                done = kernels.poll() is not None
                text = os.pread(output.fileno(), 1 << 20, output_read)
                output_read += len(text)
                sys.stdout.buffer.write(text)
                sys.stdout.flush()
                if done and not text:
                    break
                time.sleep(0 if text else 0.2)
        finally:
            kernels.terminate()
            kernels.wait()
    codes = {plain, others, kernels.returncode}
    if arguments and NO_TESTS in codes:  # a chosen file may have tests of one kind only
        codes.discard(NO_TESTS)
        codes = codes or {NO_TESTS}
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
