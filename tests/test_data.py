"""Data: the digits, folders, the split, the order of batches."""

import collections

import pytest
import torch
from PIL import Image

from tests.small_runs import colour_folder, picture
from vit_fast.data import ShuffledBatches, load_data, load_digits, split
from vit_fast.inference import open_image, to_pixels

SMALL = {"input_size": (1, 8, 8), "crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "center"}
COLOUR = {"input_size": (3, 8, 8), "crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "center"}
SQUASHED = {"crop_pct": 0.8, "interpolation": "bilinear", "crop_mode": "squash"}  # none is the default of `to_pixels`


def test_a_fifth_of_each_digit_is_held_out_and_never_trained_on():
    data = load_data("digits", SMALL)
    images, labels = load_digits()
    assert len(data.train) + len(data.held_out) == len(labels) == 1797
    for digit, total in enumerate(labels.bincount().tolist()):
        assert (data.held_out.labels == digit).sum() == round(total / 5)
    train, held_out = split([str(index) for index in range(1797)], labels.tolist())
    assert not set(train) & set(held_out)
    assert torch.equal(data.train.pixels[:, 0], images[train])
    assert torch.equal(data.held_out.pixels[:, 0], images[held_out])
    assert data.classes == tuple("0123456789")


def test_the_split_depends_on_names_alone():
    names, labels = [f"{index}.png" for index in range(50)], [index % 2 for index in range(50)]
    _, held_out = split(names, labels)
    assert collections.Counter(labels[index] for index in held_out) == {0: 5, 1: 5}
    mixed = list(range(49, -1, -1))
    again = split([names[index] for index in mixed], [labels[index] for index in mixed])
    assert {mixed[index] for index in again[1]} == set(held_out)
    assert split(["a", "b", "c"], [0, 1, 1])[1] in ([1], [2])  # one picture is trained on, of two one is held out


def test_digits_at_another_size_and_in_colour():
    """As `predict` would see files of them, the same in every channel."""
    data = load_data("digits", {"input_size": (3, 16, 12), **SQUASHED})
    images, labels = load_digits()
    for part, indices in zip((data.train, data.held_out), split([str(i) for i in range(1797)], labels.tolist())):
        first = to_pixels(Image.fromarray(images[indices[0]].numpy()), (16, 12), *SQUASHED.values())
        assert part.pixels.shape == (len(indices), 3, 16, 12)
        assert torch.equal(part.pixels[0], first.expand(3, -1, -1))


def test_digits_are_not_mirrored_and_folders_are(tmp_path):
    def mirrors(data):
        return data.augment[-1].p

    assert mirrors(load_data("digits", SMALL)) == 0.0
    assert mirrors(load_data("digits", SMALL, hflip=0.25)) == 0.25
    assert mirrors(load_data(str(colour_folder(tmp_path)), COLOUR)) == 0.5
    assert mirrors(load_data(str(tmp_path), COLOUR, hflip=0.0)) == 0.0


def test_a_folder(tmp_path):
    data = load_data(str(colour_folder(tmp_path)), COLOUR)
    assert data.classes == ("green", "red")
    assert (len(data.train), len(data.held_out)) == (16, 4)
    images, labels = data.train.__getitems__(list(range(16)))
    assert (images.dtype, images.shape[1]) == (torch.uint8, 3)
    brightest = images.float().mean(dim=(2, 3)).argmax(dim=1)  # red is channel 0 and class 1
    assert torch.equal(1 - brightest, labels)
    augmented = data.augment(images.float() / 255)
    assert augmented.shape == (16, 3, 8, 8)
    assert not torch.equal(augmented, data.augment(images.float() / 255))
    assert data.held_out.__getitems__([0, 3])[0].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_held_out_files_are_read_as_predict_reads_them(tmp_path, channels):
    held_out = load_data(str(colour_folder(tmp_path)), {"input_size": (channels, 8, 6), **SQUASHED}).held_out
    Image.fromarray(torch.randint(256, (10, 12, 3), dtype=torch.uint8).numpy()).save(held_out.paths[0])
    expected = to_pixels(open_image(held_out.paths[0], channels), (8, 6), *SQUASHED.values())
    assert torch.equal(held_out.__getitems__([0])[0][0], expected)


def test_a_model_whose_input_is_no_square(tmp_path):
    data = load_data(str(colour_folder(tmp_path)), {**COLOUR, "input_size": (3, 8, 16)})
    images = data.train.__getitems__([0])[0]
    assert images.shape == (1, 3, 10, 19), "room for a crop, a seventh more on each side"
    assert data.augment(images.float() / 255).shape == (1, 3, 8, 16)
    assert data.held_out.__getitems__([0])[0].shape == (1, 3, 8, 16)


def test_a_crop_is_a_third_of_the_picture_or_more(tmp_path):
    """Of a picture whose channels say where a pixel lies."""
    place = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 37)] * 2, indexing="ij"))
    place = torch.cat([place, place[:1]]).expand(200, -1, -1, -1)
    crops = load_data(str(colour_folder(tmp_path)), {**COLOUR, "input_size": (3, 32, 32)}).augment(place)
    area = (crops.amax((2, 3)) - crops.amin((2, 3)))[:, :2].prod(1)
    assert 0.3 < area.min() < 0.45
    assert area.max() > 0.9


