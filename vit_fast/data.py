"""Pictures to train on: scikit-learn's scanned digits, or a folder with one subfolder a class.

A fifth of each class is held out: it is measured, never trained on and never used to choose anything. Which fifth does
not depend on the seed of a run, so that runs can be compared.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vit_fast.inference import SUFFIXES, open_image, pictures_in, to_pixels

HELD_OUT = 5  # one picture in five
DIGITS_SIDE = 8


class Scans(torch.utils.data.Dataset):
    """Pictures in memory: uint8 [N, C, rows, columns] and their classes [N]."""

    def __init__(self, pixels: Tensor, labels: Tensor):
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.pixels[indices], self.labels[indices]


class Files(torch.utils.data.Dataset):
    """Pictures in files, decoded when a batch is wanted, as uint8 [B, C, rows, columns]."""

    def __init__(self, paths: list[Path], labels: Tensor, in_chans: int, *shape):
        self.paths, self.labels, self.in_chans = paths, labels, in_chans
        self.shape = shape  # img_size, crop_pct, interpolation and crop_mode of `to_pixels`

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        pictures = [to_pixels(open_image(self.paths[index], self.in_chans), *self.shape) for index in indices]
        return torch.stack(pictures), self.labels[indices]


@dataclass(frozen=True)
class Data:
    """What a run trains on and what it is measured on."""

    classes: tuple[str, ...]
    train: Files | Scans
    held_out: Files | Scans
    augment: torch.nn.Module  # float [B, C, rows, columns] from 0 to 1 → the same, at the size that the model takes
    digest: str  # of the names, classes and split: a run goes on only with the data that it began with


def load_data(source: str, preprocessing: dict, hflip: float | None = None) -> Data:
    """The data that `source` names.

    Args:
        source: "digits", or the path of a folder (write ./digits for a folder of that name). The folder has one
            subfolder a class; a stratified fifth is held out. Or it has subfolders "train" and "val" with the same
            classes in each, and then "val" is what is held out, and nothing else of the folder is read.
        preprocessing: input_size (channels, rows, columns), crop_pct, interpolation and crop_mode of the model.
        hflip: probability of a mirrored picture in training; None is 0.5, and 0 for digits.

    Raises:
        ValueError: for a path that is no folder, and a folder with one class or none or with an empty class.
    """
    if source == "digits":
        return _digits(preprocessing, hflip or 0.0)
    return _folder(Path(source), preprocessing, 0.5 if hflip is None else hflip)


def split(names: Sequence[str], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out: of each class the fifth whose names have the smallest hashes.

    A class of two to seven pictures gives one, a class of one none.
    """
    classes: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        classes.setdefault(label, []).append(index)
    train, held_out = [], []
    for members in classes.values():
        members.sort(key=lambda index: hashlib.sha256(names[index].encode()).digest())
        count = max(round(len(members) / HELD_OUT), min(len(members) - 1, 1))
        held_out += members[:count]
        train += members[count:]
    return sorted(train), sorted(held_out)


def _digest(classes: Sequence[str], train: Sequence[str], held_out: Sequence[str]) -> str:
    return hashlib.sha256("\n".join([*classes, "", *train, "", *held_out]).encode()).hexdigest()


def load_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 scans of handwritten digits, uint8 [1797, 8, 8] from 0 to 255, and their classes [1797].

    They come with scikit-learn; nothing is downloaded. Its 16 levels are spread evenly over 0 to 255.

    Raises:
        ImportError: without scikit-learn, saying how to install it.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'vit-fast[cli]'") from error
    digits = datasets.load_digits()
    return (torch.from_numpy(digits.images) * 255 / 16).round().to(torch.uint8), torch.from_numpy(digits.target).long()


