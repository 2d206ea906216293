"""What Dropout, SpatialDropout and DropBlock remove from a feature map, at the same drop probability.

    dropblock-det show-masks [--image IMAGE] [--p 0.25] [--block-sizes 3 5 7] [--seed 2] [--output masks.png]

The feature map is made with eight fixed filters (edges in four directions, brightness, two colour contrasts,
texture), so that one can recognize in it what the image shows; no network or weights are needed.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate, pad

from dropblock_det.arguments import Seed, Share, Side
from dropblock_det.datasets.images import read_image
from dropblock_det.datasets.scenes import draw_scene
from dropblock_det.errors import InputError
from dropblock_det.files import write_figure
from dropblock_det.layers import make_regularizer
from dropblock_det.runs.pictures import ORANGE

CHANNELS = ("edges │", "edges ╲", "edges ─", "edges ╱", "brightness", "red-green", "blue-yellow", "texture")
SIDE = 40  # of the feature map's longer axis: what layer3 makes of a 640-pixel image


def feature_map(image: Tensor) -> Tensor:
    """Eight channels ``(1, 8, h, w)``, each scaled to [0, 1], the longer axis ``SIDE`` cells."""
    scale = SIDE / max(image.shape[1:])
    size = [max(1, round(side * scale)) for side in image.shape[1:]]
    fine = interpolate(image[None], size=[4 * side for side in size], mode="bilinear", antialias=True)
    red, green, blue = fine[0]
    gray = fine.mean(1, keepdim=True)
    texture = (gray - avg_pool2d(gray, 5, 1, 2, count_include_pad=False)).abs()
    colours = torch.stack([red - green, blue - (red + green) / 2])[None]
    maps = avg_pool2d(
        torch.cat([edges(gray).sqrt(), gray, colours, texture.sqrt()], 1), 4
    )  # sqrt: faint ones show
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-6)


def edges(gray: Tensor) -> Tensor:
    """Strength of edges in four directions: ``(1, 1, h, w)`` to ``(1, 4, h, w)``, Sobel's filters."""
    along = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    diagonal = torch.tensor([[0.0, 1, 2], [-1, 0, 1], [-2, -1, 0]])
    kernels = torch.stack([along, diagonal, along.T, diagonal.flip(1)])[:, None]
    return conv2d(pad(gray, (1, 1, 1, 1), mode="replicate"), kernels).abs()


def draw(image: Tensor, p: float, block_sizes: list[int], seed: int) -> Figure:
    """One row per regularizer, one column per channel; what is dropped stands in colour."""
    features = feature_map(image)
    rows = [("Dropout", "dropout", 1), ("SpatialDropout", "spatial_dropout", 1)]
    rows += [(f"DropBlock, block size {k}", "dropblock", k) for k in block_sizes]
    height, width = features.shape[2:]
    cell = 1.35
    figure = Figure(
        figsize=(cell * 9.6, (cell * height / width + 0.14) * (len(rows) + 2.2)), layout="constrained"
    )
    halves = figure.add_gridspec(2, 1, height_ratios=[2.1, len(rows)])
    top, bottom = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    picture, text = top.subplots(1, 2, width_ratios=[1, 2.4])
    picture.imshow(image.permute(1, 2, 0).numpy())
    picture.set_title("an image", fontsize=11)
    picture.axis("off")
    text.axis("off")
    text.text(
        0,
        0.5,
        f"Below: its feature map, eight channels of {height} × {width}, and in colour\n"
        f"what each regularizer sets to 0 in one training step at p = {p:g}.\n\n"
        "Dropout takes single elements; their neighbours still tell what was there.\n"
        "SpatialDropout takes whole channels, all or nothing.\n"
        "DropBlock takes contiguous regions: a whole part of an object is gone,\n"
        'and the network must recognize it by the rest. (calibration="exact": p on average.)',
        va="center",
        fontsize=11,
        linespacing=1.5,
    )
    grid = bottom.subplots(len(rows) + 1, len(CHANNELS), squeeze=False)
    for axes, name, channel in zip(grid[0], CHANNELS, features[0], strict=True):
        axes.imshow(channel.numpy(), cmap="gray")
        axes.set_title(name, fontsize=9)
    grid[0][0].set_ylabel("feature map", rotation=0, ha="right", va="center", fontsize=10)
    for line, (title, name, block_size) in zip(grid[1:], rows, strict=True):
        torch.manual_seed(seed)
        layer = make_regularizer(name, p, block_size, calibration="exact").train()
        dropped = layer(torch.ones_like(features)) == 0
        share = f"{100 * dropped.float().mean():.0f} % dropped here"
        line[0].set_ylabel(f"{title}\n{share}", rotation=0, ha="right", va="center", fontsize=10)
        for axes, channel, gone in zip(line, features[0], dropped[0], strict=True):
            axes.imshow(channel.numpy(), cmap="gray")
            axes.imshow(np.ma.masked_where(~gone.numpy(), gone.numpy()), cmap=ListedColormap([ORANGE]))
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    return figure


def show_masks(
    image: Path | None = None,
    p: Share = 0.25,
    block_sizes: list[Side] = [3, 5, 7],  # noqa: B006
    seed: Seed = 2,
    output: Path = Path("masks.png"),
) -> None:
    """Draws what Dropout, SpatialDropout and DropBlock remove from a feature map.

    Args:
        image: Any image; by default a generated scene.
        p: Drop probability, for all of them.
        block_sizes: Sides of DropBlock's blocks, one row each.
        seed: Of the masks.
        output: The picture, a .png.
    """
    if output.suffix != ".png":
        raise InputError(f"--output {output}: give a name that ends in .png")
    if image is None:
        pixels = torch.from_numpy(draw_scene(np.random.default_rng(3))[0]).permute(2, 0, 1)
    else:
        pixels = read_image(image)
    write_figure(output, draw(pixels.float() / 255, p, block_sizes, seed))
    print(f"wrote {output}")
