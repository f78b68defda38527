import pytest
import torch

from tests import unfused
from tests.ops.harness import BACKENDS, MODES, Case, hold_to_the_rule, named
from vit_fast import reference
from vit_fast.ops import block


def shaped(batch: int, tokens: int, width: int, hidden: int, full: bool = True):
    """Operands of a block; `full` for every bias, LayerScale and drop path."""

    def normal(*size):
        return torch.randn(size, dtype=torch.float64)

    def kept():
        return torch.tensor([0.0, 1.25] * batch, dtype=torch.float64)[:batch][torch.randperm(batch)]

    def draw():
        return {
            "x": normal(batch, tokens, width),
            "norm1_weight": 0.5 + 0.3 * normal(width),
            "norm1_bias": 0.5 + 0.3 * normal(width),
            "qkv_weight": normal(3 * width, width) / width**0.5,
            "qkv_bias": normal(3 * width) if full else None,
            "proj_weight": normal(width, width) / width**0.5,
            "proj_bias": normal(width) if full else None,
            "layer_scale1": 0.5 + 0.3 * normal(width) if full else None,
            "drop1": kept() if full else None,
            "norm2_weight": 0.5 + 0.3 * normal(width),
            "norm2_bias": 0.5 + 0.3 * normal(width),
            "fc1_weight": 2 * normal(hidden, width) / width**0.5,
            "fc1_bias": normal(hidden) if full else None,
            "fc2_weight": normal(width, hidden) / hidden**0.5,
            "fc2_bias": normal(width) if full else None,
            "layer_scale2": 0.5 + 0.3 * normal(width) if full else None,
            "drop2": kept() if full else None,
        }

    return draw


def case(why: str, draw, num_heads: int, activation: str = "gelu") -> Case:
    settings = {"num_heads": num_heads, "activation": activation, "eps1": 1e-6, "eps2": 1e-5}
    return Case(why, draw, settings, constant=("drop1", "drop2"))


CASES = [
    case("every operand", shaped(3, 17, 64, 96), 2),
    case("nothing but the products", shaped(2, 9, 48, 80, full=False), 3, "gelu_tanh"),
    # One token alone would have queries and keys whose gradient is zero, which the error rule cannot be asked about.
    case("two tokens", shaped(4, 2, 32, 40), 2, "quick_gelu"),
]


def composed(module):
    """A block of the four ops of a module, the reference's or the unfused ones'."""

    def run(x, num_heads, activation, eps1, eps2, **p):
        qkv = module.ln_linear(x, p["norm1_weight"], p["norm1_bias"], p["qkv_weight"], p["qkv_bias"], eps1)
        heads = module.attention(*qkv.view(*x.shape[:-1], 3, num_heads, -1).unbind(2))
        end = (p["layer_scale1"], p["drop1"])
        x = module.linear_residual(heads, p["proj_weight"], p["proj_bias"], x, *end)
        names = ("norm2_weight", "norm2_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
        return module.mlp(x, *(p[name] for name in names), p["layer_scale2"], p["drop2"], activation, eps2)

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", named(CASES))
def test_output_and_gradients(case, mode, backend, guarded_memory):
    hold_to_the_rule(block, composed(reference), composed(unfused), case, mode, backend)
