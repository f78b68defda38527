"""What the arguments of a model may be: each check names the argument, what it got and what it takes."""

import functools
import operator
from collections.abc import Iterable, Sequence

from torch import nn


def whole_number(name: str, value, least: int) -> int:
    """A count as an int; those of numpy and torch, as of `labels.max() + 1`, are taken too."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name}: got {value!r}, takes {least} or more")
    return number


def pair(name: str, value) -> tuple[int, int]:
    """A number, or two of them, as two."""
    try:
        rows, columns = value if hasattr(value, "__len__") else (value, value)
        return whole_number(name, rows, 1), whole_number(name, columns, 1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: got {value!r}, takes a positive number or two") from error


def per_channel(name: str, values: Sequence[float] | float, channels: int) -> tuple[float, ...]:
    """A mean or a std, one number a channel: one value serves every channel, several on a single one are averaged."""
    numbers = tuple(map(float, values)) if isinstance(values, Iterable) else (float(values),)
    if channels == 1 and numbers:
        numbers = (sum(numbers) / len(numbers),)
    if len(numbers) not in (1, channels):
        raise ValueError(f"{name}: got {len(numbers)} values, takes 1 or {channels}, one a channel")
    return numbers if len(numbers) == channels else numbers * channels


def _from(package: str, layer, *names: str) -> bool:
    """Whether `layer` is a class of this package with one of these names; the package itself need not be installed."""
    return isinstance(layer, type) and layer.__name__ in names and layer.__module__.split(".")[0] == package


def known_layer(name: str, layer, ours: type, names: tuple[str, ...] = ()) -> None:
    """A layer argument takes our class, or timm's class of the same name."""
    if layer is None or layer is ours or _from("timm", layer, ours.__name__):
        return
    if not (isinstance(layer, str) and layer in names):
        raise ValueError(f"{name}: got {getattr(layer, '__name__', layer)!r}, takes {ours.__name__} or None")


def is_swiglu(layer, plain: type, packed: type) -> bool:
    """Whether `mlp_layer` is the gated MLP: our class, timm's SwiGLUPacked, which is a partial, or "swiglu"."""
    timms = isinstance(layer, functools.partial) and _from("timm", layer.func, "GluMlp")
    if timms and layer.keywords == {"act_layer": nn.SiLU, "gate_last": False}:
        return True
    if layer is packed or (isinstance(layer, str) and layer == "swiglu"):
        return True
    if layer is None or layer is plain or _from("timm", layer, plain.__name__):
        return False
    given = getattr(layer, "__name__", layer)
    raise ValueError(f"mlp_layer: got {given!r}, takes {plain.__name__}, {packed.__name__}, 'swiglu' or None")


def norm_factory(name: str, layer):
    """nn.LayerNorm with the eps that `layer` would have: timm's LayerNorm has 1e-6, PyTorch's 1e-5."""
    given, keywords = layer, {}
    if isinstance(layer, functools.partial):
        layer, keywords = layer.func, dict(layer.keywords)
    default = None
    if layer is None or layer in ("", "layernorm") or _from("timm", layer, "LayerNorm", "LayerNormFp32"):
        default = 1e-6
    elif layer is nn.LayerNorm:
        default = 1e-5
    eps = keywords.pop("eps", default)
    if default is None or keywords:
        raise ValueError(
            f"{name}: got {given!r}, takes 'layernorm', nn.LayerNorm, timm's LayerNorm, "
            "or functools.partial of one of them with eps"
        )
    return functools.partial(nn.LayerNorm, eps=eps)


def activation_name(layer, gated: bool) -> str:
    """The name that the ops use for an activation given by that name, PyTorch's class, or a class of timm's or ours."""
    by_class = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}
    name = "gelu" if layer is None else layer
    if isinstance(layer, functools.partial) and layer.func is nn.GELU and set(layer.keywords) <= {"approximate"}:
        name = "gelu_tanh" if layer.keywords.get("approximate") == "tanh" else "gelu"
    elif layer in (nn.GELU, nn.SiLU) or _from("timm", layer, *by_class) or _from("vit_fast", layer, "QuickGELU"):
        name = by_class[layer.__name__]
    if name not in by_class.values() or (name == "silu") != gated:
        takes = "'silu' or nn.SiLU with SwiGLU" if gated else "'gelu', 'gelu_tanh', 'quick_gelu', or the class of one"
        raise ValueError(f"act_layer: got {layer!r}, takes {takes}")
    return name


def take_indices(count: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
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
