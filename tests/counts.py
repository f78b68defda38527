"""What the long runs of the tests counted, kept as data: tests/results/NAME.json, shown in tests/README.md.

what          one sentence: what was run, and what must hold
command       how to run it again
date          of the run; commit, of the tree that it ran on, "+" where that had been changed
duration_s    seconds, all calls of a resumed run together
machine       whose the figures are
versions      of Python, torch and triton
counts        name → number, in the order in which they are shown
missed        name → why, where something was not caught and is answered by a reason
table         a list of rows, each the same names → values, where one number a name does not say it
"""

import datetime
import hashlib
import json
import os
import pathlib
import platform

from benchmarks import records

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "results"


def digest(*names: str) -> str:
    """Of what these files and folders of this tree hold, by which a note says of which code it is."""
    found = hashlib.sha256()
    for name in names:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return found.hexdigest()[:12]


class Notes:
    """What a long run has done, a line of JSON at a time in build/, so that a run that was cut goes on there.

    Its name says what ran and of which code it is: another's does not count.
    """

    def __init__(self, name: str):
        self.path = ROOT / "build" / f"{name}.jsonl"
        self.lines = list(map(json.loads, self.path.read_text().splitlines())) if self.path.is_file() else []

    def add(self, line: dict) -> None:
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def keep(
    name: str,
    what: str,
    command: str,
    duration_s: float,
    counts: dict[str, int],
    missed: dict[str, str] | None = None,
    table: list[dict] | None = None,
) -> pathlib.Path:
    """Write tests/results/NAME.json, whole or not at all."""
    versions = {package: records.version(package) for package in ("torch", "triton")}
    kept = {
        "what": what,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": records.commit(),
        "duration_s": round(duration_s),
        "machine": f"{records.cpu_name()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **versions},
        "counts": counts,
        **({"missed": missed} if missed else {}),
        **({"table": table} if table else {}),
    }
    path = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    draft.replace(path)
    return path
