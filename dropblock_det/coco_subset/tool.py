"""The command: chooses, fetches, verifies, and shows what the subset holds."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from dropblock_det.arguments import Natural, Seed
from dropblock_det.coco_subset.choose import Options
from dropblock_det.coco_subset.download import Network
from dropblock_det.coco_subset.manifest import Manifest, read_manifest
from dropblock_det.coco_subset.prepare import MANIFEST, annotations_file, prepare
from dropblock_det.coco_subset.prepare import verify as differences
from dropblock_det.coco_subset.summary import SIZES, Summary, class_figure, summarize
from dropblock_det.commands import PlainConsole
from dropblock_det.errors import InputError
from dropblock_det.files import write_figure


def prepare_coco(
    out: Path = Path("data/coco500"),
    train: Natural = 500,
    val: Natural = 200,
    seed: Seed = 0,
    categories: str | None = None,
    min_per_category: Natural = 1,
    from_manifest: Path | None = None,
    verify: bool = False,
    source: Path | None = None,
    mirror: str | None = None,
) -> None:
    """Makes a subset of COCO 2017: chooses images by seed and fetches only those.

    Args:
        out: Folder to make.
        train: Images from train2017.
        val: Images from val2017.
        seed: What decides the choice.
        categories: Keep these only: person,dog,...
        min_per_category: Least number of train images with a box of each category.
        from_manifest: Build the subset of this manifest.
        verify: Only compare --out with its (or that) manifest.
        source: A full COCO 2017 on disk; no network needed.
        mirror: Address asked in place of http://images.cocodataset.org.
    """
    console = PlainConsole()
    manifest = read_manifest(from_manifest) if from_manifest else None
    if verify:
        problems = differences(out, manifest or read_manifest(out / MANIFEST))
        for problem in problems:
            console.print(problem)
        if problems:
            raise InputError(
                f"{out}: {len(problems)} files differ from the manifest; start without --verify to mend"
            )
        return console.print(f"{out}: complete and unaltered")
    names = None if categories is None else tuple(sorted({name.strip() for name in categories.split(",")}))
    options = Options(train, val, seed, names, min_per_category)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=None)

        def report(what: str, done: int, total: int) -> None:
            if progress.tasks[0].description != what:
                progress.reset(bar, description=what)
            progress.update(bar, completed=done, total=total)

        manifest = prepare(out, manifest or options, source, Network(mirror=mirror), report)
    show(console, out, manifest)


def show(console: Console, out: Path, manifest: Manifest) -> None:
    """Prints what the subset holds and draws the class distribution."""
    summaries = {split: summarize(out / annotations_file(split)) for split in manifest.splits}
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
        size = sum(image.bytes for image in manifest.splits[split].images)
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
    write_figure(out / "classes.png", class_figure(summaries))
    console.print(f"class distribution: {out / 'classes.png'}")


def _cells(summary: Summary, name: str) -> list[str]:
    sizes = [summary.boxes[name, size] for size in SIZES]
    return [str(count) for count in (summary.images_with.get(name, 0), sum(sizes), *sizes)]
