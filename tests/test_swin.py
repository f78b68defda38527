"""accelerate on the blocks of Swin Transformers, whose attention stays in windows of a map."""

import copy
import functools
import json
import logging
import types

import pytest
import timm
import torch
import torchvision
import transformers as hf
from timm.models import swin_transformer as timm_swin
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import swin_transformer as torchvision_swin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface
from transformers.models.swin import modeling_swin

import vit_fast
from tests import matrix
from tests.conftest import INTERPRETING
from tests.error_rule import relative_error
from tests.small_runs import drawn
from tests.test_accelerate import doubled, hold_to_a_patch
from vit_fast import ops
from vit_fast.foreign import block as foreign_block
from vit_fast.foreign.block import Fused

# Maps of 8 x 8 and 4 x 4 tokens, so that windows of 4 are shifted in the first stage alone; heads of 16 and of 32.
SIZES = {"patch_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4, "num_classes": 5}
LIBRARIES = ("timm", "torchvision", "transformers")


def _drawn(model: nn.Module) -> nn.Module:
    """Every parameter drawn anew, the biases as large as scores are."""
    model = drawn(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("relative_position_bias_table"):
                parameter.normal_()
    return model


def _timm(**more) -> nn.Module:
    sizes = {"img_size": 32, "drop_path_rate": 0.0, **SIZES}
    return _drawn(timm.create_model("swin_tiny_patch4_window7_224", **{**sizes, **more}))


def _torchvision(drop_path_rate: float = 0.0, window_size=4, **more) -> nn.Module:
    window = [window_size] * 2 if isinstance(window_size, int) else list(window_size)
    sizes = {name: value if isinstance(value, int) else list(value) for name, value in {**SIZES, **more}.items()}
    return _drawn(
        torchvision.models.SwinTransformer(
            [4, 4],
            sizes["embed_dim"],
            sizes["depths"],
            sizes["num_heads"],
            window,
            stochastic_depth_prob=drop_path_rate,
            num_classes=5,
        )
    )


def _transformers(**more) -> nn.Module:
    sizes = {"image_size": 32, "num_labels": 5, "drop_path_rate": 0.0, **SIZES, **more}
    del sizes["num_classes"]
    return _drawn(hf.SwinForImageClassification(hf.SwinConfig(**sizes)))


NORM1 = {"timm": "norm1", "torchvision": "norm1", "transformers": "layernorm_before"}
BUILDS = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}


def _images(*sides: int) -> torch.Tensor:
    return torch.randn(2, 3, *(sides or (32, 32)))


def _blocks(model: nn.Module) -> list:
    """The blocks of a model, accelerated or not, in their order."""
    return [one for one in model.modules() if type(one).__name__ in ("SwinTransformerBlock", "SwinLayer")]


def _accelerated(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    vit_fast.accelerate(model, verify=False)
    return model


def _counting(monkeypatch) -> list[tuple]:
    """The calls of `ops.window_attention` from here on: the map, the windows and the shift of each."""
    calls, op = [], ops.window_attention

    def counted(qkv, table, window, shift, *rest):
        calls.append((tuple(qkv.shape[1:3]), tuple(window), tuple(shift)))
        return op(qkv, table, window, shift, *rest)

    monkeypatch.setattr(ops, "window_attention", counted)
    return calls


def _results(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Its output, and the gradients of all parameters and of the images, by one seed."""
    model.zero_grad()
    images = images.clone().requires_grad_()
    torch.manual_seed(1)
    output = matrix.flat(model(images))
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(2)))
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.detach(), {**found, "images": images.grad}


def _assert_alike(ours: nn.Module, theirs: nn.Module, images: torch.Tensor) -> None:
    (output, found), (expected, gradients) = _results(ours, images), _results(theirs, images)
    assert relative_error(output, expected) <= 1e-5
    _assert_equal_gradients(found, gradients)


def _assert_equal_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Each within a share of its own norm, or of the mean of all: some are zero but for rounding."""
    assert found.keys() == expected.keys()
    mean = torch.stack([gradient.norm() for gradient in expected.values()]).mean()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), mean), name


# ---- what it computes

SHIFTED, STILL = ((8, 8), (4, 4), (2, 2)), ((8, 8), (4, 4), (0, 0))
LAST = ((4, 4), (4, 4), (0, 0))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("training", [False, True])
def test_output_and_gradients(monkeypatch, library, training):
    model = BUILDS[library]().train(training)
    fast = _accelerated(model)
    calls = _counting(monkeypatch)
    _assert_alike(fast, model, _images())
    assert calls == [STILL, SHIFTED, LAST, LAST]


@pytest.mark.parametrize("library", LIBRARIES)
def test_drop_paths_are_drawn_as_the_library_draws(library):
    model = BUILDS[library](drop_path_rate=0.6).train()
    images = _images()
    _assert_alike(_accelerated(model), model, images)
    without = copy.deepcopy(model).eval()
    assert relative_error(_results(model, images)[0], _results(without, images)[0]) > 0.1


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRETING, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("library", LIBRARIES)
def test_on_the_kernels(monkeypatch, library):
    model = BUILDS[library](drop_path_rate=0.3).train()
    fast, images = _accelerated(model), _images()
    expected, their_gradients = _results(model, images)
    calls = _counting(monkeypatch)
    with vit_fast.use_backend("triton"):
        output, our_gradients = _results(fast, images)
    assert calls == [STILL, SHIFTED, LAST, LAST]
    assert relative_error(output, expected) <= matrix.OUTPUT
    matrix.assert_equal_gradients(our_gradients, their_gradients)


@pytest.mark.parametrize("library", LIBRARIES)
def test_autocast(library):
    """In bf16 no further from fp64 than twice the original, forward and backward."""
    model, images = BUILDS[library]().train(), _images()
    truth = _results(copy.deepcopy(model).double(), images.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = _results(_accelerated(model), images), _results(model, images)
    eps = torch.finfo(torch.bfloat16).eps / 8
    assert relative_error(ours[0], truth[0]) <= 2 * relative_error(theirs[0], truth[0]) + eps
    for name, gradient in truth[1].items():
        assert relative_error(ours[1][name], gradient) <= 2 * relative_error(theirs[1][name], gradient) + eps, name


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_model_in_bfloat16(library):
    model, images = BUILDS[library]().bfloat16(), _images().bfloat16()
    with torch.no_grad():
        truth = matrix.flat(copy.deepcopy(model).double()(images.double()))
        ours, theirs = matrix.flat(_accelerated(model)(images)), matrix.flat(model(images))
    assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth) + torch.finfo(torch.bfloat16).eps / 8


@pytest.mark.parametrize("change", ["shift", "table", "window"])
def test_an_error_is_seen(monkeypatch, change):
    """Of what the tests above hold: a shift, a table, windows that lie the other way."""
    model = _timm(img_size=(64, 32), window_size=(2, 4))
    fast, images = _accelerated(model), _images(64, 32)
    _assert_alike(fast, model, images)
    wrong = {
        "shift": lambda w: w._replace(shift=(0, 0)),
        "table": lambda w: w._replace(table=w.table.flip(0)),
        "window": lambda w: w._replace(size=w.size[::-1], shift=w.shift[::-1]),
    }[change]
    inside = foreign_block._in_windows
    monkeypatch.setattr(foreign_block, "_in_windows", lambda x, qkv, windows: inside(x, qkv, wrong(windows)))
    with pytest.raises(AssertionError):
        _assert_alike(fast, model, images)


# ---- maps


@pytest.mark.parametrize(
    ("more", "sides", "expected"),
    [
        ({"img_size": (64, 32)}, (64, 32), [((16, 8), (4, 4), (2, 2)), ((8, 4), (4, 4), (2, 0))]),
        ({"window_size": (2, 4)}, (32, 32), [((8, 8), (2, 4), (1, 2)), ((4, 4), (2, 4), (1, 0))]),
        ({"always_partition": True}, (32, 32), [SHIFTED, ((4, 4), (4, 4), (2, 2))]),
        ({"head_dim": 8}, (32, 32), [SHIFTED, LAST]),
        ({"qkv_bias": False}, (32, 32), [SHIFTED, LAST]),
        ({"dynamic_img_size": True}, (64, 96), [((16, 24), (4, 4), (2, 2)), ((8, 12), (4, 4), (0, 0))]),
        ({"dynamic_img_size": True}, (32, 32), [SHIFTED, LAST]),
        ({"dynamic_img_size": True, "always_partition": True}, (32, 32), [SHIFTED, ((4, 4), (4, 4), (2, 2))]),
        ({"img_size": 36}, (36, 36), []),
        ({"dynamic_img_size": True}, (36, 64), []),
        ({"dynamic_img_size": True}, (32, 48), [((8, 12), (4, 4), (2, 2))]),  # 4 x 6 behind it is padded
    ],
)
def test_maps_of_timm(monkeypatch, more, sides, expected):
    """Of the shifted block of each stage; what timm would pad its own code computes."""
    model = _timm(**more)
    fast, images = _accelerated(model), _images(*sides)
    calls = _counting(monkeypatch)
    _assert_alike(fast, model, images)
    assert calls[1::2] == expected


def test_the_report_tells_of_a_map_that_is_padded_in_every_call():
    """Of timm's blocks, which are made for one size."""
    report = vit_fast.accelerate(_timm(img_size=36))
    found = [(line.op, line.reason) for line in report if "blocks" in line.name]
    assert found == [("mlp", "the map is padded to whole windows")] * 4
    report = vit_fast.accelerate(_timm(img_size=36, dynamic_img_size=True), verify=False)
    found = [(line.op, line.reason) for line in report if "blocks" in line.name]
    assert found == [("window_attention, mlp", "")] * 4


def test_a_map_that_the_mask_is_not_of(monkeypatch):
    """A block called by itself: another map of as many windows would run under the wrong mask in timm's own code."""
    block = _drawn(timm_swin.SwinTransformerBlock(32, (8, 16), 2, window_size=4, shift_size=2))
    fast, x = _accelerated(block), torch.randn(2, 16, 8, 32)
    calls = _counting(monkeypatch)
    assert torch.equal(fast(x), block(x))
    assert calls == []
    x = torch.randn(2, 8, 16, 32)
    assert relative_error(fast(x), block(x)) < 1e-5
    assert calls == [((8, 16), (4, 4), (2, 2))]
    fast.shift_size = block.shift_size = (0, 0)  # the mask stays, and timm adds it
    assert torch.equal(fast(x), block(x))
    assert len(calls) == 1


def test_a_table_of_one_column_for_all_heads(monkeypatch):
    """Which PyTorch's own code takes for each of them."""
    model = _timm()
    for block in _blocks(model):
        block.attn.relative_position_bias_table = nn.Parameter(torch.randn(49, 1))
    fast, calls = _accelerated(model), _counting(monkeypatch)
    _assert_alike(fast, model, _images())
    assert calls == []


@pytest.mark.parametrize("shift", [(4, 0), (-1, 2)])
def test_a_shift_beyond_a_window(monkeypatch, shift):
    block = _drawn(timm_swin.SwinTransformerBlock(32, (8, 8), 2, window_size=4, dynamic_mask=True))
    block.shift_size = shift
    fast, x = _accelerated(block), torch.randn(2, 8, 8, 32)
    calls = _counting(monkeypatch)
    assert torch.equal(fast(x), block(x))
    assert calls == []


def test_another_size_is_set_afterwards(monkeypatch):
    """Window, shift, table and mask change, and the op takes what is there then."""
    model = _timm()
    fast = _accelerated(model)
    for one in (model, fast):
        one.set_input_size(img_size=(48, 96), window_size=(3, 6))
    calls = _counting(monkeypatch)
    _assert_alike(fast, model, _images(48, 96))
    assert calls[1::2] == [((12, 24), (3, 6), (1, 3)), ((6, 12), (3, 6), (1, 3))]


# ---- the report, and there and back


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("training", [False, True])
def test_report(library, training):
    report = vit_fast.accelerate(BUILDS[library]().train(training))
    lines = [line for line in report if line.op != "patch_embed"]
    assert len(lines) == 4
    for line in lines:
        assert (line.op, line.reason) == ("window_attention, mlp", "")
        assert 0 < line.error < 1e-5
    passes = "forward and backward" if training else "forward"
    assert report.verification == f"{len(report)} verified against fp64, {passes}"
    assert json.loads(report.to_json())["modules"][-1]["op"] == "window_attention, mlp"


@pytest.mark.parametrize("what", ["output", "gradients"])
def test_what_is_wrong_goes_back(monkeypatch, what):
    op = ops.window_attention
    wrong = {
        "output": lambda *inputs: op(*inputs) * 1.001,
        "gradients": lambda qkv, table, *rest: op(qkv, table.detach(), *rest),
    }[what]
    monkeypatch.setattr(ops, "window_attention", wrong)
    report = vit_fast.accelerate(_timm().train())
    blocks = [line for line in report if "blocks" in line.name]
    assert len(blocks) == 4
    for line in blocks:
        assert not line.replaced
        assert f"its {what} is further from fp64" in line.reason


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_example_whose_maps_are_padded_verifies_nothing_by_itself(monkeypatch, library):
    """The library's own attention runs on it: each block is compared on whole windows as well."""
    op = ops.window_attention
    monkeypatch.setattr(ops, "window_attention", lambda *args: op(*args) * 1.5)
    model = BUILDS[library](**({"dynamic_img_size": True} if library == "timm" else {}))
    report = vit_fast.accelerate(model, example=_images(36, 36))
    for line in report:
        if line.kind.endswith(("Block", "SwinLayer")):
            assert not line.replaced
            assert "further from fp64" in line.reason


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_second_call_changes_nothing_and_restore_everything(library):
    model, images = BUILDS[library](), _images()
    original = copy.deepcopy(model)
    first = vit_fast.accelerate(model)
    before = [(id(module), type(module)) for module in model.modules()]
    second = vit_fast.accelerate(model)
    assert [(id(module), type(module)) for module in model.modules()] == before
    assert [line[:5] for line in second] == [line[:5] for line in first]
    assert vit_fast.restore(model) == len(first)
    assert [type(module) for module in model.modules()] == [type(module) for module in original.modules()]
    with torch.no_grad():
        assert torch.equal(matrix.flat(model(images)), matrix.flat(original(images)))


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_checkpoint_is_loaded_strictly(monkeypatch, library):
    model, images = BUILDS[library](), _images()
    fast = _accelerated(BUILDS[library]())
    assert list(fast.state_dict()) == list(model.state_dict())
    fast.load_state_dict(model.state_dict(), strict=True)
    calls = _counting(monkeypatch)
    assert relative_error(matrix.flat(fast(images)), matrix.flat(model(images))) < 1e-5
    assert len(calls) == 4


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_block_by_itself_is_compared_on_a_map(library):
    block = _blocks(BUILDS[library]())[1]
    report = vit_fast.accelerate(block)
    assert (report[0].op, report[0].reason) == ("window_attention, mlp", ""), str(report)
    assert report.verification == "1 verified against fp64, forward, 1 of them on random tokens: no run came by them"


# ---- what stands aside


class _Lora(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.more = nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.more(x)


def _hooked(*path: str):
    def change(block):
        block.get_submodule(".".join(path)).register_forward_hook(lambda module, args, output: 1.25 * output)

    return change


def _hooked_pair(name: str):
    def change(block):
        block.get_submodule(name).register_forward_hook(lambda module, args, output: (1.25 * output[0], *output[1:]))

    return change


class _Linear(nn.Linear):
    pass


def _another_class(*path: str):
    def change(block):
        block.get_submodule(".".join(path)).__class__ = _Linear

    return change


def _wrapped(parent: str, name: str):
    def change(block):
        torch.manual_seed(4)
        parent_module = block.get_submodule(parent)
        setattr(parent_module, name, _Lora(getattr(parent_module, name)))

    return change


def _patched(parent: str, name: str):
    def change(block):
        module = block.get_submodule(parent)
        setattr(module, name, types.MethodType(doubled(getattr(module, name).__func__), module))

    return change


def _set(parent: str, name: str, value):
    def change(block):
        setattr(block.get_submodule(parent), name, copy.deepcopy(value))

    return change


def _other_norm(name: str):
    def change(block):
        setattr(block, name, nn.GroupNorm(1, 32) if name == "none" else timm.layers.RmsNorm(32))

    return change


def _unmasked(block):
    block.attn_mask = None


OWN = "somebody has given it, or its class, another"
# What is done to a block, which half keeps its code then, and the reason that is given.
ASIDES = {
    "timm": [
        (_hooked("norm1"), "attention", "norm1 has a hook"),
        (_hooked("attn"), "attention", "attn has a hook"),
        (_hooked("attn", "qkv"), "attention", "attn.qkv has a hook"),
        (_hooked("attn", "proj"), "attention", "attn.proj has a hook"),
        (_hooked("attn", "softmax"), "attention", "attn.softmax has a hook"),
        (_hooked("attn", "attn_drop"), "attention", "attn.attn_drop has a hook"),
        (_hooked("attn", "proj_drop"), "attention", "attn.proj_drop has a hook"),
        (_hooked("drop_path1"), "attention", "drop_path1 has a hook"),
        (_wrapped("attn", "qkv"), "attention", "attn.qkv is a _Lora"),
        (_wrapped("attn", "proj"), "attention", "attn.proj is a _Lora"),
        (_other_norm("norm1"), "attention", "norm1 is a RmsNorm"),
        (_set("attn", "attn_drop", nn.Dropout(0.5)), "attention", "attn.attn_drop is active"),
        (_set("attn", "proj_drop", nn.Dropout(0.5)), "attention", "attn.proj_drop is active"),
        (_set("attn", "scale", 0.1), "attention", "attn.scale is changed"),
        (_patched("", "_attn"), "attention", f"{OWN} _attn"),
        (_patched("", "get_attn_mask"), "attention", f"{OWN} get_attn_mask"),
        (_patched("attn", "_get_rel_pos_bias"), "attention", f"{OWN} _get_rel_pos_bias"),
        (_patched("attn", "forward"), "attention", "attn has a forward of its own"),
        (_unmasked, "attention", "attn_mask is not that of its shift"),
        (_hooked("norm2"), "mlp", "norm2 has a hook"),
        (_hooked("mlp"), "mlp", "mlp has a hook"),
        (_hooked("mlp", "fc1"), "mlp", "mlp.fc1 has a hook"),
        (_hooked("mlp", "act"), "mlp", "mlp.act has a hook"),
        (_hooked("mlp", "drop1"), "mlp", "mlp.drop1 has a hook"),
        (_hooked("mlp", "norm"), "mlp", "mlp.norm has a hook"),
        (_hooked("mlp", "drop2"), "mlp", "mlp.drop2 has a hook"),
        (_hooked("drop_path2"), "mlp", "drop_path2 has a hook"),
        (_wrapped("mlp", "fc2"), "mlp", "mlp.fc2 is a _Lora"),
        (_other_norm("norm2"), "mlp", "norm2 is a RmsNorm"),
        (_set("mlp", "drop1", nn.Dropout(0.5)), "mlp", "mlp.drop1 is active"),
    ],
}
ASIDES["torchvision"] = [
    (_hooked("norm1"), "attention", "norm1 has a hook"),
    (_hooked("attn"), "attention", "attn has a hook"),
    (_hooked("attn", "qkv"), "attention", "attn.qkv has a hook"),
    (_hooked("attn", "proj"), "attention", "attn.proj has a hook"),
    (_another_class("attn", "qkv"), "attention", "attn.qkv is a _Linear"),  # whose weight alone torchvision reads
    (_other_norm("norm1"), "attention", "norm1 is a RmsNorm"),
    (_set("attn", "attention_dropout", 0.5), "attention", "attn.attention_dropout or attn.dropout is active"),
    (_set("attn", "dropout", 0.5), "attention", "attn.attention_dropout or attn.dropout is active"),
    (_patched("attn", "get_relative_position_bias"), "attention", f"{OWN} get_relative_position_bias"),
    (_patched("attn", "forward"), "attention", "attn has a forward of its own"),
    (_hooked("norm2"), "mlp", "norm2 has a hook"),
    (_hooked("mlp"), "mlp", "mlp has a hook"),
    *((_hooked("mlp", str(number)), "mlp", f"mlp.{number} has a hook") for number in range(5)),
    (_wrapped("mlp", "0"), "mlp", "mlp.0 is a _Lora"),
    (_other_norm("norm2"), "mlp", "norm2 is a RmsNorm"),
    (_set("mlp", "2", nn.Dropout(0.5)), "mlp", "mlp.2 is active"),
]
ASIDES["transformers"] = [
    (_hooked("layernorm_before"), "attention", "layernorm_before has a hook"),
    (_hooked_pair("attention"), "attention", "attention has a hook"),
    *((_hooked("attention", f"{n}_proj"), "attention", f"attention.{n}_proj has a hook") for n in "qkvo"),
    (_hooked("attention", "relative_position_bias"), "attention", "attention.relative_position_bias has a hook"),
    (_hooked("drop_path"), "attention", "drop_path has a hook"),
    (_wrapped("attention", "v_proj"), "attention", "attention.v_proj is a _Lora"),
    (_other_norm("layernorm_before"), "attention", "layernorm_before is a RmsNorm"),
    (_set("attention", "attention_dropout", 0.5), "attention", "attention.attention_dropout is active"),
    (_set("attention", "scaling", 0.1), "attention", "attention.scaling is changed"),
    (_set("attention", "is_causal", True), "attention", "attention is causal"),
    (_patched("", "cyclic_shift"), "attention", f"{OWN} cyclic_shift"),
    (_patched("", "get_attn_mask"), "attention", f"{OWN} get_attn_mask"),
    (
        _patched("attention.relative_position_bias", "forward"),
        "attention",
        "attention.relative_position_bias has a forward of its own",
    ),
    (_hooked("layernorm_after"), "mlp", "layernorm_after has a hook"),
    (_hooked("mlp"), "mlp", "mlp has a hook"),
    (_hooked("mlp", "fc1"), "mlp", "mlp.fc1 has a hook"),
    (_hooked("mlp", "activation_fn"), "mlp", "mlp.activation_fn has a hook"),
    (_hooked("mlp", "fc2"), "mlp", "mlp.fc2 has a hook"),
    (_other_norm("layernorm_after"), "mlp", "layernorm_after is a RmsNorm"),
]
CASES = [
    pytest.param(library, *case, id=f"{library}-{number}-{case[2]}")
    for library, cases in ASIDES.items()
    for number, case in enumerate(cases)
]


@pytest.mark.parametrize(("library", "change", "half", "reason"), CASES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_stands_aside(library, change, half, reason, when):
    """That half runs by the library's modules, to the numbers of the library; the other on the ops."""
    model = BUILDS[library]().train()
    original = copy.deepcopy(model)
    fast = _accelerated(model) if when == "after" else model
    for one in (fast, original):
        change(_blocks(one)[1])
    line = [line for line in vit_fast.accelerate(fast, verify=False) if line.op != "patch_embed"][1]
    assert line.replaced
    if reason.endswith("is active"):
        assert (line.op, line.reason) == ("window_attention, mlp", f"its own code in training: {reason}")
    else:
        assert (line.op, line.reason) == ("mlp" if half == "attention" else "window_attention", reason)
    asides = _blocks(fast)[1].asides()
    assert asides == ((reason, "") if half == "attention" else ("", reason))
    _assert_alike(fast, original, _images())


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["attn_mask", "relative_position_index"])
def test_a_buffer_that_somebody_changed_before(library, name, caplog):
    """Is looked at when accelerate is called, though nothing is compared: the block keeps its code."""
    model, images = BUILDS[library](), _images()
    block = _blocks(model)[1]
    buffer = next((b for key, b in block.named_buffers() if key.endswith(name)), None)
    if buffer is None:
        pytest.skip(f"{library} keeps no {name}")
    buffer.copy_(buffer.flip(-1))
    original = copy.deepcopy(model)
    line = [line for line in vit_fast.accelerate(model, verify=False) if line.op != "patch_embed"][1]
    assert not line.replaced
    assert line.reason.startswith(f"its {name} is not")
    _assert_alike(model, original, images)


@pytest.mark.parametrize("library", ["timm", "torchvision"])  # transformers' own code refuses it
def test_a_table_in_another_dtype(monkeypatch, library):
    """Which PyTorch promotes, and the op refuses."""
    model = BUILDS[library]()
    fast, calls = _accelerated(model), _counting(monkeypatch)
    for one in (model, fast):
        for module in one.modules():
            if hasattr(module, "relative_position_bias_table"):
                module.relative_position_bias_table.data = module.relative_position_bias_table.data.bfloat16()
    reason = _blocks(fast)[1].asides()[0]
    assert reason.endswith("holds torch.bfloat16, what stands before it torch.float32")
    with torch.no_grad():
        images = _images()
        assert relative_error(matrix.flat(fast(images)), matrix.flat(model(images))) < 1e-5
    assert calls == []


CLASSES = {
    "torchvision": [
        (torchvision_swin.SwinTransformerBlock, "forward"),
        (torchvision_swin.ShiftedWindowAttention, "forward"),
        (torchvision_swin.ShiftedWindowAttention, "get_relative_position_bias"),
    ],
    "transformers": [
        (modeling_swin.SwinLayer, "cyclic_shift"),
        (modeling_swin.SwinMLP, "forward"),
        (modeling_swin.SwinRelativePositionBias, "forward"),
    ],
    "timm": [
        (timm_swin.SwinTransformerBlock, "forward"),
        (timm_swin.SwinTransformerBlock, "_attn"),
        (timm_swin.WindowAttention, "forward"),
        (timm_swin.WindowAttention, "_get_rel_pos_bias"),
    ],
}


@pytest.mark.parametrize(
    ("library", "kind", "method"), [(library, *one) for library, every in CLASSES.items() for one in every]
)
def test_a_class_that_somebody_patches_afterwards(monkeypatch, library, kind, method):
    """Every call asks, a compiled one too; and goes back to the ops when the patch does."""
    model = BUILDS[library]()
    hold_to_a_patch(monkeypatch, model, _accelerated(model), _images(), kind, method, _counting)


def test_a_class_of_the_users_stays(caplog):
    class Mine(timm_swin.SwinTransformerBlock):
        def forward(self, x):
            return super().forward(x) * 2

    model = _timm()
    model.layers[0].blocks[0].__class__ = Mine
    report = vit_fast.accelerate(model)
    assert report[1].reason == "it is a Mine, a class of its own"
    assert [line.replaced for line in report] == [True, False, True, True, True]


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_log_says_why_once(library, caplog, monkeypatch):
    model = _accelerated(BUILDS[library]())
    for block in _blocks(model):
        block.get_submodule(NORM1[library]).register_forward_hook(lambda *_: None)
    monkeypatch.setattr("vit_fast.ops.backend._say_once", functools.cache(logging.getLogger("vit_fast").warning))
    with caplog.at_level(logging.WARNING, "vit_fast"):
        model(_images())
    (message,) = {record.getMessage() for record in caplog.records}
    assert message.endswith(f"module by module, runs in PyTorch: {NORM1[library]} has a hook")


# ---- explain


@pytest.mark.parametrize("library", LIBRARIES)
def test_explain(library):
    model = _accelerated(BUILDS[library]())
    _blocks(model)[0].mlp.register_forward_hook(lambda *_: None)
    _blocks(model)[2].get_submodule(NORM1[library]).register_forward_hook(lambda *_: None)
    names = [name for name, one in model.named_modules() if one in _blocks(model)]
    lines = [line for line in vit_fast.explain(model) if line.op != "patch_embed"]
    cpu = "a tensor on cpu: the kernels run on CUDA and ROCm"
    assert [tuple(line) for line in lines[:8]] == [
        (f"{names[0]}.attention", "ln_linear", "torch", cpu),
        (f"{names[0]}.attention", "window_attention", "torch", cpu),
        (f"{names[0]}.attention", "linear_residual", "torch", cpu),
        (f"{names[0]}.mlp", "mlp", "torch", "mlp has a hook"),
        (f"{names[1]}.attention", "ln_linear", "torch", cpu),
        (f"{names[1]}.attention", "window_attention", "torch", cpu),
        (f"{names[1]}.attention", "linear_residual", "torch", cpu),
        (f"{names[1]}.mlp", "mlp", "torch", cpu),
    ]
    assert [tuple(line) for line in lines[8:10]] == [
        (names[2], "mlp", "torch", cpu),
        (f"{names[2]}.attention", "attention", "torch", f"{NORM1[library]} has a hook"),
    ]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"embed_dim": 24}, "head width: got 12, the kernels take 16, 32, 64"),
        ({"window_size": 9, "img_size": 72}, "window: got 9 x 9, 81 tokens, the kernels take up to 64"),
    ],
)
def test_what_no_kernel_takes_is_told(monkeypatch, more, reason):
    """By the report of a GPU alone, since a CPU takes them as well as others; by `explain` in any case."""
    model = _accelerated(_timm(**more))

    def told() -> tuple[set, set]:
        report, lines = vit_fast.accelerate(model, verify=False), vit_fast.explain(model)
        return (
            {(line.op, line.reason) for line in report if "layers.0.blocks" in line.name},
            {tuple(line)[1:] for line in lines if line.name == "layers.0.blocks.1.attention"},
        )

    cpu = "a tensor on cpu: the kernels run on CUDA and ROCm"
    reasons = {"ln_linear": cpu, "window_attention": f"{cpu}; {reason}", "linear_residual": cpu}
    assert told() == ({("window_attention, mlp", "")}, {(op, "torch", why) for op, why in reasons.items()})
    monkeypatch.setattr("vit_fast.foreign.block.use_triton", lambda op, *_: op == "window_attention")
    assert told() == ({("mlp", reason)}, {("attention", "torch", reason)})


