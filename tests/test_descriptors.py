"""Descriptors (TMA): which launches use them, that they change no bit, and whose memory they take.

The interpreter refuses a descriptor of a matrix that the hardware would refuse, so a wrong choice is an error here too.
"""

import contextlib
import threading

import pytest
import torch

from tests.ops import test_block, test_linear_residual
from vit_fast.ops import block, linear_residual, use_backend

pytestmark = pytest.mark.interpret

# The kernels of a block that read tiles through descriptors where they can; the others hold rows whole, finish a sum or
# are attention's.
PRODUCTS = {
    "ln_linear._forward_kernel",
    "linear_residual._forward_kernel",
    "mlp._fc1_kernel",
    "mlp._hidden_grad_kernel",
    "linear._input_grad_kernel",
    "linear._weight_grad_kernel",
}
# These write partial sums, which the next kernel reads in another shape, with pointers.
PARTIAL = {"linear._weight_grad_kernel"}


@pytest.fixture
def launches(monkeypatch):
    """[kernel, tiles read through a descriptor, tiles written through one] of each launch from then on."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    noted = []
    call = GridExecutor.__call__

    def noting(executor, *args, **kwargs):
        noted.append([f"{executor.fn.__module__}.{executor.fn.__name__}".removeprefix("vit_fast.kernels."), 0, 0])
        return call(executor, *args, **kwargs)

    def counting(method, place):
        def counted(*args):
            noted[-1][place] += 1
            return method(*args)

        return counted

    monkeypatch.setattr(GridExecutor, "__call__", noting)
    for place, name in ((1, "create_descriptor_load"), (2, "create_descriptor_store")):
        monkeypatch.setattr(InterpreterBuilder, name, counting(getattr(InterpreterBuilder, name), place))
    return noted


def _results(op, case, args: dict, upstream) -> list[torch.Tensor]:
    wanted = [t.requires_grad_() for name, t in args.items() if t is not None and name not in case.constant]
    with use_backend("triton"):
        y = op(**args, **case.options)
    return [y.detach(), *torch.autograd.grad(y, wanted, upstream)]


def _a_block(width: int, hidden: int, dtype) -> list[torch.Tensor]:
    """Output and gradients; the same numbers at every call."""
    torch.manual_seed(0)
    case = test_block.case("a block", test_block.shaped(2, 9, width, hidden), 2)
    args = {name: t.to(dtype) for name, t in case.draw().items()}
    return _results(block, case, args, torch.randn(2, 9, width).to(dtype))


ALIGNED = [(32, 40, torch.float16), (32, 72, torch.bfloat16), (32, 36, torch.float32)]
named = pytest.mark.parametrize(("width", "hidden", "dtype"), ALIGNED)


@named
def test_rows_of_whole_16_bytes(width, hidden, dtype, launches):
    _a_block(width, hidden, dtype)
    assert PRODUCTS < {name for name, _, _ in launches}
    for name, read, written in launches:
        assert bool(read) == (name in PRODUCTS), name
        assert bool(written) == (name in PRODUCTS - PARTIAL), name


@pytest.mark.parametrize(("hidden", "dtype"), [(36, torch.float16), (44, torch.bfloat16), (38, torch.float32)])
def test_other_rows(hidden, dtype, launches):
    """A hidden width whose rows begin between 16 bytes turns descriptors off where a matrix of it is read or written,
    and there alone: in fc1, in fc2 and in their gradients."""
    _a_block(32, hidden, dtype)
    by_hidden = {"mlp._fc1_kernel", "mlp._hidden_grad_kernel"}
    for name, read, written in launches:
        if name in by_hidden:
            assert not read, name
            assert not written, name
    # A launch for each linear map: those of the first half, whose rows are whole, and those of the second, fc1 and fc2.
    reads = {"linear_residual._forward_kernel": [0, 1], "linear._input_grad_kernel": [0, 1, 1]}
    for name, expected in (reads | {"linear._weight_grad_kernel": [0, 0, 1, 1]}).items():
        assert sorted(bool(read) for kernel, read, _ in launches if kernel == name) == expected, name


@named
def test_the_same_bits_with_pointers(width, hidden, dtype, launches, monkeypatch):
    from vit_fast.kernels import product

    through = _a_block(width, hidden, dtype)
    assert any(read for _, read, _ in launches)
    launches.clear()
    monkeypatch.setattr(product, "aligned", lambda *matrices: False)
    pointed = _a_block(width, hidden, dtype)
    assert not any(read or written for _, read, written in launches)
    assert all(torch.equal(one, other) for one, other in zip(through, pointed))


@named
def test_descriptors_of_the_operands_alone(width, hidden, dtype, launches):
    """Where the entry says so every product reads through them, its epilogue does not, and the bits are the same."""
    from vit_fast.kernels import tile_table

    everywhere = _a_block(width, hidden, dtype)
    launches.clear()
    table = tile_table.table("interpreter")
    dtype_class = tile_table.dtype_class(dtype)
    with contextlib.ExitStack() as stack:
        for kernel, dtypes in table.items():
            for shape, entry in dtypes[dtype_class].items():
                if "PIECES" in entry:
                    new = {**entry, "TMA": 2}
                    stack.enter_context(tile_table.using("interpreter", kernel, dtype_class, shape, new))
        operands = _a_block(width, hidden, dtype)
    for name, read, written in launches:
        assert bool(read) == (name in PRODUCTS), name
        assert not written, name
    assert all(torch.equal(one, other) for one, other in zip(everywhere, operands))


def _from_an_odd_element(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def _from_a_wider_one(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t, t.new_zeros(*t.shape[:-1], 1)], dim=-1)[..., :-1]


@pytest.mark.parametrize("move", [_from_an_odd_element, _from_a_wider_one])
@pytest.mark.parametrize("operand", ["x", "weight", "residual", "upstream"])
def test_a_view_between_16_bytes(operand, move, launches):
    """Each kernel that reads it takes pointers, the others do not; the results are those of a copy, to the bit."""
    # Without LayerScale and drop path: with either, backward reads a copy of the upstream gradient.
    drawn = test_linear_residual.shaped(2, 9, 32, features=40, layer_scale=False, drop=False)
    case = test_linear_residual.case("aligned", drawn)
    args = {name: None if t is None else t.half() for name, t in case.draw().items()}
    upstream = torch.randn(2, 9, 40).half()
    expected = _results(linear_residual, case, args, upstream)
    assert [bool(read) for name, read, _ in launches if name in PRODUCTS] == [True] * 3
    launches.clear()
    if operand == "upstream":
        upstream = move(upstream)
    else:
        args[operand] = move(args[operand].detach())
    got = _results(linear_residual, case, args, upstream)
    reads = {
        "x": {"linear_residual._forward_kernel", "linear._weight_grad_kernel"},
        "weight": {"linear_residual._forward_kernel", "linear._input_grad_kernel"},
        "residual": {"linear_residual._forward_kernel"},
        "upstream": {"linear._input_grad_kernel", "linear._weight_grad_kernel"},
    }
    assert {name for name, read, _ in launches if name in PRODUCTS and not read} == reads[operand]
    assert all(torch.equal(one, other) for one, other in zip(expected, got))


def test_one_row_for_all_is_read_through_pointers(launches):
    """An upstream gradient of a sum over the batch has a stride of zero, which no descriptor takes."""
    x, weight, residual = torch.randn(40, 32).half(), torch.randn(40, 32).half(), torch.randn(40, 40).half()
    found = []
    for upstream in (torch.randn(1, 40).half().expand(40, 40), None):
        upstream = found[0][1].contiguous() if upstream is None else upstream
        wanted = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with use_backend("triton"):
            y = linear_residual(*wanted, None, residual)
            found.append((torch.autograd.grad(y, wanted, upstream), upstream))
    assert all(torch.equal(one, other) for one, other in zip(found[0][0], found[1][0]))


# ---- whose memory --------------------------------------------------------------------------------------------------


@pytest.fixture
def allocators(monkeypatch):
    """The allocator in force at the making of each descriptor from then on."""
    from triton.runtime import _allocation
    from triton.runtime.interpreter import InterpreterBuilder

    seen = []
    make = InterpreterBuilder.create_make_tensor_descriptor

    def noting(*args, **kwargs):
        seen.append(_allocation._allocator.get())
        return make(*args, **kwargs)

    monkeypatch.setattr(InterpreterBuilder, "create_make_tensor_descriptor", noting)
    return seen


def _in_a_thread(function) -> list:
    """What the function returned in a new thread, where no allocator is set; what it raised is raised here."""
    results, errors = [], []

    def run():
        try:
            results.append(function())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results


def test_a_launch_from_another_thread_takes_torchs_memory(allocators):
    """As autograd's own thread does on a GPU; afterwards that thread has no allocator, as before."""
    from triton.runtime import _allocation
    from vit_fast.kernels import product

    def step():
        assert _allocation._allocator.get() is _allocation._NULL_ALLOCATOR
        results = _a_block(32, 40, torch.float16)
        assert _allocation._allocator.get() is _allocation._NULL_ALLOCATOR
        return results

    (there,) = _in_a_thread(step)
    assert allocators
    assert set(allocators) == {product._scratch}
    here = _a_block(32, 40, torch.float16)
    assert all(torch.equal(one, other) for one, other in zip(there, here))


