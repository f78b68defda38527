"""Tensors that reach past 2^31 elements: kernels that walk over tokens or images count in 64 bits, in and out."""

import pytest
import torch
import triton
import triton.language as tl
from vit_fast.kernels.product import load_tile, matrix, store_tile

from tests.guard import vast
from vit_fast.ops import (
    attention,
    attention_qkv,
    block,
    linear_residual,
    ln_linear,
    mlp,
    patch_embed,
    swiglu,
    use_backend,
)

STRIDE = 1_100_000_000  # of the first axis: the third row starts past 2^31

WEIGHTS = {
    "ln_linear": lambda x: ln_linear(x, *_norm(), torch.full((16, 16), 0.1, dtype=x.dtype), None),
    "linear_residual": lambda x: linear_residual(x, torch.full((16, 16), 0.1, dtype=x.dtype), None, x),
    "mlp": lambda x: mlp(x, *_norm(), *(torch.full((16, 16), 0.1, dtype=x.dtype), None) * 2),
    "swiglu": lambda x: swiglu(
        x, *_norm(), torch.full((32, 16), 0.1, dtype=x.dtype), None, torch.full((16, 16), 0.1, dtype=x.dtype), None
    ),
    "block": lambda x: _block(x[:, None])[:, 0],
}


def _block(x):
    full = torch.full((16, 16), 0.1, dtype=x.dtype)
    qkv = full.repeat(3, 1)
    return block(x, *_norm(), qkv, None, full, None, None, None, *_norm(), *(full, None) * 2, None, None, num_heads=1)


def _norm():
    return torch.linspace(0.5, 1.5, 16).half(), torch.linspace(-1, 1, 16).half()


@pytest.mark.interpret
@pytest.mark.parametrize("op", WEIGHTS)
def test_rows_far_apart(op):
    """Forward and the input's gradient, which reads x again, equal those of the same rows side by side."""
    x = torch.randn(3, 16, dtype=torch.float16)
    upstream = torch.randn(3, 16, dtype=torch.float16)
    results = []
    for rows in (x, vast(x, STRIDE)):
        rows.requires_grad_()
        with use_backend("triton"):
            y = WEIGHTS[op](rows)
        y.backward(vast(upstream, STRIDE) if rows.stride(0) == STRIDE else upstream)
        results.append((y.detach(), rows.grad))
    assert all(torch.equal(near, far) for near, far in zip(*results))


@pytest.mark.interpret
def test_images_far_apart():
    images = torch.randn(3, 1, 4, 4, dtype=torch.float16)
    weight = torch.randn(16, 1, 2, 2, dtype=torch.float16, requires_grad=True)
    results = []
    for batch in (images, vast(images, STRIDE)):
        with use_backend("triton"):
            tokens = patch_embed(batch, weight, None)
        (gradient,) = torch.autograd.grad(tokens, weight, torch.ones_like(tokens))
        results.append((tokens.detach(), gradient))
    assert all(torch.equal(near, far) for near, far in zip(*results))


@pytest.mark.interpret
@pytest.mark.parametrize("packed", [True, False])
def test_heads_far_apart(packed):
    qkv = torch.randn(3, 5, 3, 2, 16, dtype=torch.float16)
    upstream = torch.randn(3, 5, 32, dtype=torch.float16)
    results = []
    for batch in (qkv, vast(qkv, STRIDE)):
        batch.requires_grad_()
        with use_backend("triton"):
            out = attention_qkv(batch) if packed else attention(*batch.unbind(2))
        out.backward(vast(upstream, STRIDE) if batch.stride(0) == STRIDE else upstream)
        results.append((out.detach(), batch.grad))
    assert all(torch.equal(near, far) for near, far in zip(*results))