def _digits(preprocessing: dict, hflip: float) -> Data:
    channels, rows, columns = preprocessing["input_size"]
    images, labels = load_digits()
    if (rows, columns) == (DIGITS_SIDE, DIGITS_SIDE):
        pixels = images.unsqueeze(1)
    else:  # the same resize that the files of these digits would get
        from PIL import Image

        shape = ((rows, columns), preprocessing["crop_pct"], preprocessing["interpolation"], preprocessing["crop_mode"])
        pixels = torch.stack([to_pixels(Image.fromarray(image.numpy()), *shape) for image in images])
    pixels = pixels.expand(-1, channels, -1, -1)
    names = [str(index) for index in range(len(labels))]
    train, held_out = split(names, labels.tolist())
    classes = [str(digit) for digit in range(10)]
    # A pen shifts, leans and grows a little; it does not write in mirrors.
    augment = _augmentations(
        ("RandomAffine", {"degrees": 10.0, "translate": (1 / 16, 1 / 16), "scale": (0.95, 1.05), "p": 1.0}),
        ("RandomHorizontalFlip", {"p": hflip}),
    )
    return Data(
        tuple(classes),
        Scans(pixels[train], labels[train]),
        Scans(pixels[held_out], labels[held_out]),
        augment,
        _digest(classes, [names[index] for index in train], [names[index] for index in held_out]),
    )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Class name → its picture files, in the order of the names.

    Raises:
        ValueError: for one class or none, or a class without a picture.
    """
    classes = {subfolder.name: pictures_in(subfolder) for subfolder in _subfolders(folder)}
    if len(classes) < 2:
        found = f"one class, {next(iter(classes))!r}" if classes else "none"
        raise ValueError(f"{folder}: takes two subfolders or more, one a class, found {found}")
    for name, paths in classes.items():
        if not paths:
            raise ValueError(f"{folder / name}: a class without a picture ({', '.join(SUFFIXES)})")
    return classes


def _folder(folder: Path, preprocessing: dict, hflip: float) -> Data:
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "there is no such folder"
        raise ValueError(f"{folder}: {state}; DATA takes 'digits' or a folder with one subfolder of pictures a class")
    # A folder "test" beside them is for later; beside other classes two may have such names, and hold no folders.
    found, halves = {path.name for path in _subfolders(folder)}, ("train", "val")
    if found.issuperset(halves) and (found <= {*halves, "test"} or any(_subfolders(folder / one) for one in halves)):
        given, val = _classes(folder / "train"), _classes(folder / "val")
        if list(given) != list(val):
            differing = ", ".join(sorted(set(given) ^ set(val))[:5])
            raise ValueError(f"{folder}: train and val need the same classes, only one of them has {differing}")
        classes = list(given)
        train, held_out = (
            [(path, classes.index(name)) for name in part for path in part[name]] for part in (given, val)
        )
    else:
        given = _classes(folder)
        classes = list(given)
        every = [(path, label) for label, name in enumerate(classes) for path in given[name]]
        parts = split([path.relative_to(folder).as_posix() for path, _ in every], [label for _, label in every])
        train, held_out = ([every[index] for index in part] for part in parts)
        if not held_out:
            raise ValueError(
                f"{folder}: no class has two pictures, of which one would be held out; add some, or name folders train "
                "and val"
            )
    channels, rows, columns = preprocessing["input_size"]

    def files(part, size, crop_pct) -> Files:
        labels = torch.tensor([label for _, label in part])
        how = (crop_pct, preprocessing["interpolation"], preprocessing["crop_mode"])
        return Files([path for path, _ in part], labels, channels, size, *how)

    room = tuple(math.ceil(side * 8 / 7) for side in (rows, columns))  # the random crop moves inside this
    augment = _augmentations(
        ("RandomResizedCrop", {"size": (rows, columns), "scale": (0.35, 1.0), "cropping_mode": "resample", "p": 1.0}),
        ("RandomHorizontalFlip", {"p": hflip}),
    )
    names = [[path.relative_to(folder).as_posix() for path, _ in part] for part in (train, held_out)]
    measured_on = files(held_out, (rows, columns), preprocessing["crop_pct"])
    return Data(tuple(classes), files(train, room, 1.0), measured_on, augment, _digest(classes, *names))


def _augmentations(*steps: tuple[str, dict]) -> torch.nn.Module:
    """kornia's augmentations by name, each drawn for every picture of a batch from torch's own generator."""
    try:
        import kornia.augmentation
    except ImportError as error:
        raise ImportError("training needs kornia's augmentations: pip install 'vit-fast[cli]'") from error
    return torch.nn.Sequential(*(getattr(kornia.augmentation, name)(**arguments) for name, arguments in steps))


class ShuffledBatches:
    """The batches of an epoch in an order that follows from (seed, epoch) alone, from any position on.

    The last batch of an epoch may be smaller.
    """

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed = count, batch_size, seed

    def __len__(self) -> int:
        return math.ceil(self.count / self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """Lists of indices, beginning with batch `start`."""
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        order = torch.randperm(self.count, generator=generator).tolist()
        for batch in range(start, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]
