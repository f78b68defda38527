"""Mends what Triton's interpreter gets wrong: bf16, so that such kernels run on a CPU at all, and the fused product.

It stores bf16 as uint16, multiplies these integers in `tl.dot`, and truncates where hardware rounds to nearest even.
A bf16 result of the interpreter is still no proof of a GPU's: the products here are exact in fp32. Its `tl.fma` rounds
the product before it adds, which hardware does not. And it looks through all of triton.language at every call of a
function in a kernel, to replace what it has replaced already: a third of the time that such tests took. Its scalars are
arrays of one number, which numpy 2.4 takes for no index: Triton 3.6 had no loop up to an argument there. Its sums down
a tile in memory add one number after the other, which is further from the truth than the pairs of a GPU's threads.

What is left of it goes by the number of programs. The second stage of weight gradients has a program for two rows, and
took most of the time of a backward pass: here it has 16 rows, and few columns, so that narrow weights have two steps.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from vit_fast.kernels import linear

FINISH_TILE = linear.FINISH_TILE  # as it is on a GPU


def _bf16_to_float32(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _float32_to_bf16(data: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def mend() -> None:
    """Put right what is told above. Done once a process, before the first launch."""
    builder = interpreter.InterpreterBuilder
    original_cast, original_dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            wide = interpreter.TensorHandle(_bf16_to_float32(src.data), tl.float32)
            return wide if target == tl.float32 else original_cast(self, wide, dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            wide = src if source == tl.float32 else original_cast(self, src, tl.float32)
            return interpreter.TensorHandle(_float32_to_bf16(wide.data), tl.bfloat16)
        return original_cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return cast_impl(self, src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (cast_impl(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return original_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def create_fma(self, x, y, z):
        with np.errstate(invalid="ignore"):  # ∞ − ∞ is NaN, as in hardware
            exact = x.data.astype(np.float64) * y.data.astype(np.float64)  # 48 bits of 53
            return interpreter.TensorHandle((exact + z.data).astype(z.data.dtype), z.dtype.scalar)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, *scope):
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    def sum_in_pairs(self, input):
        data = input.handle.data
        if self.axis is not None and data.ndim > 1:
            # numpy sums in eight at once what lies side by side.
            data = np.moveaxis(np.ascontiguousarray(np.moveaxis(data, self.axis, -1)), -1, self.axis)
        return self.to_tensor(np.sum(data, axis=self.axis, keepdims=self.keep_dims), input.dtype)

    interpreter.ReduceOps.sum = sum_in_pairs
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_lang(fn):
        namespace = id(fn.__globals__)
        if namespace in patched:
            return interpreter._LangPatchScope()  # with nothing to restore
        patched.add(namespace)
        return patch(fn)

    def launch_patched_once(executor, *args, **kwargs):
        patched.clear()  # what the launch before had replaced was put back at its end
        return launch(executor, *args, **kwargs)

    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, launch_patched_once
    builder.cast_impl, builder.create_dot, builder.create_fma = cast_impl, create_dot, create_fma
    builder.create_fp_to_fp = create_fp_to_fp
    linear.FINISH_TILE = {"BLOCK_M": 16, "BLOCK_N": 32}
