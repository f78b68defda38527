"""Dispatch by evidence: where PyTorch was measured to be faster it runs, and nowhere else."""

import json
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

pytest.importorskip("triton", reason="the architecture's name comes from the tile tables")

from vit_fast.kernels import tile_table

import vit_fast
from benchmarks import evidence as maker
from tests.test_backend import Namespaces, operands
from vit_fast import ops, use_backend
from vit_fast.ops import backend, evidence

# The modules, in whose place vit_fast.ops has the functions.
attention, block = (sys.modules[f"vit_fast.ops.{name}"] for name in ("attention", "block"))

# Shape and rows of the small calls of test_backend: 2 images of 5 tokens, 32 wide, 2 heads, hidden width 48.
SMALL = {
    "patch_embed": ("patch_embed", (32, 48), 8),
    "ln_linear": ("ln_linear", (48, 32), 10),
    "attention": ("attention", (5, 5, 16), 4),
    "attention_qkv": ("attention", (5, 5, 16), 4),
    "linear_residual": ("linear_residual", (32, 32), 10),
    "mlp": ("mlp", (32, 48), 10),
}
FOUND = evidence.Finding("attention", False, torch.float32, (5, 5, 16), 4, "sdpa math", "PyTorch was faster")


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Every call of `auto` as on a GPU of capability 9.0; nothing is known of it but what a test says."""
    monkeypatch.setattr(backend, "_auto", lambda device: True)
    says(monkeypatch)
    monkeypatch.setattr(tile_table, "architecture", lambda device: "sm_90")


def says(monkeypatch, *found):
    monkeypatch.setattr(backend, "findings", lambda op, device: [one for one in found if one.op == op])


def runs_kernels(op, arguments) -> bool:
    with Namespaces() as seen:
        op(*arguments)
    return "vit_fast" in seen.names


def test_of_bytes_nothing_was_measured(monkeypatch):
    with FakeTensorMode():
        call, arguments = operands()["patch_embed"]
        op, shape, rows = SMALL["patch_embed"]
        says(monkeypatch, FOUND._replace(op=op, shape=shape, rows=rows))
        assert not runs_kernels(call, arguments)
        images, *others = arguments
        assert runs_kernels(call, (images.byte(), *others, (0.5,) * 3, (0.5,) * 3))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_pytorch_runs_where_it_was_measured_faster(name, training, monkeypatch):
    op, shape, rows = SMALL[name]
    found = FOUND._replace(op=op, shape=shape, rows=rows, training=training)
    with FakeTensorMode():
        call, arguments = operands()[name]
        index = 1 if name == "patch_embed" else 0  # an image with a gradient is PyTorch's in any case
        arguments[index].requires_grad_(training)
        assert runs_kernels(call, arguments), "nothing is known"
        says(monkeypatch, found)
        assert not runs_kernels(call, arguments)
        for other in (
            found._replace(rows=rows + 1),
            found._replace(shape=(*shape[:-1], shape[-1] + 1)),
            found._replace(training=not training),
            found._replace(dtype=torch.float16),
            found._replace(op="another"),
        ):
            says(monkeypatch, other)
            assert runs_kernels(call, arguments), other
        says(monkeypatch, found._replace(rows=rows - 1))
        assert not runs_kernels(call, arguments), "more rows than were measured"


def test_under_autocast_its_dtype_counts(monkeypatch):
    says(monkeypatch, FOUND._replace(dtype=torch.bfloat16))
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        call, arguments = operands()["attention_qkv"]
        assert not runs_kernels(call, arguments)


def test_who_asks_for_kernels_gets_them(monkeypatch):
    says(monkeypatch, FOUND)
    monkeypatch.setattr(backend, "_why_not_forced", lambda device: "")
    with FakeTensorMode(), use_backend("triton"):
        call, arguments = operands()["attention"]
        assert runs_kernels(call, arguments)


@pytest.mark.parametrize("form", attention.SDPA)
def test_attention_runs_in_the_form_that_was_measured(form, monkeypatch):
    """It is asked for first, and the result is PyTorch's."""
    says(monkeypatch, FOUND._replace(form=form))
    asked = []

    def noted(backends, set_priority):
        asked.append((backends, set_priority))
        return torch.nn.attention.sdpa_kernel(SDPBackend.MATH)

    monkeypatch.setattr(attention, "sdpa_kernel", noted)
    qkv = torch.randn(2, 5, 3, 2, 16)
    with use_backend("torch"):
        expected = ops.attention_qkv(qkv)
    torch.testing.assert_close(ops.attention_qkv(qkv), expected)
    torch.testing.assert_close(ops.attention(*qkv.unbind(2)), expected)
    for backends, in_order in asked:
        assert backends[0] is attention.SDPA[form].backend
        assert set(backends) == {one.backend for one in attention.SDPA.values()}
        assert in_order
    assert len(asked) == 2


