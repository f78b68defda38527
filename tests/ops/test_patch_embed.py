import pytest
import torch

from tests import unfused
from tests.error_rule import relative_error
from tests.ops.harness import BACKENDS, MODES, Case, hold_to_the_rule, named
from vit_fast import reference
from vit_fast.ops import patch_embed, use_backend


def shaped(
    batch: int,
    channels: int,
    grid: tuple[int, int],
    patch: int | tuple[int, int],
    width: int,
    prefix: int = 1,
    position: str | None = "all",
    bias: bool = True,
):
    def normal(*size):
        return torch.randn(size, dtype=torch.float64)

    high, wide = (patch, patch) if isinstance(patch, int) else patch
    patches = grid[0] * grid[1]
    rows = {"all": prefix + patches, "patches": patches, None: 0}[position]

    def draw():
        return {
            "images": normal(batch, channels, grid[0] * high, grid[1] * wide),
            "weight": normal(width, channels, high, wide) / (channels * high * wide) ** 0.5,
            "bias": normal(width) if bias else None,
            "position": normal(rows, width) if position else None,
            "prefix": normal(prefix, width) if prefix else None,
        }

    return draw


def case(why: str, draw) -> Case:
    return Case(why, draw, constant=("images",))


CASES = [
    case("patch 16", shaped(2, 3, (2, 2), 16, 64)),
    case("patch 14 whose 588 is no multiple of 16", shaped(1, 3, (2, 3), 14, 40)),
    case("one channel of tiny patches", shaped(2, 1, (5, 7), 2, 33)),
    case("five channels", shaped(2, 5, (3, 2), 3, 24)),
    case("patches of 2 by 3", shaped(2, 3, (3, 4), (2, 3), 24)),
    case("two prefix tokens", shaped(2, 3, (3, 3), 4, 32, prefix=2)),
    case("registers without positions", shaped(2, 3, (3, 3), 4, 32, prefix=5, position="patches")),
    case("no prefix", shaped(2, 3, (3, 3), 4, 32, prefix=0)),
    case("no positions", shaped(2, 3, (3, 3), 4, 32, position=None)),
    case("nothing but the patches", shaped(2, 3, (3, 3), 4, 32, prefix=0, position=None, bias=False)),
    case("a single patch", shaped(3, 3, (1, 1), 4, 20)),
    case("tokens summed in two spans", shaped(2, 1, (10, 13), 2, 16)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", named(CASES))
def test_output_and_gradients(case, mode, backend, guarded_memory):
    hold_to_the_rule(patch_embed, reference.patch_embed, unfused.patch_embed, case, mode, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_images(backend):
    """Channels-last, a crop, a flip and a batch of one picture many times are read as they are."""
    inputs = {name: t.float() for name, t in CASES[1].draw().items()}
    images = torch.randn(2, 3, 40, 50)
    del inputs["images"]
    views = [
        images[:, :, :28, :42].contiguous(memory_format=torch.channels_last),
        images[:, :, 5:33, 3:45],
        images[:, :, :28, :42].flip(-1),
        images[:1, :1, 1:29, 1:43].expand(4, 3, 28, 42),
        images.transpose(2, 3)[:, :, 9:37, :][..., :28].repeat(1, 1, 1, 2)[..., :42],
    ]
    with use_backend(backend):
        for view in views:
            expected = patch_embed(view.contiguous(), **inputs)
            # In norm: for another layout PyTorch's convolution may add in another order, which CPUs decide differently.
            assert relative_error(patch_embed(view, **inputs), expected) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_picture(backend):
    inputs = {name: t.float() for name, t in CASES[5].draw().items()}
    with use_backend(backend):
        clean = patch_embed(**inputs)
        inputs["images"][0, 1, 2, 3] = torch.nan
        poisoned = patch_embed(**inputs)
    assert torch.equal(poisoned[1], clean[1])
    assert poisoned[0].isnan().any(-1).sum() == 1, "one patch alone has the pixel"


@pytest.mark.interpret
def test_an_image_that_wants_a_gradient_gets_it():
    inputs = {name: t.float() for name, t in CASES[5].draw().items()}
    inputs["images"].requires_grad_()
    with use_backend("triton"):
        patch_embed(**inputs).square().sum().backward()
    ours = inputs["images"].grad.clone()
    inputs["images"].grad = None
    unfused.patch_embed(**inputs).square().sum().backward()
    assert torch.equal(ours, inputs["images"].grad)


@pytest.mark.interpret
@pytest.mark.parametrize("case", named([CASES[5], CASES[6], CASES[9]]))
def test_opcheck(case):
    args = {name: None if t is None else t.float() for name, t in case.draw().items()}
    args = {name: t if t is None or name == "images" else t.requires_grad_() for name, t in args.items()}
    torch.library.opcheck(torch.ops.vit_fast.patch_embed.default, tuple(args.values()))


@pytest.mark.interpret
def test_the_weights_gradient_lies_as_the_weight_does():
    """Of patches of 3·7·7 pixels, whose matrix is padded to 160 columns: a view of the padded one has strides that no
    traced graph expects, and a compiled training step of ViT-H ended with that."""
    args = {name: t.float().requires_grad_(name == "weight") for name, t in shaped(1, 3, (2, 2), 7, 16)().items()}
    with use_backend("triton"):
        y = patch_embed(**args)
        (gradient,) = torch.autograd.grad(y, args["weight"], torch.randn_like(y))
    assert gradient.stride() == args["weight"].stride()


REJECTED = {
    "no batch": ({"images": torch.randn(3, 8, 8)}, ValueError, r"images: got shape \[3, 8, 8\], takes \[B, C, H, W\]"),
    "four channels": ({"images": torch.randn(2, 4, 8, 8)}, ValueError, "images: got 4 channels, takes 3"),
    "half a patch": ({"images": torch.randn(2, 3, 8, 10)}, ValueError, "got 8 x 10 pixels, takes multiples of 4 x 4"),
    "no rows": ({"images": torch.randn(2, 3, 0, 8)}, ValueError, "got 0 x 8 pixels, takes multiples of 4 x 4"),
    "positions for more": (
        {"position": torch.randn(7, 16)},
        ValueError,
        r"position: got shape \[7, 16\], takes \[4, 16\] or \[5, 16\]",
    ),
    "prefix of another width": (
        {"prefix": torch.randn(1, 15)},
        ValueError,
        r"prefix: got shape \[1, 15\], takes \[1, 16\]",
    ),
    "bytes": ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, TypeError, "torch.uint8"),
}


@pytest.mark.parametrize("wrong", REJECTED)
def test_rejected(wrong):
    change, error, message = REJECTED[wrong]
    args = {name: t.float() for name, t in shaped(2, 3, (2, 2), 4, 16)().items()} | change
    with pytest.raises(error, match=message):
        patch_embed(**args)
