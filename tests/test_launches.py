"""What one block launches, by name: at batch 1 a ViT waits for launches, not for arithmetic."""

import collections
import gc
import weakref

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import vit_fast

# Everything that a block launches, in order, PyTorch's own ops among it where there are any.
FORWARD = [
    "layer_norm._forward_kernel",  # norm1
    "ln_linear._forward_kernel",  # qkv
    "attention._forward_kernel",
    "linear_residual._forward_kernel",  # the projection
    "layer_norm._forward_kernel",  # norm2
    "mlp._fc1_kernel",  # fc1 and the activation
    "linear_residual._forward_kernel",  # fc2
]
BACKWARD = [
    "mlp._hidden_grad_kernel",  # fc2's input gradient through the activation
    "linear._weight_grad_kernel",  # fc2, first stage
    "linear._input_grad_kernel",  # fc1
    "layer_norm._backward_kernel",  # through norm2, and the residual's
    "linear._weight_grad_kernel",  # fc1
    "linear._input_grad_kernel",  # the projection
    "linear._weight_grad_kernel",
    "attention._grad_kernel",  # above 272 tokens two take its place
    "linear._input_grad_kernel",  # qkv
    "layer_norm._backward_kernel",  # through norm1, and the residual's
    "linear._weight_grad_kernel",
    "linear._finish_kernel",  # the second stages of all four weights and biases, LayerScale
    "layer_norm._finish_kernel",  # the weights and biases of both norms
]
# drop∘dy and drop∘dy∘γ at the head of the second half, with a LayerScale or a drop path; norm2's gradient writes those
# of the first.
BRANCH = "linear._branch_kernel"
MOST = 22  # forward and backward, as many as attention takes
CASTS = 4 * ["aten._to_copy.default"]  # PyTorch's own: of the four weights under autocast, and of their gradients
ALLOCATE = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::resize_")
DRAW = ["aten.bernoulli_.float", "aten.div_.Tensor"]  # PyTorch's own: the drop path's, once for each half, where active


class Launches(TorchDispatchMode):
    """Notes, in order, all that would launch a kernel on a GPU: interpreted Triton kernels and PyTorch's own ops.

    A dispatch mode does not see into an opaque op, so the body of each vit_fast op is called here, with the mode on.
    To be used without inference mode, which hides what composite ops are made of.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def noting(executor, *args, **kwargs):
            self.names.append(f"{executor.fn.__module__}.{executor.fn.__name__}".removeprefix("vit_fast.kernels."))
            with _disable_current_modes():  # what the interpreter itself does with tensors
                return launch(executor, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", noting)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "vit_fast":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        if self._launches(func, args, result):
            self.names.append(str(func))
        return result

    @staticmethod
    def _launches(func, args, result) -> bool:
        """Not: what gives no tensor, what only allocates, and what only looks at an argument in another way."""
        if func._schema.name in ALLOCATE:
            return False
        if func._schema.is_mutable:
            return True
        made = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        given = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage().data_ptr() for t in given}
        return any(t.untyped_storage().data_ptr() not in known for t in made)


def launches(monkeypatch, function) -> list[str]:
    with monkeypatch.context() as patch, vit_fast.use_backend("triton"), Launches(patch) as seen:
        function()
    return seen.names


def test_the_counter_sees_what_it_should(monkeypatch):
    x = torch.randn(4, 6)
    with torch.no_grad(), Launches(monkeypatch) as seen:
        x.t().reshape(-1)  # a copy: no view can be
        x.view(-1).unbind()  # views
        torch.nn.functional.linear(x, x, x.new_empty(4))
        x.to(torch.float32)  # itself
        x.to(torch.float16)
        x.add_(1)
    assert seen.names == ["aten.clone.default", "aten.addmm.default", "aten._to_copy.default", "aten.add_.Tensor"]


SMALL = {"embed_dim": 32, "num_heads": 2, "img_size": 32, "num_classes": 5}


def _model(depth: int, **options):
    """ViT-B's structure, its width and picture made small, without a pool: every block computes every token."""
    return vit_fast.create_model("vit_base_patch16_224", depth=depth, **SMALL, **{"global_pool": "", **options})


def _assert_each_block_launches(block: list[str], names: dict[int, list[str]], beside: int) -> None:
    """names[depth] is what models of two depths launched: the same before and after the blocks, and `block` in each."""
    depth = min(names)
    first = next(i for i in range(len(names[depth])) if names[depth][i : i + len(block)] == block)
    before, after = names[depth][:first], names[depth][first + depth * len(block) :]
    assert len(before) + len(after) <= beside, "\n".join([*before, "---", *after])
    for depth in names:
        assert names[depth] == before + depth * block + after


@pytest.mark.interpret
def test_inference(monkeypatch):
    images, names = torch.randn(1, 3, 32, 32), {}
    for depth in (2, 3):
        model = _model(depth).eval()
        with torch.no_grad():
            names[depth] = launches(monkeypatch, lambda model=model: model(images))
    _assert_each_block_launches(FORWARD, names, beside=4)


@pytest.fixture
def memory(monkeypatch):
    """A function that calls another one, and gives the most and the last bytes of what kernels had made by then."""
    live, seen = {}, []

    def noted(make):
        def call(*args, **kwargs):
            gc.collect()  # the interpreter leaves the arguments of a launch in a circle
            made = make(*args, **kwargs)
            storage = made.untyped_storage()
            live[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, live.pop, storage._cdata)
            seen.append(sum(live.values()))
            return made

        return call

    def run(function):
        seen.clear()
        with vit_fast.use_backend("triton"), monkeypatch.context() as patch:
            for name in ("empty", "empty_like"):
                patch.setattr(torch, name, noted(getattr(torch, name)))
            result = function()
        gc.collect()
        return result, max(seen), sum(live.values())

    return run


