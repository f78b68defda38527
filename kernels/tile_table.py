"""Which tile a kernel takes: one data file an architecture under tiles/, read once.

A file maps kernel → dtype class ("16" for fp16 and bf16, "32" for fp32) → shape class → entry. An entry holds the
launch's tile sizes, num_warps and num_stages; of a persistent kernel how many of its blocks a multiprocessor shall hold
("blocks_per_sm", 1 where it is not said); its "origin": "predicted", by the compiler and the model of
benchmarks/roofline.py, or where measured {"device": …, "date": …, "triton": …, "torch": …}; and a "reason" where it
breaks a rule of `benchmarks.static --check` for one, with the bytes a thread that it "spills" at most. The shape class
is "any", or what the kernel's launch tells apart: "few", "some" and "many" rows of a product, the width of a head, and
"long" of it.

An architecture without a file takes the nearest of its maker. What VIT_FAST_TILES names, else the user's cache, where
`vit-fast tune` writes, takes the place of single entries.
"""

import contextlib
import datetime
import functools
import json
import logging
import os
import pathlib
import re

import torch
import triton

FOLDER = pathlib.Path(__file__).parent / "tiles"
NOT_CHOSEN = ("origin", "spills", "reason")  # what an entry says of itself
NOT_LAUNCHED = ("blocks_per_sm", *NOT_CHOSEN)  # what an entry says besides the launch's arguments
SHAPE_CLASSES = re.compile(r"any|few|some|many|\d+( long)?")
MAY_BE_ZERO = ("TMA", "LONGEST")  # a switch, and the longest sequence that a kernel takes where it takes none
LARGEST_SIDE = 1024  # of a tile; nobody has so many warps either
MEASURED = {"device", "date", "triton", "torch"}  # what the origin of a measured entry tells, each a text
# A product of so few rows has too few tiles to fill the multiprocessors: of 128 x 128 up to FEW_ROWS, 2 images of a
# ViT-B at 224, of 128 x 256 up to SOME_ROWS, 10 images.
FEW_ROWS, SOME_ROWS = 512, 2048

log = logging.getLogger("vit_fast")


@functools.cache
def architecture(device: torch.device) -> str:
    """The name of the table for a device: "interpreter", "gfx942" or "sm_90" and their like."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def nearest(name: str) -> str:
    """The architecture itself where it has a file, else the nearest of the same maker below it, else above.

    Of AMD's, those with four digits have other waves and products than those with three: they stay among themselves.
    """
    if (FOLDER / f"{name}.json").is_file():
        return name
    maker = "gfx" if name.startswith("gfx") else "sm_"
    known = sorted((path.stem for path in FOLDER.glob(f"{maker}*.json")), key=lambda stem: int(stem[3:], 16))
    if maker == "gfx":
        known = [stem for stem in known if len(stem) == len(name)] or known
    below = [stem for stem in known if int(stem[3:], 16) <= int(name[3:], 16)]
    return below[-1] if below else known[0]


def user_file(name: str) -> pathlib.Path:
    """Where entries of the user's own lie: the file that VIT_FAST_TILES names, else the user's cache."""
    if named := os.environ.get("VIT_FAST_TILES"):
        return pathlib.Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "vit_fast" / "tiles" / f"{name}.json"


def launched(entry: dict) -> dict:
    """What a launch takes of an entry."""
    return {name: value for name, value in entry.items() if name not in NOT_LAUNCHED}


def numbers(entry: dict) -> dict:
    """The launch's arguments and blocks_per_sm of an entry: what is chosen when it is."""
    return {name: value for name, value in entry.items() if name not in NOT_CHOSEN}