def test_the_library_s_code_where_no_kernel_takes_the_windows(monkeypatch):
    """On a GPU: the op moves the map in PyTorch, and what it moves is three times as wide."""
    model, images = _timm(embed_dim=24).eval(), _images()
    fast, calls = _accelerated(model), _counting(monkeypatch)
    with torch.no_grad():
        expected = model(images)
        fast(images)
        assert calls
        calls.clear()
        monkeypatch.setattr("vit_fast.foreign.block.use_triton", lambda op, *_: op == "window_attention")
        assert relative_error(fast(images), expected) < 1e-6
    assert not calls


# ---- compilers


@pytest.mark.parametrize("library", LIBRARIES)
def test_export_with_a_dynamic_map(library):
    """As far as the library's own code goes."""
    more = {"timm": {"dynamic_img_size": True}}.get(library, {})
    model = BUILDS[library](depths=(1, 1), window_size=2, **more)
    fast = _accelerated(model)
    shapes = ({0: torch.export.Dim("batch"), 2: 16 * torch.export.Dim("rows", min=1, max=50)},)
    with torch.no_grad():
        for one in (model, fast):
            program = torch.export.export(one, (_images(),), dynamic_shapes=shapes)
            for sides in ((64, 32), (48, 32)):
                images = torch.randn(3, 3, *sides)
                found, expected = program.module()(images), model(images)
                assert relative_error(matrix.flat(found), matrix.flat(expected)) < 1e-5