MLPS = {"GELU": {}, "SwiGLU": {"mlp_layer": vit_fast.layers.SwiGLUPacked, "act_layer": "silu", "mlp_ratio": 8}}


@pytest.mark.interpret
@pytest.mark.parametrize("options", MLPS.values(), ids=MLPS)
def test_memory_between_the_launches_of_inference(options, memory):
    """At most the residual stream, the hidden layer and what is read or written beside them: 6·D a token."""
    block, x = _model(1, **options).eval().blocks[0], torch.randn(2, 17, 32)
    with torch.no_grad():
        y, most, last = memory(lambda: block(x))
    assert most == 6 * x.nbytes
    assert last == y.nbytes


@pytest.mark.interpret
@pytest.mark.parametrize(("mlp", "forward", "backward"), [("GELU", 14.5, 19.5), ("SwiGLU", 18.5, 27.0)])
def test_memory_between_the_launches_of_training(mlp, forward, backward, memory):
    """In D's a token. Backward begins with what forward keeps, 10 or 14 with the result; its height is the gradients of
    the hidden layer, two or three times as wide, and of what they are made of; an eighth is the weights' of so few
    tokens."""
    block, x = _model(1, **MLPS[mlp]).train().blocks[0], torch.randn(2, 170, 32, requires_grad=True)
    y, most, _ = memory(lambda: block(x))
    assert most <= forward * x.nbytes
    _, most, _ = memory(lambda: torch.autograd.grad(y, [x, *block.parameters()], torch.ones_like(y)))
    assert most <= backward * x.nbytes


@pytest.mark.interpret
@pytest.mark.parametrize("options", [{}, {"init_values": 0.1}], ids=["plain", "layer scale"])
def test_forward_and_backward(options, monkeypatch):
    """Whatever autograd adds to a block's own kernels would be seen too: nothing."""
    images, forward, backward = torch.randn(1, 3, 32, 32), {}, {}
    for depth in (1, 2):
        model, logits = _model(depth, **options).train(), []
        forward[depth] = launches(monkeypatch, lambda model=model, logits=logits: logits.append(model(images)))
        upstream = torch.randn(logits[0].shape)
        backward[depth] = launches(monkeypatch, lambda logits=logits, upstream=upstream: logits[0].backward(upstream))
        assert all(parameter.grad is not None for parameter in model.parameters())
    expected = [BRANCH, *BACKWARD] if options else BACKWARD
    assert len(FORWARD) + len(expected) < MOST, "above 272 tokens attention takes one more"
    _assert_each_block_launches(FORWARD, forward, beside=4)
    _assert_each_block_launches(expected, backward, beside=14)


@pytest.mark.interpret
def test_a_frozen_block_makes_no_gradient_of_its_own(monkeypatch):
    """As between adapters, or behind prompts that are trained."""
    block, x, y = _model(1).blocks[0].train().requires_grad_(False), torch.randn(2, 5, 32, requires_grad=True), []
    assert launches(monkeypatch, lambda: y.append(block(x))) == FORWARD
    upstream = torch.randn(x.shape)
    expected = [name for name in BACKWARD if not name.endswith(("_weight_grad_kernel", "_finish_kernel"))]
    assert launches(monkeypatch, lambda: y[0].backward(upstream)) == expected
    assert len(expected) == len(BACKWARD) - 6


@pytest.mark.interpret
def test_the_last_block_before_a_pool_of_the_class_token(monkeypatch):
    """norm1 and the product for keys and values, and for the queries of one token; the rest is as in every block."""
    model, images = _model(1, global_pool="token").train(), torch.randn(1, 3, 32, 32)
    logits = []
    names = launches(monkeypatch, lambda: logits.append(model(images)))
    assert [name for name in names if not name.startswith(("aten.", "patch_embed."))] == [*FORWARD[:2], *FORWARD]
    names = launches(monkeypatch, lambda: logits[0].sum().backward())
    ours = [name for name in names if not name.startswith(("aten.", "patch_embed."))]
    assert collections.Counter(ours)["linear._weight_grad_kernel"] == 1 + 5  # the patches'; two of qkv
    assert len(ours) == 2 + 21  # two of the patches
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.interpret
def test_the_drop_path_adds_its_two_draws(monkeypatch):
    block = _model(1, drop_path_rate=0.5).blocks[0].train()
    block.drop_path1 = block.drop_path2 = vit_fast.layers.DropPath(0.5)
    x, y = torch.randn(2, 5, 32), []
    assert launches(monkeypatch, lambda: y.append(block(x))) == DRAW + DRAW + FORWARD
    upstream = torch.randn(x.shape)
    assert launches(monkeypatch, lambda: y[0].backward(upstream)) == [BRANCH, *BACKWARD]


@pytest.mark.interpret
def test_autocast_adds_its_casts(monkeypatch):
    """On a GPU autocast keeps those of the weights for the whole of its region."""
    block = _model(1).blocks[0].train()
    x, y = torch.randn(2, 5, 32), []
    with torch.autocast("cpu", torch.bfloat16):
        assert launches(monkeypatch, lambda: y.append(block(x))) == CASTS + FORWARD
    upstream = torch.randn(x.shape)
    assert launches(monkeypatch, lambda: y[0].backward(upstream)) == [BRANCH, *BACKWARD, *CASTS]
