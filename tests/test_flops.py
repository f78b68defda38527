"""PyTorch's counter of operations counts a call the same whichever backend runs it."""

import subprocess
import sys

import pytest
import torch
from torch._library.custom_ops import OPDEFS

pytest.importorskip("triton", reason="PyTorch's counter is used with it")

from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import vit_fast
from benchmarks.predictions import forward_flops
from tests.ops import (
    test_attention,
    test_block,
    test_linear_residual,
    test_ln_linear,
    test_mlp,
    test_patch_embed,
    test_rope_attention,
    test_swiglu,
    test_window_attention,
)
from tests.ops.harness import Case, run
from vit_fast import ops
from vit_fast.ops import backend
from vit_fast.ops.flops import FORMULAS

# What a CPU's attention counts: PyTorch has these formulas for its kernels on a GPU alone.
ON_A_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda dy, q, k, v, *_, **__: (
        sdpa_backward_flop_count(dy, q, k, v)
    ),
}
BARE = {"bias": False, "layer_scale": False, "drop": False}
CALLS = {
    "patch_embed": (ops.patch_embed, test_patch_embed.shaped(2, 3, (2, 3), 4, 20), {}),
    "patch_embed, bare": (
        ops.patch_embed,
        test_patch_embed.shaped(2, 3, (2, 3), (4, 2), 20, prefix=0, position=None, bias=False),
        {},
    ),
    "ln_linear": (ops.ln_linear, test_ln_linear.shaped(2, 5, 24, features=40), {}),
    "ln_linear, bare": (ops.ln_linear, test_ln_linear.shaped(2, 3, 5, 24, features=40, bias=False), {}),
    "attention": (ops.attention, test_attention.shaped(2, 5, 3, 16, keys=7), {}),
    "attention_qkv": (ops.attention_qkv, test_attention.shaped_qkv(2, 7, 3, 16), {}),
    "rope_attention": (ops.rope_attention, test_rope_attention.shaped(2, 7, 3, 16, 5), {}),
    "window_attention": (
        *(ops.window_attention, test_window_attention.shaped(2, 4, 6, 3, 16, (2, 3))),
        {"window": (2, 3), "shift": (1, 0)},
    ),
    "linear_residual": (ops.linear_residual, test_linear_residual.shaped(2, 5, 24, features=40), {}),
    "linear_residual, bare": (ops.linear_residual, test_linear_residual.shaped(2, 5, 24, features=40, **BARE), {}),
    "mlp": (ops.mlp, test_mlp.shaped(2, 5, 24, hidden=40), {}),
    "mlp, bare": (ops.mlp, test_mlp.shaped(2, 5, 24, hidden=40, **BARE), {}),
    "swiglu": (ops.swiglu, test_swiglu.shaped(2, 5, 24, hidden=20), {}),
    "swiglu, bare": (ops.swiglu, test_swiglu.shaped(2, 5, 24, hidden=20, **BARE), {}),
    "block": (ops.block, test_block.shaped(2, 5, 32, 40), {"num_heads": 2}),
    "block, bare": (ops.block, test_block.shaped(2, 5, 32, 40, full=False), {"num_heads": 2}),
}


def counted(chosen: str, call, module: str = "Global") -> dict[str, int]:
    """Operations of a call, or of the part of it that a module does, by the name of the op that does them."""
    with ops.use_backend(chosen), FlopCounterMode(display=False, custom_mapping=ON_A_CPU) as counter:
        call()
    return {str(op): count for op, count in counter.get_flop_counts().get(module, {}).items()}


def assert_counts_the_same(call, *names: str) -> None:
    """Ours count as much as PyTorch's, under the names of the ops that ran."""
    expected, found = (counted(chosen, call) for chosen in ("torch", "triton"))
    assert sum(found.values()) == sum(expected.values()) > 0, (found, expected)
    assert found.keys() == {f"vit_fast.{name}" for name in names}


def test_every_op_has_a_formula():
    assert {f"vit_fast::{name}" for name in FORMULAS} == {name for name in OPDEFS if name.startswith("vit_fast::")}
    assert all(getattr(torch.ops.vit_fast, name) in flop_registry for name in FORMULAS)


