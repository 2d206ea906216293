"""All commands: ``dropblock-det COMMAND``, ``python -m dropblock_det COMMAND`` and the scripts in tools/.

What a command needs is imported when it is called: ``--help`` is there at once, and Ctrl-C ends imports too.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from dropblock_det.errors import InputError, run_tool

Words = Sequence[str]


def train(words: Words) -> None:
    """Trains a model, or goes on with a run."""
    from dropblock_det.training.cli import train

    train(words)


def evaluate(words: Words) -> None:
    """Evaluates a checkpoint: its task's metrics and val_loss."""
    from dropblock_det.commands import command
    from dropblock_det.training.evaluate import evaluate

    command(evaluate, words, "evaluate")


def predict(words: Words) -> None:
    """Predicts on images: pictures, and COCO results JSON."""
    from dropblock_det.commands import command
    from dropblock_det.training.predict import predict_files

    if command(predict_files, words, "predict"):  # images that it had to leave out
        sys.exit(1)


def compare(words: Words) -> None:
    """Did it help? Trains a config under every setting with several seeds, and reports."""
    from dropblock_det.training.compare import compare

    compare(words)


def prepare_coco(words: Words) -> None:
    """Makes a subset of COCO 2017: chooses images by seed and fetches only those."""
    from dropblock_det.coco_subset.tool import prepare_coco
    from dropblock_det.commands import command

    command(prepare_coco, words, "prepare-coco")


def benchmark(words: Words) -> None:
    """Measures DropBlock against its peers."""
    from dropblock_det.benchmark.tool import MEASUREMENTS
    from dropblock_det.commands import command

    command(MEASUREMENTS, words, "benchmark")


def list_sites(words: Words) -> None:
    """Shows where a placement puts regularizers in a torchvision model."""
    from dropblock_det.commands import command
    from dropblock_det.show.sites import show_sites

    command(show_sites, words, "list-sites")


def show_masks(words: Words) -> None:
    """Draws what Dropout, SpatialDropout and DropBlock remove from a feature map."""
    from dropblock_det.commands import command
    from dropblock_det.show.masks import show_masks

    command(show_masks, words, "show-masks")


COMMANDS: dict[str, Callable[[Words], None]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "compare": compare,
    "prepare-coco": prepare_coco,
    "benchmark": benchmark,
    "list-sites": list_sites,
    "show-masks": show_masks,
}


def run(words: Words) -> None:
    """Runs the command that the first word names with the other words.

    Raises:
        InputError: There is no such command, or its own reasons.
    """
    if not words or words[0] in ("-h", "--help"):
        lines = (f"  {name:14}{inspect.getdoc(function)}" for name, function in COMMANDS.items())
        print("usage: dropblock-det COMMAND ...\n", *lines, "\nCOMMAND --help lists what it takes.", sep="\n")
    elif words[0] == "--version":
        print(f"dropblock_det {version('dropblock_det')}")
    elif words[0] in COMMANDS:
        COMMANDS[words[0]](words[1:])
    else:
        raise InputError(f"{words[0]}: no such command; there are {', '.join(COMMANDS)}")


def main(*first: str) -> None:
    """Runs a command in this process, and ends it as a shell expects.

    Args:
        *first: What goes before the process's own arguments: the command of a script in tools/.
    """
    run_tool(lambda: run([*first, *sys.argv[1:]]))


if __name__ == "__main__":
    main()
