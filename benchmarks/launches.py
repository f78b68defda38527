"""The launches that the ops and the models really make, caught where triton would compile them.

Ops and models run on tensors without memory, with Triton as their backend and an architecture's tile table in force;
nothing is compiled and nothing is run. So shapes, strides, hints and tiles are those of a real call and cannot drift.
"""

import contextlib
import functools
import json
import pathlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction
from vit_fast.kernels import replay, tile_table  # noqa: F401 - replay must know JITFunction.run before Catch

import vit_fast
from vit_fast import ops
from vit_fast.ops import backend
from vit_fast.ops.attention import HEAD_WIDTHS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPS = (
    *("patch_embed", "ln_linear", "attention", "rope_attention", "window_attention"),
    *("linear_residual", "mlp", "swiglu", "block"),
)
ALLOCATIONS = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}
STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of bytes: ImageNet's
ODD = "width 37, "  # begins the variants whose rows no vector load fits
SMALL = "small "  # windows, whose tiles no wgmma fits


@functools.cache
def hardware() -> dict:
    """hardware.json."""
    return json.loads((pathlib.Path(__file__).parent / "hardware.json").read_text())


def kernel_name(kernel: JITFunction) -> str:
    """File and kernel: "mlp.fc1"."""
    file = kernel.fn.__module__.rsplit(".", 1)[-1]
    return f"{file}.{kernel.__name__.strip('_').removesuffix('_kernel')}"


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    op: str
    variant: str
    direction: str  # "forward" or "backward"
    kernel: JITFunction
    args: tuple
    kwargs: dict
    grid: tuple
    entry_name: str = ""  # "mlp_fc1 16 many", empty where the launch takes its tile from no table
    entry: dict = field(default_factory=dict)  # with its origin, and its reason where it has one


@dataclass(frozen=True)
class TorchOp:
    """A step that PyTorch's own kernels do: the bytes of its tensors and the operations of its products."""

    name: str
    bytes: int
    flops: int


def tensors(tree) -> list[torch.Tensor]:
    """Every distinct tensor in a tree of arguments, once; a view of a packed tensor is one of its own."""
    found = {}
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            key = leaf.untyped_storage()._cdata, leaf.storage_offset(), tuple(leaf.shape), leaf.stride()
            found.setdefault(key, leaf)
    return list(found.values())


def nbytes(tree) -> int:
    """Bytes of every distinct tensor in a tree, each once: what must be moved at least. An expanded axis counts 1."""
    total = 0
    for x in tensors(tree):
        elements = x.element_size()
        for size, stride in zip(x.shape, x.stride()):
            elements *= size if stride or not size else 1
        total += elements
    return total


# ---- catching ------------------------------------------------------------------------------------------------------


class _Noted(dict):
    """The entries of one kernel and dtype class, which note who takes them."""

    def __init__(self, classes: dict, name: str, taken: list):
        super().__init__(classes)
        self.name, self.taken = name, taken

    def __getitem__(self, shape):
        entry = super().__getitem__(shape)
        self.taken.append((f"{self.name} {shape}", entry))
        return entry


def table_in_force(arch: str) -> dict[str, dict]:
    """Every entry of the table that an architecture takes, by its name."""
    return {
        f"{kernel} {dtype} {shape}": entry
        for kernel, dtypes in tile_table.table(arch).items()
        for dtype, classes in dtypes.items()
        for shape, entry in classes.items()
    }


def _kernel_modules() -> list:
    return [module for name, module in sys.modules.items() if name.startswith("vit_fast.kernels")]


def _forget_tiles() -> None:
    """Empty every cache under kernels/: the next launch asks the table again."""
    for module in _kernel_modules():
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


