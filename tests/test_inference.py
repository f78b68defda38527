"""Pictures in: what is read, what is refused, and that it becomes what timm makes of it."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import vit_fast
from tests.small_runs import bomb, picture
from vit_fast.inference import find_images, normalise, open_image, preprocess

SETTINGS = {"img_size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def noise(rows: int, columns: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(rows).integers(0, 256, (rows, columns, 3), dtype=np.uint8))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize(
    ("rows", "columns", "img_size"),
    [
        (53, 37, 32),  # smaller, upright
        (37, 53, 48),  # larger, lying
        (100, 63, (32, 48)),  # an input that is no square
        (32, 32, 32),  # nothing to resize
    ],
)
def test_a_picture_becomes_what_timm_makes_of_it(rows, columns, img_size, crop_pct, interpolation):
    from timm.data import create_transform

    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    settings = {**SETTINGS, "img_size": img_size, "crop_pct": crop_pct, "interpolation": interpolation}
    statistics = {key: settings[key] for key in ("mean", "std", "crop_pct", "interpolation")}
    image = noise(rows, columns)
    theirs = create_transform((3, *size), is_training=False, **statistics)(image)
    assert torch.allclose(preprocess(image, **settings)[0], theirs, atol=1e-6)


@pytest.mark.parametrize("crop_pct", [0.8, 1.0])
@pytest.mark.parametrize("interpolation", ["nearest", "bicubic", "bilinear"])
def test_a_tensor_of_pictures_is_within_two_levels_of_pillow(interpolation, crop_pct):
    image = noise(50, 70)
    settings = {**SETTINGS, "mean": (0.0,), "std": (1.0,), "interpolation": interpolation, "crop_pct": crop_pct}
    one, other = preprocess(image, **settings), preprocess(np.asarray(image)[None], **settings)
    assert (one - other).abs().max() <= 2.01 / 255


def test_a_list_an_array_and_a_file_of_one_picture_are_the_same(tmp_path):
    image = noise(32, 32)
    image.save(tmp_path / "a.png")
    whole = torch.from_numpy(np.asarray(image).copy())[None]
    batch = preprocess([image, tmp_path / "a.png", str(tmp_path / "a.png")], **SETTINGS)
    assert batch.shape == (3, 3, 32, 32)
    for row in (*batch, preprocess(whole, **SETTINGS)[0]):
        assert torch.equal(row, batch[0])
    assert preprocess([], **SETTINGS).shape == (0, 3, 32, 32)


def test_one_channel(tmp_path):
    image = noise(20, 20)
    image.save(tmp_path / "a.png")
    settings = {**SETTINGS, "img_size": 20, "in_chans": 1}
    from_file = preprocess(tmp_path / "a.png", **settings)
    grey = torch.from_numpy(np.asarray(image.convert("L")).copy()) / 255
    assert torch.allclose(from_file[0, 0], (grey - 0.4) / 0.3, atol=1e-5)  # the mean of three means, of three stds
    assert torch.equal(preprocess(np.asarray(image)[None], **settings), from_file)


def test_exif_orientation_is_honoured(tmp_path):
    image = noise(8, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: to be turned by 270 degrees
    image.save(tmp_path / "a.png", exif=exif)
    opened = open_image(tmp_path / "a.png")
    assert opened.size == (8, 16)
    assert np.array_equal(np.asarray(opened), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(levels * 257).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png", in_chans=1)), levels)


@pytest.mark.parametrize(("mode", "order"), [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I;16N", "=u2")])
def test_sixteen_bits_of_either_order(tmp_path, mode, order):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    image = Image.frombytes(mode, (16, 16), (levels * 257).astype(order).tobytes())
    expected = Image.fromarray(levels.astype(np.uint8))
    assert torch.equal(preprocess(image, **SETTINGS), preprocess(expected, **SETTINGS))
    if mode != "I;16N":  # which no file has
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(tmp_path / "a.tif", exif=exif)
        assert np.array_equal(np.asarray(open_image(tmp_path / "a.tif", in_chans=1)), np.rot90(levels, -1))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "ppm", "tif"])
def test_formats(tmp_path, suffix):
    opened = open_image(picture(tmp_path / f"a.{suffix}"))
    assert (opened.mode, opened.size) == ("RGB", (12, 10))


def _cut(path):
    data = picture(path.with_name("whole.png"), size=(64, 64)).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _icon(path):
    Image.new("RGB", (16, 16)).save(path, format="ICO")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_text("no picture"), "no picture that can be read"),
        (lambda path: path.write_bytes(b""), "no picture that can be read"),
        (_icon, "no picture that can be read"),  # Pillow knows the format; it is not one of ours
        (_cut, "damaged or cut off"),
        (bomb, "pixels"),
        (lambda path: picture(path, size=(60_000, 3)), "60000 x 3 pixels; takes sides of a ratio of 200"),
        (lambda path: Image.new("I", (8, 8), 200).save(path, format="TIFF"), "mode I, whose white nobody knows"),
        (lambda path: Image.new("F", (8, 8), 0.5).save(path, format="TIFF"), "mode F, whose white nobody knows"),
    ],
    ids=["text", "empty", "another format", "cut off", "bomb", "thin", "32 bits", "floats"],
)
def test_a_bad_file_is_refused_by_name(tmp_path, make, says):
    path = tmp_path / "bad.png"
    make(path)
    with pytest.raises(ValueError, match=says) as caught:
        preprocess([path], **SETTINGS)
    assert str(path) in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and devices that have a name are Unix's")
def test_a_pipe_is_refused_as_one(tmp_path):
    """And before it is opened, which waits for someone who writes."""
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match=f"{path}: got .*, takes a file"):
            open_image(path)


def test_the_limit_of_pixels_is_a_limit(tmp_path):
    path = picture(tmp_path / "a.png", size=(20, 20))
    assert open_image(path, max_pixels=400).size == (20, 20)
    with pytest.raises(ValueError, match="20 x 20 pixels, takes 399"):
        open_image(path, max_pixels=399)


@pytest.mark.parametrize(
    ("images", "change", "error", "says"),
    [
        (torch.zeros(1, 3, 8, 8), {}, TypeError, r"uint8 \[B, rows, columns, 3\]"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), {}, TypeError, "uint8"),
        (torch.zeros(1, 1, 300, 3, dtype=torch.uint8), {}, ValueError, "images: refused, 300 x 1 pixels"),
        (3, {}, TypeError, "got int"),
        ([], {"interpolation": "cubic"}, ValueError, "takes one of nearest"),
        ([], {"crop_pct": 0.0}, ValueError, "crop_pct: got 0.0"),
        ([], {"crop_pct": 1.5}, ValueError, "crop_pct: got 1.5"),
        ([], {"in_chans": 4}, ValueError, "in_chans: got 4"),
        ([], {"mean": (0.1, 0.2)}, ValueError, "mean: got 2 values"),
    ],
)
def test_bad_arguments(images, change, error, says):
    with pytest.raises(error, match=says):
        preprocess(images, **SETTINGS | change)


def test_bytes_and_their_shares_of_white_are_normalised_alike():
    """As the formula has them, in fp32."""
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    shift, scale = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
    found = normalise(pixels, mean, std)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), (pixels / 255.0 - shift) / scale, rtol=0, atol=1e-6)
    assert torch.equal(normalise(pixels.float() / 255, mean, std), found)
    assert torch.equal(normalise(pixels[:, :1], mean, std), normalise(pixels[:, :1], (sum(mean) / 3,), (sum(std) / 3,)))


def test_predict_takes_every_kind_of_picture(tmp_path):
    model = vit_fast.VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1, num_classes=3)
    image = noise(20, 30)
    image.save(tmp_path / "a.png")
    answer = model.predict([image, tmp_path / "a.png"])
    assert answer.shape == (2, 3)
    assert answer.dtype == torch.float32
    assert torch.allclose(answer.sum(dim=1), torch.ones(2))
    assert torch.equal(answer[0], answer[1])
    assert torch.allclose(model.predict(np.asarray(image)[None])[0], answer[0], atol=1e-2)  # resized by torch


def test_predict_squashes_where_the_model_says_so():
    model = vit_fast.VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1, num_classes=3)
    model.pretrained_cfg |= {"crop_mode": "squash", "crop_pct": 1.0}
    image = noise(20, 60)
    assert torch.equal(model.predict(image), model.predict(image.resize((16, 16), Image.Resampling.BICUBIC)))


def test_find_images(tmp_path):
    one, two = picture(tmp_path / "b" / "x.PNG"), picture(tmp_path / "a.jpg")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "folder.png").mkdir()
    picture(tmp_path / "._a.jpg")  # a hidden file, as some systems leave them
    assert find_images([tmp_path]) == [two, one]
    assert find_images([one, two]) == [one, two]
    (tmp_path / "empty").mkdir()
    for path, says in ((tmp_path / "empty", "holds no picture"), (tmp_path / "gone.png", "no such file")):
        with pytest.raises(ValueError, match=says):
            find_images([path])
