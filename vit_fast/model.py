"""The Vision Transformer, with timm's arguments, methods, parameter names and numbers.

    Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, equations 1 to 4        the model
    Touvron et al. 2021, Training data-efficient image transformers                 the distilled model
    Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers              attention_rollout

Letters: B batch, C channels, P patch side, N patches, R prefix tokens, T = R + N tokens, D width, H heads, d = D/H.
"""

import collections
import contextlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vit_fast import ops
from vit_fast.arguments import (
    activation_name,
    is_swiglu,
    known_layer,
    norm_factory,
    per_channel,
    take_indices,
    whole_number,
)
from vit_fast.initialise import init_children, init_module, trunc_normal_
from vit_fast.layers import (
    ACTIVATIONS,
    DROPOUT,
    NONE,
    NORM_OR_NONE,
    Attention,
    AttentionPoolLatent,
    Block,
    Mlp,
    PatchDropout,
    PatchEmbed,
    SwiGLUPacked,
    evaluating,
    why_aside,
)
from vit_fast.ops.backend import check_rank, chosen_backend, one_of, say_aside, use_backend
from vit_fast.ops.patch_embed import channel_numbers, normalise, wrong_channels
from vit_fast.positions import resample_positions, sincos_position

POOLS = ("", "token", "avg", "avgmax", "max", "map", "token_avg")
NORM_AFTER = ("avg", "avgmax", "max")  # pools behind which the final norm stands, where `fc_norm` does not say
# Up to so many tokens of a batch a GPU waits for the host, and launches count: seven compute all tokens of the last
# block as one op, nine its class token alone.
FEW_TOKENS = 512
WEIGHT_INITS = ("", "skip", "reset", "jax", "jax_nlhb", "moco")


def _are_bytes(images) -> bool:
    return isinstance(images, Tensor) and images.dtype == torch.uint8