class Catch(TorchDispatchMode):
    """While it is on, launches and PyTorch's own steps are noted in `seen`, for one architecture, and nothing runs.

    A dispatch mode does not see into an opaque op, so the body of each vit_fast op is called here, with the mode on.
    """

    def __init__(self, arch: str, autocast: torch.dtype | None = None):
        super().__init__()
        self.arch, self.autocast = arch, autocast
        self.seen: list[Launch | TorchOp] = []
        self.op = self.variant = ""
        self.direction = "forward"

    def __enter__(self):
        taken = []
        table = {
            kernel: {dtype: _Noted(classes, f"{kernel} {dtype}", taken) for dtype, classes in dtypes.items()}
            for kernel, dtypes in tile_table.table(self.arch).items()
        }

        def catch(kernel, *args, grid, warmup, **kwargs):
            name, entry = next(
                (
                    (name, entry)
                    for name, entry in reversed(taken)
                    if all(kwargs.get(key) == size for key, size in entry.items() if key.startswith(("BLOCK_", "num_")))
                ),
                ("", {}),
            )
            grid = grid(kwargs) if callable(grid) else grid
            # Aliases: autograd copies a gradient that somebody else holds, which a real call does not.
            with _disable_current_modes():
                args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
            launch = Launch(self.op, self.variant, self.direction, kernel, args, kwargs, tuple(grid), name, entry)
            self.seen.append(launch)
            _forget_tiles()

        with contextlib.ExitStack() as stack:
            swap = stack.enter_context
            swap(mock.patch.object(JITFunction, "run", catch))
            architecture = tile_table.architecture
            for module in _kernel_modules():
                if getattr(module, "architecture", None) is architecture:
                    swap(mock.patch.object(module, "architecture", return_value=self.arch))
            swap(mock.patch.object(tile_table, "table", return_value=table))
            chip = types.SimpleNamespace(
                multi_processor_count=hardware()["architectures"][self.arch]["multiprocessors"]
            )
            swap(mock.patch.object(torch.cuda, "get_device_properties", return_value=chip))
            swap(mock.patch.object(backend, "_why_not_forced", return_value=""))
            if self.autocast:
                swap(mock.patch.object(backend, "autocasting", return_value=True))
                swap(mock.patch.object(torch, "get_autocast_dtype", return_value=self.autocast))
            swap(vit_fast.use_backend("triton"))
            stack.callback(_forget_tiles)
            _forget_tiles()
            self._stack = stack.pop_all()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "vit_fast":
            with self._again():
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        allocates = func._schema.name in ALLOCATIONS
        given = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
        made = [x for x in tensors(result) if x.untyped_storage()._cdata not in given]
        if func._schema.is_mutable or (made and not allocates):
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=result) if count else 0
            self.seen.append(TorchOp(str(func), nbytes((args, kwargs, result)), flops))
        return result

    @contextlib.contextmanager
    def _again(self):
        """The mode alone, without the patches a second time."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def run(self, op: str, variant: str, call: Callable, *operands) -> None:
        """A call for inference, then one for training and its backward."""
        self.op, self.variant = op, variant
        with torch.no_grad():
            call(*operands)
        y = call(*operands)
        if y.requires_grad:
            self.direction = "backward"
            y.backward(torch.empty_like(y))
            self.direction = "forward"


# ---- the calls -----------------------------------------------------------------------------------------------------


def parameter(*shape, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def op_calls(dtype: torch.dtype, B: int, T: int, D: int, F: int, every: bool) -> Iterator[tuple]:
    """(op, variant, function, operands) for all but attention, block last; `every`: all activations and options."""

    def empty(*shape):
        return parameter(*shape, dtype=dtype)

    x, norm, drop, images = empty(B, T, D), (empty(D), empty(D)), empty(B).detach(), empty(B, 3, 224, 224).detach()
    planar = torch.empty(B, 3, 224, 224, dtype=torch.uint8, device="meta")
    decoded = {"planar": planar, "channels last": planar.contiguous(memory_format=torch.channels_last)}
    for there in (True, False) if every else (True,):
        variant = "all operands" if there else "no optional operand"

        def optional(*shape, there=there):
            return empty(*shape) if there else None

        end = empty(D), (empty(D) if there else None), (drop if there else None)  # bias, LayerScale, drop path
        yield "ln_linear", variant, ops.ln_linear, x, *norm, empty(3 * D, D), optional(3 * D)
        yield "linear_residual", variant, ops.linear_residual, x, empty(D, D), end[0], x, *end[1:]
        for P in (16, 14) if every else (16,) if D % 16 == 0 else (7,):
            tables = optional(D), optional((224 // P) ** 2 + 1, D), optional(1, D)
            yield "patch_embed", f"patch {P}, {variant}", ops.patch_embed, images, empty(D, 3, P, P), *tables
            for layout, pixels in decoded.items() if there and every else ():
                operands = pixels, empty(D, 3, P, P), *tables, *STATISTICS
                yield "patch_embed", f"patch {P} of bytes, {layout}", ops.patch_embed, *operands
        parameters = *norm, empty(F, D), optional(F), empty(D, F), *end
        for activation in ("gelu", "gelu_tanh", "quick_gelu") if every else ("gelu",):
            yield "mlp", f"{activation}, {variant}", ops.mlp, x, *parameters, activation
        yield "swiglu", variant, ops.swiglu, x, *norm, empty(2 * F, D), optional(2 * F), empty(D, F), *end
        if D % 64 == 0:  # elsewhere no kernel takes its heads
            first = *norm, empty(3 * D, D), optional(3 * D), empty(D, D)
            yield "block", variant, ops.block, x, *first, *end, *parameters, D // 64
            for some, ends in (("LayerScale", (*end[:2], None)), ("drop path", (end[0], None, drop))) if there else ():
                yield "block", f"{some} alone", ops.block, x, *first, *ends, *parameters[:-3], *ends, D // 64


def attention_calls(dtype: torch.dtype) -> Iterator[tuple]:
    """Packed QKV at every head width, 224 pixels in patches of 16 and of 14, then 384 pixels; and attention maps."""
    for tokens in (197, 257, 577):
        for width in sorted(HEAD_WIDTHS, key=lambda width: width not in (64, 80, 128)):  # those of most models first
            qkv = parameter(256, tokens, 3, 12, width, dtype=dtype)
            variant = f"head width {width}, {tokens} tokens"
            yield "attention", variant, ops.attention_qkv, qkv
            if tokens == 197:
                yield "attention", variant, ops.attention_maps, *qkv.detach().unbind(2)[:2]


def rope_calls(dtype: torch.dtype, B: int, every: bool) -> Iterator[tuple]:
    """As DINOv3 at 224 has it, five tokens before the patches; EVA-02's pairs; and tables of each head's own, as
    RoPE-ViT has them. Heads 88 and 128 wide are those of EVA's giant and of DINOv3's largest."""
    for width in (64, 88, 128) if every else (64,):
        qkv = parameter(B, 201, 3, 12, width, dtype=dtype)
        forms = ("halves", ()), ("interleaved", ()), ("halves", (12,))
        for pairs, heads in forms[: 3 if every and width == 64 else 1]:
            tables = [torch.empty(*heads, 196, width, device="meta") for _ in range(2)]
            variant = f"head width {width}, {pairs}" + (", tables of each head's own" if heads else "")
            yield "rope_attention", variant, ops.rope_attention, qkv, *tables, pairs == "interleaved"


def window_calls(dtype: torch.dtype) -> Iterator[tuple]:
    """The first stage of a Swin-T at 224, its windows shifted, once with a frozen table; then the other head widths,
    and windows for which less than a whole block of 64 tokens is computed."""
    for width, window in ((32, 7), (16, 7), (64, 8), (16, 2), (64, 4)):
        qkv = parameter(256, 56, 56, 3, 3, width, dtype=dtype)
        table = parameter((2 * window - 1) ** 2, 3, dtype=dtype)
        for tables, frozen in ((table, ""), (table.detach(), ", frozen"))[: 2 if width == 32 else 1]:
            variant = f"width {width}, {SMALL if window**2 <= 32 else ''}windows of {window} x {window}{frozen}"
            sides = (window, window), (window // 2, window // 2)
            yield "window_attention", variant, ops.window_attention, qkv, tables, *sides


def launches(chosen: list[str], arch: str, dtype: str) -> list[Launch]:
    """Every launch that the ops make: ViT-B at 224 and batch 256, few rows and some, an odd width, autocast and tf32;
    rotary positions; a Swin's windows.

    Where a variant makes a launch that differs from an earlier one in nothing, it is left out.
    """
    kind = DTYPES[dtype]
    main, odd = (256, 197, 768, 3072), (3, 67, 37, 111)
    calls = [*attention_calls(kind), *rope_calls(kind, main[0], every=True), *window_calls(kind)]
    variants = [("", [*calls, *op_calls(kind, *main, every=True)], None, "none")]
    for batch, rows in ((2, "few"), (8, "some")):
        calls = [*rope_calls(kind, batch, every=False), *op_calls(kind, batch, *main[1:], every=False)]
        variants += [(f"{rows} rows, ", calls, None, "none")]
    variants += [(ODD, op_calls(kind, *odd, every=False), None, "none")]
    if dtype == "bf16":
        variants += [("autocast, ", op_calls(torch.float32, *main, every=False), kind, "none")]
    if dtype == "fp32" and arch.startswith("sm_"):
        variants += [("tf32, ", op_calls(kind, *main, every=False), None, "tf32")]
    found = []
    for prefix, calls, autocast, precision in variants:
        catch = Catch(arch, autocast)
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = precision
        try:
            with catch:
                for op, variant, call, *operands in calls:
                    if op in chosen:
                        catch.run(op, prefix + variant, call, *operands)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        found += [launch for launch in catch.seen if isinstance(launch, Launch)]
    first = {}
    for launch in found:
        first.setdefault(sameness(launch), launch)
    return list(first.values())


def sameness(launch: Launch) -> tuple:
    """What two launches have in common that differ in nothing."""

    def of(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, tuple(value.shape), value.stride()
        return tuple(map(of, value)) if isinstance(value, tuple) else value

    arguments = of(launch.args), tuple(sorted((name, of(value)) for name, value in launch.kwargs.items()))
    return launch.direction, launch.kernel, launch.grid, launch.entry_name, str(arguments)


def model_launches(name: str, arch: str, batch: int, training: bool, **more) -> list[Launch | TorchOp]:
    """What a batch through a model of that name does, in bf16: inference, or a training step without its optimiser.

    `more` are further arguments of the model.
    """
    with torch.device("meta"):
        model = vit_fast.create_model(name, num_classes=1000, **more).to(torch.bfloat16).train(training)
        images = torch.empty(batch, 3, *model.patch_embed.img_size, dtype=torch.bfloat16)
        labels = torch.empty(batch, dtype=torch.int64)
    catch = Catch(arch)
    catch.op = name
    with catch, torch.set_grad_enabled(training):
        logits = model(images)
        if training:
            loss = torch.nn.functional.cross_entropy(logits, labels)
            catch.direction = "backward"
            loss.backward()
    return catch.seen