@pytest.mark.parametrize(
    "code",
    [
        "import vit_fast; import torch.utils.flop_counter as counter",
        "import torch.utils.flop_counter as counter; import vit_fast",
        "import vit_fast, importlib.util; importlib.util.find_spec('torch.utils.flop_counter'); "
        "import torch.utils.flop_counter as counter",
        "import vit_fast, importlib; import torch.utils.flop_counter as counter; importlib.reload(counter)",
    ],
    ids=["ours first", "the counter first", "looked for and not imported", "imported twice"],
)
def test_the_formulas_are_there_in_any_order_of_imports(code):
    code = f"import torch; {code}; assert torch.ops.vit_fast.block in counter.flop_registry"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.interpret
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_an_op_counts_as_pytorch(name, trained):
    op, draw, options = CALLS[name]
    tensors = {name: None if t is None else t.float() for name, t in draw().items()}
    stem = name.partition(",")[0]

    def inference():
        with torch.no_grad():
            return op(**tensors, **options)

    upstream = torch.randn_like(inference())
    parameters = [one for one in tensors if one not in ("x", "q", "k", "v", "qkv", "residual")]
    if stem == "patch_embed":  # no kernel makes an image's gradient: without the weight's there is no product
        parameters = ["weight"]
    frozen = () if trained or name == "patch_embed, bare" else parameters
    case = Case(name, draw, options, constant=("drop", "drop1", "drop2", "images", "cos", "sin", *frozen))
    assert_counts_the_same(inference, {"attention_qkv": "attention"}.get(stem, stem))
    forward = f"{stem}_train" if f"{stem}_train" in FORMULAS else stem
    assert_counts_the_same(lambda: run(op, tensors, case, upstream), forward, f"{stem}_backward")


@pytest.mark.interpret
def test_attention_maps_count_as_pytorch_where_lse_is_at_hand():
    q, k, _ = (t.float() for t in test_attention.shaped(2, 5, 3, 16, keys=7)().values())
    lse = torch.ops.vit_fast.attention_train(q, k, k, 0.25)[1]
    assert_counts_the_same(lambda: ops.attention_maps(q, k, lse=lse), "attention_maps")
    ours, theirs = (sum(counted(chosen, lambda: ops.attention_maps(q, k)).values()) for chosen in ("triton", "torch"))
    assert ours == 3 * theirs, "the kernels make lse first, by a forward pass of attention"


@pytest.mark.interpret
@pytest.mark.parametrize("options", [{}, {"init_values": 0.1, "drop_path_rate": 0.5, "qkv_bias": False}])
def test_a_model_counts_as_pytorch(options):
    """The counter hooks every module, and so a block runs them one by one: attention is what it has of our ops."""
    sizes = {"embed_dim": 32, "num_heads": 2, "depth": 2, "img_size": 32, "num_classes": 5}
    model = vit_fast.create_model("vit_base_patch16_224", **sizes, **options)
    images = torch.randn(2, 3, 32, 32)

    def inference():
        with torch.no_grad():
            model.eval()(images)

    def step():
        model.train()(images).square().sum().backward()

    for call in (inference, step):
        for module in ("Global", "VisionTransformer.blocks.1", "VisionTransformer.blocks.1.attn"):
            expected, found = (counted(chosen, call, module) for chosen in ("torch", "triton"))
            assert sum(found.values()) == sum(expected.values()) > 0, (found, expected)
            assert any(name.startswith("vit_fast.attention") for name in found)


def test_the_operations_of_a_published_model(monkeypatch):
    """Counted on tensors without memory, where no kernel runs."""
    monkeypatch.setattr(backend, "_why_not_forced", lambda device: "")
    with torch.device("meta"):
        model = vit_fast.create_model("vit_base_patch16_224", num_classes=1000).eval()
        images = torch.empty(2, 3, 224, 224)
    with torch.no_grad():
        found = counted("triton", lambda: model(images))
    assert found["vit_fast.attention"] == 2 * 12 * 2 * 2 * 197 * 197 * 768, "two images, twelve blocks, two products"
    assert sum(found.values()) == 2 * forward_flops("vit_base_patch16_224")
