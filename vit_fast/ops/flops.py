"""The operations of each op, for PyTorch's FlopCounterMode: those of its products alone, two a multiply-add.

They are what the same call counts in PyTorch on a GPU, forward and backward, and not what one kernel happens to do:
attention's backward is counted as PyTorch counts flash attention's, five products over all pairs of a query and a key
(the scores once more, and four for the gradients), though above 272 tokens two kernels compute seven; of windows, which
PyTorch's backend multiplies in plain products, it is four, though the kernel computes the scores again. Three differ:

- The backward of an op makes, and counts, every gradient, also where PyTorch would leave out that of an input or a
  weight which needs none.
- `attention_maps` without `lse` runs `attention_train` first: three products where PyTorch has one.
- On a CPU PyTorch's counter has no formula for PyTorch's own attention, and counts it as nothing.

The counter hooks every module, and a block with hooks calls its modules one by one: of our ops it meets attention, and
says what each module does. Called by itself, `block` counts the same.

A counter that is no dispatch mode does not see these formulas. timm's benchmark.py takes deepspeed's or fvcore's where
one is installed. Both hook modules too; fvcore then counts all but attention, fused in either backend and unknown to
it, as in timm's own models; where each block has `attn.fused_attn = False` it counts that too. deepspeed's replaces
functions of torch.nn.functional, which attention calls inside `use_backend("torch")` alone.
"""

import math
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType

import torch

from vit_fast.ops.block import KEPT

COUNTER = "torch.utils.flop_counter"


def _linear(x, *weights) -> int:
    """Every row of x, or of what a layer makes of it, meets every element of the weights once."""
    return sum(2 * math.prod(x[:-1]) * math.prod(weight) for weight in weights)


def _attention(products: int, q, k) -> int:
    batch, queries, heads, width = q
    return products * 2 * batch * heads * queries * k[1] * width


def _packed(products: int, qkv) -> int:
    q = *qkv[:2], *qkv[3:]
    return _attention(products, q, q)


def _windows(products: int, qkv, window) -> int:
    """Each token meets those of its window."""
    batch, rows, columns, _, heads, width = qkv
    tokens = math.prod(window)
    return _attention(products, (batch * rows * columns // tokens, tokens, heads, width), (None, tokens))


def _patch_embed(images, weight) -> int:
    """Every value of an image meets each feature once: no patch overlaps another."""
    return 2 * math.prod(images) * weight[0]


def _block(directions: int, scores: int, x, parameters) -> int:
    """Of the products with a weight so many, and of those over pairs of tokens so many."""
    batch, tokens, width = x
    weights = (parameters[index] for index in (2, 4, 10, 12))
    return directions * _linear(x, *weights) + _attention(scores, (batch, tokens, 1, width), x)


# Each takes the operands in the order of the op's schema, shapes in place of tensors. Backward makes the gradient of
# what a product reads, and that of its weight where a parameter is trained, which the last or last but one says.
FORMULAS = {
    "patch_embed": lambda images, weight, *_: _patch_embed(images, weight),
    "patch_embed_backward": lambda dtokens, images, weight, *_: 0 if images is None else _patch_embed(images, weight),
    "ln_linear": lambda x, g, c, weight, *_: _linear(x, weight),
    "ln_linear_backward": lambda dy, x, mean, rstd, g, c, weight, b, trained: (1 + trained) * _linear(x, weight),
    "attention": lambda q, k, *_: _attention(2, q, k),
    "attention_train": lambda q, k, *_: _attention(2, q, k),
    "attention_backward": lambda do, q, k, *_: _attention(5, q, k),
    "attention_qkv_train": lambda qkv, *_: _packed(2, qkv),
    "attention_qkv_backward": lambda do, qkv, *_: _packed(5, qkv),
    "attention_maps": lambda q, k, *_: _attention(1, q, k),
    "rope_attention": lambda qkv, *_: _packed(2, qkv),
    "rope_attention_train": lambda qkv, *_: _packed(2, qkv),
    "rope_attention_backward": lambda do, qkv, *_: _packed(5, qkv),
    "window_attention": lambda qkv, table, window, *_: _windows(2, qkv, window),
    "window_attention_backward": lambda do, qkv, table, window, *_: _windows(4, qkv, window),
    "linear_residual": lambda x, weight, *_: _linear(x, weight),
    "linear_residual_backward": lambda dy, x, weight, *others: (1 + others[-1]) * _linear(x, weight),
    "mlp": lambda x, g, c, w1, b1, w2, *_: _linear(x, w1, w2),
    "mlp_train": lambda x, g, c, w1, b1, w2, *_: _linear(x, w1, w2),
    "mlp_backward": lambda dy, x, *others: (1 + others[-2]) * _linear(x, others[5], others[7]),
    "swiglu": lambda x, g, c, w1, b1, w2, *_: _linear(x, w1, w2),
    "swiglu_train": lambda x, g, c, w1, b1, w2, *_: _linear(x, w1, w2),
    "swiglu_backward": lambda dy, x, *others: (1 + others[-1]) * _linear(x, others[5], others[7]),
    "block": lambda x, *parameters: _block(1, 2, x, parameters),
    "block_train": lambda x, *parameters: _block(1, 2, x, parameters),
    "block_backward": lambda dy, x, *others: _block(1 + others[-1], 5, x, others[KEPT:]),
}


def _enter(counter: ModuleType) -> None:
    """The formulas into PyTorch's registry."""
    for name, formula in FORMULAS.items():

        def count(*shapes, formula=formula, out_shape=None) -> int:
            return formula(*shapes)

        counter.register_flop_formula(getattr(torch.ops.vit_fast, name))(count)


class _Enter(MetaPathFinder):
    """Finds PyTorch's counter as the others do, and has the formulas entered once it is loaded."""

    def find_spec(self, name, path, target=None):
        if name != COUNTER:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec and spec.loader:
            load = spec.loader.exec_module

            def load_and_enter(module: ModuleType) -> None:
                load(module)
                _enter(module)

            vars(spec.loader)["exec_module"] = load_and_enter
        return spec


def register() -> None:
    """Enter the formulas where PyTorch's counter is loaded; elsewhere have it done when somebody imports it.

    It imports triton, which would take longer than all of `import vit_fast`; and a FlopCounterMode copies the registry
    when it is made, so that the first call of an op would be too late.
    """
    if COUNTER in sys.modules:
        _enter(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _Enter())
