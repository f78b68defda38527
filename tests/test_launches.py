"""How many kernels one forward pass launches: at batch 1 a ViT waits for launches, not for arithmetic."""

import collections

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import vit_fast

PER_BLOCK, BESIDE = 7, 5


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
            self.names.append(f"{executor.fn.__module__}.{executor.fn.__name__}")
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
        if func._schema.is_mutable:
            return True
        made = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        given = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        if func._schema.name in ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"):
            return False
        known = {t.untyped_storage().data_ptr() for t in given}
        return any(t.untyped_storage().data_ptr() not in known for t in made)


def launches(monkeypatch, model, images) -> list[str]:
    with monkeypatch.context() as patch, torch.no_grad(), vit_fast.use_backend("triton"), Launches(patch) as seen:
        model(images)
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


@pytest.mark.interpret
def test_a_vit_b_launches_seven_a_block_and_five(monkeypatch):
    """ViT-B's structure, its width and picture made small; the cost of a block is the difference of two depths."""
    small = {"embed_dim": 32, "num_heads": 2, "img_size": 32, "num_classes": 5}
    images = torch.randn(1, 3, 32, 32)
    names = {}
    for depth in (2, 3):
        model = vit_fast.create_model("vit_base_patch16_224", depth=depth, **small).eval()
        names[depth] = collections.Counter(launches(monkeypatch, model, images))
    block = names[3] - names[2]
    beside = names[2] - block - block
    assert names[2] == block + block + beside, "each block launches the same"
    assert block.total() <= PER_BLOCK, f"a block: {dict(block)}"
    assert beside.total() <= BESIDE, f"beside the blocks: {dict(beside)}"
