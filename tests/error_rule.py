"""The error rule, the only tolerance of the tests.

    ‖ours − truth‖ ≤ 2·‖unfused − truth‖ + eps(dtype)/8·‖truth‖

in the Euclidean norm of the whole tensor, and in the max norm per row, where "unfused" is plain PyTorch in the dtype under
test and "truth" the reference in float64. Rows are compared by the worst one, each relative to its own largest element:
in one given row of a few elements PyTorch's error is zero by luck too often to double it.
"""

import torch
from torch import Tensor


def _row_error(x: Tensor, truth: Tensor) -> Tensor:
    rows = truth.reshape(-1, truth.shape[-1] if truth.dim() else 1)
    error = (x.double().reshape(rows.shape) - rows).abs().amax(1)
    size = rows.abs().amax(1)
    # A row that is exactly zero (a dropped path's gradient) admits no error at all.
    return torch.where(size > 0, error / size, torch.where(error > 0, torch.inf, 0.0)).max()


def assert_close_to_truth(ours: Tensor, unfused: Tensor, truth: Tensor, name: str = "output") -> None:
    """Assert the error rule; the dtype is that of `ours`, which must be that of `unfused`."""
    assert truth.dtype == torch.float64, f"{name}: the truth is {truth.dtype}"
    assert ours.shape == unfused.shape == truth.shape, f"{name}: {ours.shape}, {unfused.shape}, {truth.shape}"
    assert ours.dtype == unfused.dtype, f"{name}: ours is {ours.dtype}, unfused is {unfused.dtype}"
    ours, unfused, truth = ours.detach().cpu(), unfused.detach().cpu(), truth.detach().cpu()
    assert torch.isfinite(ours).all(), f"{name}: {(~torch.isfinite(ours)).sum()} elements are not finite"
    if not truth.numel():
        return
    allowance = torch.finfo(ours.dtype).eps / 8
    error, peer = (ours.double() - truth).norm(), (unfused.double() - truth).norm()
    limit = 2 * peer + allowance * truth.norm()
    assert error <= limit, f"{name}: error {error:.3e}, unfused {peer:.3e}, limit {limit:.3e}"
    error, peer = _row_error(ours, truth), _row_error(unfused, truth)
    limit = 2 * peer + allowance
    assert error <= limit, f"{name}: worst row {error:.3e}, unfused {peer:.3e}, limit {limit:.3e}"


def relative_error(x: Tensor, truth: Tensor) -> float:
    """‖x − truth‖ / ‖truth‖ in float64, for reports."""
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item()
