"""opcheck of the ops that make gradients, on contiguous and on strided operands; how they split sums over tokens."""

import pytest
import torch

from tests import mend_interpreter, unfused
from tests.ops import test_block, test_linear_residual, test_ln_linear, test_mlp, test_patch_embed
from tests.ops.harness import MODES, hold_to_the_rule, rounded
from vit_fast import ops, reference

pytestmark = pytest.mark.interpret


def _floats(case: dict) -> list:
    return [None if t is None else t.float() for t in case.values()]


def _dy(*shape: int, strided: bool) -> torch.Tensor:
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2] if strided else torch.randn(shape)


@pytest.mark.parametrize(("trained", "strided"), [(True, False), (True, True), (False, False)])
def test_ln_linear_backward(trained, strided):
    x, *parameters = _floats(test_ln_linear.shaped(2, 3, 16, features=8)())
    args = _dy(2, 3, 8, strided=strided), x, torch.randn(6), torch.rand(6), *parameters, trained
    torch.library.opcheck(torch.ops.vit_fast.ln_linear_backward.default, args)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_linear_residual_backward(full, strided):
    drawn = test_linear_residual.shaped(2, 3, 16, features=8, bias=full, layer_scale=full, drop=full)()
    x, weight, bias, _, layer_scale, drop = _floats(drawn)
    args = _dy(2, 3, 8, strided=strided), x, weight, bias, layer_scale, drop, full or strided
    torch.library.opcheck(torch.ops.vit_fast.linear_residual_backward.default, args)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_mlp_backward(full, strided):
    x, *parameters = _floats(test_mlp.shaped(2, 3, 16, hidden=8, bias=full, layer_scale=full, drop=full)())
    kept = torch.randn(6, 8), torch.randn(6), torch.rand(6)
    args = _dy(2, 3, 16, strided=strided), x, *kept, *parameters, full or strided, "gelu"
    torch.library.opcheck(torch.ops.vit_fast.mlp_backward.default, args)


@pytest.mark.parametrize(("full", "strided"), [(True, False), (False, True), (False, False)])
def test_block_backward(full, strided):
    x, *parameters = _floats(test_block.shaped(2, 3, 32, 16, full=full)())
    _, *kept = torch.ops.vit_fast.block_train(x, *parameters, 2, "gelu", 1e-6, 1e-6)
    args = _dy(2, 3, 32, strided=strided), x, *kept, *parameters, 2, "gelu", full or strided
    torch.library.opcheck(torch.ops.vit_fast.block_backward.default, args)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
def test_patch_embed_backward(prefix, strided):
    operands = _floats(test_patch_embed.shaped(2, 3, (2, 2), 4, 16, prefix=prefix, bias=bool(prefix))())
    images, *others = operands
    args = _dy(2, prefix + 4, 16, strided=strided), images if prefix or strided else None, *others
    torch.library.opcheck(torch.ops.vit_fast.patch_embed_backward.default, args)


def test_patch_embed_backward_of_bytes():
    case = test_patch_embed.bytes_case("small", 2, 3, (2, 2), 4, 16)
    operands = [rounded(t, torch.float32) for t in case.draw().values()]
    args = _dy(2, 5, 16, strided=False), *operands, *case.options.values()
    torch.library.opcheck(torch.ops.vit_fast.patch_embed_backward.default, args)


@pytest.mark.parametrize("shape", [(20, 24), (36, 40)])
def test_the_cases_of_two_spans_have_two(shape):
    from vit_fast.kernels import linear, tile_table

    tile = tile_table.lookup("linear_weight_grad", torch.device("cpu"), torch.float32)
    splits, span = linear.split_tokens(linear.tiles(*shape, tile), 260, tile["BLOCK_K"], 3)
    assert splits == 2
    assert 0 < 260 - span <= span


@pytest.mark.parametrize("partial_tokens", [1, 750])
def test_spans_are_whole_steps_and_cover_the_tokens(partial_tokens, monkeypatch):
    from vit_fast.kernels import linear

    monkeypatch.setattr(linear, "PARTIAL_TOKENS", partial_tokens)
    linear.split_tokens.cache_clear()
    seen = set()
    for tiles in (1, 18, 100):
        for tokens in (1, 63, 256, 257, 5000, 50432):
            splits, span = linear.split_tokens(tiles, tokens, 64, 132)
            assert span % 64 == 0
            assert (splits - 1) * span < tokens <= splits * span
            assert splits == 1 or span >= 256
            seen.add(splits)
    assert len(seen) > 1


@pytest.mark.parametrize("mode", MODES)
def test_the_second_stage_in_the_tile_that_it_has_on_a_gpu(mode, monkeypatch, guarded_memory):
    """Of a weight that is wider than that tile; elsewhere the interpreter has another (tests/mend_interpreter.py)."""
    from vit_fast.kernels import linear

    monkeypatch.setattr(linear, "FINISH_TILE", mend_interpreter.FINISH_TILE)
    case = test_linear_residual.case("wide", test_linear_residual.shaped(2, 5, 1030, features=9))
    hold_to_the_rule(ops.linear_residual, reference.linear_residual, unfused.linear_residual, case, mode, "triton")
