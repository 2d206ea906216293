"""Makes a subset of COCO 2017: chooses images by seed and fetches only those.

python tools/prepare_coco.py --train 500 --val 200 --seed 0 --out data/coco500
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from dropblock_det.coco_subset.choose import Options
from dropblock_det.coco_subset.download import Network
from dropblock_det.coco_subset.manifest import Manifest, read_manifest
from dropblock_det.coco_subset.prepare import MANIFEST, annotations_file, prepare, verify
from dropblock_det.coco_subset.summary import SIZES, Summary, plot, summarize
from dropblock_det.errors import InputError, disk_errors, run_tool


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Options()
    parser.add_argument("--out", type=Path, default=Path("data/coco500"), help="folder to make (%(default)s)")
    parser.add_argument(
        "--train", type=int, default=defaults.train, help="images from train2017 (%(default)s)"
    )
    parser.add_argument("--val", type=int, default=defaults.val, help="images from val2017 (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=defaults.seed, help="what decides the choice (%(default)s)"
    )
    parser.add_argument("--categories", help="keep these only: person,dog,...")
    parser.add_argument(
        "--min-per-category",
        type=int,
        default=defaults.min_per_category,
        help="least number of train images with a box of each category (%(default)s)",
    )
    parser.add_argument(
        "--from-manifest", type=Path, metavar="FILE", help="build the subset of this manifest"
    )
    parser.add_argument(
        "--verify", action="store_true", help="only compare --out with its (or that) manifest"
    )
    parser.add_argument(
        "--source", type=Path, metavar="DIR", help="a full COCO 2017 on disk; no network needed"
    )
    parser.add_argument("--mirror", metavar="URL", help="asked in place of http://images.cocodataset.org")
    return parser.parse_args()


def show(console: Console, out: Path, manifest: Manifest) -> None:
    """Prints what the subset holds and draws the class distribution."""
    summaries = {split: summarize(out / annotations_file(split)) for split in manifest.parts}
    table = Table(box=None, padding=(0, 1, 0, 0), caption="boxes by area: under 32², under 96², larger")
    table.add_column("category", no_wrap=True)
    for split in summaries:
        for column in (f"{split}\nimages", "\nboxes", *("\n" + size for size in SIZES)):
            table.add_column(column, justify="right", no_wrap=True)
    first = next(iter(summaries.values()))
    for name in first.images_with:
        table.add_row(name, *(cell for summary in summaries.values() for cell in _cells(summary, name)))
    console.print(table)
    for split, summary in summaries.items():
        size = sum(image.size for image in manifest.parts[split].images)
        console.print(
            f"{split}: {summary.images} images ({size / 1e6:.1f} MB), {summary.boxes.total()} boxes, "
            f"{summary.crowds} crowd regions, {summary.empty} images without boxes"
        )
        for name, count in summary.licenses.most_common():
            console.print(f"  {count:6} x {name}")
    if "train" in summaries:
        least = manifest.options.min_per_category
        short = [f"{name} ({n})" for name, n in summaries["train"].images_with.items() if n < least]
        if short:
            console.print(f"fewer than {least} train images with: {', '.join(short)}")
    with disk_errors(out):
        written = out / ".classes.partial"
        written.write_bytes(plot(summaries))
        written.replace(out / "classes.png")
    console.print(f"class distribution: {out / 'classes.png'}")


def _cells(summary: Summary, name: str) -> list[str]:
    sizes = [summary.boxes[name, size] for size in SIZES]
    return [str(count) for count in (summary.images_with[name], sum(sizes), *sizes)]


def main() -> None:
    args = parse()
    console = Console(soft_wrap=True, highlight=False)
    manifest = read_manifest(args.from_manifest) if args.from_manifest else None
    if args.verify:
        problems = verify(args.out, manifest or read_manifest(args.out / MANIFEST))
        for problem in problems:
            print(problem)
        if problems:
            raise InputError(
                f"{args.out}: {len(problems)} files differ from the manifest; start without --verify to mend"
            )
        return console.print(f"{args.out}: complete and unaltered")
    names = args.categories.split(",") if args.categories is not None else None
    options = Options(
        args.train,
        args.val,
        args.seed,
        tuple(sorted({name.strip() for name in names})) if names is not None else None,
        args.min_per_category,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=None)

        def report(what: str, done: int, total: int) -> None:
            if progress.tasks[0].description != what:
                progress.reset(bar, description=what)
            progress.update(bar, completed=done, total=total)

        manifest = prepare(args.out, manifest or options, args.source, Network(mirror=args.mirror), report)
    show(console, args.out, manifest)


if __name__ == "__main__":
    run_tool(main)