@pytest.mark.filterwarnings("ignore")  # it is deprecated, and takes what Python reads for constants
@pytest.mark.parametrize("library", LIBRARIES)
def test_torch_jit_trace(library):
    model = BUILDS[library]()
    fast, images = _accelerated(model), _images()
    with torch.no_grad():
        traced = torch.jit.trace(fast, images, check_trace=False, strict=False)
        images = _images()
        assert relative_error(matrix.flat(traced(images)), matrix.flat(model(images))) < 1e-5


@pytest.mark.parametrize("library", LIBRARIES)
def test_gradient_checkpointing(library):
    model, images = BUILDS[library](drop_path_rate=0.6).train(), _images()
    expected = _results(model, images)
    fast = _accelerated(model)
    if library == "transformers":
        fast.gradient_checkpointing_enable()
    elif library == "timm":
        fast.set_grad_checkpointing()
    else:
        for block in _blocks(fast):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    output, found = _results(fast, images)
    assert relative_error(output, expected[0]) <= 1e-5
    _assert_equal_gradients(found, expected[1])


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_torch_fx_traces_what_it_traced_before(library):
    from torchvision.models.feature_extraction import create_feature_extractor

    model, images = BUILDS[library](), _images()
    node = {"timm": "layers.1.blocks.1", "torchvision": "features.3.1"}[library]
    expected = create_feature_extractor(model, [node])(images)[node]
    fast = _accelerated(model)
    torch.testing.assert_close(create_feature_extractor(fast, [node])(images)[node], expected)
    assert any(isinstance(one, Fused) for one in fast.modules())


