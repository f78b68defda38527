"""The modules of a Vision Transformer: they hold parameters under timm's names and call the fused ops.

A plain block is one fused op, any other one to three a half; they read the parameters of its submodules. Where one is
no plain module of the kind that timm puts there (it has a hook, a parametrization, a LoRA wrapper, a quantised weight)
or where dropout is active, that half calls its submodules one by one instead, as timm does, and one log line says why.

    Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, equations 1 to 3        patches and blocks
    Touvron et al. 2021, CaiT (LayerScale); Huang et al. 2016, Stochastic Depth     the ends of a block's two halves
    Zhai et al. 2022, Scaling Vision Transformers, section 3.5                      the attention pool
    Shazeer 2020, GLU Variants Improve Transformer, equation 6                      SwiGLU

Letters: B batch, C channels, P patch side, N patches, T tokens, D width, H heads, d = D/H head width.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from vit_fast import ops
from vit_fast.arguments import pair
from vit_fast.initialise import trunc_normal_tf_
from vit_fast.ops.backend import autocasting, compute_dtype, say_aside, traced_to_onnx
from vit_fast.ops.patch_embed import wrong_channels
from vit_fast.positions import resample_patch_weight

LAYER_NORM = functools.partial(nn.LayerNorm, eps=1e-6)


class QuickGELU(nn.Module):
    """x·σ(1.702 x), the activation of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,  # of SwiGLU's gate alone
}


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A block in which a module and its children are in evaluation mode; each gets its own mode back."""
    modes = [(one, one.training) for one in module.modules()]
    try:
        for one, _ in modes:
            one.training = False
        yield
    finally:
        for one, training in modes:
            one.training = training


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
    """Stochastic depth: in training a sample's branch is dropped with probability `drop_prob`, or scaled by 1/keep.

    Not scaled where somebody sets `scale_by_keep` to False, as with timm's.
    """

    scale_by_keep = True

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def draw(self, like: Tensor, dtype: torch.dtype) -> Tensor | None:
        """[B] factors, 0 or 1/keep, from the default generator with timm's own arithmetic; None where nothing drops."""
        if not self.training or self.drop_prob == 0:
            return None
        keep = 1 - self.drop_prob
        factors = like.new_empty(like.shape[:1], dtype=dtype).bernoulli_(keep)
        return factors.div_(keep) if keep > 0 and self.scale_by_keep else factors

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


