"""Where PyTorch was measured to be faster than an op's kernels: evidence.json, architecture → findings.

A finding holds for its op, pass, dtype and shape, from as many rows on as were measured; `python -m
benchmarks.evidence` makes the file from the files of results. As with tiles, what was measured on one card of an
architecture counts for all of it; a finding names its card. It is evidence about the package's own tiles: where the
user's own table is in force, nothing of it counts.
"""

import functools
import json
import pathlib
from typing import NamedTuple

import torch

FILE = pathlib.Path(__file__).parent / "evidence.json"


class Finding(NamedTuple):
    """One op at one shape that PyTorch computes faster."""

    op: str
    training: bool  # forward and backward, or forward alone
    dtype: torch.dtype
    # attention: (Tq, Tk, d). ln_linear, linear_residual: (N, K). mlp: (D, F). patch_embed: (D, C·P·P).
    shape: tuple[int, ...]
    rows: int  # at least so many: heads of all images for attention, tokens of all images for the others
    form: str  # what of PyTorch was faster: "eager", or "sdpa " and one of its backends
    reason: str


def _reason(found: dict) -> str:
    ours, theirs = found["us"]
    return (
        f"PyTorch ({found['form']}) was measured faster on {found['device']} in {found['pass']} at "
        f"{' x '.join(map(str, found['shape']))}, {found['rows']} rows: {theirs:.0f} us, the kernels {ours:.0f}"
    )


@functools.cache
def findings_of(architecture: str) -> tuple[Finding, ...]:
    """All that the file says of an architecture, or nothing where the user has a table of tiles for it."""
    from vit_fast.kernels import tile_table

    if tile_table.user_file(architecture).is_file():
        return ()
    lines = json.loads(FILE.read_text()).get(architecture, [])
    return tuple(
        Finding(
            line["op"],
            line["pass"] == "training",
            getattr(torch, line["dtype"]),
            tuple(line["shape"]),
            line["rows"],
            line["form"],
            _reason(line),
        )
        for line in lines
    )


@functools.cache
def _findings(op: str, device: torch.device) -> tuple[Finding, ...]:
    from vit_fast.kernels import tile_table

    return tuple(finding for finding in findings_of(tile_table.architecture(device)) if finding.op == op)


def findings(op: str, device: torch.device) -> tuple[Finding, ...]:
    """All that the file says of an op on a device on which the kernels run."""
    return _findings(op, device)


# As those of backend.py: torch.compile takes the answer and does not trace it.
vars(findings)["_dynamo_marked_constant"] = True