# ---- torchvision


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ((64, 32), [((16, 8), (4, 4), (2, 2)), ((8, 4), (4, 4), (2, 0))]),
        ((32, 64), [((8, 16), (4, 4), (2, 2)), ((4, 8), (4, 4), (0, 2))]),
        ((32, 48), [((8, 12), (4, 4), (2, 2))]),  # 4 x 6 behind it is padded
        ((16, 32), [((4, 8), (4, 4), (0, 2))]),  # 2 x 4 is padded to one window of two rows
        ((36, 36), []),
    ],
)
def test_maps_of_torchvision(monkeypatch, sides, expected):
    """It takes any, and shifts along no axis that one window covers."""
    model = _torchvision()
    fast, images = _accelerated(model), _images(*sides)
    calls = _counting(monkeypatch)
    _assert_alike(fast, model, images)
    assert calls[1::2] == expected


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("sizes", [(36, 48), (40, 44)])
def test_export_of_a_map_that_may_be_padded(sizes, strict):
    """From a size of whole windows others of that sort, from one that is padded those, as of the library's own code."""
    model = _torchvision(depths=(2,), num_heads=(2,), window_size=3)
    fast = _accelerated(model)
    shapes = ({2: 4 * torch.export.Dim("rows", min=4, max=90)},)
    with torch.no_grad():
        program = torch.export.export(fast, (_images(sizes[0], 36),), dynamic_shapes=shapes, strict=strict)
        for rows in sizes:
            images = _images(rows, 36)
            assert relative_error(program.module()(images), model(images)) < 1e-5


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_index_that_a_checkpoint_brings(when, caplog):
    """A buffer that torchvision keeps in its checkpoints: under another order the table means something else."""
    model, images = _torchvision(), _images()
    state = model.state_dict()
    key = "features.1.1.attn.relative_position_index"
    state[key] = state[key].flip(0)
    fast = _accelerated(model) if when == "after" else model
    original = _torchvision()
    for one in (fast, original):
        one.load_state_dict(state, strict=True)
    vit_fast.accelerate(fast, verify=False)
    assert [isinstance(block, Fused) for block in _blocks(fast)] == [True, False, True, True]
    _assert_alike(fast, original, images)


