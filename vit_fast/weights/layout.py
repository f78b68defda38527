"""How a library's names for weights answer to ours: a table of patterns and a few transforms, read both ways.

Our own names, which are timm's, stand between all others. In a pattern {i} is the number of a block and {p} is "weight"
or "bias". Of the names that a library puts behind a prefix of its own, patterns leave the prefix out; a pattern that
begins with "/" is of names that never have it. What torch.compile and DDP put before a name counts for nothing.
"""

import functools
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vit_fast.checkpoint import matches_any, shortened, uncompiled

log = logging.getLogger("vit_fast")


class Way(NamedTuple):
    """What happens to one tensor of theirs, and back; both get the number of heads, for the layouts that show it."""

    to_ours: Callable[[Tensor, int], Tensor]
    to_theirs: Callable[[Tensor, int], Tensor]


SAME = Way(lambda t, heads: t, lambda t, heads: t)
TRANSPOSED = Way(lambda t, heads: t.T.contiguous(), lambda t, heads: t.T.contiguous())
TOKEN = Way(lambda t, heads: t.view(1, 1, -1), lambda t, heads: t.reshape(-1))  # [D] ↔ [1, 1, D]
TABLE = Way(lambda t, heads: t.unsqueeze(0), lambda t, heads: t.squeeze(0))  # [N, D] ↔ [1, N, D]


# Of ours, what our models may be built without and those of other libraries hardly are.
TOKENS = ("pos_embed", "cls_token")
BIASES = ("blocks.{i}.attn.proj.bias", "blocks.{i}.mlp.fc1.bias", "blocks.{i}.mlp.fc2.bias")
QKV_BIAS = "blocks.{i}.attn.qkv.bias"


class Rule(NamedTuple):
    """Names of ours, and the names of theirs that hold the same numbers: several are joined along the first axis."""

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    way: Way = SAME
    shares: tuple[int, ...] = ()  # of several of ours, when they are not alike
    only_read: bool = False  # another rule writes these


class Coverage(NamedTuple):
    """What became of every name."""

    layout: str
    placed: int
    dropped: list[str]  # known, and of no use to a Vision Transformer: a text tower, a decoder, an index
    left_over: list[str]
    missing: list[str]

    def __str__(self) -> str:
        told = f"{self.layout}: {self.placed} tensors placed"
        for what, names in (("dropped", self.dropped), ("left over", self.left_over), ("missing", self.missing)):
            if names:
                told += f"; {len(names)} {what}: {shortened(names)}"
        return told


