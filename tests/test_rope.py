"""accelerate on the blocks whose queries and keys are turned: DINOv3, EVA, the Perception Encoder and RoPE-ViT."""

import copy
import functools
import types

import pytest
import timm
import timm.layers
import torch
import transformers as hf
from timm.models import eva
from torch import nn
from transformers.models.dinov3_vit import modeling_dinov3_vit

import vit_fast
from tests import matrix
from tests.error_rule import relative_error
from tests.small_runs import drawn
from tests.test_accelerate import hold_to_a_patch
from vit_fast import ops
from vit_fast.foreign import block as foreign_block
from vit_fast.foreign.block import FusedBlock


def _timm(name: str = "vit_small_patch16_dinov3", **more) -> nn.Module:
    return drawn(timm.create_model(name, **{**matrix.TINY, **more}))


def _transformers(**more) -> nn.Module:
    config = hf.DINOv3ViTConfig(**matrix.SIZES, num_register_tokens=4, **more)
    config._attn_implementation = "sdpa"
    return drawn(hf.DINOv3ViTModel(config))


BUILDS = {"timm": _timm, "transformers": _transformers}
LIBRARIES = tuple(BUILDS)


@pytest.fixture(autouse=True)
def weights_are_joined(monkeypatch):
    """As on a GPU: on a CPU transformers' three products stay three, which the cells of the matrix see."""
    monkeypatch.setattr(foreign_block, "_joins", lambda *_: True)


def _images(*sides: int) -> torch.Tensor:
    return torch.randn(2, 3, *(sides or (32, 32)))


def _blocks(model: nn.Module) -> list:
    return [one for one in model.modules() if type(one).__name__ in ("EvaBlock", "DINOv3ViTLayer")]