@pytest.mark.interpret
@pytest.mark.parametrize("axis", [0, 1, 3], ids=["images", "tokens", "heads"])
def test_queries_and_keys_turned_far_apart(axis):
    """In and out, and the tables' tokens or heads as well: forward and backward they are as side by side."""
    from vit_fast.kernels import rope

    def far(t, axis):
        return vast(t.transpose(0, axis).contiguous(), STRIDE).transpose(0, axis)

    x = torch.randn(3, 3, 2, 3, 16, dtype=torch.float16)
    tables = torch.randn(2, 3, 3, 16).half().unbind(0)  # [H, N, d]
    for back in (False, True):
        near = torch.empty_like(x)
        rope.rotate(x, near, *tables, interleaved=False, back=back)
        y = far(torch.zeros_like(x), axis)
        far_tables = tables if axis == 0 else [far(t, {1: 1, 3: 0}[axis]) for t in tables]
        rope.rotate(far(x, axis), y, *far_tables, interleaved=False, back=back)
        assert y.stride(axis) * 2 >= 2**31
        assert torch.equal(y, near)
        assert not torch.equal(near, x)


@pytest.mark.interpret
def test_an_image_of_windows_far_behind_the_first(monkeypatch):
    """The op copies a map that is not dense, so that a far image has as many before it: of the programs of such a
    batch the last alone runs, on memory of which nothing else is there."""
    from triton.runtime.interpreter import InterpreterBuilder
    from vit_fast.kernels import window_attention as kernels

    images = 2**31 // (64 * 48) + 2
    sizes = {"o": 64 * 16, "do": 64 * 16, "qkv": 64 * 48, "dqkv": 64 * 48}
    given = {name: torch.randn(sizes[name]).half() for name in ("qkv", "do")}
    table = torch.randn(225, 1).half()
    arguments = {"span": 1, "Y": 8, "X": 8, "shift_y": 3, "shift_x": 5, "scale": 0.25}
    arguments |= {"H": 1, "HEAD": 16, "WINDOW": (8, 8), "BLOCK": 64, "PRECISION": "ieee"}

    def run(count: int) -> tuple[torch.Tensor, ...]:
        far = {
            name: vast(torch.zeros(2, size, dtype=torch.float16), size * (count - 1)) for name, size in sizes.items()
        }
        for name, numbers in given.items():
            far[name][1] = numbers
        partial = vast(torch.zeros(2, 64 * 64), 64 * 64 * (count - 1))
        qkv, others = far["qkv"], {"table_ptr": table, "count": count, **arguments}
        kernels._forward_kernel[(1,)](qkv_ptr=qkv, o_ptr=far["o"], **others)
        kernels._grad_kernel[(1,)](qkv_ptr=qkv, do_ptr=far["do"], dqkv_ptr=far["dqkv"], partial_ptr=partial, **others)
        return far["o"][1], far["dqkv"][1], partial[1]

    results = []
    for count in (2, images):
        last = (count - 1, 0, 0)
        monkeypatch.setattr(
            InterpreterBuilder, "set_grid_idx", lambda self, *_, last=last: setattr(self, "grid_idx", last)
        )
        results.append(run(count))
    assert (images - 1) * sizes["qkv"] >= 2**31
    assert all(torch.equal(near, far) and near.abs().max() > 0 for near, far in zip(*results))


@triton.jit
def _copy_kernel(x_ptr, y_ptr, M, N, stride_x, stride_y, BLOCK: tl.constexpr, TMA: tl.constexpr):
    tile = load_tile(matrix(x_ptr, M, N, stride_x, BLOCK, BLOCK, TMA), 0, 0, BLOCK, BLOCK)
    store_tile(matrix(y_ptr, M, N, stride_y, BLOCK, BLOCK, TMA), tile, 0, 0, y_ptr.dtype.element_ty)


@pytest.mark.interpret
@pytest.mark.parametrize("tma", [False, True])
def test_a_result_that_reaches_far(tma):
    """What every product writes with, on rows far apart."""
    x = torch.randn(3, 8, dtype=torch.float16)
    y = vast(torch.zeros(3, 8, dtype=torch.float16), STRIDE)
    _copy_kernel[(1,)](x, y, 3, 8, 8, STRIDE, 16, tma)
    assert torch.equal(x, y)