def test_an_index_that_a_checkpoint_brings_to_a_sharded_model():
    """Whose blocks are of a class that is FSDP's, and cannot be given their own back."""
    model = _torchvision()
    state = model.state_dict()
    key = "features.1.1.attn.relative_position_index"
    state[key] = state[key].flip(0)
    fast = _accelerated(model)
    block = _blocks(fast)[1]
    block.__class__ = type("FSDPSwinTransformerBlock", (type(block),), {})
    with pytest.raises(RuntimeError, match=r"features\.1\.1\.attn: its relative_position_index is not .* restore"):
        fast.load_state_dict(state)


def test_dropping_whole_batches():
    model = _torchvision(drop_path_rate=0.6).train()
    for one in model.modules():
        if isinstance(one, torchvision.ops.StochasticDepth):
            one.mode = "batch"
    fast = _accelerated(model)
    assert _blocks(fast)[1].asides() == ("stochastic_depth drops a whole batch",) * 2
    assert _blocks(fast)[0].asides() == ("", "")  # whose rate is 0
    _assert_alike(fast, model, _images())
    assert _blocks(fast.eval())[1].asides() == ("", "")


@pytest.mark.parametrize("wrong", ["swin_v2_t", "swin3d_t"])
def test_its_other_swins(wrong):
    model = {"swin_v2_t": torchvision.models.swin_v2_t, "swin3d_t": torchvision.models.video.swin3d_t}[wrong]()
    blocks = [line for line in vit_fast.accelerate(model, verify=False) if line.op != "patch_embed"]
    assert len(blocks) == 12
    for line in blocks:
        if wrong == "swin_v2_t":
            assert (line.op, line.reason) == ("", "it is a SwinTransformerBlockV2, a class of its own")
        else:
            assert (line.op, line.reason) == ("mlp", "attn is a ShiftedWindowAttention3d")


