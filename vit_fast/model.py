"""The Vision Transformer: modules that hold parameters under timm's names and call the fused ops.

    Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, equations 1 to 4        the model
    Touvron et al. 2021, Training data-efficient image transformers                 the distilled model
    Touvron et al. 2021, CaiT (LayerScale); Huang et al. 2016, Stochastic Depth     the ends of a block's two halves
    Zhai et al. 2022, Scaling Vision Transformers, section 3.5                      the attention pool ('map')
    Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers              attention_rollout

Each half of a block is two or three fused ops that read the parameters of its submodules. Where a submodule is no plain
module of the kind that timm puts there (it has a hook, a parametrization, a LoRA wrapper, a quantised weight) or where
dropout is active, that half calls its submodules one by one instead, as timm does, and one log line says why.

Letters: B batch, C channels, P patch side, N patches, R prefix tokens, T = R + N tokens, D width, H heads, d = D/H.
"""

import collections
import contextlib
import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils.checkpoint import checkpoint

from vit_fast import ops
from vit_fast.ops.backend import compute_dtype, log

POOLS = ("", "token", "avg", "avgmax", "max", "map")
WEIGHT_INITS = ("", "skip", "reset", "jax", "jax_nlhb", "moco")
LAYER_NORM = functools.partial(nn.LayerNorm, eps=1e-6)


class QuickGELU(nn.Module):
    """x·σ(1.702 x), the activation of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class LayerScale(nn.Module):
    """γ·x over the last axis, γ [D] starting at `init_values` (CaiT, equation 4)."""

    def __init__(self, dim: int, init_values: float = 1e-5, device=None, dtype=None):
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's branch is dropped with probability `drop_prob`, or scaled by 1/keep."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def draw(self, like: Tensor, dtype: torch.dtype) -> Tensor | None:
        """[B] factors, 0 or 1/keep, from the default generator with timm's own arithmetic; None where nothing drops."""
        if not self.training or self.drop_prob == 0:
            return None
        keep = 1 - self.drop_prob
        factors = like.new_empty(like.shape[:1], dtype=dtype).bernoulli_(keep)
        return factors.div_(keep) if keep > 0 else factors

    def forward(self, x: Tensor) -> Tensor:
        factors = self.draw(x, x.dtype)
        return x if factors is None else x * factors.view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class PatchDropout(nn.Module):
    """In training keeps a random 1 − `prob` of the patch tokens, and every prefix token (Li et al. 2022, FLIP)."""

    def __init__(self, prob: float, num_prefix_tokens: int):
        super().__init__()
        self.prob = prob
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.prob == 0:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        keep = max(1, int(patches.shape[1] * (1 - self.prob)))
        kept = torch.argsort(torch.randn(patches.shape[:2], device=x.device), dim=-1)[:, :keep]
        patches = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return torch.cat([prefix, patches], dim=1)


class PatchEmbed(nn.Module):
    """Images [B, C, rows, columns] → patch tokens [B, N, D], or [B, rows/P, columns/P, D] where `flatten` is off."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer=None,
        flatten: bool = True,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.patch_size = _pair(patch_size, "patch_size")
        self._set_img_size(_pair(img_size, "img_size"))
        self.flatten = flatten
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size, bias=bias, **dd)
        self.norm = norm_layer(embed_dim, **dd) if norm_layer else nn.Identity()

    def _set_img_size(self, img_size: tuple[int, int]) -> None:
        self.img_size = img_size
        self.grid_size = (img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        if self.num_patches == 0:
            raise ValueError(f"img_size: got {img_size}, takes at least one patch of {self.patch_size}")

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Change the image size, the patch size, or both; the projection is resampled for a new patch size."""
        patch_size = self.patch_size if patch_size is None else _pair(patch_size, "patch_size")
        if patch_size != self.patch_size:
            old = self.proj
            new = nn.Conv2d(
                old.in_channels,
                old.out_channels,
                kernel_size=patch_size,
                stride=patch_size,
                bias=old.bias is not None,
                device=old.weight.device,
                dtype=old.weight.dtype,
            )
            with torch.no_grad():
                new.weight.copy_(resample_patch_weight(old.weight, patch_size)).requires_grad_(old.weight.requires_grad)
                if old.bias is not None:
                    new.bias.copy_(old.bias).requires_grad_(old.bias.requires_grad)
            self.proj = new.train(old.training)
            self.patch_size = patch_size
        self._set_img_size(self.img_size if img_size is None else _pair(img_size, "img_size"))

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches that an image of this size gives, padding counted in."""
        (rows, columns), (high, wide) = img_size, self.patch_size
        if self.dynamic_img_pad:
            return -(-rows // high), -(-columns // wide)
        return rows // high, columns // wide

    def prepare(self, images: Tensor) -> Tensor:
        """The images, checked, and padded to whole patches under `dynamic_img_pad`.

        Raises:
            TypeError, ValueError: naming what is wrong with the images and what is taken.
        """
        if not isinstance(images, Tensor):
            raise TypeError(f"images: got {type(images).__name__}, takes a tensor [B, C, rows, columns]")
        channels = self.proj.in_channels
        if images.dim() != 4:
            raise ValueError(f"images: got shape {list(images.shape)}, takes [B, {channels}, rows, columns]")
        if images.shape[1] != channels:
            raise ValueError(f"images: got {images.shape[1]} channels, takes {channels}")
        rows, columns = images.shape[2:]
        high, wide = self.patch_size
        if self.strict_img_size:
            if rows != self.img_size[0] or columns != self.img_size[1]:
                raise ValueError(
                    f"images: got {rows} x {columns}, takes {self.img_size[0]} x {self.img_size[1]}; "
                    "set_input_size changes it, dynamic_img_size=True takes any"
                )
        elif not self.dynamic_img_pad and (rows % high or columns % wide):
            raise ValueError(
                f"images: got {rows} x {columns}, takes multiples of the patch, {high} x {wide}; "
                "dynamic_img_pad=True pads"
            )
        if self.dynamic_img_pad:
            images = F.pad(images, (0, (wide - columns % wide) % wide, 0, (high - rows % high) % high))
        return images

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(self.prepare(x))
        x = x.flatten(2).transpose(1, 2) if self.flatten else x.permute(0, 2, 3, 1)
        return self.norm(x)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, equation 1), called module by module as timm does."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer=nn.LayerNorm,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, takes a divisor of the width, {dim}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.attn_dim = dim
        self.scale = self.head_dim**-0.5
        self.fused_attn = True  # set to False, as with timm, to have the probabilities pass through `attn_drop`
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(dim, **dd) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] → three of [B, H, T, d], queries and keys normalised where the model does so."""
        qkv = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.queries_keys_values(x)
        dropout = self.attn_drop.p if self.training else 0.0
        if not self.fused_attn:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            x = self.attn_drop(_masked(scores, attn_mask, is_causal).softmax(dim=-1)) @ v
            x = x.transpose(1, 2).flatten(2)
        elif attn_mask is None and not is_causal and dropout == 0:
            x = ops.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(self.norm(x)))


