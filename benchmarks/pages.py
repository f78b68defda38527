"""What the pages are made with: files of results, tables, and the parts between a page's marks."""

import json
import pathlib
import re
from collections.abc import Iterable

RESULTS = pathlib.Path(__file__).parent / "results/NVIDIA_H200"
CPU_RESULTS = RESULTS.parent / "AMD_EPYC"


def results(name: str, folder: pathlib.Path = RESULTS) -> dict:
    """A file of results."""
    return json.loads((folder / f"{name}.json").read_text())


def markdown_table(head: list[str], rows: Iterable[list]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def replace_part(text: str, name: str, body: str) -> str:
    """`text` with what stands between the marks `begin: name` and `end: name` replaced.

    Raises:
        ValueError: where the marks are missing.
    """
    begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"the page has no part {begin.strip()} … {end}")
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    return re.sub(pattern, lambda _: f"{begin}{body}\n{end}", text, flags=re.DOTALL)
