"""Models of the shape of DINO's and DINOv2's own code: attributes, order of modules and what forward returns.

Written for the tests of what is recognised by its shape; not theirs, and only as much as that needs.
"""

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class SwiGLUFFN(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(nn.functional.silu(gate) * value)


class DropPath(nn.Module):
    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(keep).div_(keep)


class Attention(nn.Module):
    """DINO's: explicit probabilities, which it returns too."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.num_heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)

    def _probabilities_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)), v

    def forward(self, x: Tensor):
        probabilities, v = self._probabilities_and_values(x)
        return self.proj_drop(self.proj((probabilities @ v).transpose(1, 2).flatten(2))), probabilities


class MemEffAttention(Attention):
    """DINOv2's: the output alone."""

    def forward(self, x: Tensor, attn_bias=None) -> Tensor:
        return super().forward(x)[0]


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """DINO's."""

    def __init__(self, width: int, heads: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 2 * width)

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor:
        y, probabilities = self.attn(self.norm1(x))
        if return_attention:
            return probabilities
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class NestedTensorBlock(nn.Module):
    """DINOv2's: takes a list of batches too; in training drops whole samples of a batch from a branch."""

    def __init__(self, width: int, heads: int, drop_path: float, gated: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = MemEffAttention(width, heads)
        self.ls1 = LayerScale(width)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = SwiGLUFFN(width, width) if gated else Mlp(width, 2 * width)
        self.ls2 = LayerScale(width)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()
        self.sample_drop_ratio = drop_path

    def _one(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path1(self.ls2(self.mlp(self.norm2(x))))

    def forward(self, x):
        return [self._one(one) for one in x] if isinstance(x, list) else self._one(x)


class PatchEmbed(nn.Module):
    def __init__(self, img_size: int, patch_size: int, width: int):
        super().__init__()
        self.img_size = img_size
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class OriginalVisionTransformer(nn.Module):
    """The features of the class token."""

    def __init__(self, kind: str, drop_path: float = 0.0, registers: int = 0, depth: int = 2, patch_size: int = 8):
        super().__init__()
        width, heads = 48, 3
        self.patch_embed = PatchEmbed(32, patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        if kind == "dino":
            blocks = [Block(width, heads, drop_path) for _ in range(depth)]
        else:
            blocks = [NestedTensorBlock(width, heads, drop_path, kind == "dinov2 gated") for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]
