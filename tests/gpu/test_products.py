"""The ops of the products on a device: the cases of tests/ops, and sizes that cross the device's own tiles."""

import pytest
import torch

import vit_fast
from tests import unfused
from tests.error_rule import relative_error
from tests.ops import test_linear_residual, test_ln_linear, test_mlp, test_patch_embed, test_swiglu
from tests.ops.harness import MODES, Case, assert_views_are_read, hold_to_the_rule, three_ways
from vit_fast import reference

EPS = {"eps": 1e-6}
SIZED = {
    "ln_linear": [
        Case("ViT-S at two images", test_ln_linear.shaped(2, 197, 384, features=1152), EPS),
        Case("one row past a tile", test_ln_linear.shaped(1, 257, 129, features=257), EPS),
        Case("more rows of tiles than a group has", test_ln_linear.shaped(1, 1200, 64, features=260), EPS),
        Case("rows of large mean", test_ln_linear.shaped(2, 197, 384, features=384, mean=30.0), EPS),
    ],
    "linear_residual": [
        test_linear_residual.case("ViT-S at two images", test_linear_residual.shaped(2, 197, 384, features=384)),
        test_linear_residual.case("one row past a tile", test_linear_residual.shaped(1, 257, 129, features=257)),
    ],
    "mlp": [
        test_mlp.case("ViT-S at two images", test_mlp.shaped(2, 197, 384, hidden=1536)),
        test_mlp.case("one row past a tile", test_mlp.shaped(1, 257, 129, hidden=257), "gelu_tanh"),
    ],
    "swiglu": [
        test_swiglu.case("DINOv2's giant, half as wide, at two images", test_swiglu.shaped(2, 257, 768, hidden=2048)),
        test_swiglu.case("one row past a tile", test_swiglu.shaped(1, 257, 129, hidden=131)),
    ],
    "patch_embed": [
        test_patch_embed.case("ViT-S at two images", test_patch_embed.shaped(2, 3, (14, 14), 16, 384)),
        test_patch_embed.case("patch 14 at 224", test_patch_embed.shaped(2, 3, (16, 16), 14, 129, prefix=5)),
        test_patch_embed.bytes_case("bytes of ViT-S at two images", 2, 3, (14, 14), 16, 384),
        test_patch_embed.bytes_case("bytes in patches of 14 at 224", 2, 3, (16, 16), 14, 129, prefix=5),
    ],
}
SMALL = {
    "ln_linear": test_ln_linear.CASES,
    "linear_residual": test_linear_residual.CASES,
    "mlp": test_mlp.CASES,
    "swiglu": test_swiglu.CASES,
    "patch_embed": test_patch_embed.CASES,
}
ALL = [pytest.param(op, case, id=f"{op}-{case}") for op in SMALL for case in SMALL[op] + SIZED[op]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("op", "case"), ALL)
def test_output_and_gradients(op, case, mode):
    ours, truth, peer = (getattr(module, op) for module in (vit_fast.ops, reference, unfused))
    hold_to_the_rule(ours, truth, peer, case, mode, "triton", "cuda")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [129, 768])
def test_hard_rows(width, mode):
    drawn = test_ln_linear.shaped(2, 20, width, features=40)
    eps = {"eps": test_ln_linear.hard_eps(mode)}
    case = Case("hard rows", lambda: drawn() | {"x": test_ln_linear.hard_rows(width)}, eps)
    ours, truth, peer = (module.ln_linear for module in (vit_fast.ops, reference, unfused))
    test_ln_linear.hold_each_kind_to_the_rule(ours, truth, peer, case, mode, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [70, 129, 768, 1152])
def test_the_norm_of_equal_elements_is_zero(width, dtype):
    """To the bit, with next to no eps: a mean that is off by one unit in the last place would come out as one."""
    x = torch.tensor([0.0, 3.7, -1e4, 1e4 / 3, 0.1], device="cuda", dtype=dtype)[:, None].expand(5, width)[None]
    norm_weight, zeros = torch.ones(width, device="cuda", dtype=dtype), torch.zeros(width, device="cuda", dtype=dtype)
    y = vit_fast.ops.ln_linear(x, norm_weight, zeros, torch.eye(width, device="cuda", dtype=dtype), None, 1e-12)
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("op", SMALL)
def test_tf32_where_the_user_says_so(op):
    """tf32 keeps ten bits of an operand. wgmma cuts off the rest where cuBLAS rounds, so that each operand is off by up
    to 2^-10, one-sided, and the error is two to four times that of cuBLAS: four such products in a row stay under 2^-8,
    and none of them comes near to fp32. To round the operands first would take a pass over each."""
    ours, truth, peer = (getattr(module, op) for module in (vit_fast.ops, reference, unfused))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        got, _, exact = three_ways(ours, truth, peer, SIZED[op][0], "fp32", "triton", "cuda")
    finally:
        torch.set_float32_matmul_precision(before)
    errors = {name: relative_error(got[name].cpu(), exact[name]) for name in exact}
    assert max(errors.values()) < 2**-8, errors
    assert errors["output"] > 2**-16, "tf32 was allowed and not taken"


@pytest.mark.parametrize("op", SMALL)
def test_views(op):
    case = SMALL[op][5 if op == "patch_embed" else 1]
    assert_views_are_read(getattr(vit_fast.ops, op), case, "triton", "cuda")


@pytest.mark.parametrize("patch", [14, 16])
def test_bytes_of_any_strides(patch):
    """Loads of sixteen bytes, of two and of one: to the bit those of a copy, every byte among them."""
    case = test_patch_embed.bytes_case("bytes", 4, 3, (3, 3), patch, 64)
    given = {name: t.to("cuda", torch.bfloat16) for name, t in case.draw().items()}
    decoded = torch.arange(4 * 56 * 56 * 3, device="cuda").to(torch.uint8).view(4, 56, 56, 3).permute(0, 3, 1, 2)
    side, expected = 3 * patch, []
    for images in (decoded[:, :, :side, :side], decoded[:, :, 3 : 3 + side, 5 : 5 + side], decoded[:1, :1]):
        images = images[..., :side, :side].expand(4, 3, side, side)
        for view in (images, images.contiguous()):
            given["images"] = view
            expected.append(vit_fast.ops.patch_embed(**given, **case.options))
    assert all(torch.equal(one, other) for one, other in zip(expected[::2], expected[1::2]))


@pytest.mark.parametrize("op", SMALL)
def test_two_runs_give_the_same_bits(op):
    """No atomics anywhere: gradients do not depend on the order in which programs finish."""
    case = SIZED[op][0]
    args = {name: None if t is None else t.to("cuda", torch.bfloat16) for name, t in case.draw().items()}
    wanted = [t.requires_grad_() for name, t in args.items() if t is not None and name not in case.constant]
    function = getattr(vit_fast.ops, op)
    runs = []
    for _ in range(2):
        y = function(**args, **case.options)
        runs.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_autocast_casts_a_weight_once():
    """Inside one autocast region the second call finds the weight in autocast's cache."""
    from vit_fast.ops.backend import cast

    weight = torch.randn(32, 32, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        first, second = cast(weight, torch.bfloat16), cast(weight, torch.bfloat16)
    assert first.dtype == torch.bfloat16
    assert first.data_ptr() == second.data_ptr()
    first.float().sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
