"""Which tile a kernel takes: one data file an architecture under tiles/, read once.

A file maps kernel → dtype class ("16" for fp16 and bf16, "32" for fp32) → the launch's tile sizes, num_warps and
num_stages. An architecture without a file takes the nearest of its maker.
"""

import functools
import json
import pathlib

import torch

FOLDER = pathlib.Path(__file__).parent / "tiles"


@functools.cache
def architecture(device: torch.device) -> str:
    """The name of the table for a device: "interpreter", "gfx942" or "sm_90" and their like."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def table(name: str) -> dict:
    """The table of an architecture, or of the nearest one of the same maker below it, else above."""
    if not (FOLDER / f"{name}.json").is_file():
        maker = "gfx" if name.startswith("gfx") else "sm_"
        known = sorted((path.stem for path in FOLDER.glob(f"{maker}*.json")), key=lambda stem: int(stem[3:], 16))
        below = [stem for stem in known if int(stem[3:], 16) <= int(name[3:], 16)]
        name = below[-1] if below else known[0]
    return json.loads((FOLDER / f"{name}.json").read_text())


@functools.cache
def lookup(kernel: str, device: torch.device, dtype: torch.dtype) -> dict:
    """The launch arguments of a kernel: its tile sizes, num_warps and num_stages; shared, so not to be changed.

    Args:
        kernel: the entry's name, such as "attention_forward".
        device: where the tensors are.
        dtype: of the operands of its products.
    """
    return table(architecture(device))[kernel]["32" if dtype.itemsize == 4 else "16"]