def _check_a_patch_fits(img_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    if img_size[0] < patch_size[0] or img_size[1] < patch_size[1]:
        raise ValueError(f"img_size: got {img_size}, takes at least one patch of {patch_size}")


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
        self.patch_size = pair("patch_size", patch_size)
        self._set_img_size(pair("img_size", img_size))
        self.flatten = flatten
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size, bias=bias, **dd)
        self.norm = norm_layer(embed_dim, **dd) if norm_layer else nn.Identity()

    def _set_img_size(self, img_size: tuple[int, int]) -> None:
        _check_a_patch_fits(img_size, self.patch_size)
        self.img_size = img_size
        self.grid_size = (img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Change the image size, the patch size, or both; the projection is resampled for a new patch size."""
        img_size = self.img_size if img_size is None else pair("img_size", img_size)
        patch_size = self.patch_size if patch_size is None else pair("patch_size", patch_size)
        _check_a_patch_fits(img_size, patch_size)
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
                if old.bias is not None and new.bias is not None:
                    new.bias.copy_(old.bias).requires_grad_(old.bias.requires_grad)
            self.proj = new.train(old.training)
            self.patch_size = patch_size
        self._set_img_size(img_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: Sequence[int]) -> tuple[int, int]:
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
        channels = getattr(self.proj, "in_channels", None)  # of somebody's own projection it is not known
        if images.dim() != 4:
            raise ValueError(f"images: got shape {list(images.shape)}, takes [B, {channels or 'C'}, rows, columns]")
        if channels is not None and images.shape[1] != channels:
            raise wrong_channels(images, channels)
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


class SwiGLUPacked(nn.Module):
    """fc2(silu(a)·b) with [a | b] = fc1(x), a gate and its value from one product, called module by module.

    `hidden_features` is the width of fc1, an even number; fc2 reads half of it.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer=nn.SiLU,
        norm_layer=None,
        bias: bool = True,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if hidden_features % 2:
            raise ValueError(f"hidden_features: got {hidden_features}, takes an even number: half are gates")
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias, **dd)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = norm_layer(hidden_features // 2, **dd) if norm_layer else nn.Identity()
        self.fc2 = nn.Linear(hidden_features // 2, in_features, bias=bias, **dd)
        self.drop2 = nn.Dropout(drop)

    def init_weights(self) -> None:
        """Begin near fc2 on silu(a) alone, values near 1, as timm does."""
        values = slice(self.fc2.in_features, None)
        with torch.no_grad():
            if self.fc1.bias is not None:
                nn.init.ones_(self.fc1.bias[values])
            nn.init.normal_(self.fc1.weight[values], std=1e-6)

    def gated(self, hidden: Tensor) -> Tensor:
        gate, value = hidden.chunk(2, dim=-1)
        return self.act(gate) * value

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.gated(self.fc1(x))))))


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
        mlp_layer=Mlp,
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
        self.mlp = mlp_layer(dim, hidden, act_layer, norm_layer if scale_mlp_norm else None, proj_bias, proj_drop, **dd)
        self.ls2 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def attention_op_aside(self) -> str:
        """Why softmax attention itself is no fused op here, or "" where it is one, in whichever way the half runs."""
        attn = self.attn
        reason = _why_other("attn", attn, (Attention,))
        if reason:
            return reason
        if not attn.fused_attn:
            return "attn.fused_attn is False"
        return "attn.attn_drop is active" if attn.training and attn.attn_drop.p else ""

    def attention_aside(self) -> str:
        """Why the attention half calls its modules one by one, or "" where it runs on fused ops."""
        reason = self.attention_op_aside()
        if reason:
            return reason
        parts: dict[str, Any] = self.attn._modules
        own: dict[str, Any] = self._modules
        return why_aside(
            ("attn", self.attn, (Attention,)),
            ("norm1", own["norm1"], NORM),
            ("attn.qkv", parts["qkv"], LINEAR),
            ("attn.q_norm", parts["q_norm"], NORM_OR_NONE),
            ("attn.k_norm", parts["k_norm"], NORM_OR_NONE),
            ("attn.norm", parts["norm"], NORM_OR_NONE),
            ("attn.proj", parts["proj"], LINEAR),
            ("attn.proj_drop", parts["proj_drop"], DROPOUT),
            ("ls1", own["ls1"], SCALE_OR_NONE),
            ("drop_path1", own["drop_path1"], PATH_OR_NONE),
        )

    def mlp_aside(self) -> str:
        """Why the MLP half calls its modules one by one, or "" where it runs on fused ops."""
        reason = _why_other("mlp", self.mlp, MLP)
        if reason:
            return reason
        parts: dict[str, Any] = self.mlp._modules
        own: dict[str, Any] = self._modules
        return why_aside(
            ("mlp", self.mlp, MLP),
            ("norm2", own["norm2"], NORM),
            ("mlp.fc1", parts["fc1"], LINEAR),
            ("mlp.act", parts["act"], ACTIVATION if type(self.mlp) is Mlp else GATE),
            ("mlp.drop1", parts["drop1"], DROPOUT),
            ("mlp.norm", parts["norm"], NORM_OR_NONE),
            ("mlp.fc2", parts["fc2"], LINEAR),
            ("mlp.drop2", parts["drop2"], DROPOUT),
            ("ls2", own["ls2"], SCALE_OR_NONE),
            ("drop_path2", own["drop_path2"], PATH_OR_NONE),
        )

    def suits_block_op(self) -> bool:
        """Whether the op of the whole block computes this one: no norm inside a half, no gate, no head pruned; no half
        may be aside."""
        attn, mlp = self.attn, self.mlp
        inner = (attn.q_norm, attn.k_norm, attn.norm, mlp.norm)
        rows, width = attn.qkv.weight.shape
        return rows == 3 * width and type(mlp) is Mlp and all(type(norm) is nn.Identity for norm in inner)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        attention_reason = "a mask is given" if attn_mask is not None or is_causal else self.attention_aside()
        mlp_reason = self.mlp_aside()
        if not (attention_reason or mlp_reason) and self.suits_block_op():
            return self._fused(x)
        if attention_reason:
            say_aside("a block, module by module,", attention_reason)
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        else:
            x = self._fused_attention(x)
        if mlp_reason:
            say_aside("a block, module by module,", mlp_reason)
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return self._fused_mlp(x)

    def _fused(self, x: Tensor) -> Tensor:
        norm1, attn, norm2, mlp = self.norm1, self.attn, self.norm2, self.mlp
        return ops.block(
            x,
            norm1.weight,
            norm1.bias,
            attn.qkv.weight,
            attn.qkv.bias,
            attn.proj.weight,
            attn.proj.bias,
            *_branch_end(self.ls1, self.drop_path1, x),
            norm2.weight,
            norm2.bias,
            mlp.fc1.weight,
            mlp.fc1.bias,
            mlp.fc2.weight,
            mlp.fc2.bias,
            *_branch_end(self.ls2, self.drop_path2, x),
            attn.num_heads,
            activation_of(mlp.act),
            norm1.eps,
            norm2.eps,
        )

    def first_tokens(self, x: Tensor, count: int) -> Tensor:
        """`forward` of the first `count` tokens, [B, count, D]: they read the keys and values of all T, and nobody
        computes anything else of the others. For a block of which neither half is aside."""
        return self._fused_mlp(self._fused_attention(x, count))

    def _projected(self, x: Tensor, start: int = 0, stop: int = 3) -> Tensor:
        """[B, T, D] → [B, T, 3, H, d] by norm1 and qkv in one op, or those of the three from start to stop; q_norm and
        k_norm are still to come."""
        norm, attn = self.norm1, self.attn
        weight: Tensor = attn.qkv.weight
        bias: Tensor | None = attn.qkv.bias
        if stop - start < 3:
            width = attn.num_heads * attn.head_dim
            weight = weight[start * width : stop * width]
            bias = None if bias is None else bias[start * width : stop * width]
        y = ops.ln_linear(x, norm.weight, norm.bias, weight, bias, norm.eps)
        return y.view(x.shape[0], x.shape[1], stop - start, attn.num_heads, attn.head_dim)

    def _fused_attention(self, x: Tensor, count: int | None = None) -> Tensor:
        attn = self.attn
        if count is None and type(attn.q_norm) is nn.Identity and type(attn.k_norm) is nn.Identity:
            heads = ops.attention_qkv(self._projected(x))
        else:
            if count is None:
                q, k, v = self._projected(x).unbind(2)
            else:
                k, v = self._projected(x, 1, 3).unbind(2)
                x = x[:, :count]
                (q,) = self._projected(x, 0, 1).unbind(2)
            heads = ops.attention(attn.q_norm(q), attn.k_norm(k), v)
        if type(attn.norm) is not nn.Identity:
            heads = attn.norm(heads)
        gamma, drop = _branch_end(self.ls1, self.drop_path1, x)
        return ops.linear_residual(heads, attn.proj.weight, attn.proj.bias, x, gamma, drop)

    def _fused_mlp(self, x: Tensor) -> Tensor:
        norm, mlp = self.norm2, self.mlp
        fc1, fc2 = mlp.fc1, mlp.fc2
        gamma, drop = _branch_end(self.ls2, self.drop_path2, x)
        gates = type(mlp) is SwiGLUPacked
        if type(mlp.norm) is not nn.Identity:
            hidden = ops.ln_linear(x, norm.weight, norm.bias, fc1.weight, fc1.bias, norm.eps)
            hidden = mlp.gated(hidden) if gates else mlp.act(hidden)
            return ops.linear_residual(mlp.norm(hidden), fc2.weight, fc2.bias, x, gamma, drop)
        parameters = norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias, gamma, drop
        if gates:
            return ops.swiglu(x, *parameters, norm.eps)
        return ops.mlp(x, *parameters, activation_of(mlp.act), norm.eps)

    def attention_map(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """The probabilities with which this layer's heads read x [B, T, D]: fp32 [B, H, T or len(queries), T].

        Raises:
            ValueError: where the block's attention is somebody's own.
        """
        if _why_other("attn", self.attn, (Attention,)):
            raise ValueError(f"attention_map: the block's attn is a {type(self.attn).__name__}, takes vit_fast's")
        if self.attention_aside():
            q, k, _ = (t.transpose(1, 2) for t in self.attn.queries_keys_values(self.norm1(x)))
            usual = self.attn.head_dim**-0.5
            if not self.attn.fused_attn and self.attn.scale != usual:  # the fused forms do not ask for it, as timm's
                q = q * (self.attn.scale / usual)
        else:
            q, k, _ = self._projected(x).unbind(2)
            q, k = self.attn.q_norm(q), self.attn.k_norm(k)
        return ops.attention_maps(q, k, queries)


def _branch_end(scale: nn.Module, path: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """LayerScale's γ and the drop path's draw, the draw in the dtype of the branch, as timm's is."""
    gamma = scale.gamma if type(scale) is LayerScale else None
    if type(path) is not DropPath or not path.training:
        return gamma, None
    dtype = compute_dtype(x)
    return gamma, path.draw(x, dtype if gamma is None else torch.promote_types(dtype, gamma.dtype))


def activation_of(module: nn.Module) -> str:
    """The name by which the ops know an activation module: QuickGELU of ours, or a GELU by its `approximate`."""
    if isinstance(module, QuickGELU):
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
        return _why_other("mlp", mlp, (Mlp,)) or why_aside(
            ("mlp", mlp, (Mlp,)),
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
            say_aside("the attention pool, module by module,", reason)
            return (x + mlp(norm(x)))[:, 0]
        return ops.mlp(
            x,
            norm.weight,
            norm.bias,
            mlp.fc1.weight,
            mlp.fc1.bias,
            mlp.fc2.weight,
            mlp.fc2.bias,
            activation=activation_of(mlp.act),
            eps=norm.eps,
        )[:, 0]


# Which modules a fused half may read in the place of timm's, and the forward that each had when this file was read.
NONE = (nn.Identity,)
NORM = (nn.LayerNorm,)
LINEAR = (nn.Linear,)
DROPOUT = (nn.Dropout, nn.Identity)
MLP = (Mlp, SwiGLUPacked)
GELU = (nn.GELU,)
ACTIVATION = (*GELU, QuickGELU)
GATE = (nn.SiLU,)
NORM_OR_NONE = (nn.Identity, nn.LayerNorm)
SCALE_OR_NONE = (nn.Identity, LayerScale)
PATH_OR_NONE = (nn.Identity, DropPath)
_FORWARD: dict[type, Callable | None] = {
    kind: kind.forward
    for kind in (
        *(*ACTIVATION, *GATE, *DROPOUT, *NORM, *LINEAR, *MLP),
        *(LayerScale, DropPath, Attention, Block, PatchEmbed, nn.Conv2d, nn.Sequential),
    )
}
_PLAIN_TENSORS = (nn.Parameter, Tensor, type(None))
HOLDERS = (nn.Linear, nn.LayerNorm, nn.MultiheadAttention)


def is_genuine(kind: type, method: str = "forward") -> bool:
    """Whether a class has the method that its library wrote: one that somebody set comes from another module."""
    home = next(one for one in kind.__mro__ if method in vars(one))
    function = vars(home)[method]
    return function.__module__ == home.__module__ and package_of(function) == home.__module__.split(".")[0]


def package_of(function: Callable) -> str:
    """The package in which a function is written; its `__module__` may be of what it replaces, by functools.wraps."""
    return getattr(function, "__globals__", {}).get("__name__", "").split(".")[0]


def readable(*kinds: type[nn.Module]) -> tuple[type, ...]:
    """These kinds of modules, noted as such that an op may stand for while their forward is their library's."""
    for kind in kinds:
        _FORWARD.setdefault(kind, kind.forward if is_genuine(kind) else None)
    return kinds


def has_its_forward(kind: type[nn.Module]) -> bool:
    """Whether one of the `readable` kinds still has the forward that its library wrote."""
    return kind.forward is _FORWARD[kind]


def _why_other(name: str, module: nn.Module, kinds: tuple[type, ...]) -> str:
    """Why `module` does not compute what a module of these kinds does, or ""."""
    kind = type(module)
    if kind not in kinds:
        alike = kind.__name__ in [one.__name__ for one in kinds]
        return f"{name} is a {kind.__module__.split('.')[0] + ' ' if alike else ''}{kind.__name__}"
    if kind.forward is not _FORWARD[kind] or "forward" in module.__dict__:
        return f"{name} has a forward of its own"
    return ""


def why_aside(*submodules: tuple[str, nn.Module, tuple[type, ...]]) -> str:
    """Why a fused op may not stand for these (name, module, kinds) and read their parameters itself, or ""."""
    # Runs in every forward pass of every half of a block: one loop, and no call that can be saved.
    if nn_module._has_any_global_hook():
        return "a global module hook is set"
    if traced_to_onnx():
        return "torch.onnx traces it, with dynamo=False"
    dtype = None
    for name, module, kinds in submodules:
        kind = type(module)
        module.forward  # noqa: B018  torch.compile guards on what is read, and not on what is not in a __dict__
        if kind not in kinds or kind.forward is not _FORWARD[kind] or "forward" in module.__dict__:
            return _why_other(name, module, kinds)
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"{name} has a hook"
        if len(module._parameters) < 2 and issubclass(kind, HOLDERS):
            return f"{name} has a weight or a bias that is no parameter"  # FSDP's first version keeps both elsewhere
        for parameter in module._parameters.values():
            if type(parameter) not in _PLAIN_TENSORS:
                return f"{name} holds a {type(parameter).__name__}"
            if parameter is None:
                if issubclass(kind, nn.LayerNorm):
                    return f"{name} has no weight or no bias"
            elif parameter.dtype != dtype:
                if dtype is not None and not autocasting(parameter):
                    return f"{name} holds {parameter.dtype}, what stands before it {dtype}"
                dtype = parameter.dtype
        if kind is nn.Dropout and module.p and module.training:
            return f"{name} is active"
    return ""