def test_a_folder_that_is_split_already(tmp_path):
    colour_folder(tmp_path / "train", 3)
    colour_folder(tmp_path / "val", 2)
    colour_folder(tmp_path / "test", 5)  # is read by nobody
    data = load_data(str(tmp_path), COLOUR)
    assert (len(data.train), len(data.held_out), data.classes) == (6, 4, ("green", "red"))
    picture(tmp_path / "val" / "red" / "more.png")
    assert load_data(str(tmp_path), COLOUR).digest != data.digest, "a run does not go on with others held out"
    picture(tmp_path / "val" / "blue" / "a.png")
    with pytest.raises(ValueError, match="only one of them has blue"):
        load_data(str(tmp_path), COLOUR)


def test_classes_with_the_names_of_parts(tmp_path):
    for name in ("train", "val"):
        for index in range(5):
            picture(tmp_path / name / f"{index}.png")
    with pytest.raises(ValueError, match="train: takes two subfolders or more, one a class, found none"):
        load_data(str(tmp_path), COLOUR)  # a split without classes is none of two classes
    picture(tmp_path / "car" / "a.png")
    picture(tmp_path / "car" / "b.png")
    assert load_data(str(tmp_path), COLOUR).classes == ("car", "train", "val")


def _one_class(folder):
    picture(folder / "cats" / "a.png")


def _single_pictures(folder):
    for name in ("cats", "dogs"):
        picture(folder / name / "a.png")


def _empty_class(folder):
    picture(folder / "cats" / "a.png")
    (folder / "dogs").mkdir()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "two subfolders or more, one a class, found none"),
        (lambda folder: picture(folder / "a.png"), "found none"),
        (_one_class, "found one class, 'cats'"),
        (_single_pictures, "no class has two pictures, of which one would be held out"),
        (_empty_class, "dogs: a class without a picture"),
    ],
    ids=["nothing", "pictures without a class", "one class", "a picture a class", "an empty class"],
)
def test_a_folder_that_cannot_be_trained_on(tmp_path, make, says):
    make(tmp_path)
    with pytest.raises(ValueError, match=says) as caught:
        load_data(str(tmp_path), COLOUR)
    assert str(tmp_path) in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        load_data(str(tmp_path / "gone"), COLOUR)
    with pytest.raises(ValueError, match="is a file"):
        load_data(str(picture(tmp_path / "a.png")), COLOUR)


def test_a_broken_picture_is_named(tmp_path):
    colour_folder(tmp_path)
    (tmp_path / "red" / "0.png").write_bytes(b"\x89PNG")
    data = load_data(str(tmp_path), COLOUR)
    part, index = next(
        (part, part.paths.index(path))
        for part in (data.train, data.held_out)
        for path in part.paths
        if path == tmp_path / "red" / "0.png"
    )
    with pytest.raises(ValueError, match=r"red.0\.png"):
        part.__getitems__([index])


def test_batches_go_on_from_any_position():
    batches = ShuffledBatches(10, 4, seed=3)
    whole = list(batches.epoch(5))
    assert [len(batch) for batch in whole] == [4, 4, 2]
    assert len(batches) == 3
    assert sorted(index for batch in whole for index in batch) == list(range(10))
    for start in range(4):
        assert list(batches.epoch(5, start)) == whole[start:]
    assert whole != list(batches.epoch(6))
    assert whole != list(ShuffledBatches(10, 4, seed=4).epoch(5))
