"""torch.compile and torch.export of every op."""

import operator

import pytest
import torch
from torch import nn

from tests.ops import (
    test_block,
    test_linear_residual,
    test_ln_linear,
    test_mlp,
    test_patch_embed,
    test_rope_attention,
    test_swiglu,
    test_window_attention,
)
from tests.ops.harness import BACKENDS, Case, rounded
from vit_fast import ops

SMALL = {
    "ln_linear": Case("small", test_ln_linear.shaped(2, 5, 16, features=32), {"eps": 1e-6}),
    "linear_residual": test_linear_residual.case("small", test_linear_residual.shaped(2, 5, 16, features=16)),
    "mlp": test_mlp.case("small", test_mlp.shaped(2, 5, 16, hidden=32)),
    "swiglu": test_swiglu.case("small", test_swiglu.shaped(2, 5, 16, hidden=16)),
    "block": test_block.case("small", test_block.shaped(2, 5, 32, 16), 2),
    "patch_embed": test_patch_embed.case("small", test_patch_embed.shaped(2, 3, (2, 2), 4, 16)),
    "patch_embed of bytes": test_patch_embed.bytes_case("small", 2, 3, (2, 2), 4, 16),
    "attention": Case("small", lambda: {name: torch.randn(2, 5, 2, 16) for name in "qkv"}),
    "attention_qkv": Case("small", lambda: {"qkv": torch.randn(2, 5, 3, 2, 16)}),
    "rope_attention": test_rope_attention.case("small", 2, 5, 2, 16, 4),
    "window_attention": test_window_attention.case("small", 2, 2, 6, 2, 16, window=(2, 3), shift=(1, 1)),
}


def _function(op: str):
    return getattr(ops, op.split()[0])


def _arguments(op: str) -> tuple[dict, list]:
    case = SMALL[op]
    args = {name: rounded(t, torch.float32) for name, t in case.draw().items()}
    return args, [t.requires_grad_() for name, t in args.items() if name not in case.constant]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", SMALL)
def test_compiled_without_a_graph_break(op, backend):
    """Forward and every gradient of the compiled op are those of the eager one."""
    args, wanted = _arguments(op)
    function = _function(op)

    def call(**args):
        return function(**args, **SMALL[op].options)

    with ops.use_backend(backend):
        expected = call(**args)
        upstream = torch.randn(expected.shape)
        expected_grads = torch.autograd.grad(expected, wanted, upstream)
        torch.compiler.reset()
        output = torch.compile(call, fullgraph=True, backend="aot_eager")(**args)
        grads = torch.autograd.grad(output, wanted, upstream)
    for got, want in zip((output, *grads), (expected, *expected_grads)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


class _Module(nn.Module):
    def __init__(self, op: str):
        super().__init__()
        self.op = op

    def forward(self, args: dict):
        return _function(self.op)(**args, **SMALL[self.op].options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", SMALL)
def test_exported_graph_holds_pytorchs_ops(op, backend):
    """Whatever the backend: an exported model runs where vit_fast is not installed."""
    args, _ = _arguments(op)
    args = {name: t.detach() for name, t in args.items()}
    with ops.use_backend(backend):
        program = torch.export.export(_Module(op), (args,))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    foreign = [target for target in calls if not str(target).startswith("aten.") and target is not operator.getitem]
    assert calls
    assert not foreign
    torch.testing.assert_close(program.module()(args), _Module(op)(args), rtol=1e-5, atol=1e-5)
