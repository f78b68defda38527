"""What is timed against what: each op and whole models, ours and every peer, each used as its own documentation says.

A peer that is not installed, or does not take a case, is left out with its reason. Nobody is timed before what it
returns has been held to fp64.
"""

import contextlib
import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import timing
from benchmarks.launches import DTYPES, STATISTICS
from benchmarks.timing import DEVICE
from vit_fast import ops, reference
from vit_fast.ops.window_attention import apart, distances
from vit_fast.verify import in_a_line

# Width, heads and hidden width. "tiny" is a rehearsal's.
MODELS = {
    "tiny": (64, 2, 128),
    "Ti": (192, 3, 768),
    "S": (384, 6, 1536),
    "B": (768, 12, 3072),
    "L": (1024, 16, 4096),
    "H": (1280, 16, 5120),
    "g": (1408, 16, 6144),
    "so400m": (1152, 16, 4304),
}
# Side of the map, heads, and side of a window of a stage of a Swin at 224 pixels; each head is 32 wide.
SWINS = {"tiny": (4, 2, 2)} | {
    f"{name} {stage + 1}": (56 >> stage, heads << stage, 7)
    for name, heads in (("Swin-T", 3), ("Swin-B", 4))
    for stage in range(4)
}
# Tokens, the class token among them → pixels a side of the image, and of a patch.
IMAGES = {17: (32, 8), 50: (224, 32), 197: (224, 16), 257: (224, 14), 577: (384, 16), 1370: (518, 14)}
SIZES = ((["B", "L"], 197), (["H"], 257))  # at 224 pixels
DINOV3 = ["B", "L"], [201]  # at 224 too: the class token and four registers before the patches
EPS = 1e-6


class Case(NamedTuple):
    """One op at one shape."""

    op: str
    model: str
    tokens: int
    batch: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.op}-{self.model}-{self.tokens}-{self.batch}-{self.dtype}"


class LeftOut(Exception):
    """Why a contender does not take part."""


class Wrong(Exception):
    """What is wrong with what a contender returns."""


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def installed(package: str) -> None:
    """Leave out whoever needs a package that is not there."""
    if not is_installed(package):
        raise LeftOut(f"{package} is not installed")


# ---- the ops -------------------------------------------------------------------------------------------------------


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def sdpa(qkv: Tensor, backend: SDPBackend | None = None) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _conv2d(images, weight, bias, position, prefix):
    patches = F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    return torch.cat([prefix.expand(len(images), -1, -1), patches], 1) + position


@functools.cache
def _statistics(device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(numbers, device=device).view(-1, 1, 1) for numbers in STATISTICS)


def _conv2d_of_bytes(images, *others):
    """As torchvision's transforms write it: to floats from 0 to 1, normalised, in the model's dtype."""
    shift, scale = _statistics(images.device)
    return _conv2d(((images.float() / 255 - shift) / scale).to(others[0].dtype), *others)


def _mlp(x, norm_weight, norm_bias, w1, b1, w2, b2):
    return x + F.linear(F.gelu(F.linear(_norm(x, norm_weight, norm_bias), w1, b1)), w2, b2)


def _swiglu(x, norm_weight, norm_bias, w1, b1, w2, b2):
    gate, value = F.linear(_norm(x, norm_weight, norm_bias), w1, b1).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * value, w2, b2)


def _block(x, g1, c1, wqkv, bqkv, wproj, bproj, g2, c2, w1, b1, w2, b2, heads):
    qkv = F.linear(_norm(x, g1, c1), wqkv, bqkv)
    x = x + F.linear(sdpa(qkv.view(*x.shape[:2], 3, heads, -1)), wproj, bproj)
    return _mlp(x, g2, c2, w1, b1, w2, b2)


def _our_block(x, g1, c1, wqkv, bqkv, wproj, bproj, *second, heads):
    ends = (None, None)
    return ops.block(x, g1, c1, wqkv, bqkv, wproj, bproj, *ends, *second, *ends, num_heads=heads, eps1=EPS, eps2=EPS)


