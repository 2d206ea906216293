"""Shows where a placement puts regularizers in a torchvision model, and what share they would drop.

python tools/list_sites.py retinanet_resnet50_fpn --at paper --size 640
python tools/list_sites.py mobilenet_v3_large --at stage5 --at 'features.*.block.0'
"""

import argparse
import warnings
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dropblock_det.errors import run_tool
from dropblock_det.inject.preview import list_sites
from dropblock_det.layers import DropBlock2d
from dropblock_det.torchvision_models import build_without_weights


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a name in torchvision.models.list_models()")
    parser.add_argument("--at", action="append", help="preset or dotted pattern, repeatable (default: paper)")
    parser.add_argument("--p", type=float, default=0.1, help="drop probability (default: 0.1)")
    parser.add_argument("--block-size", type=int, default=7, help="side of a block (default: 7)")
    parser.add_argument("--calibration", choices=("paper", "exact"), default="paper")
    parser.add_argument(
        "--size", type=int, default=224, help="side of the square input in pixels (default: 224)"
    )
    arguments = parser.parse_args()

    def make() -> DropBlock2d:
        return DropBlock2d(arguments.p, arguments.block_size, calibration=arguments.calibration)

    make()  # a bad argument is said before the model is built
    warnings.simplefilter("ignore")  # of torchvision, about its own initialization
    model: Any = build_without_weights(arguments.model)
    at = arguments.at or ["paper"]
    list_sites(model, at)  # and so is a bad name, before the model runs
    if hasattr(model, "transform"):
        model.transform.min_size, model.transform.max_size = (arguments.size,), arguments.size
        example: object = [torch.rand(3, arguments.size, arguments.size)]
    else:
        example = torch.rand(1, 3, arguments.size, arguments.size)
    sites = list_sites(model, at, example, make)

    title = f"{arguments.model}, at {', '.join(at)}: {len(sites)} site{'s' * (len(sites) > 1)}, {make()}"
    table = Table(title=title, title_justify="left")
    table.add_column("site", no_wrap=True, min_width=max(len(site.name) for site in sites))
    for header in ("module", "feature map", "dropped"):
        table.add_column(header)
    for site in sites:
        maps = ["×".join(map(str, shape[1:])) for shape in site.shapes] or ["did not run"]
        shares = ["" if share is None else f"{share:.1%}" for share in site.shares] or [""]
        # A head's layers run once per level of the pyramid: the first and the last say enough.
        table.add_row(
            site.name, site.kind, *(" ... ".join(dict.fromkeys((v[0], v[-1]))) for v in (maps, shares))
        )
    Console().print(table)


if __name__ == "__main__":
    run_tool(main)
