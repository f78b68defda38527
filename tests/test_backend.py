"""Which code runs a call: use_backend, VIT_FAST_BACKEND, what is refused, and what is said."""

import contextlib
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vit_fast
from vit_fast import ops, use_backend
from vit_fast.ops import backend

B, T, D, H, F = 2, 5, 32, 2, 48


def operands(dtype=torch.float32, device="cpu"):
    """One small call of each op: name → (function, arguments)."""

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, device=device)

    x, scale, shift = draw(B, T, D), draw(D), draw(D)
    heads = [draw(B, T, H, D // H) for _ in range(3)]
    tables = draw(T - 1, D // H), draw(T - 1, D // H)
    mlp = x, scale, shift, draw(F, D), draw(F), draw(D, F), draw(D)
    return {
        "patch_embed": (ops.patch_embed, (draw(B, 3, 8, 8), draw(D, 3, 4, 4), draw(D), draw(T, D), draw(1, D))),
        "ln_linear": (ops.ln_linear, (x, scale, shift, draw(F, D), draw(F))),
        "attention": (ops.attention, heads),
        "attention_qkv": (ops.attention_qkv, (torch.stack(heads, 2),)),
        "attention_maps": (ops.attention_maps, heads[:2]),
        "rope_attention": (ops.rope_attention, (torch.stack(heads, 2), *tables)),
        "linear_residual": (ops.linear_residual, (x, draw(D, D), draw(D), draw(B, T, D), scale)),
        "mlp": (ops.mlp, mlp),
        "swiglu": (ops.swiglu, (x, scale, shift, draw(2 * F, D), draw(2 * F), draw(D, F), draw(D))),
        "window_attention": (ops.window_attention, (draw(B, 2, 4, 3, H, D // H), draw(9, H), (2, 2), (1, 1))),
    }


OPS = sorted(operands())


class Namespaces(TorchDispatchMode):
    """The namespaces of the ops that were called: "aten" is PyTorch, "vit_fast" a kernel."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.namespace)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def device_of_capability(monkeypatch):
    """Tensors on a GPU that is not there: fake ones, for which PyTorch keeps shapes, dtypes and devices only."""

    def forget():
        backend.why_not_triton.cache_clear()
        backend._say_once.cache_clear()

    def make(*capability):
        forget()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr("vit_fast.kernels.tile_table.architecture", lambda device: "sm_{}{}".format(*capability))
        return FakeTensorMode()

    yield make
    forget()


class Graphs:
    """A compiler for torch.compile that leaves each graph as it is, and notes it whenever it runs."""

    def __init__(self):
        self.compiled, self.ran = 0, []

    def __call__(self, graph, _):
        self.compiled += 1
        targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}

        def run(*arguments):
            self.ran.append(targets)
            return graph(*arguments)

        return run


def python(code: str, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


# --- choosing


def test_nested_blocks_restore_what_was_before():
    before = backend.chosen_backend()
    with use_backend("torch"):
        with use_backend("auto"):
            assert backend.chosen_backend() == "auto"
        assert backend.chosen_backend() == "torch"
    assert backend.chosen_backend() == before


def test_blocks_of_two_threads_that_overlap():
    """Whoever leaves last, what was chosen before both is chosen again."""
    before = backend.chosen_backend()
    first_is_in, second_is_in = threading.Event(), threading.Event()

    def first():
        with use_backend("triton"):
            first_is_in.set()
            second_is_in.wait(10)

    one = threading.Thread(target=first)
    one.start()
    first_is_in.wait(10)
    with use_backend("torch"):
        second_is_in.set()
        one.join()
        assert backend.chosen_backend() == "torch"
    assert backend.chosen_backend() == before


def test_blocks_of_many_threads_leave_what_was():
    before, interval = backend.chosen_backend(), sys.getswitchinterval()

    def enter_and_leave(name):
        for _ in range(300):
            with use_backend(name):
                pass

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=enter_and_leave, args=(name,)) for name in ("torch", "triton") * 2]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    finally:
        sys.setswitchinterval(interval)
    assert backend.chosen_backend() == before


def test_a_block_that_is_open_compiles_nothing_anew():
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    op, arguments = operands()["ln_linear"]
    run = torch.compile(op, backend=count, fullgraph=True)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(use_backend("torch"))
            run(*arguments)
    assert len(compiled) == 1


def test_a_block_inside_what_is_compiled():
    @torch.compile(backend="eager", fullgraph=True)
    def run(x):
        with use_backend("torch"):
            return x + (backend.chosen_backend() == "torch")

    before = backend.chosen_backend()
    assert run(torch.zeros(1)) == 1
    assert backend.chosen_backend() == before


def test_an_error_inside_restores_too():
    before = backend.chosen_backend()
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert backend.chosen_backend() == before


@pytest.mark.parametrize("name", ["cuda", "Triton", "", None])
def test_another_name_is_refused(name):
    before = backend.chosen_backend()
    refusal = r"use_backend\(name\): got .*takes one of 'auto', 'triton', 'torch'"
    with pytest.raises(ValueError, match=refusal), use_backend(name):
        pass
    assert backend.chosen_backend() == before


def test_the_variable_chooses_and_use_backend_overrides_it():
    code = """
import torch, vit_fast
from vit_fast.ops import backend
x = torch.ones(1, 2, 4)
call = lambda: vit_fast.ops.ln_linear(x, x[0, 0], x[0, 0], torch.ones(3, 4), None)
with vit_fast.use_backend("auto"):
    call()
try:
    call()
except RuntimeError as error:
    print("refused:", error)
"""
    done = python(code, VIT_FAST_BACKEND="triton", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert "refused: use_backend('triton') got a tensor on cpu" in done.stdout


def test_a_bad_variable_is_refused_on_import():
    done = python("import vit_fast", VIT_FAST_BACKEND="gpu")
    assert done.returncode != 0
    assert "ValueError: VIT_FAST_BACKEND: got 'gpu', takes one of 'auto', 'triton', 'torch'" in done.stderr


# --- what runs where


@pytest.mark.parametrize("name", OPS)
def test_auto_on_a_cpu_is_pytorch(name):
    op, arguments = operands()[name]
    with use_backend("auto"), Namespaces() as seen:
        op(*arguments)
    assert "vit_fast" not in seen.names


@pytest.mark.interpret
@pytest.mark.parametrize("name", OPS)
def test_triton_runs_kernels(name):
    op, arguments = operands()[name]
    with use_backend("triton"), Namespaces() as seen:
        op(*arguments)
    assert "vit_fast" in seen.names


@pytest.mark.parametrize("name", OPS)
def test_triton_on_a_cpu_tensor_raises_and_never_falls_back(name, monkeypatch):
    op, arguments = operands()[name]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"a tensor on cpu.*TRITON_INTERPRET=1"):
        op(*arguments)


@pytest.mark.parametrize("name", OPS)
def test_triton_refuses_float64(name, monkeypatch):
    op, arguments = operands(torch.float64)[name]
    op(*arguments)  # PyTorch takes it
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the CPU is no reason to refuse
    refusal = r"takes? float32, float16 and bfloat16, got torch\.float64"
    with use_backend("triton"), pytest.raises(TypeError, match=refusal):
        op(*arguments)


@pytest.mark.parametrize("name", OPS)
def test_meta_tensors_pass(name):
    """Shapes of a model too large for this machine can be asked for."""
    op, arguments = operands(device="meta")[name]
    assert op(*arguments).device.type == "meta"


def test_an_old_gpu_runs_in_pytorch_and_the_log_says_so_once(device_of_capability, caplog):
    with caplog.at_level(logging.WARNING, logger="vit_fast"), device_of_capability(7, 5):
        for op, arguments in operands(device="cuda").values():
            with Namespaces() as seen:
                op(*arguments)
            assert "vit_fast" not in seen.names
    assert caplog.messages == ["vit_fast runs in PyTorch: compute capability 7.5, the kernels need 8.0"]


def test_triton_on_an_old_gpu_raises(device_of_capability):
    with device_of_capability(7, 5):
        op, arguments = operands(device="cuda")["ln_linear"]
        with use_backend("triton"), pytest.raises(RuntimeError, match=r"compute capability 7\.5"):
            op(*arguments)


@pytest.mark.parametrize("name", OPS)
def test_auto_on_a_gpu_runs_kernels(name, device_of_capability):
    with device_of_capability(9, 0):
        op, arguments = operands(device="cuda")[name]
        with Namespaces() as seen:
            result = op(*arguments)
    assert "vit_fast" in seen.names
    assert result.device.type == "cuda"


def test_auto_on_a_gpu_leaves_float64_to_pytorch(device_of_capability):
    with device_of_capability(9, 0):
        op, arguments = operands(torch.float64, "cuda")["mlp"]
        with Namespaces() as seen:
            op(*arguments)
    assert "vit_fast" not in seen.names


def test_a_gpu_without_triton_runs_in_pytorch(device_of_capability, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)  # as where it is not installed
    with caplog.at_level(logging.WARNING, logger="vit_fast"), device_of_capability(9, 0):
        op, arguments = operands(device="cuda")["mlp"]
        with Namespaces() as seen:
            op(*arguments)
        assert "vit_fast" not in seen.names
        with use_backend("triton"), pytest.raises(RuntimeError, match="triton is not installed"):
            op(*arguments)
    assert caplog.messages == ["vit_fast runs in PyTorch: triton is not installed"]


# --- torch.compile


@pytest.mark.interpret
@pytest.mark.parametrize("name", OPS)
def test_a_compiled_call_follows_the_backend(name):
    """The same compiled function is compiled anew when the choice changes, and again finds what it had compiled."""
    torch.compiler.reset()
    op, arguments = operands()[name]
    graphs = Graphs()
    compiled = torch.compile(lambda *arguments: op(*arguments), fullgraph=True, backend=graphs)
    for choice in ("torch", "triton", "torch", "triton"):
        with use_backend(choice):
            compiled(*arguments)
    assert [any("vit_fast" in target for target in ran) for ran in graphs.ran] == [False, True, False, True]
    assert graphs.compiled == 2


def test_nothing_of_the_choice_is_in_the_graph(device_of_capability, recwarn):
    """On a GPU the capability is asked for once, by Python: neither a graph break, nor a warning, nor a node."""
    torch.compiler.reset()
    with device_of_capability(9, 0):
        op, arguments = operands(device="cuda")["ln_linear"]
        graphs = Graphs()
        torch.compile(op, fullgraph=True, backend=graphs)(*arguments)
    assert graphs.ran == [{"vit_fast.ln_linear.default", "<built-in function getitem>"}]
    assert not [str(warning.message) for warning in recwarn if "lru_cache" in str(warning.message)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("batch", "kernels"), [(63, True), (64, False)])
def test_what_was_measured_counts_on_such_a_gpu(batch, kernels, compiled, device_of_capability):
    """Of ViT-B at 384 pixels the H200's results say that cuDNN is faster, from 64 images on."""
    torch.compiler.reset()
    with device_of_capability(9, 0), torch.no_grad():
        qkv = torch.randn(batch, 577, 3, 12, 64, dtype=torch.bfloat16, device="cuda")
        if compiled:
            graphs = Graphs()
            torch.compile(ops.attention_qkv, fullgraph=True, backend=graphs)(qkv)
            names = graphs.ran[0]
        else:
            with Namespaces() as seen:
                ops.attention_qkv(qkv)
            names = seen.names
    assert any("vit_fast" in name for name in names) == kernels


@pytest.mark.interpret
def test_backward_runs_where_forward_ran():
    """The choice is recorded with the call: after the block, and in autograd's own thread, it still holds."""
    op, arguments = operands()["ln_linear"]
    arguments = [argument.requires_grad_() for argument in arguments]
    with use_backend("triton"):
        output = op(*arguments)
    with use_backend("torch"), Namespaces() as seen:
        output.backward(torch.randn_like(output))
    assert "vit_fast" in seen.names


# --- precision


@pytest.mark.interpret
@pytest.mark.parametrize("chosen", ["triton", "torch"])
def test_a_checkpointed_block_is_computed_again_where_it_ran(chosen):
    """Backward comes behind the end of the `with` that forward was in."""
    other = {"triton": "torch", "torch": "triton"}[chosen]
    model = vit_fast.VisionTransformer(img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    images, gradients = torch.randn(2, 3, 8, 8), []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        with use_backend(chosen):
            loss = model(images).square().sum()
        with use_backend(other):
            loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("name", OPS)
def test_fake_tensors_of_a_gpu_without_one(name):
    """As of who plans on a CPU what a GPU will hold."""
    with FakeTensorMode():
        op, args = operands(device="cuda")[name]
        assert op(*args).device.type == "cuda"


@pytest.mark.interpret
def test_sharded_tensors_run_in_pytorch():
    """Of a model that `distribute_module` sharded, of which no op of ours knows how it is to be."""
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        q = torch.randn(2, 5, 2, 16)
        sharded = DTensor.from_local(q, mesh, [Replicate()])
        with torch.no_grad(), use_backend("triton"), pytest.raises(TypeError, match="no rule for a sharded tensor"):
            ops.attention(sharded, sharded, sharded)
    finally:
        torch.distributed.destroy_process_group()


def test_tf32_is_used_when_pytorch_allows_it():
    """By each of PyTorch's three ways to say so; the newest last, for after it the oldest raises."""
    code = """
import torch
from vit_fast.ops.backend import float32_precision
matmul = torch.backends.cuda.matmul
print(float32_precision())
for precision in ("high", "highest"):
    torch.set_float32_matmul_precision(precision)
    print(float32_precision())
for allowed in (True, False):
    matmul.allow_tf32 = allowed
    print(float32_precision())
matmul.fp32_precision = "tf32"
print(float32_precision())
torch.version.hip = "7.0"  # whose chips, but for one, have none
print(float32_precision())
"""
    done = python(code)
    assert done.stdout.split() == ["ieee", "tf32", "ieee", "tf32", "ieee", "tf32", "ieee"], done.stderr
