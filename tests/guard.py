"""Tensors whose last byte touches a page that nobody may touch: one element too far is a segmentation fault."""

import contextlib
import ctypes
import mmap
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
PAGE = mmap.PAGESIZE
PROT_NONE = 0


def guarded_empty(shape: tuple[int, ...], dtype: torch.dtype, at_start: bool = False) -> Tensor:
    """Uninitialised CPU tensor between two guard pages, its end at the second one (or its start at the first)."""
    count = 1
    for size in shape:
        count *= size
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    size = count * dtype.itemsize
    inner = -(-size // PAGE) * PAGE
    region = mmap.mmap(-1, inner + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for page in (address, address + PAGE + inner):
        if _libc.mprotect(page, PAGE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    np.frombuffer(region, np.uint8)[PAGE : PAGE + inner] = 0xFF  # NaN, also in what the tensor leaves of its pages
    offset = PAGE if at_start else PAGE + inner - size
    return torch.frombuffer(region, dtype=dtype, count=count, offset=offset).view(shape)


def guarded(tensor: Tensor, at_start: bool = False) -> Tensor:
    """A contiguous copy of a CPU tensor between guard pages; it requires a gradient where the original does."""
    copy = guarded_empty(tuple(tensor.shape), tensor.dtype, at_start)
    copy.copy_(tensor.detach())
    return copy.requires_grad_(tensor.requires_grad)


def poisoned_empty(*shape, dtype=None, device=None, at_start: bool = False, **_) -> Tensor:
    """Stands in for torch.empty: guarded memory full of NaN (of the largest value where there is no NaN)."""
    shape = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list | torch.Size) else shape
    dtype = dtype or torch.get_default_dtype()
    poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
    return guarded_empty(tuple(shape), dtype, at_start).fill_(poison)


def poisoned_empty_like(tensor: Tensor, **_) -> Tensor:
    """Stands in for torch.empty_like as `poisoned_empty` does for torch.empty."""
    return poisoned_empty(tensor.shape, dtype=tensor.dtype)


class counted_writes:
    """A block in which every element that kernels allocate must be written exactly once, and no other memory at all;
    what `rope.rotate` turns in place once before that and once by it.

    What they get from torch.empty is poisoned and guarded, its end at a protected page or, `at_start`, its start behind
    one; what PyTorch copies for them, into another dtype or without holes, lies so too. Of the interpreter only: each
    of its stores is looked at.
    """

    COPYING = ((Tensor, "contiguous"), (Tensor, "reshape"), (Tensor, "to"), (torch.nn.functional, "pad"))

    def __init__(self, at_start: bool = False):
        self.at_start = at_start

    def __enter__(self) -> "counted_writes":
        from triton.runtime.interpreter import InterpreterBuilder
        from vit_fast.kernels import rope

        self.given: list[Tensor] = []  # kept, so that no address is given twice
        self.writes: list[np.ndarray] = []
        self.starts = np.empty(0, np.uint64)
        store = InterpreterBuilder.create_masked_store

        def counted_store(builder, pointers, value, mask, *hints):
            self._count(pointers.data[np.asarray(mask.data, bool)])  # a mask may be of bytes
            return store(builder, pointers, value, mask, *hints)

        def empty_like(tensor: Tensor, **_) -> Tensor:
            return self._empty(tensor.shape, dtype=tensor.dtype)

        self.replaced = contextlib.ExitStack()
        for owner, name, ours in (
            (InterpreterBuilder, "create_masked_store", counted_store),
            (torch, "empty", self._empty),
            (torch, "empty_like", empty_like),
            (rope, "rotate", self._in_place(rope.rotate)),
            *((owner, name, self._guarding(getattr(owner, name))) for owner, name in self.COPYING),
        ):
            self.replaced.enter_context(mock.patch.object(owner, name, ours))
        return self

    def _guarding(self, copy: Callable) -> Callable:
        def guarded_copy(tensor: Tensor, /, *args, **kwargs) -> Tensor:
            result = copy(tensor, *args, **kwargs)
            if result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                return result
            flat = guarded_empty((result.numel(),), result.dtype, self.at_start)  # a copy has no holes
            return flat.as_strided(result.shape, result.stride()).copy_(result)  # of the same graph

        return guarded_copy

    def _in_place(self, rotate: Callable) -> Callable:
        def rotating(x: Tensor, y: Tensor, *others) -> None:
            if y is x:
                storages = [memory.untyped_storage().data_ptr() for memory in self.given]
                index = storages.index(x.untyped_storage().data_ptr())
                writes = torch.from_numpy(self.writes[index]).as_strided(x.shape, x.stride(), x.storage_offset())
                assert (writes == 1).all(), "a kernel turns in place what was not written once"
                writes.zero_()
            rotate(x, y, *others)

        return rotating

    def _empty(self, *shape, **options) -> Tensor:
        memory = poisoned_empty(*shape, **options, at_start=self.at_start)
        if memory.numel():
            self.given.append(memory)
            self.writes.append(np.zeros(memory.numel(), np.int32))
            self.starts = np.array([t.data_ptr() for t in self.given], np.uint64)
            self.order = np.argsort(self.starts)
        return memory

    def _count(self, addresses: np.ndarray) -> None:
        if not addresses.size:
            return
        assert self.given, "a kernel writes, and was given no memory"
        places = np.searchsorted(self.starts[self.order], addresses, side="right") - 1
        for place in np.unique(places):
            index = self.order[place]  # of the last allocation that begins at or before these addresses
            memory, here = self.given[index], addresses[places == place]
            elements = ((here - self.starts[index]) // np.uint64(memory.element_size())).astype(np.int64)
            inside = place >= 0 and elements.max() < memory.numel()
            assert inside, "a kernel writes to memory that it did not allocate"
            np.add.at(self.writes[index], elements, 1)

    def __exit__(self, kind, *_) -> None:
        self.replaced.close()
        if kind is None:
            for memory, writes in zip(self.given, self.writes):
                what = f"{memory.dtype} {list(memory.shape)}: {(writes == 0).sum()} elements never written"
                assert (writes == 1).all(), f"{what}, {(writes > 1).sum()} more than once"


def vast(tensor: Tensor, stride: int) -> Tensor:
    """A copy of a CPU tensor whose first axis has this stride, in memory that is reserved and for the most part unused.

    An offset kept in 32 bits misses it: 2^31 elements away there is nothing mapped.
    """
    inner = tensor[0].numel()
    count = stride * (len(tensor) - 1) + inner
    MAP_NORESERVE = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    region = mmap.mmap(-1, count * tensor.dtype.itemsize, flags=flags)
    flat = torch.frombuffer(region, dtype=tensor.dtype, count=count)
    copy = flat.as_strided(tensor.shape, (stride, *tensor[0].contiguous().stride()))
    copy.copy_(tensor)
    return copy
