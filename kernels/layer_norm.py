"""LayerNorm of whole rows, and its gradients.

forward    x̂ = (x − mean)·rstd     z = x̂∘γ + β
backward   g = dz∘γ     dx = rstd·(g − mean(g) − x̂·mean(g∘x̂))     dγ = Σ dz∘x̂     dβ = Σ dz      (Σ over rows)
shapes     x, z, dz, dx [M, K]   γ, β [K]   mean, rstd [M] in fp32
saved      x, mean and rstd: backward has x̂ in registers anyway, and writes z again for the gradient of the weight
limit      2·M·K elements moved forward, 4·M·K backward and one more for a residual's gradient, at the rate of a copy

A pass of its own and not a loader of the product behind it: a left operand that is computed in registers makes wgmma
wait for each of its instructions, and the product then takes twice its time, several times what this pass costs
(measured on an H200, docs/performance.md).
"""

import torch
import triton
import triton.language as tl

from .linear import NO_BRANCH, store_branch
from .product import early, load_tile, load_vector, matrix, store_tile, wait_for_launch_before
from .tile_table import multiprocessors

PROGRAMS = 4  # of backward, a multiprocessor: each has a share of dγ and dβ to itself


def whole_rows(K: int, elements: int) -> dict:
    """The launch of a kernel that holds rows whole, about so many elements: four warps, and more for long rows."""
    block = 1 << (K - 1).bit_length()
    return {"BLOCK_M": max(1, elements // block), "BLOCK_K": block, "num_warps": min(16, max(4, block // 1024))}


@triton.jit(do_not_specialize=["M"])
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, z_ptr, mean_ptr, rstd_ptr,
    M, K, stride_x, eps,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    wait_for_launch_before()
    row = tl.program_id(0) * BLOCK_M
    rows, cols = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    x = load_tile(matrix(x_ptr, M, K, stride_x, BLOCK_M, BLOCK_K, False), row, 0, BLOCK_M, BLOCK_K).to(tl.float32)
    total, count, share = tl.sum(x, axis=1), tl.cast(K, tl.float32), 1.0 / K
    mean = total * share
    # Newton's step to the nearest number: the mean of equal elements is that element, which `/` on a GPU may miss.
    mean = tl.fma(tl.fma(-mean, count, total), share, mean)
    centred = tl.where((cols < K)[None, :], x - mean[:, None], 0.0)
    if x_ptr.dtype.element_ty == tl.float32:
        # Once more of what the first mean left over: exact where all elements are equal, whose variance must be zero.
        left_over = tl.sum(centred, axis=1) / K
        mean += left_over
        centred = tl.where((cols < K)[None, :], centred - left_over[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / K + eps)
    weight, bias = load_vector(weight_ptr, cols, K), load_vector(bias_ptr, cols, K)
    z = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    store_tile(matrix(z_ptr, M, K, K, BLOCK_M, BLOCK_K, False), z, row, 0, z_ptr.dtype.element_ty)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=rows < M)
        tl.store(rstd_ptr + rows, rstd, mask=rows < M)


def forward(x, weight, bias, eps, dtype, training):
    """z [M, K] in `dtype`; mean and rstd [M], None unless training. The last axis of x has stride 1."""
    M, K = x.shape
    z = torch.empty((M, K), dtype=dtype, device=x.device)
    mean, rstd = None, None
    if training:
        mean, rstd = (torch.empty((M,), dtype=torch.float32, device=x.device) for _ in range(2))
    tile = whole_rows(K, 4096)
    _forward_kernel[(-(-M // tile["BLOCK_M"]),)](
        x_ptr=x, weight_ptr=weight, bias_ptr=bias, z_ptr=z, mean_ptr=mean, rstd_ptr=rstd, M=M, K=K,
        stride_x=x.stride(0), eps=eps, **tile, **early(x.device, M, K),
    )  # fmt: skip
    return z, mean, rstd


@triton.jit(do_not_specialize=["M", "span"])
def _backward_kernel(
    dz_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, residual_grad_ptr, dx_ptr, z_ptr, shares_ptr,
    branch, M, K, stride_x, stride_residual_grad, span,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of this program's span of rows dx, what reached x past the branch added where that is given, z, what dx is to the
    branch before where there is one to know, and its share of dγ and dβ, [2, programs, K]."""
    first = tl.program_id(0) * span
    cols = tl.arange(0, BLOCK_K)
    weight, bias = load_vector(weight_ptr, cols, K)[None, :], load_vector(bias_ptr, cols, K)[None, :]
    dweight, dbias = tl.zeros([BLOCK_M, BLOCK_K], tl.float32), tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for row in range(first, min(first + span, M), BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        mean, rstd = load_vector(mean_ptr, rows, M)[:, None], load_vector(rstd_ptr, rows, M)[:, None]
        dz = load_tile(matrix(dz_ptr, M, K, K, BLOCK_M, BLOCK_K, False), row, 0, BLOCK_M, BLOCK_K).to(tl.float32)
        x = load_tile(matrix(x_ptr, M, K, stride_x, BLOCK_M, BLOCK_K, False), row, 0, BLOCK_M, BLOCK_K)
        # Past a row's end γ is zero, and so is g; x̂ is not, but every sum has g or dz as a factor.
        x = (x.to(tl.float32) - mean) * rstd
        g = dz * weight
        dx = (g - tl.sum(g, axis=1)[:, None] / K - x * (tl.sum(g * x, axis=1)[:, None] / K)) * rstd
        if residual_grad_ptr is not None:
            residual_grad = matrix(residual_grad_ptr, M, K, stride_residual_grad, BLOCK_M, BLOCK_K, False)
            dx += load_tile(residual_grad, row, 0, BLOCK_M, BLOCK_K).to(tl.float32)
        store_tile(matrix(dx_ptr, M, K, K, BLOCK_M, BLOCK_K, False), dx, row, 0, dx_ptr.dtype.element_ty)
        if branch[3] is not None:  # where drop∘dy∘γ goes; Triton compares no tuple that holds a None
            store_branch(dx, branch, row, 0, M, K)
        z = matrix(z_ptr, M, K, K, BLOCK_M, BLOCK_K, False)
        store_tile(z, x * weight + bias, row, 0, z_ptr.dtype.element_ty)
        dweight += dz * x
        dbias += dz
    share = shares_ptr + tl.program_id(0) * K + cols
    tl.store(share, tl.sum(dweight, axis=0), mask=cols < K)
    tl.store(share + tl.num_programs(0) * K, tl.sum(dbias, axis=0), mask=cols < K)


def backward(dz, x, mean, rstd, weight, bias, residual_grad=None, branch=None):
    """dx [M, K] in the dtype of x, z [M, K] in that of dz, and shares [2, programs, K] of dγ and dβ for `finish`.

    `residual_grad` reached x past this branch, and is added to dx; `branch`, of `linear.branch_of`, is the branch
    before, whose end x was: what dx is to it is written too.
    """
    M, K = x.shape
    dx, z = torch.empty((M, K), dtype=x.dtype, device=x.device), torch.empty_like(dz)
    tile = whole_rows(K, 2048)  # four tensors of them are held
    steps = -(-M // tile["BLOCK_M"])
    span = -(-steps // (PROGRAMS * multiprocessors(x.device))) * tile["BLOCK_M"]
    shares = torch.empty((2, -(-M // span), K), dtype=torch.float32, device=x.device)
    _backward_kernel[(shares.shape[1],)](
        dz_ptr=dz, x_ptr=x, mean_ptr=mean, rstd_ptr=rstd, weight_ptr=weight, bias_ptr=bias,
        residual_grad_ptr=residual_grad, dx_ptr=dx, z_ptr=z, shares_ptr=shares, branch=branch or NO_BRANCH, M=M, K=K,
        stride_x=x.stride(0), stride_residual_grad=0 if residual_grad is None else residual_grad.stride(0), span=span,
        **tile,
    )  # fmt: skip
    return dx, z, shares


@triton.jit
def _sum_shares(norm, cols, K, BLOCK_M: tl.constexpr):
    """dγ (program 0 of axis 1) or dβ (1) of one LayerNorm."""
    shares_ptr, count, dweight_ptr, dbias_ptr = norm
    count = tl.cast(count, tl.int32)
    which = tl.program_id(1)
    sums = tl.zeros([BLOCK_M, cols.shape[0]], tl.float32)
    for first in range(0, count, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        place = shares_ptr + (which * count + rows)[:, None] * K + cols[None, :]
        sums += tl.load(place, mask=(rows[:, None] < count) & (cols[None, :] < K), other=0.0)
    total = tl.sum(sums, axis=0)
    if which == 0:
        tl.store(dweight_ptr + cols, total, mask=cols < K)
    else:
        tl.store(dbias_ptr + cols, total, mask=cols < K)


@triton.jit
def _finish_kernel(first, second, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dγ and dβ of one LayerNorm or two, each (shares [2, programs, K], programs, dγ, dβ)."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(2) == 0:
        _sum_shares(first, cols, K, BLOCK_M)
    else:
        if second is not None:
            _sum_shares(second, cols, K, BLOCK_M)


def finish(*norms: tuple) -> list:
    """(dγ, dβ) of each LayerNorm: one launch for one or two (shares of `backward`, γ, β); or all shares are None."""
    if norms[0][0] is None:
        return [(None, None)] * len(norms)
    K = norms[0][0].shape[2]
    found, groups = [], [None, None]
    for index, (shares, weight, bias) in enumerate(norms):
        dweight, dbias = (torch.empty((K,), dtype=t.dtype, device=t.device) for t in (weight, bias))
        found.append((dweight, dbias))
        groups[index] = (shares, float(shares.shape[1]), dweight, dbias)  # a float as in `linear.finish`
    _finish_kernel[(-(-K // 32), 2, len(norms))](
        first=groups[0], second=groups[1], K=K, BLOCK_M=32, BLOCK_N=32, num_warps=4
    )
    return found