def test_what_the_user_switched_off_stays_off(monkeypatch):
    says(monkeypatch, FOUND._replace(form="sdpa math"))
    with FakeTensorMode():
        call, arguments = operands()["attention"]
        assert not runs_kernels(call, arguments)
        with torch.nn.attention.sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            assert runs_kernels(call, arguments)


def test_what_the_user_switched_off_is_no_second_choice_either(monkeypatch):
    says(monkeypatch, FOUND._replace(form="sdpa math"))
    asked, chosen = [], torch.nn.attention.sdpa_kernel

    def noted(backends, set_priority):
        asked.append(backends)
        return chosen(SDPBackend.MATH)

    monkeypatch.setattr(attention, "sdpa_kernel", noted)
    q = torch.randn(2, 5, 2, 16)
    with chosen([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        ops.attention(q, q, q)
    assert asked == [[SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]]


def block_operands(requires_grad):
    def draw(*shape):
        return torch.randn(*shape, requires_grad=requires_grad)

    attention_half = draw(32), draw(32), draw(96, 32), draw(96), draw(32, 32), draw(32), None, None
    mlp_half = draw(32), draw(32), draw(48, 32), draw(48), draw(32, 48), draw(32), None, None
    return torch.randn(2, 5, 32), *attention_half, *mlp_half, 2


def test_a_block_is_taken_apart_in_inference_alone(monkeypatch):
    """One op for all of it saves more in training; its other parts are kernels still."""
    calls = []
    with FakeTensorMode():
        for name in ("_block", "_block_train"):
            op = getattr(block, name)
            monkeypatch.setattr(block, name, lambda *args, op=op: calls.append(op._name) or op(*args))
        for requires_grad, name in ((False, "block"), (True, "block_train")):
            says(monkeypatch)
            ops.block(*block_operands(requires_grad))
            assert calls == [name]
            says(monkeypatch, FOUND, FOUND._replace(training=True))
            assert runs_kernels(ops.block, block_operands(requires_grad))
            assert calls == ([name, name] if requires_grad else [name])
            calls.clear()


def test_compiled_it_is_the_same_choice(monkeypatch):
    """One graph, and another for a shape that the finding does not speak of."""
    says(monkeypatch, FOUND)
    backend.findings._dynamo_marked_constant = True
    graphs = []

    def keep(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    compiled = torch.compile(ops.attention_qkv, fullgraph=True, backend=keep, dynamic=True)
    qkv = torch.randn(2, 5, 3, 2, 16)
    with use_backend("torch"):
        expected = ops.attention_qkv(qkv)
    torch.testing.assert_close(compiled(qkv), expected)
    assert len(graphs) == 1
    assert not any("vit_fast" in target for target in graphs[0])


def test_explain_says_when(monkeypatch):
    reason = "PyTorch (sdpa cudnn) was measured faster"
    known = (
        FOUND._replace(shape=(577, 577, 64), reason=reason),
        FOUND._replace(shape=(577, 577, 80), reason="another width"),
        FOUND._replace(shape=(577, 577, 64), dtype=torch.float16, reason="another dtype"),
        FOUND._replace(shape=(577, 577, 64), training=True, reason="the block is one op in training"),
        FOUND._replace(op="mlp", shape=(128, 512), reason="the block is one op"),
        FOUND._replace(op="patch_embed", shape=(128, 768), reason="conv2d was faster"),
    )
    says(monkeypatch, *known)
    monkeypatch.setitem(vit_fast.explain.__globals__, "findings", backend.findings)
    sizes = {"embed_dim": 128, "num_heads": 2, "depth": 2}
    fixed = vit_fast.create_model("vit_tiny_patch16_224", **sizes)
    assert not [line for line in vit_fast.explain(fixed) if reason in line.reason], "it has 197 tokens in every call"
    assert [one for one in vit_fast.explain(fixed.blocks) if reason in one.reason], "nobody knows of blocks alone"
    model = vit_fast.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **sizes)
    lines = {(line.name, line.op): line for line in vit_fast.explain(model)}
    assert all(line.backend == "triton" for line in lines.values())
    attn = lines["blocks.0.attn", "attention_qkv"].reason
    assert attn.endswith(f"; but {reason}")
    assert lines["patch_embed", "patch_embed"].reason.endswith("; but conv2d was faster")
    assert not [line for line in lines.values() if "another" in line.reason]
    assert not [line for line in lines.values() if "one op" in line.reason]
    assert reason not in lines["blocks.1.attn", "attention"].reason, "of one query, which was not measured"
    model.blocks[0].norm1.register_forward_hook(lambda *_: None)
    lines = {(line.name, line.op): line for line in vit_fast.explain(model)}
    assert lines["blocks.0.mlp", "mlp"].reason.endswith("; but the block is one op")
    assert "the block is one op in training" in lines["blocks.0.attn", "attention"].reason


def test_explain_counts_every_token_and_knows_autocast_and_whose_choice_it_is(monkeypatch):
    says(monkeypatch, FOUND._replace(shape=(197, 197, 64), dtype=torch.bfloat16, reason="faster"))
    monkeypatch.setitem(vit_fast.explain.__globals__, "findings", backend.findings)
    monkeypatch.setattr(backend, "_why_not_forced", lambda device: "")
    model = vit_fast.create_model("vit_tiny_patch16_224", embed_dim=128, num_heads=2, depth=2)

    def told() -> set:
        return {(line.name, line.op) for line in vit_fast.explain(model) if line.reason.endswith("; but faster")}

    assert not told(), "in fp32 nothing was measured"
    with torch.autocast("cpu", torch.bfloat16):
        assert told() == {("blocks.0.attn", "attention_qkv")}
        with use_backend("triton"):
            assert not told()


# ---- the file ------------------------------------------------------------------------------------------------------


def test_the_file_is_that_of_the_results():
    assert evidence.FILE.read_text() == maker.text(), "python -m benchmarks.evidence"


def test_what_the_h200_said():
    """Attention of ViT-B at 384 pixels, inference, is cuDNN's; a batch that was not measured is not."""
    evidence.findings_of.cache_clear()
    known = evidence.findings_of("sm_90")
    assert known
    (found,) = [one for one in known if one.op == "attention"]
    assert (found.training, found.dtype, found.shape) == (False, torch.bfloat16, (577, 577, 64))
    assert found.rows == 64 * 12
    assert found.form == "sdpa cudnn"
    assert "NVIDIA H200" in found.reason
    assert evidence.findings_of("sm_80") == ()


def test_a_users_own_tiles_are_another_matter(monkeypatch, tmp_path):
    (tmp_path / "own.json").write_text("{}")
    monkeypatch.setenv("VIT_FAST_TILES", str(tmp_path / "own.json"))
    evidence.findings_of.cache_clear()
    assert evidence.findings_of("sm_90") == ()
    evidence.findings_of.cache_clear()


LINE = {"op": "mlp", "model": "B", "tokens": 197, "batch": 2, "dtype": "fp16", "direction": "both"}
TIMES = {"vit_fast": [10, 11, 12], "eager": [7, 8, 9], "cublas": [1, 1, 1], "compiled": [2, 2, 2]}


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({}, 1),
        ({"us": TIMES | {"eager": [7, 8, 10]}}, 0),  # they overlap
        ({"us": TIMES | {"vit_fast": [5, 6, 7]}}, 0),
        ({"us": {"vit_fast": [10, 11, 12], "cublas": [1, 1, 1]}}, 0),
        ({"op": "block"}, 0),
        ({"op": "rope_attention", "model": "DINOv3 B", "tokens": 201}, 0),  # it asks no evidence
        ({"op": "window_attention", "model": "Swin-T 1", "tokens": 3136}, 0),  # nor does this
    ],
)
def test_which_lines_count(change, count):
    file = {"device": "d", "date": "2026-01-01", "commit": "c", "results": [LINE | {"us": TIMES} | change]}
    found = maker.findings(file)
    assert len(found) == count
    if found:
        assert json.loads(json.dumps(found)) == [
            {
                **{"op": "mlp", "pass": "training", "dtype": "float16", "shape": [768, 3072], "rows": 394},
                **{"form": "eager", "us": [11, 8], "device": "d", "date": "2026-01-01", "commit": "c"},
            }
        ]


