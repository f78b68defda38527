"""What a layer keeps for backward, counted in bytes a token by hooks on all that autograd saves, in pure bf16."""

import importlib.util

import pytest
import torch

import vit_fast

WIDTH, HEADS, TOKENS = 32, 2, 5  # pictures of 2 x 2 patches and the class token
SMALL = {"embed_dim": WIDTH, "num_heads": HEADS, "img_size": 32, "num_classes": 5}
# x, qkv, what attention gives, the stream between the halves and fc1's output, of F = 4·D: 10·D numbers of two bytes;
# a logarithm in fp32 for each head; mean and rstd in fp32 of both norms. LayerScale adds nothing.
OURS = 20 * WIDTH + 4 * HEADS + 16


def saved(model, images) -> int:
    """Bytes that autograd holds after a forward pass: each storage once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(images)
    assert logits.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


def bytes_a_token(create, layer_scale: bool, checkpointing: bool = False) -> float:
    """Of one layer: the difference between two depths."""
    images = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
    found = []
    for depth in (1, 2):
        model = create("vit_base_patch16_224", depth=depth, init_values=0.1 if layer_scale else None, **SMALL)
        model = model.bfloat16().train()
        model.set_grad_checkpointing(checkpointing)
        found.append(saved(model, images))
    return (found[1] - found[0]) / (len(images) * TOKENS)


class Halves(torch.nn.Module):
    def forward(self, x):
        left, right = x.chunk(2, dim=1)
        return left * right


def test_the_counter_sees_what_it_should():
    layer = torch.nn.Linear(6, 5)
    x = torch.randn(3, 6, requires_grad=True)
    assert saved(layer, x) == 3 * 6 * 4  # the input, and not the weight
    assert saved(torch.nn.Sequential(layer, torch.nn.Sigmoid(), torch.nn.Tanh()), x) == (3 * 6 + 2 * 3 * 5) * 4
    assert saved(Halves(), x) == 3 * 6 * 4  # two views of one storage


@pytest.mark.interpret
@pytest.mark.parametrize("layer_scale", [False, True])
def test_a_layer_keeps_20_d(layer_scale):
    with vit_fast.use_backend("triton"):
        # Not a byte less either: a count that misses something would be less.
        assert bytes_a_token(vit_fast.create_model, layer_scale) == OURS


@pytest.mark.interpret
def test_a_checkpointed_layer_keeps_its_input():
    with vit_fast.use_backend("triton"):
        assert bytes_a_token(vit_fast.create_model, layer_scale=True, checkpointing=True) == 2 * WIDTH


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("layer_scale", [False, True])
def test_timms_layer_keeps_more(layer_scale):
    """Its own blocks in eager PyTorch, on a CPU: what the number above is compared with."""
    import timm

    theirs = bytes_a_token(timm.create_model, layer_scale)
    assert theirs >= (36 if layer_scale else 32) * WIDTH > OURS