class VisionTransformer(nn.Module):
    """A Vision Transformer with the arguments, methods, parameter names and numbers of timm's.

    Args:
        img_size: rows and columns of an image, or one number for both.
        patch_size: the same of a patch.
        in_chans: channels of an image.
        num_classes: width of the logits; 0 leaves the head out.
        global_pool: how the tokens become one vector: "token" (the class token), "avg", "max", "avgmax" (over the patch
            tokens), "map" (attention pooling), "token_avg" (the class token and behind it the mean of the patch tokens,
            2·D wide, as DINOv2's classifier reads them), "" (not at all: the head is applied to each token).
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
        act_layer: "gelu", "gelu_tanh", "quick_gelu", or the class of one; with SwiGLU "silu" or nn.SiLU.
        mlp_layer: Mlp; or "swiglu", SwiGLUPacked of ours or timm's, whose hidden width, mlp_ratio·D, is even: half are
            gates.
        embed_layer, block_fn, attn_layer: only PatchEmbed, Block and Attention are taken.
        device, dtype: of the parameters.

    Input: images [B, C, rows, columns] in the dtype of the parameters, or any floating dtype under autocast; or bytes,
    uint8 of any strides, normalised by the mean and std of `pretrained_cfg`: by the kernel that cuts them where the
    patch embedding is one op, before its modules where it is not. A `patch_embed` of somebody's own, or with a hook
    before it, gets them as they are. Output: logits [B, classes] in the dtype of the products.

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
        one_of("global_pool", global_pool, POOLS)
        one_of("pos_embed", pos_embed, ("learn", "none", "", "sincos2d"))
        one_of("weight_init", weight_init, WEIGHT_INITS)
        known_layer("embed_layer", embed_layer, PatchEmbed)
        known_layer("block_fn", block_fn, Block)
        known_layer("attn_layer", attn_layer, Attention, ("", "attn"))
        if global_pool in ("token", "token_avg") and not class_token:
            raise ValueError(
                f"global_pool: got {global_pool!r} with class_token=False, takes another pool or a class token"
            )
        in_chans = whole_number("in_chans", in_chans, 1)
        embed_dim = whole_number("embed_dim", embed_dim, 1)
        num_heads = whole_number("num_heads", num_heads, 1)
        num_classes = whole_number("num_classes", num_classes, 0)
        depth = whole_number("depth", depth, 0)
        reg_tokens = whole_number("reg_tokens", reg_tokens, 0)
        rates = {
            "drop_rate": drop_rate,
            "pos_drop_rate": pos_drop_rate,
            "patch_drop_rate": patch_drop_rate,
            "proj_drop_rate": proj_drop_rate,
            "attn_drop_rate": attn_drop_rate,
            "drop_path_rate": drop_path_rate,
        }
        for name, rate in rates.items():
            if not 0 <= rate < 1:
                raise ValueError(f"{name}: got {rate}, takes 0 or more and less than 1")
        if not 1 <= embed_dim * mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio: got {mlp_ratio}, takes a number that gives a hidden width of 1 or more")
        if init_values is not None and not math.isfinite(init_values):
            raise ValueError(f"init_values: got {init_values}, takes a finite number or None")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, takes a divisor of embed_dim, {embed_dim}")
        norm_layer = norm_factory("norm_layer", norm_layer)
        embed_norm_layer = embed_norm_layer and norm_factory("embed_norm_layer", embed_norm_layer)
        mlp_layer = SwiGLUPacked if is_swiglu(mlp_layer, Mlp, SwiGLUPacked) else Mlp
        act_layer = ACTIVATIONS[activation_name(act_layer, gated=mlp_layer is SwiGLUPacked)]
        norm_after_pool = global_pool in NORM_AFTER if fc_norm is None else fc_norm

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.embed_dim = embed_dim
        self.num_features = self.head_hidden_size = pooled = self._pooled_width(global_pool)
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

        path_rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
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
                    mlp_layer,
                    **dd,
                )
                for rate in path_rates
            ]
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.norm = norm_layer(embed_dim, **dd) if final_norm and not norm_after_pool else nn.Identity()
        if global_pool == "map":
            self.attn_pool: AttentionPoolLatent | None = AttentionPoolLatent(
                embed_dim, num_heads, mlp_ratio, norm_layer, act_layer, **dd
            )
        else:
            self.attn_pool = None
        self.fc_norm = norm_layer(pooled, **dd) if final_norm and norm_after_pool else nn.Identity()
        if representation_size:
            hidden = nn.Linear(pooled, representation_size, **dd)
            self.pre_logits: nn.Module = nn.Sequential(collections.OrderedDict(fc=hidden, act=nn.Tanh()))
            self.num_features = self.head_hidden_size = representation_size
        else:
            self.pre_logits = nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._new_head(dd)

        # How positions are resampled to another grid, as `positions.resample_positions` names it.
        self.pos_interpolation = "antialiased"
        self.label_names: tuple[str, ...] = ()  # of the classes, where the weights' source says them
        # What `predict` does to a picture. The zoo overwrites it with the numbers of the architecture's weights.
        self.pretrained_cfg: dict[str, Any] = {
            "input_size": (in_chans, *self.patch_embed.img_size),
            "mean": (0.5,) * in_chans,
            "std": (0.5,) * in_chans,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "crop_mode": "center",
            # Whose weights another picture's channels, or other classes, change: what timm's users look up.
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "num_classes": num_classes,
        }
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def _new_pos_embed(self, dd: dict) -> nn.Parameter:
        """The position table, without values yet where it is learned; the fixed one has them and takes no gradient."""
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        table = nn.Parameter(torch.empty(1, self.patch_embed.num_patches + prefix, self.embed_dim, **dd))
        if self.fixed_pos_embed:
            self._write_sincos(table.requires_grad_(False))
        return table

    @torch.no_grad()
    def _write_sincos(self, table: Tensor) -> None:
        """The sine-cosine positions of this grid, zeros for the prefix tokens."""
        grid = (1, 1) if table.is_meta else self.patch_embed.grid_size  # a shell has no values, and may be of any size
        positions = sincos_position(*grid, self.embed_dim)
        table.zero_()
        table[0, table.shape[1] - len(positions) :].copy_(positions)

    def _pooled_width(self, pool: str) -> int:
        return (2 if pool == "token_avg" else 1) * self.embed_dim

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
        one_of("mode", mode, [name for name in WEIGHT_INITS if name != "skip"])
        if self.pos_embed is None:
            pass
        elif self.fixed_pos_embed:
            self._write_sincos(self.pos_embed)
        else:
            trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        head_bias = -math.log(self.num_classes) if mode == "jax_nlhb" else 0.0
        init_children(self, mode, head_bias, needs_reset)
        if self.fix_init:
            self.fix_init_weight()

    @torch.no_grad()
    def fix_init_weight(self) -> None:
        """Divide what each block adds by the square root of twice its number, from 1."""
        block: Any
        for index, block in enumerate(self.blocks):
            block.attn.proj.weight.div_(math.sqrt(2.0 * (index + 1)))
            block.mlp.fc2.weight.div_(math.sqrt(2.0 * (index + 1)))

    def _init_weights(self, module: nn.Module) -> None:
        """One module's weights as a subclass of timm's model draws them, by `apply`."""
        init_module(module, "", "", 0.0, needs_reset=False)

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
        """Keep only the input of each block for the backward pass, and compute the block again there; but of the last
        one, where it computes the class token alone, also the keys and values of all tokens."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` (0: none), whose classes have no names yet, and another pool if one is named.

        Raises:
            ValueError: for a number below 0, and for a pool that the model cannot change to.
        """
        num_classes = whole_number("num_classes", num_classes, 0)
        if global_pool is not None:
            one_of("global_pool", global_pool, POOLS)
            if global_pool in ("token", "token_avg") and not self.has_class_token:
                raise ValueError(f"global_pool: got {global_pool!r}, the model has no class token")
            if global_pool == "map" and self.attn_pool is None:
                raise ValueError("global_pool: got 'map', the model was built without an attention pool")
            change = self._pooled_width(global_pool) - self._pooled_width(self.global_pool)
            if change and not (type(self.fc_norm) is type(self.pre_logits) is nn.Identity):
                raise ValueError(f"global_pool: got {global_pool!r}, of another width than fc_norm or pre_logits reads")
            self.num_features = self.head_hidden_size = self.head_hidden_size + change
            if global_pool != "map":
                self.attn_pool = None
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = self._new_head(self._dd()).train(self.training)
        self._forget_classes()

    def _forget_classes(self) -> None:
        """What was said of a head that is gone."""
        self.label_names = ()
        self.pretrained_cfg.pop("projection", None)

    def _dd(self) -> dict:
        parameter = next(itertools.chain(self.patch_embed.parameters(), self.parameters()))
        return {"device": parameter.device, "dtype": parameter.dtype}

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Change the image size, the patch size or both.

        The patch projection and learned positions are resampled; for another grid the "sincos2d" table is made anew.
        """
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, patch_size)
        if self.pos_embed is None or self.patch_embed.grid_size == old_grid:
            return
        if self.fixed_pos_embed:
            self.pos_embed = self._new_pos_embed(self._dd())
        else:
            prefix = 0 if self.no_embed_class else self.num_prefix_tokens
            table = self.pos_embed.detach()
            table = resample_positions(table, self.patch_embed.grid_size, old_grid, prefix, self.pos_interpolation)
            self.pos_embed = nn.Parameter(table, self.pos_embed.requires_grad)

    # --- forward

    def _prefix_tokens(self) -> list[Tensor]:
        """The learned tokens before the patches, each [1, ·, D], in their order."""
        return [token for token in (self.cls_token, self.reg_token) if token is not None]

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The position table for this grid of patches, [1, N or R + N, D], resampled where it is another one."""
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        old_grid = self.patch_embed.grid_size
        assert self.pos_embed is not None
        return resample_positions(self.pos_embed, (rows, columns), old_grid, prefix, self.pos_interpolation)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patch tokens [B, N, D] (or [B, rows, columns, D] with dynamic_img_size) → tokens with prefix and position."""
        prefix = [token.expand(x.shape[0], -1, -1) for token in self._prefix_tokens()]
        if self.pos_embed is None:
            return torch.cat([*prefix, x.reshape(x.shape[0], -1, x.shape[-1])], dim=1)
        positions: Tensor = self.pos_embed
        if self.dynamic_img_size:
            positions = self._positions(*x.shape[1:3])
            x = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.no_embed_class:
            x = x + positions
        x = torch.cat([*prefix, x], dim=1) if prefix else x
        return self.pos_drop(x if self.no_embed_class else x + positions)

    def embed_aside(self) -> str:
        """Why the patch embedding calls its modules one by one, or "" where it is one fused op."""
        embed = self.patch_embed
        if not self._is_own("_pos_embed"):
            return "_pos_embed is replaced"
        if type(embed) is not PatchEmbed:
            return f"patch_embed is a {type(embed).__name__}"
        proj = embed.proj
        if type(proj) is nn.Conv2d and not (
            proj.kernel_size == proj.stride == embed.patch_size
            and (proj.padding, proj.dilation, proj.groups) == ((0, 0), (1, 1), 1)
        ):
            return "patch_embed.proj is no plain patch projection"
        return why_aside(
            ("patch_embed", embed, (PatchEmbed,)),
            ("patch_embed.proj", proj, (nn.Conv2d,)),
            ("patch_embed.norm", embed.norm, NONE),
            ("pos_drop", self.pos_drop, DROPOUT),
        )

    def _all_tokens(self, images: Tensor) -> Tensor:
        """Images → every token [B, T, D], with its position (equation 1)."""
        reason = self.embed_aside()
        if reason:
            say_aside("patch_embed, module by module,", reason)
            if _are_bytes(images) and self._reads_numbers(self.patch_embed):
                images = self._normalised(images)
            return self._pos_embed(self.patch_embed(images))
        return self._fused_embed(images)

    def _statistics(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The mean and the std by which `predict` normalises pixels from 0 to 1, of each channel."""

        def of(name: str) -> tuple[float, ...]:
            if self.pretrained_cfg.get(name) is None:
                raise ValueError(f"images: got bytes, and pretrained_cfg has no {name!r} to normalise them by")
            values = per_channel(f"pretrained_cfg[{name!r}]", self.pretrained_cfg[name], channels)
            return channel_numbers(f"pretrained_cfg[{name!r}]", values, channels, above_zero=name == "std")

        return of("mean"), of("std")

    def _reads_numbers(self, embed: nn.Module) -> bool:
        """Whether a patch embedding cannot do anything with bytes: somebody's own, or a hook before it, may."""
        return type(embed) is PatchEmbed and "forward" not in vars(embed) and not embed._forward_pre_hooks

    def _normalised(self, images: Tensor) -> Tensor:
        """Bytes as the numbers that the modules read."""
        check_rank("images", images, "B C rows columns")
        if images.shape[1] != self.in_chans:
            raise wrong_channels(images, self.in_chans)
        return normalise(images, *self._statistics(self.in_chans), self._dd()["dtype"])

    def _embed(self, images: Tensor) -> Tensor:
        """Images → tokens [B, T, D] that the first block reads."""
        return self.norm_pre(self.patch_drop(self._all_tokens(images)))

    def _fused_embed(self, images: Tensor) -> Tensor:
        embed = self.patch_embed
        whole = embed.prepare(images)
        mean = std = None
        if not _are_bytes(images):
            images = whole
        elif whole.shape == images.shape:
            mean, std = self._statistics(embed.proj.in_channels)
        else:
            images = embed.prepare(self._normalised(images))  # what pads is no black pixel, but the mean
        high, wide = embed.patch_size
        rows, columns = images.shape[2] // high, images.shape[3] // wide
        if not self.dynamic_img_size and (images.shape[2] % high or images.shape[3] % wide):
            images = images[:, :, : rows * high, : columns * wide]  # as a convolution leaves out what fills no patch
        tokens = [token[0] for token in self._prefix_tokens()]
        prefix = (tokens[0] if len(tokens) == 1 else torch.cat(tokens)) if tokens else None
        position: Tensor | None = None
        if self.pos_embed is None:
            pass
        elif not self.dynamic_img_size:
            position = self.pos_embed[0]
        else:
            table = self._positions(rows, columns)[0]
            if prefix is not None and not self.no_embed_class:
                prefix, table = prefix + table[: len(prefix)], table[len(prefix) :]
            position = table
        return ops.patch_embed(images, embed.proj.weight, embed.proj.bias, position, prefix, mean, std)

    def _run_block(self, block: nn.Module, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if attn_mask is not None or is_causal:
            return block(x, attn_mask=attn_mask, is_causal=is_causal)
        if not self.grad_checkpointing:
            return block(x)
        if torch.compiler.is_compiling():
            return checkpoint(block, x, use_reentrant=False)
        chosen = chosen_backend()  # backward, where the block is computed again, may come behind the end of use_backend
        return checkpoint(
            block, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), use_backend(chosen))
        )

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images [B, C, rows, columns] → tokens [B, T, D] behind the final LayerNorm."""
        return self._encode(self._embed(x), attn_mask, is_causal)

    def _encode(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens through every block and the final LayerNorm."""
        if attn_mask is None and not is_causal and not self.grad_checkpointing:
            return self.norm(self.blocks(x))
        for block in self.blocks:
            x = self._run_block(block, x, attn_mask, is_causal)
        return self.norm(x)

    def _is_own(self, *methods: str) -> bool:
        """Whether these methods are those of this file: nobody replaced one, in the model, in its class or in ours."""
        kind = type(self)
        own = next(_OWN[base] for base in kind.__mro__ if base in _OWN)
        for name in methods:
            getattr(self, name)  # as in `layers.why_aside`
        return all(getattr(kind, name) is own[name] and name not in self.__dict__ for name in methods)

    def first_tokens_read(self) -> int | None:
        """How many of the first tokens the head reads of what comes from the last block; None for all of them, or where
        a method between the two is somebody's own."""
        if self.global_pool != "token" or self.attn_pool is not None:
            return None
        return 1 if self._is_own("forward_features", "_encode", "_run_block", "pool", "forward_head") else None

    def last_block_aside(self) -> str:
        """Why the last block computes tokens that the head does not read, or "" where it leaves them out."""
        if not len(self.blocks):
            return "there is no block"
        last: Any = self.blocks[-1]
        name = f"blocks.{len(self.blocks) - 1}"
        for place, module in (("blocks", self.blocks), (name, last)):
            if module._compiled_call_impl is not None:
                return f"{place} is compiled by itself"
        reason = why_aside(
            ("blocks", self.blocks, (nn.Sequential,)), (name, last, (Block,)), ("norm", self.norm, NORM_OR_NONE)
        )
        return reason or last.attention_aside() or last.mlp_aside()

    def forward_masked(
        self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The encoder of a masked autoencoder: a random share of the patches is read, the others are left out.

        He et al. 2022, Masked Autoencoders Are Scalable Vision Learners, section 3 and appendix A.1: the patches of
        each image are shuffled, and the first N·(1 − mask_ratio) of them kept, in that order, behind the prefix tokens.

        Args:
            images: [B, C, rows, columns].
            mask_ratio: the share of patches left out, at least 0 and below 1; of those that stay the number is rounded
                down, and one stays.
            noise: [B, N], numbers whose order from the least up is the order of the patches; drawn uniformly if None.

        Returns:
            latent: [B, R + kept, D], behind the final LayerNorm (which stands behind the pool, and not here, where
                `fc_norm` does).
            mask: fp32 [B, N], 1 for a patch left out, 0 for one that was read.
            ids_restore: int64 [B, N], for each patch its place in the shuffled order: what a decoder gathers by, once
                it has put mask tokens behind those that were kept.

        Raises:
            ValueError: for a ratio or a noise that does not fit, and as `forward` does for images.
        """
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio: got {mask_ratio}, takes 0 or more and less than 1")
        x, count = self._all_tokens(images), self.num_prefix_tokens
        patches = x[:, count:]
        batch, number, width = patches.shape
        if noise is None:
            noise = torch.rand(batch, number, device=x.device)
        elif noise.shape != (batch, number):
            raise ValueError(
                f"noise: got shape {list(noise.shape)}, takes [{batch}, {number}], a number for each patch"
            )
        kept = max(1, int(number * (1 - mask_ratio)))
        order = noise.to(x.device).argsort(dim=1)
        ids_restore = order.argsort(dim=1)
        patches = patches.gather(1, order[:, :kept, None].expand(-1, -1, width))
        latent = self._encode(self.norm_pre(torch.cat([x[:, :count], patches], dim=1)))
        return latent, (ids_restore >= kept).float(), ids_restore

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
        one_of("output_fmt", output_fmt, ("NCHW", "NLC"))
        chosen, last = take_indices(len(self.blocks), indices)
        images, x = x, self._embed(x)
        found = []
        for index, block in enumerate(list(self.blocks)[: last + 1] if stop_early else self.blocks):
            x = self._run_block(block, x, attn_mask, is_causal)
            if index in chosen:
                found.append(self.norm(x) if norm else x)
        count = self.num_prefix_tokens
        prefix, found = [y[:, :count] for y in found], [y[:, count:] for y in found]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size(images.shape[-2:])
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
        chosen, last = take_indices(len(self.blocks), indices)
        self.blocks = nn.Sequential(*list(self.blocks)[: last + 1])
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return chosen

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, T, D] → [B, D], or [B, 2·D] of "token_avg", by the model's pool, or by `pool_type`."""
        start = 0 if self.pool_include_prefix else self.num_prefix_tokens
        if self.attn_pool is not None:
            return self.attn_pool(x[:, start:])
        pool_type = self.global_pool if pool_type is None else pool_type
        if pool_type == "token":
            return x[:, 0]
        if pool_type == "avg":
            return x[:, start:].mean(dim=1)
        if pool_type == "token_avg":
            return torch.cat([x[:, 0], x[:, start:].mean(dim=1)], dim=1)
        if pool_type == "max":
            return x[:, start:].amax(dim=1)
        if pool_type == "avgmax":
            return 0.5 * (x[:, start:].amax(dim=1) + x[:, start:].mean(dim=1))
        one_of("pool_type", pool_type, [name for name in POOLS if name != "map"])
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, T, D] → logits [B, classes], or with `pre_logits` what the head reads."""
        x = self.head_drop(self.pre_logits(self.fc_norm(self.pool(x))))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images → logits [B, classes]: `forward_head` of `forward_features`, whose last block leaves out the tokens
        that the head does not read, where `first_tokens_read` counts those that it does, `last_block_aside` names no
        reason, and the call is not one of `FEW_TOKENS` or less that a GPU runs eagerly."""
        count = self.first_tokens_read()
        if count is None or attn_mask is not None or is_causal:
            return self.forward_head(self.forward_features(x, attn_mask, is_causal))
        x = self._embed(x)
        few = x.device.type != "cpu" and not torch.compiler.is_compiling() and x.shape[0] * x.shape[1] <= FEW_TOKENS
        if few or self.last_block_aside():
            return self.forward_head(self._encode(x))
        blocks: list[Any] = list(self.blocks)
        for block in blocks[:-1]:
            x = self._run_block(block, x, None, False)
        return self.forward_head(self.norm(blocks[-1].first_tokens(x, count)))

    # --- what people ask of a trained model

    @contextlib.contextmanager
    def _per_layer(self, images: Tensor):
        """(index, block, the tokens that it reads) for each block in turn."""

        def walk():
            x = self._embed(images)
            for index, block in enumerate(self.blocks):
                yield index, block, x
                x = block(x)

        with evaluating(self), torch.no_grad():
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
            [L, B, H, T, T], or Tq rows for T, in fp32 (fp64 from a model in fp64): row i holds the probabilities with
            which token i reads the others.
        """
        chosen, last = take_indices(len(self.blocks), layers)
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
            [B, T, T] in fp32 (or fp64): row i holds the share that each input token has in token i of the last layer.
            Rows sum to one.

        Raises:
            ValueError: for a model of depth 0.
        """
        if not len(self.blocks):
            raise ValueError("attention_rollout: the model has no layer")
        flow: Tensor | None = None
        with self._per_layer(images) as walk:
            for _, block, x in walk:
                layer = block.attention_map(x).mean(dim=1)
                layer = 0.5 * (layer + torch.eye(layer.shape[-1], device=layer.device))
                flow = layer if flow is None else layer @ flow
        assert flow is not None
        return flow

    def rollout_map(self, images: Tensor) -> Tensor:
        """How much of the class token comes from each patch, by `attention_rollout`.

        Without a class token it is the mean over the patch tokens, which the model pools.

        Returns:
            [B, rows, columns] in fp32 (or fp64), on the grid of patches. Prefix tokens have their share too, so a map
            sums to less than one.
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
        if config.get("projection"):
            raise ValueError("predict: the head is the projection of a CLIP, which has no classes; call the model")
        pixels = preprocess(
            images,
            img_size=self.patch_embed.img_size,
            mean=config["mean"],
            std=config["std"],
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config.get("crop_mode", "center"),
            in_chans=self.in_chans,
        )
        with evaluating(self), torch.no_grad():
            return self(pixels.to(**self._dd())).float().softmax(dim=-1)

    @property
    def default_cfg(self) -> dict[str, Any]:
        """`pretrained_cfg`, by the older of timm's two names."""
        return self.pretrained_cfg

    @default_cfg.setter
    def default_cfg(self, settings: dict[str, Any]) -> None:
        self.pretrained_cfg = settings

    # timm's factory notes in a model what it was built with, and timm's export writes that; ours is read off the model,
    # and is not there where a part is somebody's own.

    @property
    def _model_args(self) -> dict[str, Any]:
        from vit_fast.weights.settings import to_timm

        try:
            return to_timm(self, ())["model_args"]
        except ValueError as error:
            raise AttributeError("_model_args") from error

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        pass

    @property
    def _traits(self) -> dict[str, Any]:
        embed = self.patch_embed
        return {"img_size": embed.img_size, "fixed_input_size": embed.strict_img_size, "first_conv": "patch_embed.proj"}

    @_traits.setter
    def _traits(self, traits: dict[str, Any]) -> None:
        pass

    # --- checkpoints

    def save_pretrained(self, folder) -> None:
        """Write config.json and model.safetensors, as timm reads them: see `pretrained.save_pretrained`."""
        from vit_fast.pretrained import save_pretrained

        save_pretrained(self, folder)

    def push_to_hub(self, repository: str, **kwargs) -> str:
        """Upload that to a repository of the Hub: see `pretrained.push_to_hub`."""
        from vit_fast.pretrained import push_to_hub

        return push_to_hub(self, repository, **kwargs)

    @staticmethod
    def from_pretrained(path_or_repo, **kwargs) -> "VisionTransformer":
        """`vit_fast.load` of a folder, file or repository."""
        from vit_fast.pretrained import load

        return load(path_or_repo, **kwargs)


