import pytest
import torch

from tests import unfused
from tests.error_rule import relative_error
from tests.ops.harness import BACKENDS, MODES, Case, hold_to_the_rule, named, rounded
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


MEAN, STD = (0.485, 0.456, 0.406, 0.0), (0.229, 0.224, 0.225, 1.0)  # ImageNet's, and a channel that is left as it is


def bytes_case(why: str, batch: int, channels: int, *sizes, **options) -> Case:
    """A case whose images are bytes, normalised by the op."""
    draw = shaped(batch, channels, *sizes, **options)

    def draw_bytes():
        drawn = draw()
        return drawn | {"images": torch.randint(0, 256, drawn["images"].shape, dtype=torch.uint8)}

    return Case(why, draw_bytes, {"mean": MEAN[:channels], "std": STD[:channels]}, constant=("images",))


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
BYTES = [
    bytes_case("bytes in patches of 16", 2, 3, (2, 2), 16, 64),
    bytes_case("bytes in patches of 14, whose 588 is no multiple of 16", 1, 3, (2, 3), 14, 40, prefix=0),
    bytes_case("bytes of one channel", 2, 1, (5, 7), 2, 33),
    bytes_case("bytes of four channels in patches of 2 by 3, two prefix tokens", 2, 4, (3, 4), (2, 3), 24, prefix=2),
    bytes_case("bytes, registers without positions", 2, 3, (3, 3), 4, 32, prefix=5, position="patches"),
    bytes_case("bytes, nothing but the patches", 2, 3, (3, 3), 4, 32, prefix=0, position=None, bias=False),
]
CASES += BYTES


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
def test_bytes_of_any_strides(backend):
    """To the bit those of a copy: as decoders give them, a crop, every other pixel, one channel as three."""
    inputs = {name: rounded(t, torch.float32) for name, t in BYTES[1].draw().items()}
    del inputs["images"]
    images = torch.randint(0, 256, (2, 40, 50, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    views = [
        images[:, :, :28, :42],
        images[:, :, 5:33, 3:45],
        images[:, [2, 1, 0], :28, :42],
        torch.randint(0, 256, (2, 3, 56, 84), dtype=torch.uint8)[:, :, ::2, 1::2],
        images[:, :1, :28, :42].expand(2, 3, 28, 42),
        images[:1, :, 9:37, :42].expand(4, 3, 28, 42),
        images.transpose(2, 3)[:, :, :28, :].repeat(1, 1, 1, 2)[..., :42],
    ]
    with use_backend(backend):
        for view in views:
            expected = patch_embed(view.contiguous(), **inputs, **BYTES[1].options)
            assert torch.equal(patch_embed(view, **inputs, **BYTES[1].options), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_byte(dtype, backend):
    """Each pixel of each channel is a token's element: computed in fp32, whose roundings are of what is subtracted, and
    rounded once."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 4, 16, 16)
    with use_backend(backend):
        found = patch_embed(images, torch.eye(4, dtype=dtype).view(4, 4, 1, 1), None, mean=MEAN, std=STD)
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    level = images.double().flatten(2).transpose(1, 2) / 255
    truth, roundings = (level - mean) / std, 2**-22 * (level + mean) / std
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 * truth.abs()
    assert found.dtype == dtype
    assert ((found.double() - truth).abs() <= rounding + roundings).all()


@pytest.mark.interpret
@pytest.mark.parametrize("case", named([BYTES[0], BYTES[4]]))
def test_bytes_are_read_where_they_lie(case, monkeypatch):
    """Forward and backward get the tensor itself, and what is no pixel is zero and not a black one."""
    from vit_fast.kernels import patch_embed as kernel

    def noting(images, *others):
        seen.append((images, cut(images, *others)))
        return seen[-1][1]

    cut, seen = kernel.cut, []
    monkeypatch.setattr(kernel, "cut", noting)
    drawn = {name: rounded(t, torch.float32) for name, t in case.draw().items()}
    images = drawn["images"] = drawn["images"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    drawn["weight"].requires_grad_()
    with use_backend("triton"):
        patch_embed(**drawn, **case.options).square().sum().backward()
    assert len(seen) == 2
    count, pixels = len(drawn["prefix"]), drawn["weight"][0].numel()
    for given, patches in seen:
        assert given.dtype == torch.uint8
        assert given.data_ptr() == images.data_ptr()
        assert given.stride() == images.stride()
        assert not patches.view(len(images), -1, patches.shape[1])[:, :count].any()
        assert not patches[:, pixels:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtype_of_bytes_is_the_weights(backend):
    inputs = {name: rounded(t, torch.bfloat16) for name, t in BYTES[5].draw().items()}
    with use_backend(backend):
        assert patch_embed(**inputs, **BYTES[5].options).dtype == torch.bfloat16
        assert patch_embed(**inputs | {"images": inputs["images"][:0]}, **BYTES[5].options).shape == (0, 9, 32)
        inputs["weight"] = inputs["weight"].float()
        with torch.autocast("cpu", torch.bfloat16):
            assert patch_embed(**inputs, **BYTES[5].options).dtype == torch.bfloat16


def test_bytes_in_fp64():
    """PyTorch alone computes in it, the pixels too."""
    inputs = {name: rounded(t, torch.float64) for name, t in BYTES[0].draw().items()}
    found = patch_embed(**inputs, **BYTES[0].options)
    assert relative_error(found, reference.patch_embed(**inputs, **BYTES[0].options)) < 1e-14


def test_bytes_under_transforms():
    """An image at a time by vmap, and on a device without memory."""
    inputs = {name: rounded(t, torch.float32) for name, t in BYTES[0].draw().items()}
    images = inputs.pop("images")
    expected = patch_embed(images, **inputs, **BYTES[0].options)
    each = torch.func.vmap(lambda image: patch_embed(image[None], **inputs, **BYTES[0].options)[0])(images)
    torch.testing.assert_close(each, expected)
    on_meta = {name: t.to("meta") for name, t in inputs.items()}
    assert patch_embed(images.to("meta"), **on_meta, **BYTES[0].options).shape == expected.shape


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
@pytest.mark.parametrize("case", named([CASES[5], CASES[6], CASES[9], BYTES[3]]))
def test_opcheck(case):
    args = {name: rounded(t, torch.float32) for name, t in case.draw().items()}
    args = {name: t if t is None or name == "images" else t.requires_grad_() for name, t in args.items()}
    torch.library.opcheck(torch.ops.vit_fast.patch_embed.default, (*args.values(), *case.options.values()))


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
    "whole numbers": (
        {"images": torch.zeros(2, 3, 8, 8, dtype=torch.int64)},
        TypeError,
        "the input: got torch.int64, takes a floating dtype",
    ),
    "a mean of what is no byte": ({"mean": MEAN[:3]}, ValueError, r"mean: got \(0.485.* with images in torch.flo"),
    "a std of what is no byte": ({"std": STD[:3]}, ValueError, r"std: got \(0.229.* with images in torch.flo"),
}
OF_BYTES = {
    "no mean": ({"mean": None}, ValueError, "mean: got None, takes 3 finite numbers, one a channel of uint8 images"),
    "no std": ({"std": None}, ValueError, "std: got None, takes 3 finite numbers above 0, one a channel"),
    "two means": ({"mean": MEAN[:2]}, ValueError, r"mean: got \(0.485, 0.456\), takes 3 finite numbers"),
    "one number": ({"std": 0.5}, ValueError, "std: got 0.5, takes 3 finite numbers"),
    "no number": ({"mean": (0.5, torch.nan, 0.5)}, ValueError, r"mean: got \(0.5, nan, 0.5\), takes 3 finite"),
    "no end": ({"std": (0.5, torch.inf, 0.5)}, ValueError, r"std: got \(0.5, inf, 0.5\), takes 3 finite"),
    "no spread": ({"std": (0.5, 0.0, 0.5)}, ValueError, r"std: got \(0.5, 0.0, 0.5\), takes 3 finite numbers above 0"),
    "channels last": (
        {"images": torch.zeros(2, 8, 8, 3, dtype=torch.uint8)},
        ValueError,
        r"images: got 8 channels, takes 3, those of weight; \.permute\(0, 3, 1, 2\) puts those of \[B, H, W, C\]",
    ),
    "another dtype than the weight's": ({"bias": torch.randn(16).half()}, TypeError, "bias: torch.float16"),
    "a weight of whole numbers": (
        {"weight": torch.ones(16, 3, 4, 4, dtype=torch.uint8)},
        TypeError,
        "got torch.uint8, takes a floating dtype",
    ),
    "a weight elsewhere": ({"weight": torch.empty(16, 3, 4, 4, device="meta")}, ValueError, "weight: on meta, the in"),
}


@pytest.mark.parametrize("wrong", REJECTED)
def test_rejected(wrong):
    change, error, message = REJECTED[wrong]
    args = {name: t.float() for name, t in shaped(2, 3, (2, 2), 4, 16)().items()} | change
    with pytest.raises(error, match=message):
        patch_embed(**args)


@pytest.mark.parametrize("wrong", OF_BYTES)
def test_rejected_with_bytes(wrong):
    change, error, message = OF_BYTES[wrong]
    case = bytes_case("small", 2, 3, (2, 2), 4, 16)
    args = {name: rounded(t, torch.float32) for name, t in case.draw().items()} | case.options | change
    with pytest.raises(error, match=message):
        patch_embed(**args)
