"""Pictures of what a model looked at, and of how it learned (matplotlib, without a display)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vit_fast.inference import open_image, preprocess, to_pixels

PANELS_A_LINE = 8
PANEL = 1.5  # inches
GLOW = (1.0, 0.58, 0.12)  # of attention, red, green, blue
INK, PAPER, ACCENT, SECOND = "#1f2430", "#ffffff", "#c8443a", "#2f6db3"


@dataclass(frozen=True)
class Looked:
    """One picture and where a model looked in it."""

    picture: Tensor  # uint8 [rows, columns, 3], as the model was given it
    probabilities: Tensor  # fp32 [classes]
    rollout: Tensor  # fp32 [rows, columns] of patches
    heads: Tensor  # fp32 [H, rows, columns] of patches, the last layer


def look(model, path: str | Path) -> Looked:
    """Classify a picture and read the model's attention: its rollout, and each head of the last layer.

    The row read is the class token's; without one, the mean over the patch tokens.

    Raises:
        ValueError: as `open_image`.
    """
    config = model.pretrained_cfg
    size = model.patch_embed.img_size
    placing = ("crop_pct", "crop_mode", "interpolation")
    shape = {"img_size": size, **{name: config[name] for name in placing if name in config}}
    image = open_image(path, model.in_chans)
    parameter = next(model.parameters())
    batch = preprocess(image, mean=config["mean"], std=config["std"], in_chans=model.in_chans, **shape)
    batch = batch.to(parameter.device, parameter.dtype)
    grid, count = model.patch_embed.grid_size, model.num_prefix_tokens
    maps = model.attention_maps(batch, layers=[-1])[0, 0]  # [H, T, T]
    rows = maps[:, 0] if model.has_class_token else maps[:, count:].mean(dim=1)
    with torch.no_grad():
        probabilities = model.eval()(batch).float().softmax(dim=-1)[0]
    return Looked(
        to_pixels(image, **shape).expand(3, -1, -1).permute(1, 2, 0),
        probabilities.cpu(),
        model.rollout_map(batch)[0].cpu(),
        rows[:, count:].reshape(-1, *grid).cpu(),
    )


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'vit-fast[cli]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.family": "DejaVu Sans", "text.color": INK, "axes.edgecolor": INK})
    return plt


def check_picture_path(path: str | Path) -> None:
    """Refuse a name that no picture can be written to, before the work begins.

    Raises:
        ValueError: for a suffix that matplotlib does not write, and a folder that is not there or not writable.
    """
    path = Path(path)
    suffixes = sorted(_pyplot().gcf().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in suffixes:
        raise ValueError(f"{path}: got the suffix {path.suffix!r}, takes one of {', '.join('.' + s for s in suffixes)}")
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(f"output: cannot write {path}: {error.strerror}") from error


def draw_attention(looked: Sequence[Looked], titles: Sequence[str], path: str | Path) -> None:
    """One line of panels for each picture: the picture, its rollout, each head of the last layer.

    Every panel has its own scale, from none to its brightest patch. More than six heads take several lines a picture.

    Args:
        titles: for each picture, what stands above it.
        path: where the figure goes; the suffix is the format.
    """
    plt = _pyplot()
    panels = 2 + len(looked[0].heads)
    lines = math.ceil(panels / PANELS_A_LINE)
    columns = math.ceil(panels / lines)
    figure, axes = plt.subplots(
        lines * len(looked),
        columns,
        figsize=(columns * PANEL, lines * len(looked) * (PANEL + 0.26)),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for index, (one, title) in enumerate(zip(looked, titles)):
        places = iter(axes[index * lines : (index + 1) * lines].flat)
        axis = next(places)
        _show(axis, one.picture)
        axis.set_title(title, fontsize=9, fontweight="bold", parse_math=False)
        for name, heat in [("rollout", one.rollout), *((f"head {n}", h) for n, h in enumerate(one.heads, 1))]:
            axis = next(places)
            _show(axis, one.picture, heat)
            if index == 0 or lines > 1:
                axis.set_title(name, fontsize=9)
    figure.savefig(path, dpi=150, facecolor=PAPER)
    plt.close(figure)


def _show(axis, picture: Tensor, heat: Tensor | None = None) -> None:
    """A picture; with `heat`, in grey under its attention, which covers it the more the stronger it is."""
    rows, columns = picture.shape[:2]
    smooth = "nearest" if max(rows, columns) <= 64 else "antialiased"
    extent = (0, columns, rows, 0)
    if heat is None:
        axis.imshow(picture.numpy(), interpolation=smooth, extent=extent)
        return
    grey = picture.float().mean(dim=2) / 255
    axis.imshow(grey.numpy(), cmap="gray", vmin=0, vmax=1.15, interpolation=smooth, extent=extent)
    heat = heat / heat.max().clamp(min=torch.finfo(torch.float32).tiny)
    cover = torch.cat([torch.tensor(GLOW).expand(*heat.shape, 3), 0.85 * heat.unsqueeze(2)], dim=2)
    axis.imshow(cover.numpy(), interpolation="nearest", extent=extent)


def draw_history(history: Sequence[dict], path: str | Path) -> None:
    """Loss and held-out accuracy over the epochs, from the lines of a history.jsonl."""
    plt = _pyplot()
    figure, (losses, accuracy) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    epochs = [record["epoch"] + 1 for record in history]
    losses.plot(epochs, [record["train_loss"] for record in history], color=SECOND, label="training, augmented")
    losses.plot(epochs, [record["held_out_loss"] for record in history], color=ACCENT, label="held out")
    losses.set(title="loss", xlabel="epoch", ylim=(0, None))
    losses.legend(frameon=False)
    percent = [100 * record["held_out_accuracy"] for record in history]
    accuracy.plot(epochs, percent, color=ACCENT)
    accuracy.annotate(
        f"{percent[-1]:.1f} %",
        (epochs[-1], percent[-1]),
        (-4, -16),
        textcoords="offset points",
        ha="right",
        color=ACCENT,
    )
    accuracy.set(title="held-out accuracy, %", xlabel="epoch", ylim=(None, 101))
    for axis in (losses, accuracy):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, dpi=150, facecolor=PAPER)
    plt.close(figure)