class VisionTransformerDistilled(VisionTransformer):
    """DeiT with a distillation token and a head of its own (Touvron et al. 2021, section 4).

    The arguments are those of VisionTransformer, the pool is the class token. The logits are the mean of both heads;
    after `set_distilled_training()` a model in training mode gives the pair instead.
    """

    def __init__(self, *args, **kwargs):
        weight_init = kwargs.pop("weight_init", "")
        super().__init__(*args, **{**kwargs, "weight_init": "skip"})
        if self.global_pool != "token" or self.fixed_pos_embed or self.pos_embed is None or self.num_reg_tokens:
            raise ValueError("VisionTransformerDistilled takes global_pool='token', pos_embed='learn' and no registers")
        dd = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.num_prefix_tokens = 2
        self.dist_token = nn.Parameter(torch.empty(1, 1, self.embed_dim, **dd))
        positions = self.patch_embed.num_patches + (0 if self.no_embed_class else 2)
        self.pos_embed = nn.Parameter(torch.empty(1, positions, self.embed_dim, **dd))
        self.head_dist = self._new_head(dd)
        self.pretrained_cfg["classifier"] = ("head", "head_dist")
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

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:  # type: ignore[override]  # as timm's does
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool not in (None, "", "token"):
            raise ValueError(f"global_pool: got {global_pool!r}, the distilled model takes 'token'")
        self.num_classes = whole_number("num_classes", num_classes, 0)
        self.head = self._new_head(self._dd()).train(self.training)
        self.head_dist = self._new_head(self._dd()).train(self.training)
        self._forget_classes()

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training mode give the logits of both heads, (class, distillation)."""
        self.distilled_training = enable

    def _prefix_tokens(self) -> list[Tensor]:
        assert self.cls_token is not None  # its pool is "token"
        return [self.cls_token, self.dist_token]

    def first_tokens_read(self) -> int | None:
        return 2 if self._is_own("forward_features", "_encode", "_run_block", "forward_head") else None

    def forward_head(self, x: Tensor, pre_logits: bool = False):
        x, distilled = self.head_drop(x[:, 0]), self.head_drop(x[:, 1])
        if pre_logits:
            return (x + distilled) / 2
        x, distilled = self.head(x), self.head_dist(distilled)
        if self.distilled_training and self.training:
            return x, distilled
        return (x + distilled) / 2


# What each class is when this file has been read, before anybody could replace a method in it.
_OWN: dict[type, dict[str, Any]] = {
    kind: {
        name: getattr(kind, name)
        for name in ("_pos_embed", "forward_features", "_encode", "_run_block", "pool", "forward_head")
    }
    for kind in (VisionTransformer, VisionTransformerDistilled)
}