def test_the_users_allocator_is_put_back(allocators):
    import triton
    from triton.runtime import _allocation
    from vit_fast.kernels import product

    def own(size, alignment, stream):
        raise AssertionError("not this one")

    def step():
        triton.set_allocator(own)
        _a_block(32, 40, torch.float16)
        assert _allocation._allocator.get() is own
        return True

    assert _in_a_thread(step) == [True]
    assert set(allocators) == {product._scratch}


def test_the_users_allocator_is_put_back_after_an_error(monkeypatch):
    import triton
    from triton.runtime import _allocation
    from triton.runtime.interpreter import InterpreterBuilder

    def own(size, alignment, stream):
        raise AssertionError("not this one")

    def fails(*args, **kwargs):
        raise RuntimeError("no descriptor today")

    monkeypatch.setattr(InterpreterBuilder, "create_make_tensor_descriptor", fails)

    def step():
        triton.set_allocator(own)
        # The interpreter wraps what a kernel raises.
        with pytest.raises(Exception, match="no descriptor today"):
            _a_block(32, 40, torch.float16)
        assert _allocation._allocator.get() is own
        return True

    assert _in_a_thread(step) == [True]


def test_torchs_memory_is_the_devices(monkeypatch):
    """Bytes from the caching allocator, which counts them to the current stream of the current device."""
    from vit_fast.kernels import product

    asked = []
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: asked.append((args, kwargs)))
    product._scratch(384, 128, None)
    assert asked == [((384,), {"dtype": torch.int8, "device": "cuda"})]