def test_a_block_of_a_video():
    """Whose second half alone is on the ops, and reads a map of three axes."""
    block = torchvision.models.video.swin_transformer.PatchMerging
    assert block is torchvision_swin.PatchMerging
    block = _drawn(
        torchvision_swin.SwinTransformerBlock(
            32,
            2,
            [2, 4, 4],
            [1, 2, 2],
            attn_layer=torchvision.models.video.swin_transformer.ShiftedWindowAttention3d,
        )
    )
    original, x = copy.deepcopy(block), torch.randn(2, 4, 8, 8, 32)
    report = vit_fast.accelerate(block)
    assert (report[0].op, report[0].replaced) == ("mlp", True), str(report)
    assert relative_error(block(x), original(x)) < 1e-5


def test_a_function_of_torchvision_that_somebody_patches(monkeypatch):
    model, images = _torchvision(), _images()
    fast = _accelerated(model)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    with torch.no_grad():
        before = compiled(images)
        monkeypatch.setattr(
            torchvision_swin, "shifted_window_attention", doubled(torchvision_swin.shifted_window_attention)
        )
        expected = model(images)
        assert relative_error(expected, before) > 1e-3
        for run in (fast, compiled):
            assert relative_error(run(images), expected) < 1e-5


# ---- transformers


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ((64, 32), [((16, 8), (4, 4), (2, 2)), ((8, 4), (4, 4), (0, 0))]),
        ((64, 64), [((16, 16), (4, 4), (2, 2)), ((8, 8), (4, 4), (2, 2))]),
        ((32, 48), [((8, 12), (4, 4), (2, 2))]),
        ((36, 36), []),
    ],
)
def test_maps_of_transformers(monkeypatch, sides, expected):
    model = _transformers()
    fast, images = copy.deepcopy(model), _images(*sides)
    vit_fast.accelerate(fast)  # it is verified on a map that would take the shift away for good
    calls = _counting(monkeypatch)
    _assert_alike(fast, model, images)
    assert calls[1::2] == expected
    assert [block.shift_size for block in _blocks(fast)] == [block.shift_size for block in _blocks(model)]
    _assert_alike(fast, model, _images(64, 64))  # as the library's own, whose shift a small map has taken away