@pytest.mark.parametrize(
    ("lost", "rows"),
    [({1}, []), ({8, 256}, [256]), ({64, 256}, [64, 256]), ({1, 8, 64, 256}, [1, 8, 64, 256]), (set(), [])],
)
def test_a_finding_holds_at_every_larger_batch_that_was_measured(lost, rows):
    wins = TIMES | {"vit_fast": [5, 6, 7]}
    lines = [LINE | {"batch": size, "us": TIMES if size in lost else wins} for size in (256, 1, 8, 64)]
    lines.append(LINE | {"batch": 512, "us": wins, "direction": "forward"})  # which says nothing of both
    found = maker.findings({"device": "d", "date": "2026-01-01", "commit": "c", "results": lines})
    assert sorted(one["rows"] // 197 for one in found) == rows


@pytest.mark.parametrize(
    ("op", "tokens", "shape", "rows"),
    [
        ("ln_linear", 197, [2304, 768], 394),
        ("projection", 197, [768, 768], 394),
        ("fc2", 577, [768, 3072], 1154),
        ("attention", 577, [577, 577, 64], 24),
        ("patch_embed", 257, [768, 588], 512),
    ],
)
def test_a_lines_size(op, tokens, shape, rows):
    assert maker.size(LINE | {"op": op, "tokens": tokens}) == (shape, rows)
