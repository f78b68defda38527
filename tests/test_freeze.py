"""Blocks with frozen weights: their numbers, when they serve, and all that ends them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import vit_fast
from tests import unfused
from tests.error_rule import assert_close_to_truth
from tests.guard import guarded
from tests.ops.test_block import composed, shaped
from vit_fast import reference
from vit_fast.freeze import fold
from vit_fast.layers import Block, LayerScale
from vit_fast.ops import use_backend

HALF = [torch.float16, torch.bfloat16]
halves = pytest.mark.parametrize("dtype", HALF)
interpret = pytest.mark.interpret


def block_of(width: int = 48, heads: int = 3, full: bool = True, dtype=torch.float16, **options) -> tuple[Block, dict]:
    """A block in evaluation mode and its parameters by the names of `ops.block`, as in tests/ops/test_block.py."""
    block = Block(width, heads, 2, full, proj_bias=full, init_values=0.5 if full else None, dtype=dtype, **options)
    drawn = shaped(2, 4, width, 2 * width, full)() | {"drop1": None, "drop2": None}
    modules = {
        "norm1": block.norm1,
        "qkv": block.attn.qkv,
        "proj": block.attn.proj,
        "norm2": block.norm2,
        "fc1": block.mlp.fc1,
        "fc2": block.mlp.fc2,
    }
    places = {f"{name}_{part}": (module, part) for name, module in modules.items() for part in ("weight", "bias")}
    for name, scale in (("layer_scale1", block.ls1), ("layer_scale2", block.ls2)):
        if type(scale) is LayerScale:
            places[name] = (scale, "gamma")
    with torch.no_grad():
        for name, (module, part) in places.items():
            if drawn[name] is not None:
                getattr(module, part).copy_(drawn[name])
    found = {name: getattr(*places[name]) if name in places else None for name in drawn if name != "x"}
    return block.eval(), found


@pytest.fixture
def folded_calls(monkeypatch):
    """Of each call of the kernels of a block, whether it got folded weights."""
    from vit_fast.kernels import block as kernel

    seen, forward = [], kernel.forward

    def noting(*args):
        seen.append(args[-1] != (None, None))
        return forward(*args)

    monkeypatch.setattr(kernel, "forward", noting)
    return seen


@torch.no_grad()
def on_kernels(block, x):
    with use_backend("triton"):
        return block(x)


def model_of(dtype=torch.float16, **options):
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5} | options
    return vit_fast.VisionTransformer(**options, dtype=dtype).eval()


# --- numbers


@interpret
@halves
@pytest.mark.parametrize(
    ("full", "tokens", "mean", "std"),
    [
        pytest.param(True, 17, 0.0, 1.0, id="every operand"),
        pytest.param(False, 9, 0.0, 1.0, id="nothing but the products"),
        pytest.param(True, 17, 1.0, 1 / 30, id="a mean of thirty deviations"),
        pytest.param(True, 17, 1.0, 1 / 100, id="a mean of a hundred deviations"),
    ],
)
def test_a_frozen_block_obeys_the_error_rule(full, tokens, mean, std, dtype, folded_calls, guarded_memory):
    block, parameters = block_of(full=full, dtype=dtype)
    x = (mean + std * torch.randn(3, tokens, 48, dtype=torch.float64)).to(dtype)
    settings = {"num_heads": 3, "activation": "gelu", "eps1": 1e-6, "eps2": 1e-6}
    exact = {name: None if t is None else t.detach().double() for name, t in parameters.items()}
    truth = composed(reference)(x.double(), **exact, **settings)
    with torch.no_grad():
        peer = composed(unfused)(x, **parameters, **settings)
    ours = on_kernels(vit_fast.freeze(block), guarded(x))
    assert folded_calls == [True]
    assert_close_to_truth(ours, peer, truth)


def rows_of(kind: str, count: int, width: int) -> torch.Tensor:
    normal = torch.randn(count, width, dtype=torch.float64)
    return {
        "ordinary": normal,
        "mean 30 deviations": 30 + normal,
        "mean 100 deviations": 100 + normal,
        "mean 1000 deviations": 1000 - normal,
        "mean 1e4, variance 1e-4": 1e4 + 1e-2 * normal,
        "all equal": torch.full((count, width), -3.7, dtype=torch.float64),
        "zero": 0 * normal,
    }[kind]


KINDS = [
    "mean 30 deviations",
    "mean 100 deviations",
    "mean 1000 deviations",
    "mean 1e4, variance 1e-4",
    "all equal",
    "zero",
]


def _product(op: str, x, parameters, eps):
    """y [M, N] of the folded ln_linear, or h of the folded MLP: before a residual that would hide its error."""
    from vit_fast.kernels import ln_linear, mlp

    weight, shift, row_sums = fold(*parameters)
    if op == "ln_linear":
        return ln_linear.forward(x, None, None, weight, shift, eps, "ieee", row_sums)[0]
    fc2 = (torch.zeros(x.shape[1], len(weight), dtype=x.dtype), None, None, None)
    return mlp.forward(x, None, None, weight, shift, *fc2, "gelu", eps, len(x), "ieee", True, None, row_sums)[1]


def adversarial(kind: str, together: bool, dtype: torch.dtype, eps: float) -> tuple:
    """x [M, K] with ordinary rows among these, in the same tiles of 32 rows or not; parameters; truth and peer."""
    kinds = [rows_of("ordinary", 40, 70), rows_of(kind, 40, 70)]
    x = (
        torch.stack(kinds, dim=1).flatten(0, 1) if together else torch.cat([kinds[0][:32], kinds[1], kinds[0][32:]])
    ).to(dtype)
    drawn = shaped(1, 1, 70, 45)()
    names = ("norm2_weight", "norm2_bias", "fc1_weight", "fc1_bias")
    parameters = [drawn[name].to(dtype) for name in names]
    truth = reference.ln_linear(x.double(), *(t.double() for t in parameters), eps)
    return x, parameters, truth, unfused.ln_linear(x, *parameters, eps)


@interpret
@halves
@pytest.mark.parametrize("eps", [1e-6, 1e-12])
@pytest.mark.parametrize("together", [True, False], ids=["same tiles", "other tiles"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", ["ln_linear", "mlp"])
def test_rows_that_the_folded_form_cannot_do(op, kind, together, eps, dtype):
    x, parameters, truth, peer = adversarial(kind, together, dtype, eps)
    ours = _product(op, x, parameters, eps)
    assert_close_to_truth(ours, peer, truth)
    # Each kind for itself: beside the other's errors its own might not be seen.
    rare = torch.arange(80) % 2 == 1 if together else (torch.arange(80) >= 32) & (torch.arange(80) < 72)
    for rows in (rare, ~rare):
        assert_close_to_truth(ours[rows], peer[rows], truth[rows])


@interpret
@halves
@pytest.mark.parametrize("kind", ["mean 1e4, variance 1e-4", "all equal"])
@pytest.mark.parametrize("op", ["ln_linear", "mlp"])
def test_it_is_the_guard_that_saves_them(op, kind, dtype, monkeypatch):
    import triton.language as tl
    from vit_fast.kernels import ln_linear

    monkeypatch.setattr(ln_linear, "FOLD_LIMIT", tl.constexpr(float("inf")))
    x, parameters, truth, peer = adversarial(kind, True, dtype, 1e-12)
    with pytest.raises(AssertionError, match="output"):
        assert_close_to_truth(_product(op, x, parameters, 1e-12), peer, truth)


# --- what ends it


def small(dtype=torch.float16, **options) -> Block:
    return block_of(32, 2, dtype=dtype, **options)[0]


def drawn_anew(module: nn.Module) -> dict:
    return {name: torch.randn_like(t) / 4 for name, t in module.state_dict().items()}


def rewrite(parameter: nn.Parameter, context=torch.no_grad) -> None:
    with context():
        parameter.mul_(1.5)


def step(block: Block) -> None:
    """Of a fused optimiser: it writes without being counted."""
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.3, fused=True)
    with use_backend("torch"):
        block(torch.randn(2, 3, 32, dtype=block.norm1.weight.dtype)).square().sum().backward()
    optimizer.step()


def there_and_back(block: Block) -> None:
    """What was bf16 in between is not what it was; the parameters are the same objects, not counted as written to."""
    block.to(torch.bfloat16).to(torch.float16)


ENDS = {
    "train()": lambda block: block.train().eval(),
    "train() of what holds it": lambda block: nn.Sequential(block).train().eval(),
    "load_state_dict()": lambda block: block.load_state_dict(drawn_anew(block)),
    "load_state_dict(assign=True)": lambda block: block.load_state_dict(drawn_anew(block), assign=True),
    "load_state_dict() of what holds it": lambda block: nn.ModuleDict({"a": block}).load_state_dict(
        {f"a.{name}": t for name, t in drawn_anew(block).items()}
    ),
    "load_state_dict() of its attention": lambda block: block.attn.load_state_dict(drawn_anew(block.attn)),
    "load_state_dict() of one norm": lambda block: block.norm2.load_state_dict(drawn_anew(block.norm2)),
    "another dtype and back": there_and_back,
    "a write": lambda block: rewrite(block.mlp.fc1.bias),
    "a write in inference mode": lambda block: rewrite(block.norm1.bias, torch.inference_mode),
    "a step of training": step,
    "another parameter": lambda block: setattr(block.norm1, "weight", nn.Parameter(torch.randn(32).half())),
    "another module": lambda block: setattr(block.mlp, "fc1", nn.Linear(32, 64, dtype=torch.float16)),
    "a bias gone": lambda block: block.attn.qkv.register_parameter("bias", None),
}


@interpret
@pytest.mark.parametrize("end", ENDS)
def test_ended_by(end, folded_calls):
    """The block then gives, to the bit, what a block with these parameters gives that was never frozen."""
    block, x = vit_fast.freeze(small()), torch.randn(2, 3, 32).half()
    before = on_kernels(block, x)
    ENDS[end](block)
    ours = on_kernels(block, x)
    assert folded_calls == [True, False]
    assert "frozen" not in str(vit_fast.explain(block))
    never = copy.deepcopy(block)
    assert never.folded is None
    assert torch.equal(ours, on_kernels(never, x))
    if end not in ("train()", "train() of what holds it", "another dtype and back"):
        assert not torch.allclose(ours, before, atol=0.1), "the change is one that a stale weight would not show"
    frozen = on_kernels(vit_fast.freeze(block.eval()), x)
    assert folded_calls == [True, False, False, True]
    torch.testing.assert_close(frozen, ours, rtol=2e-2, atol=2e-2)


@interpret
def test_other_blocks_stay_frozen(folded_calls):
    model = vit_fast.freeze(nn.Sequential(small(), small()).eval())
    model[0].load_state_dict(drawn_anew(model[0]))
    on_kernels(model, torch.randn(2, 3, 32).half())
    assert folded_calls == [False, True]


@interpret
def test_evaluation_mode_again_does_not_end_it(folded_calls):
    block = vit_fast.freeze(small()).eval()
    on_kernels(block, torch.randn(2, 3, 32).half())
    assert folded_calls == [True]


@pytest.mark.parametrize("twin", [copy.deepcopy, copy.copy, lambda module: pickle.loads(pickle.dumps(module))])
def test_no_copy_is_frozen(twin):
    block = vit_fast.freeze(small())
    assert twin(block).folded is None
    assert block.folded is not None


def test_nothing_of_it_is_a_part_of_the_model():
    def saved(content) -> int:
        file = io.BytesIO()
        torch.save(content, file)
        return len(file.getvalue())

    model = model_of()
    names = [list(model.state_dict()), [name for name, _ in model.named_parameters()], list(model.buffers())]
    sizes = saved(model), saved(model.state_dict())
    assert vit_fast.freeze(model) is model
    assert all(block.folded for block in model.blocks)
    assert names == [list(model.state_dict()), [name for name, _ in model.named_parameters()], list(model.buffers())]
    assert (saved(model), saved(model.state_dict())) == sizes


# --- gradients


@interpret
@pytest.mark.parametrize("train", [True, False], ids=["train()", "evaluation mode"])
def test_training_afterwards_is_that_of_a_model_never_frozen(train, folded_calls):
    blocks = [small(drop_path=0.5)]
    blocks.append(copy.deepcopy(blocks[0]))
    vit_fast.freeze(blocks[1])
    x, results = torch.randn(4, 3, 32).half(), []
    for block in blocks:
        torch.manual_seed(0)
        block.train(train)
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        with use_backend("triton"):
            for _ in range(2):
                y = block(x)
                optimizer.zero_grad()
                y.square().mean().backward()
                optimizer.step()
        results.append([y, *block.parameters(), *(p.grad for p in block.parameters())])
    assert folded_calls == [False] * 4
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs)


@interpret
def test_the_gradient_of_an_input_takes_the_parameters(folded_calls):
    """They do not change by it: the block stays frozen."""
    block = small().requires_grad_(False)
    x = torch.randn(2, 3, 32).half().requires_grad_()

    def results() -> tuple:
        with use_backend("triton"):
            y = block(x)
            return y, *torch.autograd.grad(y, x, torch.ones_like(y))

    expected = results()
    vit_fast.freeze(block)
    assert all(map(torch.equal, results(), expected))
    on_kernels(block, x)
    assert folded_calls == [False, False, True]


# --- where it does not serve


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_pytorch_runs_as_before(dtype):
    model, images = model_of(dtype), torch.randn(2, 3, 16, 16, dtype=dtype)
    with torch.no_grad(), use_backend("torch"):
        expected = model(images)
        assert torch.equal(vit_fast.freeze(model)(images), expected)


def with_hook() -> Block:
    block = small()
    block.norm1.register_forward_hook(lambda *_: None)
    return block


def with_norm_weight(value: float, dtype) -> Block:
    block = small(dtype)
    nn.init.constant_(block.norm2.weight, value)
    return block


@torch.inference_mode()
def made_in_inference_mode() -> Block:
    return small()


LEFT = {
    "fp32": lambda: small(torch.float32),
    "fp64": lambda: small(torch.float64),
    "some of it in fp32": lambda: small().apply(lambda m: m.float() if type(m) is nn.LayerNorm else None),
    "a hook": with_hook,
    "norms of queries and keys": lambda: small(qk_norm=True),
    "a norm in the MLP": lambda: small(scale_mlp_norm=True),
    "a norm behind attention": lambda: small(scale_attn_norm=True),
    "a head width without kernel": lambda: block_of(32, 4)[0],
    "a folded weight that overflows": lambda: with_norm_weight(6e4, torch.float16),
    "a folded weight that underflows": lambda: with_norm_weight(1e-5, torch.float16),
    "not a number": lambda: with_norm_weight(float("nan"), torch.bfloat16),
    "parameters made in inference mode": made_in_inference_mode,
    "the meta device": lambda: small().to("meta"),
}


@pytest.mark.parametrize("why", LEFT)
def test_left_as_it_is(why):
    block = LEFT[why]()
    assert vit_fast.freeze(block).folded is None


@pytest.mark.parametrize("value", [1e-5, 6e4])
def test_bf16_has_room_for_what_fp16_has_not(value):
    assert vit_fast.freeze(with_norm_weight(value, torch.bfloat16)).folded is not None


@interpret
def test_hooks_set_afterwards_are_honoured(folded_calls):
    block, x = vit_fast.freeze(small()), torch.randn(2, 3, 32).half()
    expected = on_kernels(block, x)
    seen = []
    handle = block.norm2.register_forward_hook(lambda *_: seen.append(1))
    on_kernels(block, x)
    assert seen == [1]
    assert "frozen" not in str(vit_fast.explain(block))
    handle.remove()
    assert torch.equal(on_kernels(block, x), expected)
    assert folded_calls == [True, True]


@interpret
def test_tokens_in_fp32_are_not_rounded_before_they_are_centred(folded_calls):
    """Under autocast parameters in bf16 may meet tokens in fp32."""
    block, x = vit_fast.freeze(small(torch.bfloat16)), torch.randn(2, 3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        on_kernels(block, x)
        on_kernels(block, x.bfloat16())
    assert folded_calls == [False, True]


# --- compile, export, explain, refusals


@interpret
@torch.no_grad()
def test_compiled(folded_calls):
    """Frozen before or after, ended by whatever ends it: a compiled model does as an eager one does."""
    model, x = nn.Sequential(small(), small()).eval(), torch.randn(2, 3, 32).half()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def same_as_eager(first: bool, second: bool) -> None:
        folded_calls.clear()
        with use_backend("triton"):
            assert torch.equal(compiled(x), model(x))
        assert folded_calls == [first, second] * 2

    same_as_eager(False, False)
    vit_fast.freeze(model)
    same_as_eager(True, True)
    rewrite(model[0].attn.qkv.weight)
    same_as_eager(False, True)
    model[1].mlp.fc1.load_state_dict(drawn_anew(model[1].mlp.fc1))
    same_as_eager(False, False)
    vit_fast.freeze(model)
    same_as_eager(True, True)
    model.train().eval()
    same_as_eager(False, False)


@interpret
@pytest.mark.parametrize("strict", [False, True])
def test_exported_from_the_parameters(strict):
    model, images = vit_fast.freeze(model_of()), torch.randn(2, 3, 16, 16).half()
    with use_backend("triton"):
        program = torch.export.export(model, (images,), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("vit_fast" in target for target in targets)
    with torch.no_grad(), use_backend("torch"):
        torch.testing.assert_close(program.module()(images), model(images))
    assert all(block.folded for block in model.blocks)


@interpret
def test_opcheck():
    block, parameters = block_of(32, 2, dtype=torch.float16)
    folded = vit_fast.freeze(block).folded
    x = torch.randn(2, 3, 32).half()
    values = [None if t is None else t.detach() for t in parameters.values()]
    for extra in ((folded.operands, folded.writes), (None, None)):
        torch.library.opcheck(torch.ops.vit_fast.block.default, (x, *values, 2, "gelu", 1e-6, 1e-6, *extra))


@interpret
def test_explain_says_which_blocks_are_frozen():
    model = vit_fast.freeze(model_of())
    model.blocks[1].train().eval()
    with use_backend("triton"):
        lines = [line.name for line in vit_fast.explain(model) if "frozen, where no gradient is wanted" in line.reason]
    assert lines == ["blocks.0.attn", "blocks.0.mlp"]
    assert "frozen" not in str(vit_fast.explain(model)), "PyTorch runs, and takes the parameters"


def test_refused():
    model = model_of()
    with pytest.raises(ValueError, match=r"model: got one in training mode.*model.eval\(\)"):
        vit_fast.freeze(model.train())
    model.eval().blocks[1].train()
    with pytest.raises(ValueError, match="training mode"):
        vit_fast.freeze(model)
    assert model.blocks[0].folded is None
    with pytest.raises(ValueError, match="got Linear without any block"):
        vit_fast.freeze(nn.Linear(2, 2).eval())
