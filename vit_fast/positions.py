"""Position tables and patch projections, made and resampled."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_fast.ops.backend import exporting, without_autocast


def sincos_position(rows: int, columns: int, width: int, temperature: float = 10_000.0) -> Tensor:
    """The fixed table of Vaswani et al. 2017, section 3.5, in two dimensions: float64 [rows·columns, width].

    Patch (r, c) is row r·columns + c, with sin(c·ω), cos(c·ω), sin(r·ω), cos(r·ω) and ωᵢ = temperature^(−4i/width).
    """
    if width % 4:
        raise ValueError(f"embed_dim: got {width}, pos_embed='sincos2d' takes a multiple of 4")
    omega = temperature ** (-torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    row = torch.arange(rows, dtype=torch.float64, device="cpu").repeat_interleave(columns)[:, None] * omega
    column = torch.arange(columns, dtype=torch.float64, device="cpu").repeat(rows)[:, None] * omega
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)


def resample_positions(
    table: Tensor, grid: tuple[int, int], old_grid: tuple[int, int], prefix: int, how: str
) -> Tensor:
    """A position table [1, prefix + N, D] for another grid: bicubic, in fp32.

    Args:
        how: "antialiased" as timm and DINOv2 with registers in transformers, "plain" as transformers' other models,
            "offset" as DINOv2's own repository: plain, by a ratio whose numerator has 0.1 added.
    """
    # Under torch.export there is no way out early: it would bind the graph to the example's size.
    if not exporting() and grid[0] == old_grid[0] and grid[1] == old_grid[1]:
        return table
    tokens, patches = table[:, :prefix], table[:, prefix:]
    image = patches.float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    if torch.compiler.is_compiling() and not exporting() and torch.is_grad_enabled() and table.requires_grad:
        # PyTorch compiles no gradient of a resize to a size that is not known: a product with resized units has one.
        with torch.no_grad():
            # Of each side, [old, new]: units as both columns of a picture, which stay alike in every way.
            units = [torch.eye(old, device=image.device)[None, :, :, None].expand(-1, -1, -1, 2) for old in old_grid]
            rows, columns = (_resized(unit, (new, 2), how)[0, :, :, 0] for unit, new in zip(units, grid))
        with without_autocast(image):
            image = rows.T @ image @ columns
    else:
        image = _resized(image, grid, how)
    patches = image.permute(0, 2, 3, 1).reshape(1, -1, table.shape[-1]).to(table.dtype)
    return torch.cat([tokens, patches], dim=1) if prefix else patches


def _resized(image: Tensor, size: tuple[int, int], how: str) -> Tensor:
    """Pictures [1, D, rows, columns] of another size."""
    if how != "offset":
        return F.interpolate(image, size=size, mode="bicubic", antialias=how == "antialiased")
    sides = zip(size, image.shape[2:])
    return F.interpolate(image, scale_factor=tuple((new + 0.1) / old for new, old in sides), mode="bicubic")


def resample_patch_weight(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """A patch projection [D, C, P, P] for another patch size, by the pseudoinverse of a resize (FlexiViT, 3.4)."""
    old = tuple(weight.shape[-2:])
    basis = torch.eye(old[0] * old[1], device=weight.device).reshape(-1, 1, *old)
    resize = F.interpolate(basis, size=size, mode="bicubic", antialias=True, align_corners=False)
    resize = resize.flatten(1).T  # [new pixels, old pixels]
    resampled = weight.float().flatten(2) @ torch.linalg.pinv(resize)
    return resampled.reshape(*weight.shape[:2], *size).to(weight.dtype)