def measured_on(device: torch.device) -> dict:
    """The origin of an entry that is measured on a device now."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else architecture(device),
        "date": datetime.date.today().isoformat(),
        "triton": triton.__version__,
        "torch": str(torch.__version__),
    }


def fault(entry: dict, like: dict) -> str:
    """What is wrong with an entry in a place where `like` would be right, or "".

    The same numbers must be there, each a whole one, above zero but for MAY_BE_ZERO, sides of tiles and warps a power
    of two, and an origin.
    """
    if not isinstance(entry, dict):
        return f"got {entry!r}, takes an entry"
    takes = launched(like)
    got = numbers(entry)
    right = all(
        type(value) is int
        and value >= (name not in MAY_BE_ZERO)
        and (not name.startswith(("BLOCK_", "num_warps")) or (value & (value - 1) == 0 and value <= LARGEST_SIDE))
        for name, value in got.items()
    )
    if launched(entry).keys() != takes.keys() or not right:
        return (
            f"got {got}, takes {', '.join(takes)} (and blocks_per_sm), each a whole number above zero, BLOCK_ and "
            f"num_warps a power of two up to {LARGEST_SIDE}"
        )
    origin = entry.get("origin")
    measured = isinstance(origin, dict) and origin.keys() == MEASURED and all(type(v) is str for v in origin.values())
    if origin != "predicted" and not measured:
        return f"the origin: got {origin!r}, takes 'predicted', or a text each for {', '.join(sorted(MEASURED))}"
    return ""


def merge(base: dict, own: dict, source: str) -> dict:
    """The table `base` with the entries of `own` in their places.

    Raises:
        ValueError: naming `source` and the entry, where `base` has none of that kernel and dtype, or `fault` finds one.
    """
    merged = {kernel: {dtype: dict(classes) for dtype, classes in dtypes.items()} for kernel, dtypes in base.items()}
    for kernel, dtypes in own.items():
        for dtype, classes in dtypes.items():
            for shape, entry in classes.items():
                there = merged.get(kernel, {}).get(dtype)
                wrong = "the package has no such kernel and dtype"
                if there is not None and not SHAPE_CLASSES.fullmatch(shape):
                    wrong = "there is no such shape class"
                elif there is not None:
                    wrong = fault(entry, there.get(shape) or next(iter(there.values())))
                if wrong:
                    raise ValueError(f"{source}: {kernel}, {dtype}, {shape}: {wrong}")
                there[shape] = entry
    return merged


def entries_in(file: pathlib.Path) -> dict:
    """The entries of a file of the user's, kernel → dtype → shape class → entry, none of them looked at.

    Raises:
        ValueError: for a file that cannot be read, and one that is no table.
    """
    try:
        found = json.loads(file.read_text())
        if not all(isinstance(classes, dict) for dtypes in found.values() for classes in dtypes.values()):
            raise ValueError("a dtype without entries")
        return found
    except (AttributeError, ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{file}: got no tile table ({error}); mend or remove it") from error


@functools.cache
def table(name: str) -> dict:
    """The table in force for an architecture: the package's, the user's entries in their places.

    Raises:
        ValueError: for a file of the user's that is no table.
    """
    found = nearest(name)
    if found != name:
        log.warning("vit_fast has no tile table of %s and takes that of %s; `vit-fast tune` makes one", name, found)
    base = json.loads((FOLDER / f"{found}.json").read_text())
    own = user_file(name)
    if not os.path.isfile(own):
        if os.environ.get("VIT_FAST_TILES"):
            raise ValueError(f"VIT_FAST_TILES: got {own}, takes a file that is there")
        return base
    return merge(base, entries_in(own), str(own))


def text(table: dict) -> str:
    """A table as the text of its file: an entry a line."""
    kernels = []
    for kernel, dtypes in table.items():
        lines = [
            f'    "{dtype}": {{\n'
            + ",\n".join(f'      "{shape}": {json.dumps(entry)}' for shape, entry in classes.items())
            + "\n    }"
            for dtype, classes in dtypes.items()
        ]
        kernels.append(f'  "{kernel}": {{\n' + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def rows_class(rows: int) -> str:
    """The shape class of a product with so many rows; of another class an image may have other last bits."""
    return "few" if rows <= FEW_ROWS else "some" if rows <= SOME_ROWS else "many"


def dtype_class(dtype: torch.dtype) -> str:
    """The class of a table that a dtype belongs to."""
    return "32" if dtype.itemsize == 4 else "16"


def _entry_for(shape_class: str, classes: dict) -> str:
    """The entry of a shape class in a table that need not tell it apart."""
    if shape_class not in classes:
        shape_class = "few" if shape_class == "some" and "few" in classes else "any"
    return shape_class


_recorded: list | None = None
changes = 0  # how often entries were looked up anew


@functools.cache
def lookup(kernel: str, device: torch.device, dtype: torch.dtype, shape_class: str = "any") -> dict:
    """The launch arguments of a kernel: its tile sizes, num_warps and num_stages; shared, so not to be changed.

    Args:
        kernel: the entry's name, such as "attention_forward".
        device: where the tensors are.
        dtype: of the operands of its products.
        shape_class: which entry, where the table tells shapes apart; "any" is taken where it does not.
    """
    classes = table(architecture(device))[kernel][dtype_class(dtype)]
    shape = _entry_for(shape_class, classes)
    if _recorded is not None:
        _recorded.append((kernel, dtype_class(dtype), shape))
    return launched(classes[shape])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a device has; 3 in the interpreter, so that a program there takes several tiles, and some take none."""
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def residents(kernel: str, device: torch.device, dtype: torch.dtype, shape_class: str = "any") -> int:
    """How many programs of a persistent kernel the device shall hold at once; arguments as `lookup`'s."""
    classes = table(architecture(device))[kernel][dtype_class(dtype)]
    return multiprocessors(device) * classes[_entry_for(shape_class, classes)].get("blocks_per_sm", 1)


def forget() -> None:
    """Have entries looked up anew."""
    global changes
    lookup.cache_clear()
    residents.cache_clear()
    changes += 1  # last: a plan that another thread makes meanwhile belongs to the entries before


@contextlib.contextmanager
def recording():
    """A list that grows by (kernel, dtype class, shape class) of each entry when it is first looked up in the block."""
    global _recorded
    before, _recorded = _recorded, []
    forget()
    try:
        yield _recorded
    finally:
        _recorded = before


@contextlib.contextmanager
def using(name: str, kernel: str, dtype: str, shape: str, entry: dict):
    """Inside the block every launch of this process takes `entry` from that place of an architecture's table."""
    classes = table(name)[kernel][dtype]
    before, classes[shape] = classes[shape], entry
    forget()
    try:
        yield
    finally:
        classes[shape] = before
        forget()
