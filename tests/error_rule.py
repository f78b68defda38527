"""The error rule, the only tolerance of the tests.

    ‖ours − truth‖ ≤ 2·‖unfused − truth‖ + eps(dtype)/8·‖truth‖

in the Euclidean norm of the whole tensor, and in the max norm of a row relative to the row's own largest element, the
root mean square over rows. "unfused" is plain PyTorch in the dtype under test, "truth" the reference in float64. The
worst row of all may have twice as much again: the largest of many rounding errors is a matter of luck, on both sides.

Single rows are not compared, nor the rows of a tensor that has fewer than eight: the largest of a few rounding errors
is zero by luck too often to be doubled.
"""

import torch
from torch import Tensor

FEWEST_ROWS = 8


def _row_errors(x: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows' errors in max norm, each relative to its row: the root mean square, and the largest."""
    rows = truth.flatten(0, -2)
    error = (x.double().reshape(rows.shape) - rows).abs().amax(1)
    size = rows.abs().amax(1)
    # A row that is exactly zero (a dropped path's gradient) admits no error at all.
    relative = torch.where(size > 0, error / size, torch.where(error > 0, torch.inf, 0.0))
    return relative.square().mean().sqrt(), relative.max()


def parts(ours: Tensor, unfused: Tensor, truth: Tensor) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """What the rule compares: of the whole tensor, and of its rows where it has enough of them, what it is, our error,
    that of unfused PyTorch, and the limit."""
    slack = torch.finfo(ours.dtype).eps / 8
    error, peer = (ours.double() - truth).norm(), (unfused.double() - truth).norm()
    found = [("error", error, peer, 2 * peer + slack * truth.norm())]
    if truth.dim() < 2 or truth.shape[:-1].numel() < FEWEST_ROWS:
        return found
    (rms, worst), (peer_rms, peer_worst) = _row_errors(ours, truth), _row_errors(unfused, truth)
    # Where all rows of unfused PyTorch happen to err alike, its largest says nothing of what is usual for one row.
    usual = torch.maximum(peer_worst, 2 * peer_rms)
    return [*found, ("rows", rms, peer_rms, 2 * peer_rms + slack), ("worst row", worst, usual, 4 * usual + slack)]


def assert_close_to_truth(ours: Tensor, unfused: Tensor, truth: Tensor, name: str = "output") -> None:
    """Assert the error rule; the dtype is that of `ours`, which must be that of `unfused`."""
    assert truth.dtype == torch.float64, f"{name}: the truth is {truth.dtype}"
    assert ours.shape == unfused.shape == truth.shape, f"{name}: {ours.shape}, {unfused.shape}, {truth.shape}"
    assert ours.dtype == unfused.dtype, f"{name}: ours is {ours.dtype}, unfused is {unfused.dtype}"
    ours, unfused, truth = ours.detach().cpu(), unfused.detach().cpu(), truth.detach().cpu()
    assert torch.isfinite(ours).all(), f"{name}: {(~torch.isfinite(ours)).sum()} elements are not finite"
    if not truth.numel():
        return
    for what, error, peer, limit in parts(ours, unfused, truth):
        assert error <= limit, f"{name}: {what} {error:.3e}, unfused {peer:.3e}, limit {limit:.3e}"


def relative_error(x: Tensor, truth: Tensor) -> float:
    """‖x − truth‖ / ‖truth‖ in float64, for reports."""
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item()