def _accelerated(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    vit_fast.accelerate(model, verify=False)
    assert all(isinstance(one, FusedBlock) for one in _blocks(model))
    return model


def _counting(monkeypatch) -> list[tuple]:
    """The calls of `ops.rope_attention` from here on: the shapes of queries and tables, and which pairs are turned."""
    calls, op = [], ops.rope_attention

    def counted(qkv, cos, sin, interleaved):
        calls.append((tuple(qkv.shape), tuple(cos.shape), interleaved))
        return op(qkv, cos, sin, interleaved)

    monkeypatch.setattr(ops, "rope_attention", counted)
    return calls


def _assert_alike(ours: nn.Module, theirs: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        assert relative_error(matrix.flat(ours(images)), matrix.flat(theirs(images))) < 1e-5


# Name of a model, what else it is built with, the tokens that are turned, which pairs, and the number of tables.
CALLS = {
    "halves behind five tokens": ("vit_small_patch16_dinov3", {}, 16, False, ()),
    "interleaved behind one": ("eva02_tiny_patch14_224", {}, 16, True, ()),
    "the same size again, with any": ("eva02_tiny_patch14_224", {"dynamic_img_size": True}, 16, True, ()),
    "tables of each head's own": ("vit_small_patch16_rope_mixed_224", {}, 16, True, (3,)),
    "the Perception Encoder": ("vit_pe_core_tiny_patch16_384", {}, 16, True, ()),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_timms_models(monkeypatch, name):
    model, more, turned, interleaved, heads = CALLS[name]
    model = _timm(model, **more)
    fast, calls = _accelerated(model), _counting(monkeypatch)
    _assert_alike(fast, model, _images())
    (qkv, cos, pairs), again = calls
    assert (qkv[0], qkv[2:]) == (2, (3, 3, 16))
    assert qkv[1] - turned == _blocks(model)[0].attn.num_prefix_tokens
    assert (cos, pairs) == ((*heads, turned, 16), interleaved)
    assert again == calls[0]


def test_calls_of_transformers(monkeypatch):
    """Of any size of picture; in training the model jitters, moves and scales the positions of each batch."""
    augmented = {"pos_embed_shift": 0.2, "pos_embed_jitter": 1.5, "pos_embed_rescale": 2.0}
    model = _transformers(drop_path_rate=0.4, **augmented)
    fast, calls = _accelerated(model), _counting(monkeypatch)
    for sides in ((32, 32), (40, 24)):
        _assert_alike(fast, model, _images(*sides))
    assert calls[::2] == [((2, 21, 3, 3, 16), (16, 16), False), ((2, 20, 3, 3, 16), (15, 16), False)]
    images, results = _images(), []
    for one in (fast.train(), model.train()):
        torch.manual_seed(0)
        results.append(one(images).last_hidden_state)
    assert relative_error(*results) < 1e-5
    assert relative_error(results[0], model.eval()(images).last_hidden_state) > 1e-2


def test_a_picture_of_another_size_in_timm(monkeypatch):
    model = _timm(dynamic_img_size=True)
    fast, calls = _accelerated(model), _counting(monkeypatch)
    _assert_alike(fast, model, _images(40, 24))
    assert {cos for _, cos, _ in calls} == {(15, 16)}


def test_without_positions_it_is_a_block_as_any_other(monkeypatch):
    """EVA's giant: whole blocks on one op."""
    model = _timm("eva_giant_patch14_224")
    fast, calls, block = _accelerated(model), [], ops.block
    monkeypatch.setattr(ops, "block", lambda *args: calls.append(1) or block(*args))
    turned = _counting(monkeypatch)
    _assert_alike(fast, model, _images())
    assert (calls, turned) == ([1, 1], [])


def test_learned_frequencies(monkeypatch):
    """RoPE-ViT's: their gradient comes through the op."""
    model = _timm("vit_small_patch16_rope_mixed_224")
    fast, calls = _accelerated(model), _counting(monkeypatch)
    found, expected = (matrix.gradients(one, {"x": images}) for images in (_images(),) for one in (fast, model))
    assert calls
    matrix.assert_equal_gradients(found, expected)
    assert found["rope.freqs"].abs().max() > 0


# ---- the report


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("training", [False, True])
def test_report(library, training):
    model = BUILDS[library]().train(training)
    lines = [line for line in vit_fast.accelerate(model) if line.op != "patch_embed"]
    assert len(lines) == 2
    for line in lines:
        assert (line.op, line.reason) == ("rope_attention, mlp", "")
        assert 0 < line.error < 1e-5
    cpu = "a tensor on cpu: the kernels run on CUDA and ROCm"
    told = [tuple(line)[1:] for line in vit_fast.explain(model) if line.op != "patch_embed"]
    may = "block, or " if library == "timm" else ""  # which a call without positions runs
    assert told == [(f"{may}rope_attention, mlp", "torch", cpu)] * 2


def test_the_report_tells_what_a_call_runs():
    """Where one is seen: EVA's giant has no positions."""
    for name, op in (("eva_giant_patch14_224", "block"), ("vit_small_patch16_dinov3", "rope_attention, mlp")):
        model = _timm(name)
        for verify, expected in ((False, "block, or rope_attention, mlp"), (True, op)):
            report = vit_fast.accelerate(copy.deepcopy(model), verify=verify)
            assert {line.op for line in report} == {"patch_embed", expected}


EXAMPLES = {
    "a causal call": lambda model, images: {"x": images, "is_causal": True},
    "a mask": lambda model, images: {"x": images, "attn_mask": torch.zeros(21, 21)},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_that_the_library_computes_verifies_nothing_by_itself(monkeypatch, name):
    """Each block is compared on random tokens with positions as well."""
    op = ops.rope_attention
    monkeypatch.setattr(ops, "rope_attention", lambda qkv, cos, sin, pairs: op(qkv, cos, -sin, pairs))
    model = _timm()
    for line in vit_fast.accelerate(model, example=EXAMPLES[name](model, _images())):
        if line.op != "patch_embed":
            assert not line.replaced
            assert "its output is further from fp64" in line.reason


def test_positions_of_each_image(monkeypatch):
    """Of timm's patch dropout, in training alone."""
    model = _timm("eva02_tiny_patch14_224", patch_drop_rate=0.5).train()
    fast, calls, images, results = _accelerated(model), _counting(monkeypatch), _images(), []
    for one in (fast, model):
        torch.manual_seed(0)
        results.append(one(images))
    assert relative_error(*results) < 1e-5
    assert not calls
    _assert_alike(fast.eval(), model.eval(), images)
    assert len(calls) == 2


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("what", ["output", "gradients"])
@pytest.mark.parametrize("alone", [False, True])
def test_what_is_wrong_goes_back(monkeypatch, library, what, alone):
    """Also where a block stands alone and no model says what it reads."""
    op = ops.rope_attention
    wrong = {
        "output": lambda qkv, cos, sin, interleaved: op(qkv, cos, -sin, interleaved),
        "gradients": lambda qkv, *rest: op(qkv.detach() + 0.999 * (qkv - qkv.detach()), *rest),
    }[what]
    monkeypatch.setattr(ops, "rope_attention", wrong)
    model = BUILDS[library]().train()
    for line in vit_fast.accelerate(_blocks(model)[0] if alone else model):
        if line.op != "patch_embed":
            assert not line.replaced
            assert f"its {what} is further from fp64" in line.reason


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_block_by_itself_is_compared_with_positions(monkeypatch, library):
    block = _blocks(BUILDS[library]())[0]
    calls = _counting(monkeypatch)
    (line,) = vit_fast.accelerate(block)
    assert line.replaced
    tokens, turned = (22, 17) if library == "timm" else (17, 16)
    assert {(qkv[1], cos) for qkv, cos, _ in calls} == {(tokens, (turned, 16))}


def test_a_block_of_more_prefix_tokens_than_others():
    (line,) = vit_fast.accelerate(drawn(eva.EvaBlock(48, 3, num_prefix_tokens=40)))
    assert line.replaced


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_half_that_no_fp64_takes_is_no_bar_to_the_other(library):
    """A quantised Linear: the half that is replaced is compared alone, with its positions."""
    for half, name in (("rope_attention", "mlp"), ("mlp", "attn" if library == "timm" else "attention")):
        model = BUILDS[library]()
        for block in _blocks(model):
            parent = block.get_submodule(name)
            child = {"mlp": ("fc1", "up_proj"), "attn": ("proj",), "attention": ("o_proj",)}[name]
            child = next(one for one in child if hasattr(parent, one))
            (quantised,) = torch.ao.quantization.quantize_dynamic(nn.Sequential(parent.get_submodule(child)))
            setattr(parent, child, quantised)
        for line in vit_fast.accelerate(model):
            if line.op != "patch_embed":
                assert (line.op, line.replaced) == (half, True), line.reason
                assert 0 < line.error < 1e-5


# ---- what stands aside


def _hook(*path: str):
    def change(block) -> None:
        block.get_submodule(".".join(path)).register_forward_hook(lambda module, args, output: _more(output))

    return change


def _more(output):
    return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5


def _set(path: str, value):
    def change(block) -> None:
        *parents, name = path.split(".")
        value_of = value if isinstance(value, types.FunctionType) else lambda block: value
        setattr(functools.reduce(getattr, parents, block), name, value_of(block))

    return change


def _drop(path: str):
    def change(block) -> None:
        block.train()
        block.get_submodule(path).p = 0.5

    return change


def _drop_attention(layer) -> None:
    layer.attention.train().dropout = 0.5


GATE = drawn(nn.Linear(48, 48))
ASIDES = {
    "timm": [
        (_hook("norm1"), 0, "norm1 has a hook"),
        (_hook("attn"), 0, "attn has a hook"),
        (_hook("attn", "qkv"), 0, "attn.qkv has a hook"),
        (_hook("attn", "proj"), 0, "attn.proj has a hook"),
        (_set("attn.fused_attn", False), 0, "attn.fused_attn is False"),
        (_set("attn.gate", GATE), 0, "attn has a gate"),
        (_hook("drop_path1"), 0, "drop_path1 has a hook"),
        (_hook("drop_path2"), 1, "drop_path2 has a hook"),
        (_set("gamma_1", lambda block: Marked(block.gamma_1.detach())), 0, "gamma_1 is a Marked"),
        (_drop("attn.attn_drop"), 0, "attn.attn_drop is active"),
        (_drop("attn.proj_drop"), 0, "attn.proj_drop is active"),
        (_hook("mlp"), 1, "mlp has a hook"),
        (_hook("norm2"), 1, "norm2 has a hook"),
        (_hook("mlp", "fc2"), 1, "mlp.fc2 has a hook"),
        (_drop("mlp.drop1"), 1, "mlp.drop1 is active"),
        (
            _set("gamma_1", lambda block: nn.Parameter(block.gamma_1.bfloat16())),
            0,
            "gamma_1 is torch.bfloat16, what stands before it torch.float32",
        ),
        (
            _set("gamma_2", lambda block: nn.Parameter(block.gamma_2.bfloat16())),
            1,
            "gamma_2 is torch.bfloat16, what stands before it torch.float32",
        ),
    ],
    "transformers": [
        (_hook("norm1"), 0, "norm1 has a hook"),
        (_hook("attention"), 0, "attention has a hook"),
        (_hook("attention", "k_proj"), 0, "attention.k_proj has a hook"),
        (_hook("attention", "o_proj"), 0, "attention.o_proj has a hook"),
        (_hook("layer_scale1"), 0, "layer_scale1 has a hook"),
        (_drop_attention, 0, "attention.dropout is active"),
        (_set("attention.scaling", 0.1), 0, "attention.scaling is changed"),
        (_set("attention.is_causal", True), 0, "attention is causal"),
        (_hook("mlp"), 1, "mlp has a hook"),
        (_hook("mlp", "up_proj"), 1, "mlp.up_proj has a hook"),
        (_hook("layer_scale2"), 1, "layer_scale2 has a hook"),
        (_set("mlp.act_fn", nn.ReLU()), 1, "mlp.act_fn is a ReLU"),
    ],
}
CHANGES = [(library, *one) for library, every in ASIDES.items() for one in every]


@pytest.mark.parametrize(("library", "change", "half", "reason"), CHANGES, ids=[f"{c[0]}-{c[3]}" for c in CHANGES])
def test_what_stands_aside(library, change, half, reason):
    """One half, changed after accelerate; the other stays on its op."""
    model = BUILDS[library]()
    fast = _accelerated(model)
    for one in (model, fast):
        change(_blocks(one)[1])
    asides = _blocks(fast)[1].asides()
    assert asides[half].startswith(reason)
    assert asides[1 - half] == ""
    images, results = _images(), []
    for one in (fast, model):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(matrix.flat(one(images)))
    assert relative_error(*results) < 1e-5


# Arguments of a call on 21 tokens that no op computes, and why.
OTHER = "its positions are of other tokens or heads"
POSITIONS = {
    "a mask": ("timm", {"rope": torch.randn(16, 32), "attn_mask": torch.randn(21, 21)}, "a mask is given"),
    "a causal call": ("timm", {"rope": torch.randn(16, 32), "is_causal": True}, "a mask is given"),
    "positions of each image": ("timm", {"rope": torch.randn(2, 1, 16, 32)}, OTHER),
    "one position for all": ("timm", {"rope": torch.randn(1, 32)}, OTHER),
    "one table for all heads, given so": ("timm", {"rope": torch.randn(1, 16, 32)}, OTHER),
    "a mask in transformers": (
        "transformers",
        {"position_embeddings": torch.randn(2, 16, 16).unbind(), "attention_mask": torch.randn(2, 1, 21, 21)},
        "attention_mask is given",
    ),
    "positions of each image in transformers": (
        "transformers",
        {"position_embeddings": torch.randn(2, 2, 1, 16, 16).unbind()},
        OTHER,
    ),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_calls_that_no_op_computes(monkeypatch, name):
    library, arguments, reason = POSITIONS[name]
    block = _blocks(BUILDS[library]())[0]
    fast, calls, told = _accelerated(block), _counting(monkeypatch), []
    monkeypatch.setattr(foreign_block, "say_aside", lambda what, why: told.append(why))
    x = torch.randn(2, 21, 48)
    with torch.no_grad():
        assert relative_error(fast(x, **arguments), block(x, **arguments)) < 1e-5
    assert (calls, told) == ([], [reason])


# What a block of timm's is built with that no op computes, and why; the other half runs on its op.
BUILT = {
    "norms before a turn": ({"attn_type": "rope", "qk_norm": True}, "attn.q_norm is a LayerNorm"),
    "fewer heads of keys": (
        {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1},
        "attn has fewer heads of keys than of queries",
    ),
    "a norm behind a gate": ({"swiglu_mlp": True, "scale_mlp": True}, "mlp has a norm behind its gate"),
}


@pytest.mark.parametrize("name", BUILT)
def test_what_a_block_is_built_with(name):
    more, reason = BUILT[name]
    block = drawn(eva.EvaBlock(48, 3, num_prefix_tokens=5, **more))
    fast, x = copy.deepcopy(block), torch.randn(2, 21, 48)
    (line,) = vit_fast.accelerate(fast)
    assert (line.replaced, line.op, line.reason) == (True, "rope_attention" if "mlp" in reason else "mlp", reason)
    for rope in (torch.randn(16, 32), None):
        with torch.no_grad():
            assert relative_error(fast(x, rope), block(x, rope)) < 1e-5


def test_heads_that_are_not_the_width_together(monkeypatch):
    block = drawn(eva.EvaBlock(48, 3, num_prefix_tokens=5, attn_type="rope", attn_head_dim=32))
    fast, calls, x, rope = _accelerated(block), _counting(monkeypatch), torch.randn(2, 21, 48), torch.randn(16, 64)
    with torch.no_grad():
        assert relative_error(fast(x, rope), block(x, rope)) < 1e-5
    assert calls == [((2, 21, 3, 3, 32), (16, 32), not block.attn.rotate_half)]


def test_biases_of_another_dtype(monkeypatch):
    """Which PyTorch's own code joins to the others, in the wider of both."""
    block = drawn(eva.EvaBlock(48, 3, num_prefix_tokens=5))
    fast, calls = _accelerated(block), _counting(monkeypatch)
    for one in (block, fast):
        one.attn.q_bias = nn.Parameter(block.attn.q_bias.detach().bfloat16())
    assert fast.asides() == ("attn holds torch.float32, what stands before it torch.bfloat16", "")
    x, rope = torch.randn(2, 21, 48), torch.randn(16, 32)
    with torch.no_grad():
        assert relative_error(fast(x, rope), block(x, rope)) < 1e-5
    assert not calls


class Marked(nn.Parameter):
    """A parameter of somebody's own class."""


@pytest.mark.parametrize("kind", [eva.EvaAttention, timm.layers.AttentionRope])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_biases_of_timms_attention(monkeypatch, kind, fused, bias):
    """One weight or three; biases that are joined in each call, some of them none."""
    attn_type = "rope" if kind is timm.layers.AttentionRope else "eva"
    block = drawn(eva.EvaBlock(48, 3, bias, fused, num_prefix_tokens=5, attn_type=attn_type, scale_attn_inner=True))
    assert type(block.attn) is kind
    fast, calls = _accelerated(block), _counting(monkeypatch)
    x, rope = torch.randn(2, 21, 48), torch.randn(16, 32)
    gradients = []
    for one in (fast, block):
        y = one(x, rope)
        wanted = dict(one.named_parameters())
        found = torch.autograd.grad(y, list(wanted.values()), torch.ones_like(y))
        gradients.append(dict(zip(wanted, found)))
    assert calls
    matrix.assert_equal_gradients(*gradients)


def test_attentions_are_returned():
    """By transformers' own code in its eager form; afterwards all is as before."""
    model = _transformers()
    model.set_attn_implementation("eager")
    fast, images = _accelerated(model), _images()
    with torch.no_grad():
        ours, theirs = (one(images, output_attentions=True).attentions for one in (fast, model))
        assert len(ours) == 2
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, theirs))
    _assert_alike(fast, model, images)


def test_an_attention_of_the_users():
    class Mine(timm.layers.AttentionRope):
        def forward(self, x, *args, **kwargs):
            return super().forward(x, *args, **kwargs) * 2

    model = _timm("vit_pe_core_tiny_patch16_384")
    _blocks(model)[1].attn.__class__ = Mine
    fast = copy.deepcopy(model)
    lines = [line for line in vit_fast.accelerate(fast) if line.op != "patch_embed"]
    assert [(line.op, line.reason) for line in lines] == [("rope_attention, mlp", ""), ("mlp", "attn is a Mine")]
    _assert_alike(fast, model, _images())


PATCHED = [
    ("timm", eva.EvaBlock, "forward"),
    ("timm", eva.EvaAttention, "forward"),
    ("timm", eva, "apply_rot_embed_cat"),
    ("timm, AttentionRope", timm.layers.attention, "apply_rot_embed_cat"),
    ("transformers", modeling_dinov3_vit.DINOv3ViTLayer, "forward"),
    ("transformers", modeling_dinov3_vit.DINOv3ViTAttention, "forward"),
    ("transformers", modeling_dinov3_vit, "apply_rotary_pos_emb"),
    ("transformers", modeling_dinov3_vit.DINOv3ViTMLP, "forward"),
]


@pytest.mark.parametrize(("library", "kind", "name"), PATCHED)
def test_what_somebody_patches_afterwards(monkeypatch, library, kind, name):
    model = _timm("vit_pe_core_tiny_patch16_384") if "AttentionRope" in library else BUILDS[library]()
    hold_to_a_patch(monkeypatch, model, _accelerated(model), _images(), kind, name, _counting)
