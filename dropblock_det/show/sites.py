"""Where a placement puts regularizers in a torchvision model, and what share they would drop.

dropblock-det list-sites retinanet_resnet50_fpn --at paper --size 640
dropblock-det list-sites mobilenet_v3_large --at stage5 'features.*.block.0'
"""

import inspect
import warnings
from typing import Any, Literal

import torch
from rich.table import Table

from dropblock_det.arguments import Count, Share, Side
from dropblock_det.commands import PlainConsole
from dropblock_det.errors import InputError
from dropblock_det.inject.coverage import measure_coverage
from dropblock_det.inject.preview import Site, list_sites
from dropblock_det.layers import DropBlock2d
from dropblock_det.torchvision_models import build_without_weights


def show_sites(
    model: str,
    at: list[str] = ["paper"],  # noqa: B006
    p: Share = 0.1,
    block_size: Count = 7,
    calibration: Literal["paper", "exact"] = "paper",
    size: Side = 224,
) -> None:
    """Shows where a placement puts regularizers in a torchvision model, and what share they would drop.

    Args:
        model: A name in torchvision.models.list_models().
        at: Presets and dotted patterns.
        p: Drop probability.
        block_size: Side of a block.
        calibration: Of the blocks' probability.
        size: Side of the square input in pixels.
    """

    def make() -> DropBlock2d:
        return DropBlock2d(p, block_size, calibration=calibration)

    make()  # refuses a bad argument before the model is built
    warnings.simplefilter("ignore")  # of torchvision, about its own initialization
    network = build_without_weights(model)
    list_sites(network, at)  # and a bad name, before the model runs
    try:
        sites = list_sites(network, at, example(network, size), make)
    except InputError:
        raise
    except Exception as error:  # a network has many errors for an image, or memory, that is too small
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise InputError(f"--size {size}: {model} does not run on it ({reason}); give another") from None
    title = f"{model}, at {', '.join(at)}: {len(sites)} site{'s' * (len(sites) > 1)}, {make()}"
    console = PlainConsole()
    console.print(table(title, sites))
    for stage in measure_coverage(network, [site.name for site in sites]):
        console.print(f"{stage.stage}: {stage.covered} of {stage.convolutions} convolutions covered")


def example(network: Any, size: int) -> Any:
    """What to call a torchvision model with: an image, as many as it takes, or a list of them."""
    if hasattr(network, "transform"):
        network.transform.min_size, network.transform.max_size = (size,), size
        return [torch.rand(3, size, size)]
    inputs = inspect.signature(network.forward).parameters.values()
    return (torch.rand(1, 3, size, size),) * sum(each.default is each.empty for each in inputs)


def table(title: str, sites: list[Site]) -> Table:
    """A line for each site."""
    lines = Table(title=title, title_justify="left")
    rows = []
    for site in sites:
        maps = ["×".join(map(str, shape[1:])) for shape in site.shapes] or ["did not run"]
        shares = ["" if share is None else f"{share:.1%}" for share in site.shares] or [""]
        # A head's layers run once per level of the pyramid: the first and the last are shown.
        ends = (" ... ".join(dict.fromkeys((values[0], values[-1]))) for values in (maps, shares))
        rows.append((site.name, site.kind, f"{site.p:g}", *ends))
    # In full, whatever the terminal's width: a cut name can't be copied.
    headers = ("site", "module", "p", "feature map", "dropped")
    for header, values in zip(headers, zip(*rows, strict=True), strict=True):
        lines.add_column(header, no_wrap=True, min_width=max(map(len, (header, *values))))
    for row in rows:
        lines.add_row(*row)
    return lines