def test_always_partition(monkeypatch):
    layer = _blocks(_transformers())[3]
    fast, x = _accelerated(layer), torch.randn(2, 16, 64)
    calls = _counting(monkeypatch)
    with torch.no_grad():
        ours, theirs = fast(x, (4, 4), always_partition=True), layer(x, (4, 4), always_partition=True)
    assert relative_error(ours[0], theirs[0]) < 1e-5
    assert calls == [((4, 4), (4, 4), (2, 2))]


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "vit_fast"])
def test_attentions(monkeypatch, implementation):
    """Where they are returned the first half is the library's own; afterwards all is as before."""
    vit_fast.register_transformers()
    model, images = _transformers(), _images()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    model.set_attn_implementation(implementation)
    expected = eager(images, output_attentions=True)
    fast = _accelerated(model)
    calls = _counting(monkeypatch)
    assert relative_error(fast(images).logits, expected.logits) < 1e-5
    assert len(calls) == (0 if implementation == "eager" else 4)
    found = fast(images, output_attentions=True, output_hidden_states=True)
    assert relative_error(found.logits, expected.logits) < 1e-5
    assert len(found.hidden_states) == 3
    if implementation == "sdpa":
        assert not found.attentions  # as in the library's own
    else:
        assert len(found.attentions) == 2
        for ours, theirs in zip(found.attentions, expected.attentions):
            assert relative_error(ours, theirs) < 1e-5
    before = len(calls)
    fast(images)
    assert len(calls) - before == (0 if implementation == "eager" else 4)


