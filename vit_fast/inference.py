"""From pictures to the tensor that a model takes: open safely, resize, crop, scale, normalise.

The resize and the crop are those of timm's evaluation (`create_transform(..., is_training=False, crop_mode="center")`):
the shorter side becomes img_size / crop_pct, then the centre is cut out.
"""

import io
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_fast.arguments import per_channel
from vit_fast.ops.patch_embed import normalise as normalise_by

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff")
MAX_PIXELS = 89_478_485  # Pillow's own threshold: a quarter of a GiB in RGB
MAX_RATIO = 200  # of the sides of a picture
MAX_RESIZED = MAX_PIXELS  # of a picture once it is resized: a crop_pct of almost nothing asks for any number
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
CROP_MODES = ("center", "squash")


class NoLonger(io.BufferedReader):
    """A file that is read, of which nobody can ask more than there is.

    Python allocates what it is asked to read, and Pillow and zipfile ask for the lengths that stand in a file.
    """

    def __init__(self, path: str | Path):
        if os.path.exists(path) and not os.path.isfile(path):
            kind = "a folder" if os.path.isdir(path) else "a pipe or a device, of which nobody knows how much there is"
            raise ValueError(f"{path}: got {kind}, takes a file")
        super().__init__(io.FileIO(path))

    def read(self, size: int | None = -1) -> bytes:
        left = max(os.fstat(self.fileno()).st_size - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


def open_image(path: str | Path, in_chans: int = 3, max_pixels: int = MAX_PIXELS):
    """Open a picture file whole, turned as its EXIF orientation says, as a PIL image in RGB (greyscale for in_chans=1).

    Of a file with several frames the first is taken. A 16-bit greyscale picture keeps its upper 8 bits.

    Raises:
        ValueError: for a file that is no picture in one of `FORMATS`, is cut off, or has more than `max_pixels` pixels
            (a decompression bomb), and for a pipe. The message names the file.
        OSError: for a file that is not there or may not be read. MemoryError: where there is none for its pixels.
    """
    Image, _ = _pillow()
    path = Path(path)
    with NoLonger(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of a bomb where we refuse one, and of tags that we do not read
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError:
            raise ValueError(f"{path}: refused, it has more than {max_pixels:,} pixels") from None
        except Exception as error:
            raise ValueError(f"{path}: no picture that can be read, takes {', '.join(FORMATS)}") from error
        return _upright(image, str(path), in_chans, max_pixels)


def _pillow():
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("reading pictures needs Pillow: pip install 'vit-fast[cli]'") from error
    return Image, ImageOps


def _upright(image, name: str, in_chans: int, max_pixels: int = MAX_PIXELS):
    """The decoded PIL image, upright, in "RGB" or "L"."""
    _, ImageOps = _pillow()
    if image.width * image.height > max_pixels:
        raise ValueError(f"{name}: refused, it has {image.width} x {image.height} pixels, takes {max_pixels:,} at most")
    _check_ratio(name, image.height, image.width)
    if image.mode in ("I", "F"):
        raise ValueError(f"{name}: got a picture of mode {image.mode}, whose white nobody knows; takes 8 or 16 bits")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip instead of scale
            wide = image if image.mode == "I;16" else image.convert("I")  # of I;16B and its like no point is changed
            image = wide.point(lambda level: level / 256).convert("L")
        return image.convert("L" if in_chans == 1 else "RGB")
    except MemoryError as error:  # and not the file's fault
        raise MemoryError(f"{name}: no memory for the picture, {image.width} x {image.height} pixels") from error
    except Exception as error:  # each decoder has errors of its own
        raise ValueError(f"{name}: the picture is damaged or cut off ({error})") from error


def _check_ratio(name: str, rows: int, columns: int) -> None:
    """Refuse a picture so thin that, resized until its short side fits the model, it would fill the memory."""
    if not 0 < max(rows, columns) <= MAX_RATIO * min(rows, columns):
        raise ValueError(f"{name}: refused, {columns} x {rows} pixels; takes sides of a ratio of {MAX_RATIO} at most")


def _check_resized(rows: int, columns: int) -> None:
    if rows * columns > MAX_RESIZED:
        raise ValueError(f"crop_pct: asks for a picture of {columns} x {rows} pixels, takes {MAX_RESIZED:,} at most")


def check_pictures(settings: Mapping[str, Any]) -> None:
    """Refuse what a checkpoint says of its pictures where `preprocess` cannot do it.

    Raises:
        ValueError: naming the setting.
    """

    def number(value) -> bool:
        return isinstance(value, (int, float)) and abs(value) < 1e30

    for name in ("mean", "std"):
        values = settings.get(name, (1.0,))
        each = isinstance(values, (list, tuple)) and all(map(number, values))
        if not each or not values or (name == "std" and min(values) <= 0):
            takes = "numbers above 0" if name == "std" else "numbers"
            raise ValueError(f"{name}: got {values!r}, takes a list of {takes}")
    sides = settings.get("input_size", (1,))
    if not isinstance(sides, (list, tuple)) or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"input_size: got {sides!r}, takes a list of numbers above 0")
    crop_pct = settings.get("crop_pct", 1.0)
    if not number(crop_pct) or not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct: got {crop_pct!r}, takes more than 0 and at most 1")
    for name, named in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if settings.get(name, named[0]) not in named:
            raise ValueError(f"{name}: got {settings[name]!r}, takes one of {', '.join(named)}")


def _scaled_size(size: Sequence[int], img_size: tuple[int, int], crop_pct: float, crop_mode: str) -> tuple[int, int]:
    """(rows, columns) of a picture of (rows, columns) `size` once it is resized to cover img_size / crop_pct."""
    rows, columns = size
    high, wide = (math.floor(side / crop_pct) for side in img_size)
    if crop_mode == "squash":
        return high, wide
    if high == wide:  # the shorter side becomes the target, the other is rounded down: torchvision's Resize
        short = min(size)
        rows, columns = (high if side == short else int(high * side / short) for side in size)
        return rows, columns
    ratio = min(rows / high, columns / wide)  # rounded to the nearest: timm's ResizeKeepRatio
    rows, columns = (max(round(side / ratio), least) for side, least in zip(size, img_size))
    return rows, columns


def _crop_origin(size: Sequence[int], img_size: Sequence[int]) -> tuple[int, int]:
    top, left = (round((side - wanted) / 2) for side, wanted in zip(size, img_size))
    return top, left


def to_pixels(
    image,
    img_size: tuple[int, int],
    crop_pct: float = 1.0,
    interpolation: str = "bicubic",
    crop_mode: str = "center",
) -> Tensor:
    """A PIL image resized and cropped to [C, rows, columns] uint8."""
    Image, _ = _pillow()
    rows, columns = _scaled_size((image.height, image.width), img_size, crop_pct, crop_mode)
    _check_resized(rows, columns)
    if (rows, columns) != (image.height, image.width):
        image = image.resize((columns, rows), Image.Resampling[interpolation.upper()])
    top, left = _crop_origin((rows, columns), img_size)
    image = image.crop((left, top, left + img_size[1], top + img_size[0]))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(*img_size, len(image.getbands())).permute(2, 0, 1)


def _tensor_to_pixels(images: Tensor, img_size, crop_pct, interpolation, crop_mode, in_chans) -> Tensor:
    """The same for a uint8 tensor [B, rows, columns, 3], on the device where it lies: within two levels of Pillow's."""
    images = images.permute(0, 3, 1, 2)
    _check_ratio("images", *images.shape[2:])
    if in_chans == 1:  # Pillow's integer weights for luminance
        red, green, blue = images.int().unbind(1)
        images = ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8).unsqueeze(1)
    size = _scaled_size(images.shape[2:], img_size, crop_pct, crop_mode)
    _check_resized(*size)
    if size != tuple(images.shape[2:]):
        if interpolation == "lanczos":
            raise ValueError("interpolation: 'lanczos' resizes files and PIL images only; a tensor takes the others")
        smooth = {} if interpolation == "nearest" else {"antialias": True}
        mode = "nearest-exact" if interpolation == "nearest" else interpolation
        for pass_size in ((images.shape[2], size[1]), size):  # columns, then rows, each rounded to levels: as Pillow
            images = torch.nn.functional.interpolate(images.float(), pass_size, mode=mode, **smooth)
            images = images.round().clamp(0, 255)
        images = images.to(torch.uint8)
    top, left = _crop_origin(size, img_size)
    return images[:, :, top : top + img_size[0], left : left + img_size[1]]


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(pixels - mean) / std for [B, C, rows, columns] pixels from 0 to 1, or uint8 from 0 to 255; gives fp32.

    One value of `mean` and `std` serves every channel; three on a single channel are averaged.
    """
    channels = pixels.shape[1]
    mean, std = per_channel("mean", mean, channels), per_channel("std", std, channels)
    return normalise_by(pixels, mean, std, torch.float32)


def preprocess(
    images,
    *,
    img_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    crop_pct: float = 1.0,
    crop_mode: str = "center",
    in_chans: int = 3,
) -> Tensor:
    """Pictures as the normalised batch that a model takes.

    Args:
        images: a path, a PIL image, a list of paths and PIL images, or a uint8 tensor or array [B, rows, columns, 3].
        img_size: the side of the model's input, or (rows, columns).
        mean, std: one value a channel, for pixels from 0 to 1.
        interpolation: one of `INTERPOLATIONS`, antialiased when it makes a picture smaller.
        crop_pct: share of the resized picture's shorter side that the crop keeps, above 0 and at most 1.
        crop_mode: "center" keeps the ratio of the sides, "squash" resizes both to the model's, as in transformers.
        in_chans: 3 for RGB, 1 for greyscale.

    Returns:
        fp32 [B, in_chans, rows, columns]; on the tensor's own device for a tensor, on the CPU otherwise.

    Raises:
        ValueError: for an argument out of range, and as `open_image` does. TypeError: for anything else as `images`.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
    if in_chans not in (1, 3):
        raise ValueError(f"in_chans: got {in_chans}, pictures have 1 or 3")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation: got {interpolation!r}, takes one of {', '.join(INTERPOLATIONS)}")
    if crop_mode not in CROP_MODES:
        raise ValueError(f"crop_mode: got {crop_mode!r}, takes one of {', '.join(CROP_MODES)}")
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct: got {crop_pct}, takes more than 0 and at most 1")
    if hasattr(images, "__array__") and not hasattr(images, "getbands"):
        if not isinstance(images, Tensor):
            import numpy as np

            images = torch.from_numpy(np.array(images))
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
            shape = list(images.shape)
            raise TypeError(f"images: got {images.dtype} {shape}, a tensor of pictures is uint8 [B, rows, columns, 3]")
        pixels = _tensor_to_pixels(images, size, crop_pct, interpolation, crop_mode, in_chans)
    else:
        pictures = list(images) if isinstance(images, (list, tuple)) else [images]
        how = (size, crop_pct, interpolation, crop_mode)
        each = [to_pixels(_picture(picture, in_chans), *how) for picture in pictures]
        pixels = torch.stack(each) if each else torch.empty(0, in_chans, *size, dtype=torch.uint8)
    return normalise(pixels, mean, std)


def _picture(picture, in_chans: int):
    if isinstance(picture, (str, Path)):
        return open_image(picture, in_chans)
    if hasattr(picture, "getbands"):
        return _upright(picture, "images: the PIL image", in_chans)
    takes = "a path, a PIL image, a list of them, or a uint8 tensor [B, rows, columns, 3]"
    raise TypeError(f"images: got {type(picture).__name__}, takes {takes}")


def pictures_in(folder: Path) -> list[Path]:
    """The files under a folder, at any depth, whose suffix is one of `SUFFIXES`; hidden ones are left out."""
    files = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    return sorted(file for file in files if file.is_file())


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """The picture files that `paths` name: files as they are, folders searched through for `SUFFIXES`, in order.

    Raises:
        ValueError: for a path that is not there, and a folder without a picture.
    """
    found = []
    for path in map(Path, paths):
        if not path.is_dir():
            if not path.exists():
                raise ValueError(f"{path}: no such file or folder")
            found.append(path)
            continue
        inside = pictures_in(path)
        if not inside:
            raise ValueError(f"{path}: the folder holds no picture ({', '.join(SUFFIXES)})")
        found += inside
    return found