def _masked(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scores with an additive or boolean mask, as scaled_dot_product_attention reads it."""
    if causal:
        return scores + torch.full_like(scores[0, 0], -math.inf).triu(1)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


class Mlp(nn.Module):
    """fc1, activation, fc2, called module by module as timm does."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer=nn.GELU,
        norm_layer=None,
        bias: bool = True,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias, **dd)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = norm_layer(hidden_features, **dd) if norm_layer else nn.Identity()
        self.fc2 = nn.Linear(hidden_features, in_features, bias=bias, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class Block(nn.Module):
    """One layer, equations 2 and 3 of the paper: x [B, T, D] → [B, T, D]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer=nn.GELU,
        norm_layer=LAYER_NORM,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = Attention(
            dim, num_heads, qkv_bias, qk_norm, scale_attn_norm, proj_bias, attn_drop, proj_drop, norm_layer, **dd
        )
        self.ls1 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        hidden = int(dim * mlp_ratio)
        self.mlp = Mlp(dim, hidden, act_layer, norm_layer if scale_mlp_norm else None, proj_bias, proj_drop, **dd)
        self.ls2 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def attention_aside(self) -> str:
        """Why the attention half calls its modules one by one, or "" where it runs on fused ops."""
        attn = self.attn
        reason = _why_aside("attn", attn, (Attention,))
        if reason:
            return reason
        if not attn.fused_attn:
            return "attn.fused_attn is False"
        if attn.training and attn.attn_drop.p:
            return "attention dropout is active"
        if attn.proj_drop.training and attn.proj_drop.p:
            return "projection dropout is active"
        return _first_aside(
            ("norm1", self.norm1, NORM),
            ("attn.qkv", attn.qkv, LINEAR),
            ("attn.q_norm", attn.q_norm, NORM_OR_NONE),
            ("attn.k_norm", attn.k_norm, NORM_OR_NONE),
            ("attn.norm", attn.norm, NORM_OR_NONE),
            ("attn.proj", attn.proj, LINEAR),
            ("attn.proj_drop", attn.proj_drop, DROPOUT),
            ("ls1", self.ls1, SCALE_OR_NONE),
            ("drop_path1", self.drop_path1, PATH_OR_NONE),
        )

    def mlp_aside(self) -> str:
        """Why the MLP half calls its modules one by one, or "" where it runs on fused ops."""
        mlp = self.mlp
        reason = _why_aside("mlp", mlp, (Mlp,))
        if reason:
            return reason
        if (mlp.drop1.training and mlp.drop1.p) or (mlp.drop2.training and mlp.drop2.p):
            return "projection dropout is active"
        return _first_aside(
            ("norm2", self.norm2, NORM),
            ("mlp.fc1", mlp.fc1, LINEAR),
            ("mlp.act", mlp.act, ACTIVATION),
            ("mlp.drop1", mlp.drop1, DROPOUT),
            ("mlp.norm", mlp.norm, NORM_OR_NONE),
            ("mlp.fc2", mlp.fc2, LINEAR),
            ("mlp.drop2", mlp.drop2, DROPOUT),
            ("ls2", self.ls2, SCALE_OR_NONE),
            ("drop_path2", self.drop_path2, PATH_OR_NONE),
        )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        reason = "a mask is given" if attn_mask is not None or is_causal else self.attention_aside()
        if reason:
            _say_aside(reason)
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        else:
            x = self._fused_attention(x)
        reason = self.mlp_aside()
        if reason:
            _say_aside(reason)
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return self._fused_mlp(x)

    def _packed_qkv(self, x: Tensor) -> Tensor:
        """[B, T, D] → [B, T, 3, H, d] by norm1 and qkv in one op; q_norm and k_norm are still to come."""
        norm, attn = self.norm1, self.attn
        qkv = ops.ln_linear(x, norm.weight, norm.bias, attn.qkv.weight, attn.qkv.bias, norm.eps)
        return qkv.view(x.shape[0], x.shape[1], 3, attn.num_heads, attn.head_dim)

    def _fused_attention(self, x: Tensor) -> Tensor:
        attn = self.attn
        qkv = self._packed_qkv(x)
        if type(attn.q_norm) is nn.Identity and type(attn.k_norm) is nn.Identity:
            heads = ops.attention_qkv(qkv)
        else:
            q, k, v = qkv.unbind(2)
            heads = ops.attention(attn.q_norm(q), attn.k_norm(k), v)
        if type(attn.norm) is not nn.Identity:
            heads = attn.norm(heads)
        gamma, drop = _branch_end(self.ls1, self.drop_path1, x)
        return ops.linear_residual(heads, attn.proj.weight, attn.proj.bias, x, gamma, drop)

    def _fused_mlp(self, x: Tensor) -> Tensor:
        norm, mlp = self.norm2, self.mlp
        fc1, fc2 = mlp.fc1, mlp.fc2
        gamma, drop = _branch_end(self.ls2, self.drop_path2, x)
        if type(mlp.norm) is not nn.Identity:
            hidden = mlp.act(ops.ln_linear(x, norm.weight, norm.bias, fc1.weight, fc1.bias, norm.eps))
            return ops.linear_residual(mlp.norm(hidden), fc2.weight, fc2.bias, x, gamma, drop)
        return ops.mlp(
            x,
            norm.weight,
            norm.bias,
            fc1.weight,
            fc1.bias,
            fc2.weight,
            fc2.bias,
            gamma,
            drop,
            activation_name(mlp.act),
            norm.eps,
        )

    def attention_map(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """The probabilities with which this layer's heads read x [B, T, D]: fp32 [B, H, T or len(queries), T]."""
        if _why_aside("attn", self.attn, (Attention,)):
            raise ValueError(f"attention_map: the block's attn is a {type(self.attn).__name__}, takes vit_fast's")
        if self.attention_aside():
            q, k, _ = (t.transpose(1, 2) for t in self.attn.queries_keys_values(self.norm1(x)))
        else:
            q, k, _ = self._packed_qkv(x).unbind(2)
            q, k = self.attn.q_norm(q), self.attn.k_norm(k)
        return ops.attention_maps(q, k, queries)


def _branch_end(scale: nn.Module, path: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """LayerScale's γ and the drop path's draw, the draw in the dtype of the branch, as timm's is."""
    gamma = scale.gamma if type(scale) is LayerScale else None
    if type(path) is not DropPath or not path.training:
        return gamma, None
    dtype = compute_dtype(x)
    return gamma, path.draw(x, dtype if gamma is None else torch.promote_types(dtype, gamma.dtype))


def activation_name(module: nn.Module) -> str:
    """The name by which the ops know an activation module of `ACTIVATION`."""
    if type(module) is QuickGELU:
        return "quick_gelu"
    return "gelu_tanh" if module.approximate == "tanh" else "gelu"


class AttentionPoolLatent(nn.Module):
    """Attention pooling by one learned query, then a residual MLP: x [B, N, D] → [B, D]."""

    def __init__(
        self,
        in_features: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        norm_layer=LAYER_NORM,
        act_layer=nn.GELU,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if in_features % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, takes a divisor of the width, {in_features}")
        self.num_heads = num_heads
        self.head_dim = in_features // num_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, in_features, **dd))
        self.q = nn.Linear(in_features, in_features, **dd)
        self.kv = nn.Linear(in_features, in_features * 2, **dd)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        self.proj = nn.Linear(in_features, in_features, **dd)
        self.proj_drop = nn.Dropout(0.0)
        self.norm = norm_layer(in_features, **dd)
        self.mlp = Mlp(in_features, int(in_features * mlp_ratio), act_layer, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        trunc_normal_tf_(self.latent, std=self.latent.shape[-1] ** -0.5)

    def mlp_aside(self) -> str:
        """Why the MLP calls its modules one by one, or "" where it is one fused op."""
        mlp = self.mlp
        return _why_aside("mlp", mlp, (Mlp,)) or _first_aside(
            ("norm", self.norm, NORM),
            ("mlp.fc1", mlp.fc1, LINEAR),
            ("mlp.act", mlp.act, ACTIVATION),
            ("mlp.drop1", mlp.drop1, DROPOUT),
            ("mlp.norm", mlp.norm, NONE),
            ("mlp.fc2", mlp.fc2, LINEAR),
            ("mlp.drop2", mlp.drop2, DROPOUT),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(self.latent.expand(batch, -1, -1)).view(batch, 1, self.num_heads, self.head_dim)
        k, v = self.kv(x).view(batch, tokens, 2, self.num_heads, self.head_dim).unbind(2)
        x = self.proj_drop(self.proj(ops.attention(self.q_norm(q), self.k_norm(k), v)))
        norm, mlp = self.norm, self.mlp
        reason = self.mlp_aside()
        if reason:
            _say_aside(f"the attention pool's {reason}")
            return (x + mlp(norm(x)))[:, 0]
        return ops.mlp(
            x,
            norm.weight,
            norm.bias,
            mlp.fc1.weight,
            mlp.fc1.bias,
            mlp.fc2.weight,
            mlp.fc2.bias,
            activation=activation_name(mlp.act),
            eps=norm.eps,
        )[:, 0]


# Which modules a fused half may read in the place of timm's, and the forward that each had when this file was read.
NONE = (nn.Identity,)
NORM = (nn.LayerNorm,)
LINEAR = (nn.Linear,)
DROPOUT = (nn.Dropout, nn.Identity)
ACTIVATION = (nn.GELU, QuickGELU)
NORM_OR_NONE = (nn.Identity, nn.LayerNorm)
SCALE_OR_NONE = (nn.Identity, LayerScale)
PATH_OR_NONE = (nn.Identity, DropPath)
_FORWARD = {
    kind: kind.forward
    for kind in (*ACTIVATION, *DROPOUT, *NORM, *LINEAR, LayerScale, DropPath, Attention, Mlp, PatchEmbed, nn.Conv2d)
}
_PLAIN_TENSORS = (nn.Parameter, Tensor, type(None))


def _why_aside(name: str, module: nn.Module, kinds: tuple[type, ...]) -> str:
    """Why a fused op may not read the parameters of `module` itself, or ""."""
    kind = type(module)
    if kind not in kinds:
        return f"{name} is a {kind.__name__}"
    if kind.forward is not _FORWARD[kind] or "forward" in module.__dict__:
        return f"{name} has a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has a hook"
    for parameter in module._parameters.values():
        if type(parameter) not in _PLAIN_TENSORS:
            return f"{name} holds a {type(parameter).__name__}"
    if kind is nn.LayerNorm and (module.weight is None or module.bias is None):
        return f"{name} has no weight or no bias"
    return ""


def _first_aside(*submodules: tuple[str, nn.Module, tuple[type, ...]]) -> str:
    if nn_module._has_any_global_hook():
        return "a global module hook is set"
    for name, module, kinds in submodules:
        reason = _why_aside(name, module, kinds)
        if reason:
            return reason
    return ""


@functools.cache
def _log_aside(reason: str) -> None:
    log.warning("%s: that part of a model runs module by module in PyTorch; vit_fast.explain(model) lists them", reason)


def _say_aside(reason: str) -> None:
    """One log line a reason for the process."""
    if not torch.compiler.is_compiling():
        _log_aside(reason)


class VisionTransformer(nn.Module):
    """A Vision Transformer with the arguments, methods, parameter names and numbers of timm's.

    Args:
        img_size: rows and columns of an image, or one number for both.
        patch_size: the same of a patch.
        in_chans: channels of an image.
        num_classes: width of the logits; 0 leaves the head out.
        global_pool: how the tokens become one vector: "token" (the class token), "avg", "max", "avgmax" (over the patch
            tokens), "map" (attention pooling), "" (not at all: the head is applied to each token).
        embed_dim, depth, num_heads, mlp_ratio: D, layers, H, hidden width of the MLP as a multiple of D.
        qkv_bias, proj_bias: biases of the QKV product; of the projection, fc1 and fc2.
        qk_norm: LayerNorm over each head's query and key.
        scale_attn_norm, scale_mlp_norm: LayerNorm before the projection and before fc2.
        init_values: start of LayerScale's γ; None or 0 leaves LayerScale out.
        class_token, reg_tokens: the prefix tokens: one class token or none, and this many registers.
        pos_embed: "learn"; "none" or ""; "sincos2d", a frozen sine-cosine table with temperature 10,000.
        no_embed_class: prefix tokens get no position.
        pre_norm: LayerNorm before the first block, and no bias in the patch projection (CLIP).
        final_norm: LayerNorm after the last block.
        fc_norm: put it behind the pool; None means so for "avg", "avgmax" and "max".
        representation_size: width of a tanh hidden layer `pre_logits.fc` before the head (the paper's pre-training).
        pool_include_prefix: pool over prefix tokens too.
        dynamic_img_size: take any multiple of the patch; positions are resampled (bicubic, antialiased, in fp32).
        dynamic_img_pad: pad images to whole patches.
        drop_rate, pos_drop_rate, patch_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: dropout before the
            head, on the embedded tokens, of whole patches, behind each product, of attention probabilities, of whole
            branches (rising linearly to this rate in the last block). Draws equal timm's under one seed.
        weight_init: "", "jax", "jax_nlhb", "moco", "reset" or "skip", as timm's. fix_init: scale proj and fc2 by depth.
        norm_layer, embed_norm_layer: "layernorm", nn.LayerNorm, timm's LayerNorm, or functools.partial of one with eps.
        act_layer: "gelu", "gelu_tanh", "quick_gelu", or the class of one.
        embed_layer, block_fn, mlp_layer, attn_layer: only PatchEmbed, Block, Mlp and Attention are taken.
        device, dtype: of the parameters.

    Input: images [B, C, rows, columns] in the dtype of the parameters, or any floating dtype under autocast. Output:
    logits [B, classes] in the dtype of the products.

    Raises:
        ValueError, TypeError: for an argument or images that the model does not take, naming what it got and takes.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        pos_embed: str = "learn",
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool | None = None,
        pool_include_prefix: bool = False,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        fix_init: bool = False,
        embed_layer=None,
        embed_norm_layer=None,
        norm_layer=None,
        act_layer=None,
        block_fn=None,
        mlp_layer=None,
        attn_layer=None,
        representation_size: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        _one_of("global_pool", global_pool, POOLS)
        _one_of("pos_embed", pos_embed, ("learn", "none", "", "sincos2d"))
        _one_of("weight_init", weight_init, WEIGHT_INITS)
        _known_layer("embed_layer", embed_layer, PatchEmbed)
        _known_layer("block_fn", block_fn, Block)
        _known_layer("mlp_layer", mlp_layer, Mlp)
        _known_layer("attn_layer", attn_layer, Attention, ("", "attn"))
        if global_pool == "token" and not class_token:
            raise ValueError("global_pool: got 'token' with class_token=False, takes another pool or a class token")
        for name, number in (("in_chans", in_chans), ("embed_dim", embed_dim), ("num_heads", num_heads)):
            if number < 1:
                raise ValueError(f"{name}: got {number}, takes 1 or more")
        for name, number in (("num_classes", num_classes), ("depth", depth), ("reg_tokens", reg_tokens)):
            if number < 0:
                raise ValueError(f"{name}: got {number}, takes 0 or more")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, takes a divisor of embed_dim, {embed_dim}")
        norm_layer = _norm_factory("norm_layer", norm_layer)
        embed_norm_layer = embed_norm_layer and _norm_factory("embed_norm_layer", embed_norm_layer)
        act_layer = _activation_factory(act_layer)
        norm_after_pool = global_pool in ("avg", "avgmax", "max") if fc_norm is None else fc_norm

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_reg_tokens = reg_tokens
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.has_class_token = class_token
        self.no_embed_class = no_embed_class
        self.pool_include_prefix = pool_include_prefix
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self.fix_init = fix_init
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        self.fixed_pos_embed = pos_embed == "sincos2d"

        self.patch_embed = PatchEmbed(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            embed_norm_layer,
            flatten=not dynamic_img_size,
            bias=not pre_norm,
            strict_img_size=not dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
            **dd,
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, embed_dim, **dd)) if reg_tokens else None
        self.pos_embed = self._new_pos_embed(dd) if pos_embed not in ("", "none") else None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.patch_drop = PatchDropout(patch_drop_rate, self.num_prefix_tokens) if patch_drop_rate else nn.Identity()
        self.norm_pre = norm_layer(embed_dim, **dd) if pre_norm else nn.Identity()

        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.Sequential(
            *[
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias,
                    qk_norm,
                    scale_attn_norm,
                    scale_mlp_norm,
                    proj_bias,
                    proj_drop_rate,
                    attn_drop_rate,
                    init_values,
                    rate,
                    act_layer,
                    norm_layer,
                    **dd,
                )
                for rate in rates
            ]
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.norm = norm_layer(embed_dim, **dd) if final_norm and not norm_after_pool else nn.Identity()
        if global_pool == "map":
            self.attn_pool = AttentionPoolLatent(embed_dim, num_heads, mlp_ratio, norm_layer, act_layer, **dd)
        else:
            self.attn_pool = None
        self.fc_norm = norm_layer(embed_dim, **dd) if final_norm and norm_after_pool else nn.Identity()
        if representation_size:
            hidden = nn.Linear(embed_dim, representation_size, **dd)
            self.pre_logits = nn.Sequential(collections.OrderedDict(fc=hidden, act=nn.Tanh()))
            self.num_features = self.head_hidden_size = representation_size
        else:
            self.pre_logits = nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._new_head(dd)

        # What `predict` does to a picture. The zoo overwrites it with the numbers of the architecture's weights.
        self.pretrained_cfg = {
            "input_size": (in_chans, *self.patch_embed.img_size),
            "mean": (0.5,) * in_chans,
            "std": (0.5,) * in_chans,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
        }
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def _new_pos_embed(self, dd: dict) -> nn.Parameter:
        """The position table, still without values where it is learned."""
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        if not self.fixed_pos_embed:
            return nn.Parameter(torch.empty(1, self.patch_embed.num_patches + prefix, self.embed_dim, **dd))
        table = sincos_position(*self.patch_embed.grid_size, self.embed_dim)
        table = torch.cat([table.new_zeros(prefix, self.embed_dim), table])[None]
        return nn.Parameter(table.to(device=device_of(dd), dtype=dd["dtype"] or torch.get_default_dtype()), False)

    def _new_head(self, dd: dict) -> nn.Module:
        return nn.Linear(self.head_hidden_size, self.num_classes, **dd) if self.num_classes else nn.Identity()

    # --- weights

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Draw the weights as timm does under the same seed.

        Args:
            mode: "", "jax", "jax_nlhb", "moco" or "reset"; "" is the `weight_init` of the constructor.
            needs_reset: also call `reset_parameters` of modules that have one and no rule of their own.
        """
        mode = mode or self.weight_init_mode
        _one_of("mode", mode, [name for name in WEIGHT_INITS if name != "skip"])
        if self.pos_embed is not None and not self.fixed_pos_embed:
            trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        head_bias = -math.log(self.num_classes) if mode == "jax_nlhb" else 0.0
        _init_children(self, mode, head_bias, needs_reset)
        if self.fix_init:
            with torch.no_grad():
                for index, block in enumerate(self.blocks):
                    block.attn.proj.weight.div_(math.sqrt(2.0 * (index + 1)))
                    block.mlp.fc2.weight.div_(math.sqrt(2.0 * (index + 1)))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone."""
        return {"pos_embed", "cls_token", "reg_token", "dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that sort parameters into a stem and the blocks, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block for the backward pass, and compute the block again there."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` (0: none), and another pool if one is named.

        Raises:
            ValueError: for a pool that the model cannot change to.
        """
        if global_pool is not None:
            _one_of("global_pool", global_pool, POOLS)
            if global_pool == "token" and not self.has_class_token:
                raise ValueError("global_pool: got 'token', the model has no class token")
            if global_pool == "map" and self.attn_pool is None:
                raise ValueError("global_pool: got 'map', the model was built without an attention pool")
            if global_pool != "map":
                self.attn_pool = None
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = self._new_head(self._dd()).train(self.training)

    def _dd(self) -> dict:
        parameter = self.patch_embed.proj.weight
        return {"device": parameter.device, "dtype": parameter.dtype}

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Change the image size, the patch size or both; positions and patch projection are resampled."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, patch_size)
        if self.pos_embed is not None and self.patch_embed.grid_size != old_grid:
            prefix = 0 if self.no_embed_class else self.num_prefix_tokens
            table = resample_positions(self.pos_embed.detach(), self.patch_embed.grid_size, old_grid, prefix)
            self.pos_embed = nn.Parameter(table, self.pos_embed.requires_grad)

    # --- forward

    def _prefix_tokens(self) -> list[Tensor]:
        """The learned tokens before the patches, each [1, ·, D], in their order."""
        return [token for token in (self.cls_token, self.reg_token) if token is not None]

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The position table for this grid of patches, [1, N or R + N, D], resampled where it is another one."""
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        return resample_positions(self.pos_embed, (rows, columns), self.patch_embed.grid_size, prefix)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patch tokens [B, N, D] (or [B, rows, columns, D] with dynamic_img_size) → tokens with prefix and position."""
        prefix = [token.expand(x.shape[0], -1, -1) for token in self._prefix_tokens()]
        if self.pos_embed is None:
            return torch.cat([*prefix, x.reshape(x.shape[0], -1, x.shape[-1])], dim=1)
        positions = self.pos_embed
        if self.dynamic_img_size:
            positions = self._positions(*x.shape[1:3])
            x = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.no_embed_class:
            x = x + positions
        x = torch.cat([*prefix, x], dim=1) if prefix else x
        return self.pos_drop(x if self.no_embed_class else x + positions)

    def embed_aside(self) -> str:
        """Why the patch embedding calls its modules one by one, or "" where it is one fused op."""
        if self.pos_drop.training and self.pos_drop.p:
            return "position dropout is active"
        if type(self)._pos_embed is not VisionTransformer._pos_embed or "_pos_embed" in self.__dict__:
            return "_pos_embed is replaced"
        embed = self.patch_embed
        reason = _why_aside("patch_embed", embed, (PatchEmbed,))
        if reason:
            return reason
        if embed.patch_size[0] != embed.patch_size[1]:
            return "patches are not square"
        return _first_aside(
            ("patch_embed.proj", embed.proj, (nn.Conv2d,)),
            ("patch_embed.norm", embed.norm, NONE),
            ("pos_drop", self.pos_drop, DROPOUT),
        )

    def _embed(self, images: Tensor) -> Tensor:
        """Images → tokens [B, T, D] that the first block reads (equation 1)."""
        reason = self.embed_aside()
        if reason:
            _say_aside(reason)
            x = self._pos_embed(self.patch_embed(images))
        else:
            x = self._fused_embed(images)
        return self.norm_pre(self.patch_drop(x))

    def _fused_embed(self, images: Tensor) -> Tensor:
        embed = self.patch_embed
        images = embed.prepare(images)
        side = embed.patch_size[0]
        rows, columns = images.shape[2] // side, images.shape[3] // side
        if not self.dynamic_img_size and (images.shape[2] % side or images.shape[3] % side):
            images = images[:, :, : rows * side, : columns * side]  # as a convolution leaves out what fills no patch
        prefix = [token[0] for token in self._prefix_tokens()]
        prefix = (prefix[0] if len(prefix) == 1 else torch.cat(prefix)) if prefix else None
        if self.pos_embed is None:
            position = None
        elif not self.dynamic_img_size:
            position = self.pos_embed[0]
        else:
            position = self._positions(rows, columns)[0]
            if prefix is not None and not self.no_embed_class:
                prefix, position = prefix + position[: len(prefix)], position[len(prefix) :]
        return ops.patch_embed(images, embed.proj.weight, embed.proj.bias, position, prefix)

    def _run_block(self, block: nn.Module, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if attn_mask is not None or is_causal:
            return block(x, attn_mask=attn_mask, is_causal=is_causal)
        return checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images [B, C, rows, columns] → tokens [B, T, D] behind the final LayerNorm."""
        x = self._embed(x)
        if attn_mask is None and not is_causal and not self.grad_checkpointing:
            return self.norm(self.blocks(x))
        for block in self.blocks:
            x = self._run_block(block, x, attn_mask, is_causal)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ):
        """The outputs of chosen blocks.

        Args:
            x: images [B, C, rows, columns].
            indices: the last n blocks for a number, these blocks for a list (negative from the end), None for all.
            return_prefix_tokens: give (patches, prefix tokens) for each.
            norm: apply the final LayerNorm to each.
            stop_early: leave out the blocks behind the last one chosen.
            output_fmt: "NCHW", patches as [B, D, rows, columns]; "NLC", as [B, N, D].
            intermediates_only: give the list alone.
            output_dict: give a dict with image_intermediates, image_intermediates_prefix and image_features.

        Returns:
            (tokens behind the final LayerNorm, list), the list, or the dict.
        """
        _one_of("output_fmt", output_fmt, ("NCHW", "NLC"))
        chosen, last = _take_indices(len(self.blocks), indices)
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        x = self._embed(x)
        found = []
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._run_block(block, x, attn_mask, is_causal)
            if index in chosen:
                found.append(self.norm(x) if norm else x)
        count = self.num_prefix_tokens
        prefix, found = [y[:, :count] for y in found], [y[:, count:] for y in found]
        if output_fmt == "NCHW":
            found = [y.reshape(y.shape[0], *grid, -1).permute(0, 3, 1, 2).contiguous() for y in found]
        if output_dict:
            result = {"image_intermediates": found}
            if count and return_prefix_tokens:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        if count and return_prefix_tokens:
            found = list(zip(found, prefix))
        return found if intermediates_only else (self.norm(x), found)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> list:
        """`forward_intermediates` with the arguments of DINO's own code."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks behind the last one chosen, and the final norm and the head where asked."""
        chosen, last = _take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return chosen

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, T, D] → [B, D] by the model's pool, or by `pool_type`."""
        start = 0 if self.pool_include_prefix else self.num_prefix_tokens
        if self.attn_pool is not None:
            return self.attn_pool(x[:, start:])
        pool_type = self.global_pool if pool_type is None else pool_type
        if pool_type == "token":
            return x[:, 0]
        if pool_type == "avg":
            return x[:, start:].mean(dim=1)
        if pool_type == "max":
            return x[:, start:].amax(dim=1)
        if pool_type == "avgmax":
            return 0.5 * (x[:, start:].amax(dim=1) + x[:, start:].mean(dim=1))
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, T, D] → logits [B, classes], or with `pre_logits` what the head reads."""
        x = self.head_drop(self.pre_logits(self.fc_norm(self.pool(x))))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))

    # --- what people ask of a trained model

    @contextlib.contextmanager
    def _looking(self):
        """Evaluation mode without gradients; each module gets its own mode back."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training

    @contextlib.contextmanager
    def _per_layer(self, images: Tensor):
        """(index, block, the tokens that it reads) for each block in turn."""

        def walk():
            x = self._embed(images)
            for index, block in enumerate(self.blocks):
                yield index, block, x
                x = block(x)

        with self._looking():
            yield walk()

    def attention_maps(
        self, images: Tensor, layers: int | Sequence[int] | None = None, queries: Tensor | None = None
    ) -> Tensor:
        """The attention of each head, exact, while the model itself runs on the fused path, in evaluation mode.

        Args:
            images: [B, C, rows, columns].
            layers: the last n layers for a number, these layers for a list (negative from the end), None for all.
            queries: the tokens whose rows are wanted, int64 [Tq]; None for all. Token 0 is the class token, where
                there is one; registers follow, then the patches, row by row.

        Returns:
            fp32 [L, B, H, T, T] (or Tq rows), row i the probabilities with which token i reads the others.
        """
        chosen, last = _take_indices(len(self.blocks), layers)
        maps = {}
        with self._per_layer(images) as walk:
            for index, block, x in walk:
                if index in chosen:
                    maps[index] = block.attention_map(x, queries)
                if index == last:
                    break
        return torch.stack([maps[index] for index in chosen])

    def attention_rollout(self, images: Tensor) -> Tensor:
        """Attention rolled out from the last layer to the first (Abnar and Zuidema 2020, equation 1).

        Each layer reads ½·(the mean of its heads' maps + identity), for the residual; their product is the flow.

        Args:
            images: [B, C, rows, columns].

        Returns:
            fp32 [B, T, T], row i the share that each input token has in token i of the last layer; rows sum to one.
        """
        flow = None
        with self._per_layer(images) as walk:
            for _, block, x in walk:
                layer = block.attention_map(x).mean(dim=1)
                layer = 0.5 * (layer + torch.eye(layer.shape[-1], device=layer.device))
                flow = layer if flow is None else layer @ flow
        return flow

    def rollout_map(self, images: Tensor) -> Tensor:
        """How much of the class token comes from each patch, by `attention_rollout`.

        Without a class token it is the mean over the patch tokens, which the model pools.

        Returns:
            fp32 [B, rows, columns] on the grid of patches. It sums to less than one: prefix tokens have their share.
        """
        flow, count = self.attention_rollout(images), self.num_prefix_tokens
        row = flow[:, 0] if self.has_class_token else flow[:, count:].mean(dim=1)
        return row[:, count:].reshape(len(row), *self.patch_embed.dynamic_feat_size(images.shape[-2:]))

    def predict(self, images) -> Tensor:
        """Class probabilities of pictures, prepared as the model's `pretrained_cfg` says, in evaluation mode.

        Args:
            images: a path, a PIL image, a list of them, or a uint8 [B, rows, columns, 3] tensor or array.

        Returns:
            fp32 [B, classes] on the model's device, each row summing to one.

        Raises:
            ValueError: for a model without a head, or a picture that cannot be read.
        """
        from vit_fast.inference import preprocess

        if not self.num_classes or self.global_pool == "":
            raise ValueError("predict: the model gives no logits of a picture; build it with num_classes and a pool")
        config = self.pretrained_cfg
        pixels = preprocess(
            images,
            img_size=self.patch_embed.img_size,
            mean=config["mean"],
            std=config["std"],
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
        )
        with self._looking():
            return self(pixels.to(**self._dd())).float().softmax(dim=-1)


class VisionTransformerDistilled(VisionTransformer):
    """DeiT with a distillation token and a head of its own (Touvron et al. 2021, section 4).

    The arguments are those of VisionTransformer, the pool is the class token. The logits are the mean of both heads;
    after `set_distilled_training()` a model in training mode gives the pair instead.
    """

    def __init__(self, *args, **kwargs):
        weight_init = kwargs.pop("weight_init", "")
        super().__init__(*args, **kwargs, weight_init="skip")
        if self.global_pool != "token" or self.fixed_pos_embed or self.pos_embed is None or self.num_reg_tokens:
            raise ValueError("VisionTransformerDistilled takes global_pool='token', pos_embed='learn' and no registers")
        dd = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.num_prefix_tokens = 2
        self.dist_token = nn.Parameter(torch.empty(1, 1, self.embed_dim, **dd))
        positions = self.patch_embed.num_patches + (0 if self.no_embed_class else 2)
        self.pos_embed = nn.Parameter(torch.empty(1, positions, self.embed_dim, **dd))
        self.head_dist = self._new_head(dd)
        self.distilled_training = False
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        trunc_normal_(self.dist_token, std=0.02)
        super().init_weights(mode or self.weight_init_mode, needs_reset)

    def group_matcher(self, coarse: bool = False) -> dict:
        return {
            "stem": r"^cls_token|pos_embed|patch_embed|dist_token",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool not in (None, "", "token"):
            raise ValueError(f"global_pool: got {global_pool!r}, the distilled model takes 'token'")
        self.num_classes = num_classes
        self.head = self._new_head(self._dd()).train(self.training)
        self.head_dist = self._new_head(self._dd()).train(self.training)

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training mode give the logits of both heads, (class, distillation)."""
        self.distilled_training = enable

    def _prefix_tokens(self) -> list[Tensor]:
        return [self.cls_token, self.dist_token]

    def forward_head(self, x: Tensor, pre_logits: bool = False):
        x, distilled = self.head_drop(x[:, 0]), self.head_drop(x[:, 1])
        if pre_logits:
            return (x + distilled) / 2
        x, distilled = self.head(x), self.head_dist(distilled)
        if self.distilled_training and self.training:
            return x, distilled
        return (x + distilled) / 2


# --- positions


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


def resample_positions(table: Tensor, grid: tuple[int, int], old_grid: tuple[int, int], prefix: int) -> Tensor:
    """A position table [1, prefix + N, D] for another grid: bicubic, antialiased, in fp32, as timm does."""
    # Under torch.export there is no way out early: it would bind the graph to the example's size.
    if not torch.compiler.is_exporting() and grid[0] == old_grid[0] and grid[1] == old_grid[1]:
        return table
    tokens, patches = table[:, :prefix], table[:, prefix:]
    image = patches.float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=grid, mode="bicubic", antialias=True)
    patches = image.permute(0, 2, 3, 1).reshape(1, -1, table.shape[-1]).to(table.dtype)
    return torch.cat([tokens, patches], dim=1) if prefix else patches


def resample_patch_weight(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """A patch projection [D, C, P, P] for another patch size, by the pseudoinverse of a resize (FlexiViT, section 3.4)."""
    old = tuple(weight.shape[-2:])
    basis = torch.eye(old[0] * old[1], device=weight.device).reshape(-1, 1, *old)
    resize = F.interpolate(basis, size=size, mode="bicubic", antialias=True, align_corners=False)
    resize = resize.flatten(1).T  # [new pixels, old pixels]
    resampled = weight.float().flatten(2) @ torch.linalg.pinv(resize)
    return resampled.reshape(*weight.shape[:2], *size).to(weight.dtype)


# --- weights, drawn as timm draws them: its own truncated normal, module by module


def trunc_normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """A normal cut at ±2 (not ±2·std), by the inverse of its distribution function."""
    low, high = (0.5 * (1 + math.erf((edge - mean) / std / math.sqrt(2))) for edge in (-2.0, 2.0))
    with torch.no_grad():
        tensor.uniform_(2 * low - 1, 2 * high - 1).erfinv_()
        return tensor.mul_(std * math.sqrt(2.0)).add_(mean).clamp_(-2.0, 2.0)


def trunc_normal_tf_(tensor: Tensor, std: float) -> Tensor:
    """A normal cut at two standard deviations."""
    with torch.no_grad():
        return trunc_normal_(tensor).mul_(std).add_(0.0)


def _init_children(module: nn.Module, mode: str, head_bias: float, needs_reset: bool, prefix: str = "") -> None:
    for name, child in module.named_children():
        name = f"{prefix}.{name}" if prefix else name
        _init_children(child, mode, head_bias, needs_reset, name)
        _init_module(child, name, mode, head_bias, needs_reset)


def _init_module(module: nn.Module, name: str, mode: str, head_bias: float, needs_reset: bool) -> None:
    if mode != "reset" and isinstance(module, nn.Linear):
        bias = 0.0
        if mode == "":
            trunc_normal_(module.weight, std=0.02)
        elif mode == "moco" and "qkv" in name:
            bound = math.sqrt(6.0 / float(module.weight.shape[0] // 3 + module.weight.shape[1]))
            nn.init.uniform_(module.weight, -bound, bound)
        elif mode != "moco" and name.startswith("head"):
            nn.init.zeros_(module.weight)
            bias = head_bias
        else:
            nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            if mode.startswith("jax") and "mlp" in name:
                nn.init.normal_(module.bias, std=1e-6)
            else:
                nn.init.constant_(module.bias, bias)
    elif mode.startswith("jax") and isinstance(module, nn.Conv2d):
        fan_in = module.weight[0].numel()
        trunc_normal_tf_(module.weight, std=math.sqrt(1 / fan_in) / 0.87962566103423978)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif mode != "reset" and hasattr(module, "init_weights"):
        module.init_weights()
    elif needs_reset and hasattr(module, "reset_parameters"):
        module.reset_parameters()


# --- arguments


def device_of(dd: dict) -> torch.device:
    """The device on which a tensor made with these factory arguments lies."""
    return torch.get_default_device() if dd["device"] is None else torch.device(dd["device"])


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"{name}: got {value!r}, takes a positive number or two")
    return pair


def _one_of(name: str, value, choices: Sequence) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, takes one of {', '.join(map(repr, choices))}")


def _known_layer(name: str, layer, ours: type, names: tuple[str, ...] = ()) -> None:
    """A layer argument takes our class, or the class of the same name that timm has."""
    if layer is None or layer is ours or (isinstance(layer, str) and layer in names):
        return
    if isinstance(layer, type) and layer.__name__ == ours.__name__ and layer.__module__.split(".")[0] == "timm":
        return
    raise ValueError(f"{name}: got {getattr(layer, '__name__', layer)!r}, takes {ours.__name__} or None")


def _norm_factory(name: str, layer):
    """nn.LayerNorm with the eps that `layer` would have: timm's LayerNorm has 1e-6, PyTorch's 1e-5."""
    keywords = {}
    given = layer
    if isinstance(layer, functools.partial):
        keywords, layer = dict(layer.keywords), layer.func
    eps = None
    if layer is None or (
        isinstance(layer, str) and layer.replace("_", "").lower() in ("", "layernorm", "layernormfp32")
    ):
        eps = 1e-6
    elif layer is nn.LayerNorm:
        eps = 1e-5
    elif (
        isinstance(layer, type)
        and layer.__name__ in ("LayerNorm", "LayerNormFp32")
        and layer.__module__.split(".")[0] == "timm"
    ):
        eps = 1e-6
    eps = keywords.pop("eps", eps) if eps is not None else None
    if eps is None or keywords:
        raise ValueError(
            f"{name}: got {given!r}, takes 'layernorm', nn.LayerNorm, timm's LayerNorm, "
            "or functools.partial of one of them with eps"
        )
    return functools.partial(nn.LayerNorm, eps=eps)


def _activation_factory(layer):
    """The module class of an activation by its name, PyTorch's class, or timm's class of the same name."""
    tanh = functools.partial(nn.GELU, approximate="tanh")
    known = {"gelu": nn.GELU, "gelu_tanh": tanh, "quick_gelu": QuickGELU}
    by_class = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}
    name = layer
    if layer is None:
        name = "gelu"
    elif isinstance(layer, functools.partial) and layer.func is nn.GELU and set(layer.keywords) <= {"approximate"}:
        name = "gelu_tanh" if layer.keywords.get("approximate") == "tanh" else "gelu"
    elif layer is nn.GELU or layer is QuickGELU:
        name = by_class[layer.__name__]
    elif isinstance(layer, type) and layer.__module__.split(".")[0] == "timm":
        name = by_class.get(layer.__name__)
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"act_layer: got {layer!r}, takes 'gelu', 'gelu_tanh', 'quick_gelu', or the class of one")
    return known[name]


def _take_indices(count: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """Chosen layers as numbers from 0, and the last of them: the last n for a number, all for None."""
    if indices is None or isinstance(indices, int):
        last = count if indices is None else indices
        if not 0 < last <= count:
            raise ValueError(f"indices: got the last {last}, takes 1 to {count}")
        return list(range(count - last, count)), count - 1
    chosen = [index + count if index < 0 else index for index in indices]
    if not chosen or not all(0 <= index < count for index in chosen):
        raise ValueError(f"indices: got {list(indices)}, takes {-count} to {count - 1}")
    return chosen, max(chosen)