def _true_block(x, g1, c1, wqkv, bqkv, wproj, bproj, *second, heads):
    qkv = reference.ln_linear(x, g1, c1, wqkv, bqkv, EPS).reshape(*x.shape[:2], 3, heads, -1)
    x = reference.linear_residual(reference.attention(*qkv.unbind(2)), wproj, bproj, x)
    return reference.mlp(x, *second, eps=EPS)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' apply_rotary_pos_emb and rotate_half, of q or k [B, H, T, d]."""
    patches = len(cos)
    before, x = x.split((x.shape[2] - patches, patches), dim=2)
    a, b = x.chunk(2, -1)
    return torch.cat((before, (x * cos) + (torch.cat((-b, a), dim=-1) * sin)), dim=2)


def _rope_sdpa(qkv, cos, sin, backend=None):
    """As transformers' DINOv3 writes it, whose attention is SDPA unless told."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = _turned(q, cos, sin), _turned(k, cos, sin)
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _cut(x: Tensor, window: int) -> Tensor:
    """timm's window_partition: a map [B, Y, X, …] as its windows [B·windows, T, …]."""
    B, Y, X, *others = x.shape
    x = x.view(B, Y // window, window, X // window, window, *others).transpose(2, 3)
    return x.reshape(-1, window * window, *others)


def _put_back(o: Tensor, side: int, window: int, shift: int) -> Tensor:
    """timm's window_reverse of o [B·windows, T, H·d], and rolled back."""
    o = o.view(-1, side // window, side // window, window, window, o.shape[-1]).transpose(2, 3)
    o = o.reshape(-1, side, side, o.shape[-1])
    return o.roll((shift, shift), (1, 2)) if shift else o


def _relative_bias(table: Tensor, index: Tensor) -> Tensor:
    return table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1).contiguous()  # [H, T, T]


def _window_attention(qkv, table, window, shift, index, mask):
    """As timm's Swin writes it. It rolls and cuts x before its product, which is a third as wide as what is here."""
    B, side, _, _, H, d = qkv.shape
    T = window * window
    if shift:
        qkv = qkv.roll((-shift, -shift), (1, 2))
    q, k, v = _cut(qkv, window).permute(2, 0, 3, 1, 4)  # each [B·windows, H, T, d]
    scores = q * d**-0.5 @ k.transpose(-2, -1) + _relative_bias(table, index)
    if mask is not None:
        scores = (scores.view(B, -1, H, T, T) + mask[:, None]).view(-1, H, T, T)
    o = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return _put_back(o, side, window, shift)


def _window_sdpa(qkv, table, window, shift, index, mask, backend=None):
    """Bias and mask as SDPA's own, the same for each image, so that the windows are heads: no copy of it an image."""
    B, side, _, _, H, d = qkv.shape
    across, T = side // window, window * window
    if shift:
        qkv = qkv.roll((-shift, -shift), (1, 2))
    qkv = qkv.view(B, across, window, across, window, 3, H, d).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = qkv.reshape(3, B, across**2 * H, T, d)
    bias = _relative_bias(table, index).expand(across**2, H, T, T)
    bias = (bias if mask is None else bias + mask[:, None]).reshape(1, -1, T, T)
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return _put_back(o.view(-1, H, T, d).transpose(1, 2).flatten(2), side, window, shift)


def _our_windows(qkv, table, window, shift, **_):
    return ops.window_attention(qkv, table, (window, window), (shift, shift))


def _true_windows(qkv, table, window, shift, **_):
    return reference.window_attention(qkv, table, (window, window), (shift, shift))


@dataclass(frozen=True)
class Op:
    """How an op's tensors are drawn, what the truth is, and what PyTorch does without us."""

    draw: Callable  # (case, normal: shape → tensor) → tensors
    ours: Callable
    truth: Callable
    eager: Callable
    images: int  # how many of the tensors, the first, have an axis of images
    constant: int = 0  # how many of those get no gradient
    limit: Callable | None = None  # its products alone, by cuBLAS: no contender, but what any product is held to
    peers: dict[str, Callable] = field(default_factory=dict)  # name → case → call


def _sizes(case: Case) -> tuple[int, int, int, int, int]:
    return case.batch, case.tokens, *MODELS[case.model]


def _settings(case: Case) -> dict:
    """What an op takes besides the tensors that are drawn."""
    if case.op == "window_attention":
        return _window_settings(case)
    if case.op == "rope_attention":
        return _rope_settings(case)
    return {"heads": MODELS[case.model][1]} if case.op == "block" else {}


def _rope_settings(case: Case) -> dict:
    """DINOv3's tables, of its base of 100 and in the dtype of the model: the patches are as many as fill a square."""
    width, heads, _ = MODELS[case.model]
    side = math.isqrt(case.tokens - 1)
    at = (torch.arange(side, device=DEVICE) + 0.5) / side * 2 - 1
    places = torch.stack(torch.meshgrid(at, at, indexing="ij"), -1).flatten(0, 1)  # [side², 2]
    frequencies = 100.0 ** -torch.arange(0, 1, 4 * heads / width, device=DEVICE)
    angles = (2 * math.pi * places[:, :, None] * frequencies).flatten(1).tile(2)
    return {"cos": angles.cos().to(DTYPES[case.dtype]), "sin": angles.sin().to(DTYPES[case.dtype])}


def _window_settings(case: Case) -> dict:
    """The window, the shift of every second block, and what timm keeps in buffers: the entry of the table for each pair
    of tokens, and −100 for each pair that the shift brought together, or None."""
    side, _, window = SWINS[case.model]
    shift = window // 2 if window < side else 0
    like = torch.empty(0, device=DEVICE, dtype=DTYPES[case.dtype])
    mask = apart(side, side, (window, window), (shift, shift), like) if shift else None
    return {"window": window, "shift": shift, "index": distances((window, window), like.device), "mask": mask}


def _draw_ln_linear(case, normal):
    B, T, D, _, _ = _sizes(case)
    return normal(B, T, D), normal(D), normal(D), normal(3 * D, D), normal(3 * D)


def _draw_attention(case, normal):
    B, T, D, H, _ = _sizes(case)
    return (normal(B, T, 3, H, D // H),)


def _draw_window_attention(case, normal):
    side, heads, window = SWINS[case.model]
    return normal(case.batch, side, side, 3, heads, 32), normal((2 * window - 1) ** 2, heads)


def _draw_mlp(case, normal):
    B, T, D, _, hidden = _sizes(case)
    return normal(B, T, D), normal(D), normal(D), normal(hidden, D), normal(hidden), normal(D, hidden), normal(D)


def _draw_swiglu(case, normal):
    """Gates and values of two thirds of the hidden width each, as DINOv2's giant has them."""
    B, T, D, _, hidden = _sizes(case)
    inner = 8 * round(hidden / 12)
    first = normal(2 * inner, D), normal(2 * inner)
    return normal(B, T, D), normal(D), normal(D), *first, normal(D, inner), normal(D)


def _draw_patch_embed(case, normal):
    B, T, D, _, _ = _sizes(case)
    side, patch = IMAGES[T]
    return normal(B, 3, side, side), normal(D, 3, patch, patch), normal(D), normal(T, D), normal(1, D)


def _draw_patch_embed_bytes(case, normal):
    """Images as a decoder gives them, whose channels come last."""
    images, *others = _draw_patch_embed(case, normal)
    shape = len(images), *images.shape[2:], images.shape[1]
    decoded = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    return decoded.permute(0, 3, 1, 2), *others


def _draw_block(case, normal):
    _, _, D, _, _ = _sizes(case)
    x, *second = _draw_mlp(case, normal)
    return x, normal(D), normal(D), normal(3 * D, D), normal(3 * D), normal(D, D), normal(D), *second


def _linear_residual(of_hidden: bool) -> Op:
    """The projection, or fc2, whose input is the hidden layer: x and the residual, which both have images, in front."""

    def draw(case, normal):
        B, T, D, _, hidden = _sizes(case)
        K = hidden if of_hidden else D
        return normal(B, T, K), normal(B, T, D), normal(D, K), normal(D)

    def swapped(op: Callable) -> Callable:
        return lambda x, residual, weight, bias: op(x, weight, bias, residual)

    return Op(
        draw,
        swapped(ops.linear_residual),
        swapped(reference.linear_residual),
        lambda x, residual, w, b: residual + F.linear(x, w, b),
        images=2,
        limit=lambda x, residual, w, b: F.linear(x, w, b),
    )


def _flash_attn_2(case: Case) -> Callable:
    installed("flash_attn")
    from flash_attn import flash_attn_qkvpacked_func

    return lambda qkv: flash_attn_qkvpacked_func(qkv).flatten(2)


def _flash_attn_3(case: Case) -> Callable:
    installed("flash_attn_interface")
    from flash_attn_interface import flash_attn_func

    def call(qkv):
        out = flash_attn_func(*qkv.unbind(2))
        return (out[0] if isinstance(out, tuple) else out).flatten(2)

    return call


def _xformers(case: Case) -> Callable:
    installed("xformers")
    from xformers.ops import memory_efficient_attention

    return lambda qkv: memory_efficient_attention(*qkv.unbind(2)).flatten(2)


def _flex(case: Case) -> Callable:
    if DEVICE == "cpu":
        raise LeftOut("FlexAttention has no backward pass on a CPU")
    from torch.nn.attention.flex_attention import flex_attention

    attention = compiled(flex_attention)

    def call(qkv):
        return attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2).flatten(2)

    return call


def _sdpa_by(backend: SDPBackend) -> Callable:
    def peer(case: Case) -> Callable:
        if DEVICE == "cpu" and backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            raise LeftOut("SDPA has that backend on a GPU only")
        return functools.partial(sdpa, backend=backend)

    return peer


def _rope_by(backend: SDPBackend) -> Callable:
    def peer(case: Case) -> Callable:
        _sdpa_by(backend)(case)  # which says where there is none
        return functools.partial(_rope_sdpa, **_settings(case), backend=backend)

    return peer


def _window_peer(case: Case) -> Callable:
    """On a GPU by SDPA's efficient backend, which takes a bias that wants a gradient; flash takes none."""
    backend = None if DEVICE == "cpu" else SDPBackend.EFFICIENT_ATTENTION
    return functools.partial(_window_sdpa, **_settings(case), backend=backend)


def _liger(case: Case) -> Callable:
    installed("liger_kernel")
    from liger_kernel.transformers.functional import liger_layer_norm

    return lambda x, g, c, w, b: F.linear(liger_layer_norm(x, g, c, EPS), w, b)


class _ChannelsLast:
    """Conv2d on images and a weight that lie in its own layout before it is called."""

    def __call__(self, *tensors: Tensor) -> Tensor:
        return _conv2d(*tensors)

    def laid_out(self, *tensors: Tensor) -> list[Tensor]:
        images, weight = (t.detach().contiguous(memory_format=torch.channels_last) for t in tensors[:2])
        return [images, weight.requires_grad_(), *tensors[2:]]


class _Held:
    """A peer that holds its parameters itself: they are copied from the tensors of the first call."""

    def __init__(self, module: torch.nn.Module, names: tuple[str, ...], residual: bool):
        self.module, self.names, self.residual = module, names, residual
        self.filled = False

    def __call__(self, x: Tensor, *tensors: Tensor) -> Tensor:
        if not self.filled:
            with torch.no_grad():
                for name, tensor in zip(self.names, tensors, strict=True):
                    self.module.get_parameter(name).copy_(tensor)
            self.filled = True
        y = self.module(x)
        return x + y if self.residual else y

    def wanted(self, x: Tensor, *tensors: Tensor) -> list[Tensor]:
        return [x, *map(self.module.get_parameter, self.names)]


def _transformer_engine(case: Case, mlp: bool) -> Callable:
    installed("transformer_engine")
    import transformer_engine.pytorch as te

    _, _, D, _, hidden = _sizes(case)
    options = {"eps": EPS, "bias": True, "params_dtype": DTYPES[case.dtype]}
    norm = ("layer_norm_weight", "layer_norm_bias")
    if mlp:
        names = (*norm, "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
        return _Held(te.LayerNormMLP(D, hidden, activation="gelu", **options), names, residual=True)
    return _Held(te.LayerNormLinear(D, 3 * D, **options), (*norm, "weight", "bias"), residual=False)


OPS = {
    "ln_linear": Op(
        _draw_ln_linear,
        functools.partial(ops.ln_linear, eps=EPS),
        functools.partial(reference.ln_linear, eps=EPS),
        lambda x, g, c, w, b: F.linear(_norm(x, g, c), w, b),
        images=1,
        limit=lambda x, g, c, w, b: F.linear(x, w, b),
        peers={"liger": _liger, "te": functools.partial(_transformer_engine, mlp=False)},
    ),
    "attention": Op(
        _draw_attention,
        ops.attention_qkv,
        lambda qkv: reference.attention(*qkv.unbind(2)),
        sdpa,
        images=1,
        peers={
            "sdpa flash": _sdpa_by(SDPBackend.FLASH_ATTENTION),
            "sdpa cudnn": _sdpa_by(SDPBackend.CUDNN_ATTENTION),
            "sdpa efficient": _sdpa_by(SDPBackend.EFFICIENT_ATTENTION),
            "sdpa math": _sdpa_by(SDPBackend.MATH),
            "flex": _flex,
            "flash-attn 2": _flash_attn_2,
            "flash-attn 3": _flash_attn_3,
            "xformers": _xformers,
        },
    ),
    "rope_attention": Op(
        _draw_attention,
        ops.rope_attention,
        reference.rope_attention,
        _rope_sdpa,
        images=1,
        peers={
            "sdpa flash": _rope_by(SDPBackend.FLASH_ATTENTION),
            "sdpa cudnn": _rope_by(SDPBackend.CUDNN_ATTENTION),
            "sdpa efficient": _rope_by(SDPBackend.EFFICIENT_ATTENTION),
        },
    ),
    "window_attention": Op(
        _draw_window_attention,
        _our_windows,
        _true_windows,
        _window_attention,
        images=1,
        peers={"sdpa": _window_peer},
    ),
    "projection": _linear_residual(of_hidden=False),
    "fc2": _linear_residual(of_hidden=True),
    "mlp": Op(
        _draw_mlp,
        functools.partial(ops.mlp, eps=EPS),
        functools.partial(reference.mlp, eps=EPS),
        _mlp,
        images=1,
        limit=lambda x, g, c, w1, b1, w2, b2: F.linear(F.linear(x, w1, b1), w2, b2),
        peers={"te": functools.partial(_transformer_engine, mlp=True)},
    ),
    "swiglu": Op(
        _draw_swiglu,
        functools.partial(ops.swiglu, eps=EPS),
        functools.partial(reference.swiglu, eps=EPS),
        _swiglu,
        images=1,
        limit=lambda x, g, c, w1, b1, w2, b2: F.linear(F.linear(x, w1, b1)[..., : w2.shape[1]], w2, b2),
    ),
    "patch_embed": Op(
        _draw_patch_embed,
        ops.patch_embed,
        reference.patch_embed,
        _conv2d,
        images=1,
        constant=1,
        # The images read as a matrix of patches: as many numbers, no cut.
        limit=lambda images, weight, *_: F.linear(images.reshape(-1, weight[0].numel()), weight.flatten(1)),
        peers={"channels last": lambda case: _ChannelsLast()},
    ),
    "patch_embed_bytes": Op(
        _draw_patch_embed_bytes,
        lambda *tensors: ops.patch_embed(*tensors, *STATISTICS),
        lambda *tensors: reference.patch_embed(*tensors, *STATISTICS),
        _conv2d_of_bytes,
        images=1,
        constant=1,
    ),
    "block": Op(_draw_block, _our_block, _true_block, _block, images=1),
}


def names(op: str) -> list[str]:
    """Every contender of an op, installed here or not; "cublas" is its products alone."""
    whole = OPS[op]
    return ["vit_fast", "eager", "compiled", "compiled max", *whole.peers, *["cublas"] * (whole.limit is not None)]


def call_of(case: Case, name: str) -> Callable:
    """What a contender runs on the tensors of a case.

    Raises:
        LeftOut: where it does not take part.
    """
    op = OPS[case.op]
    if name == "vit_fast":
        return _on_kernels(functools.partial(op.ours, **_settings(case)))
    if name == "cublas":
        return op.limit
    if name in op.peers:
        return op.peers[name](case)
    eager = functools.partial(op.eager, **_settings(case))
    if name == "eager":
        return eager
    return compiled(eager, "max-autotune-no-cudagraphs" if name == "compiled max" else None)


def _on_kernels(call: Callable) -> Callable:
    """On a GPU never what `auto` runs in our place: that choice is made of what is measured here."""
    if DEVICE == "cpu":
        return call

    def forced(*tensors):
        with ops.use_backend("triton"):
            return call(*tensors)

    return forced


def compiled(what: Callable, mode: str | None = None) -> Callable:
    """torch.compile of a function or model that is really compiled: not eager in silence, as what comes after the
    eighth compilation of one piece of code would be."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(what, mode=mode, dynamic=False)


# ---- measuring -----------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What became of a contender at a case: its samples by pass in microseconds, or why there are none."""

    us: dict[str, list[float]]  # "forward", "both"
    error: float | None = None  # of its output, ‖y − fp64‖ / ‖fp64‖
    left_out: str = ""
    wrong: str = ""


def _draw(case: Case) -> tuple[Tensor, ...]:
    def normal(*shape):
        fan = shape[1:] if len(shape) in (2, 4) and shape[0] != case.batch else ()
        scale = torch.Size(fan).numel() ** -0.5 if fan else 1.0
        return (scale * torch.randn(shape, device=DEVICE)).to(DTYPES[case.dtype])

    return OPS[case.op].draw(case, normal)


def errors_of(case: Case, call: Callable, tensors: tuple[Tensor, ...]) -> dict[str, float]:
    """‖y − fp64‖ / ‖fp64‖ of "output" and of each "gradient" with its tensor's number, in runs of the whole batch.

    Output and gradients with an axis of images are compared at the first and the last: fp64 of all would take most of
    the day. The gradient of the output is zero for the images between, so that the parameters' gradients, sums over
    all images, are those of these two. It is the same for every call of a case: sums of it that all but cancel, as a
    table's of a window, are as small for all of them.
    """
    op, images = OPS[case.op], [0, -1][: case.batch]
    ends = [t.detach()[images] if at < op.images else t.detach() for at, t in enumerate(tensors)]
    ends = [t.double().requires_grad_(at >= op.constant) for at, t in enumerate(ends)]
    truth = op.truth(*ends, **_settings(case))
    generator = torch.Generator(truth.device).manual_seed(0)
    upstream = torch.randn(truth.shape, generator=generator, device=truth.device).to(DTYPES[case.dtype])
    wanted = torch.autograd.grad(truth, ends[op.constant :], upstream.double())
    output = _forward(call, op.constant, upstream, *tensors)
    everywhere = torch.zeros_like(output)
    everywhere[images] = upstream
    gradients = _both(call, op.constant, everywhere, *tensors)
    errors = {"output": _relative(output[images], truth)}
    for at, (gradient, true) in enumerate(zip(gradients, wanted, strict=True), op.constant):
        errors[f"gradient {at}"] = _relative(gradient[images] if at < op.images else gradient, true)
    return errors


LOST = "the device was lost to "


def lost(said: str) -> bool:
    """Whether an error says that the device takes no more work from this process."""
    return "CUDA error" in said


def _relative(ours: Tensor, truth: Tensor) -> float:
    return ((ours.detach().double() - truth.detach()).norm() / truth.detach().norm()).item()


def _forward(call: Callable, constant: int, upstream: Tensor, *tensors: Tensor) -> Tensor:
    with torch.no_grad():
        return call(*tensors)


def _both(call: Callable, constant: int, upstream: Tensor, *tensors: Tensor) -> tuple:
    wanted = call.wanted(*tensors) if isinstance(call, _Held) else tensors[constant:]
    return torch.autograd.grad(call(*tensors), wanted, upstream, allow_unused=True)


RUNS = {"forward": _forward, "both": _both}


def measure(
    case: Case, contenders: list[str], rounds: int = timing.ROUNDS, directions: Iterable[str] = tuple(RUNS)
) -> dict[str, Measured]:
    """Each contender forward, and forward and backward, or one of them alone, in turn with the others.

    Its output, and each of its gradients, may be four times as far from fp64 as eager PyTorch's in the same dtype, or
    it is wrong, and not timed. Where eager PyTorch fails there is nothing to hold the others to, and all are left out;
    where one takes the device with it, so are those that were not timed.
    """
    torch._dynamo.reset()  # its limits are for one piece of code, and all cases share theirs
    op = OPS[case.op]
    rounding = torch.finfo(DTYPES[case.dtype]).eps / 8
    try:
        first = _draw(case)
        nbytes = sum(t.nbytes for t in first)
        inputs = [first, *(_draw(case) for _ in range(timing.copies(nbytes) - 1))]
        for tensors in inputs:
            for t in tensors[op.constant :]:
                t.requires_grad_()
        eager = errors_of(case, call_of(case, "eager"), first)
    except Exception as error:
        reason = f"eager PyTorch, which the others are held to: {in_a_line(error)}"
        return {name: Measured({}, left_out=reason) for name in contenders}
    found, runs = {}, {direction: {} for direction in directions}
    for name in contenders:
        try:
            call = call_of(case, name)
            own = [call.laid_out(*tensors) for tensors in inputs] if isinstance(call, _ChannelsLast) else inputs
            errors = {} if name == "cublas" else errors_of(case, call, tuple(own[0]))
            for what, error in errors.items():
                allowed = 4 * eager[what] + rounding
                if not error <= allowed:
                    raise Wrong(f"the error of its {what} is {error:.1e}, {allowed:.1e} is allowed")
            upstream = torch.randn_like(call(*own[0]))
            for direction in directions:
                one = functools.partial(RUNS[direction], call, op.constant, upstream)
                one(*own[0])
                runs[direction][name] = timing.rotated(one, own)
            found[name] = Measured({}, errors.get("output"))
        except LeftOut as reason:
            found[name] = Measured({}, left_out=str(reason))
        except Wrong as reason:
            found[name] = Measured({}, wrong=str(reason))
        except Exception as error:  # as SDPA says that a backend takes no such heads; a failure of ours is a fault
            said = in_a_line(error)
            found[name] = Measured({}, wrong=said) if name == "vit_fast" else Measured({}, left_out=said)
            if lost(said):
                aside = {other: one for other, one in found.items() if one.left_out or one.wrong}
                return dict.fromkeys(contenders, Measured({}, left_out=LOST + name)) | aside
    for direction, them in runs.items():
        them = {name: run for name, run in them.items() if not (found[name].left_out or found[name].wrong)}
        for name, samples in timing.time_in_turn(them, rounds).items():
            found[name].us[direction] = samples
    return found


OF_A_VIT = tuple(op for op in OPS if op not in ("rope_attention", "window_attention"))


def cases(models, tokens, batches, dtypes, chosen=OF_A_VIT) -> list[Case]:
    """Every op of a ViT at every one of these."""
    return [Case(*one) for one in itertools.product(chosen, models, tokens, batches, dtypes)]


def of_swins(stages, batches, dtypes) -> list[Case]:
    """window_attention at stages of SWINS."""
    every = itertools.product(stages, batches, dtypes)
    return [Case("window_attention", stage, SWINS[stage][0] ** 2, batch, dtype) for stage, batch, dtype in every]


def cases_of(which: str) -> list[Case]:
    """Those of a set: "small" for a rehearsal, "main", "few" for small batches, "full"."""
    if which == "small":
        at = [2], ["bf16", "fp32"]
        return [*cases(["tiny"], [17], *at, (*OF_A_VIT, "rope_attention")), *of_swins(["tiny"], *at)]
    if which == "few":
        found = [cases(models, [tokens], [batch], ["bf16"]) for batch in (1, 8, 64) for models, tokens in SIZES]
        at_577 = cases(["B", "L"], [577], [1, 8, 64], ["bf16"], ["attention"])
        turned = cases(*DINOV3, [1, 8, 64], ["bf16"], ["rope_attention"])
        return [*itertools.chain(*found), *at_577, *turned, *of_swins(["Swin-T 1"], [1, 8, 64], ["bf16"])]
    if which == "full":
        models = [model for model in MODELS if model != "tiny"]
        tokens = [count for count in IMAGES if count != 17]
        at = [1, 8, 32, 64, 256], ["bf16", "fp16", "fp32"]
        turned = cases(*DINOV3, *at, ["rope_attention"])
        return [*cases(models, tokens, *at), *turned, *of_swins([stage for stage in SWINS if stage != "tiny"], *at)]
    found = [cases(models, [tokens], [256], ["bf16"]) for models, tokens in SIZES]
    at_577 = cases(["B"], [577], [64], ["bf16"], ["attention"])
    turned = cases(*DINOV3, [256], ["bf16"], ["rope_attention"])
    return [*itertools.chain(*found), *at_577, *turned, *of_swins(["Swin-T 1", "Swin-B 3"], [256], ["bf16"])]