def test_a_call_that_asks_attention_for_more():
    vit_fast.register_transformers()
    model = _transformers()
    model.set_attn_implementation("vit_fast")
    layer = _blocks(model)[1]
    fast, x = _accelerated(layer), torch.randn(2, 64, 32)
    with torch.no_grad():
        ours, theirs = fast(x, (8, 8), softcap=0.5)[0], layer(x, (8, 8), softcap=0.5)[0]
        assert relative_error(ours, theirs) < 1e-5
        assert relative_error(fast(x, (8, 8))[0], ours) > 1e-3


def test_an_attention_function_of_the_users(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "mine", doubled(sdpa_attention_forward))
    model = _transformers()
    fast = _accelerated(model)
    for one in (model, fast):
        one.set_attn_implementation("mine")
    assert _blocks(fast)[1].asides()[0] == "attention implementation 'mine' is none of transformers' own"
    _assert_alike(fast, model, _images())


def test_a_key_without_a_bias():
    """Of three weights that are joined to one."""
    model = _transformers()
    fast = _accelerated(model)
    for one in (model, fast):
        for layer in _blocks(one):
            layer.attention.k_proj.bias = None
    _assert_alike(fast, model, _images())


def test_a_half_that_no_fp64_takes_is_no_bar_to_the_other():
    """A quantised Linear: the half that is replaced is compared alone, on the map that the tokens are of."""
    model = _transformers()
    for layer in _blocks(model):
        (quantised,) = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer.mlp.fc1))
        layer.mlp.fc1 = quantised
    for line in vit_fast.accelerate(model):
        if "blocks" in line.name:
            assert (line.op, line.replaced) == ("window_attention", True), line.reason
            assert 0 < line.error < 1e-5
