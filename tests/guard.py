"""Tensors whose last byte touches a page that nobody may touch: one element too far is a segmentation fault."""

import ctypes
import mmap

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
    offset = PAGE if at_start else PAGE + inner - size
    return torch.frombuffer(region, dtype=dtype, count=count, offset=offset).view(shape)


def guarded(tensor: Tensor, at_start: bool = False) -> Tensor:
    """A contiguous copy of a CPU tensor between guard pages; it requires a gradient where the original does."""
    copy = guarded_empty(tuple(tensor.shape), tensor.dtype, at_start)
    copy.copy_(tensor.detach())
    return copy.requires_grad_(tensor.requires_grad)


def poisoned_empty(*shape, dtype=None, device=None, **_) -> Tensor:
    """Stands in for torch.empty: guarded memory full of NaN (of the largest value where there is no NaN)."""
    shape = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list | torch.Size) else shape
    dtype = dtype or torch.get_default_dtype()
    poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
    return guarded_empty(tuple(shape), dtype).fill_(poison)


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