@functools.cache
def _compiled(pattern: str) -> re.Pattern:
    return re.compile(re.escape(pattern).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{p\}", "(?P<p>weight|bias)"))


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


class _Match(NamedTuple):
    """A rule, and what {i} and {p} are where it applies."""

    rule: Rule
    groups: dict[str, str]

    def names(self, side: str) -> list[str]:
        return [pattern.format(**self.groups) for pattern in _names(getattr(self.rule, side))]


def _matches(rules: Iterable[Rule], side: str, names: Iterable[str]) -> list[_Match]:
    """Where the rules apply: one of a rule's names on this side is enough."""
    found = []
    for rule in rules:
        patterns = [_compiled(pattern) for pattern in _names(getattr(rule, side))]
        matches = (match for name in names for p in patterns if (match := p.fullmatch(name)))
        groups = dict.fromkeys(tuple(match.groupdict().items()) for match in matches)
        found += [_Match(rule, dict(one)) for one in groups]
    return found


@dataclass(frozen=True)
class Layout:
    """One library's names for one architecture."""

    name: str
    rules: tuple[Rule, ...]
    prefix: str = ""  # written, and read where it is there
    dropped: tuple[str, ...] = ()  # shell patterns
    aliases: tuple[tuple[str, str], ...] = ()  # regular expressions of other spellings, and what stands in the rules
    made: dict[str, Callable[[dict], Tensor]] = field(default_factory=dict)  # what they have and we do not, from ours
    without_bias: tuple[str, ...] = ()  # of ours, layers whose bias they do not have: it is zero
    needs: tuple[str, ...] = (*TOKENS, *BIASES)  # of ours, what no model of theirs is without
    first: Callable[[dict], dict] | None = None  # of theirs, before the rules
    last: Callable[[dict], dict] | None = None  # of ours that are to be written, before the rules

    def spelled(self, names: Iterable[str]) -> dict[str, str]:
        """Each name as the rules spell it, with their own before it."""
        unwrapped = {name: uncompiled(name).removeprefix("module.") for name in names}
        prefixed = bool(self.prefix) and any(name.startswith(self.prefix) for name in unwrapped.values())
        outside = [_compiled(p[1:]) for rule in self.rules for p in _names(rule.theirs) if p.startswith("/")]
        found: dict[str, str] = {}
        for name, plain in unwrapped.items():
            spelled = plain.removeprefix(self.prefix)
            for pattern, replacement in self.aliases:
                spelled = re.sub(pattern, replacement, spelled)
            if (prefixed and not plain.startswith(self.prefix)) or any(p.fullmatch(plain) for p in outside):
                spelled = f"/{plain}"
            if spelled in found:
                raise ValueError(f"the weights: {found[spelled]} and {name} are names of the same tensor")
            found[spelled] = name
        return found

    def cover(self, names: Iterable[str]) -> tuple[list[_Match], Coverage]:
        """Which rules apply to a library's names, and what becomes of each."""
        spelled = self.spelled(names)
        matches = _matches(self.rules, "theirs", spelled)
        used = {name for match in matches for name in match.names("theirs")}
        missing = [name for name in sorted(used) if name not in spelled]
        whole = [match for match in matches if all(name in spelled for name in match.names("theirs"))]
        rest = [name for name in spelled if name not in used]
        unread = {name for name in rest if matches_any(name, self.dropped)}
        left_over = [spelled[name] for name in rest if name not in unread]
        missing += _gaps({name for match in whole for name in match.names("ours")}, self.needs)
        dropped = [spelled[name] for name in rest if name in unread]
        return whole, Coverage(self.name, len(spelled) - len(rest), dropped, left_over, missing)

    def to_ours(self, theirs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Coverage]:
        """The tensors under our names, and what became of each."""
        matches, coverage = self.cover(theirs)
        state = {spelled: theirs[name] for spelled, name in self.spelled(theirs).items()}
        if self.first and not coverage.missing:
            state = self.first(state)
        found: dict[str, Tensor] = {}
        for match in matches:
            parts = [match.rule.way.to_ours(state[name], 0) for name in match.names("theirs")]
            placed = _spread(parts, match.names("ours"), match.rule.shares)
            if twice := found.keys() & placed.keys():
                raise ValueError(f"the weights: {min(twice)} is there twice, by two of {self.name}'s names")
            found |= placed
        for layer in self.without_bias:
            # Before a norm of the tokens our patches have no bias either.
            if layer == "patch_embed.proj" and "norm_pre.weight" in found:
                continue
            if (weight := found.get(f"{layer}.weight")) is not None:
                found.setdefault(f"{layer}.bias", weight.new_zeros(len(weight)))
        return found, coverage

    def to_theirs(self, ours: Mapping[str, Tensor], heads: int) -> tuple[dict[str, Tensor], Coverage]:
        """The tensors under their names, and what became of each of ours."""
        state = self.last(dict(ours)) if self.last else dict(ours)
        found, missing = {}, _gaps(set(state), self.needs)
        biases = [f"{layer}.bias" for layer in self.without_bias]
        used = {name for name in biases if name in state and not state[name].any()}
        for match in _matches((rule for rule in self.rules if not rule.only_read), "ours", state):
            names = match.names("ours")
            lacking = [name for name in names if name not in state]
            used |= set(names)
            missing += lacking
            if not lacking:
                targets = [self._written(name) for name in match.names("theirs")]
                for name, part in _spread([state[name] for name in names], targets, ()).items():
                    found[name] = match.rule.way.to_theirs(part, heads).contiguous()
        found |= {self._written(name): make(state) for name, make in self.made.items()}
        return found, Coverage(self.name, len(used), [], [name for name in state if name not in used], missing)

    def _written(self, name: str) -> str:
        return name[1:] if name.startswith("/") else self.prefix + name


def _spread(parts: list[Tensor], names: list[str], shares: tuple[int, ...]) -> dict[str, Tensor]:
    """Tensors joined along the first axis, and cut again into as many as there are names."""
    if len(parts) == len(names) == 1:
        return {names[0]: parts[0]}
    whole = torch.cat(parts)
    shares = shares or (1,) * len(names)
    sizes = [len(whole) * share // sum(shares) for share in shares]
    return {name: part.contiguous() for name, part in zip(names, whole.split(sizes))}


# What every block of every layout has.
_OF_A_BLOCK = (
    *("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.proj.weight"),
    *("norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc2.weight"),
)


def _gaps(ours: set[str], needs: tuple[str, ...]) -> list[str]:
    """Names that a model cannot be without, and those that other blocks have and one has not."""
    blocks: dict[int, set[str]] = {}
    for name in ours:
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            blocks.setdefault(int(match[1]), set()).add(match[2])
    of_a_block = {name.removeprefix("blocks.{i}.") for name in needs if name.startswith("blocks.{i}.")}
    every = of_a_block.union(_OF_A_BLOCK, *blocks.values())
    depth = min(max(blocks, default=0), len(ours)) + 1  # a name may have any number: fewer blocks than names are whole
    gaps = [f"blocks.{i}.{name}" for i in range(depth) for name in sorted(every - blocks.get(i, set()))]
    norm = "fc_norm" if "fc_norm.weight" in ours or "fc_norm.bias" in ours else "norm"
    outside = (name for name in needs if not name.startswith("blocks."))
    needed = ("patch_embed.proj.weight", *outside, f"{norm}.weight", f"{norm}.bias")
    heads = [f"{head}.weight" for head in ("head", "head_dist") if f"{head}.bias" in ours]
    return gaps + [name for name in (*needed, *heads) if name not in ours]


def fold_class_position(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Beside registers timm gives prefix tokens no position: that of the class token is added to the token itself.

    `with_positions_of` gives it one of zero again.
    """
    position = state["pos_embed"]
    return {**state, "cls_token": state["cls_token"] + position[:, :1], "pos_embed": position[:, 1:].contiguous()}


def with_positions_of(*tokens: str) -> Callable[[dict], dict]:
    """A step before writing: these tokens get a position of zero where ours have none, which a square number tells.

    It refuses registers with positions of their own where they are not among these tokens: theirs have none.
    """

    def step(state: dict[str, Tensor]) -> dict[str, Tensor]:
        position = state.get("pos_embed")
        count = sum(state[name].shape[1] for name in tokens if name in state)
        if position is not None and "reg_token" in state and "reg_token" not in tokens:
            if not _is_square(position.shape[1]):
                raise ValueError(
                    f"pos_embed: got {position.shape[1]} positions beside registers, takes a square number, of patches "
                    "alone: the library has no positions for registers"
                )
        if position is None or not count or not _is_square(position.shape[1]) or _is_square(position.shape[1] - count):
            return state
        without = ", ".join(tokens)
        log.warning(f"pos_embed: {position.shape[1]} positions are read as a square of patches, none for {without}")
        return {**state, "pos_embed": torch.cat([torch.zeros_like(position[:, :count]), position], dim=1)}

    return step


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def zero_token(ours: Mapping[str, Tensor]) -> Tensor:
    """What stands for a masked patch, [1, D]: no inference reads it, and our models have none."""
    weight = ours["patch_embed.proj.weight"]
    return weight.new_zeros(1, len(weight))


def is_gated(ours: Mapping[str, Tensor]) -> bool:
    """Whether the MLP of these weights has gates: fc1 then makes twice what fc2 reads."""
    fc1, fc2 = ours.get("blocks.0.mlp.fc1.weight"), ours.get("blocks.0.mlp.fc2.weight")
    return fc1 is not None and fc2 is not None and len(fc1) == 2 * fc2.shape[1]
