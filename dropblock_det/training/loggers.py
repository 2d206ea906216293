"""A run's loggers, and those that somebody adds: all get the metrics, the settings and the pictures."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from PIL import Image

PICTURES = ("curves.png", "samples.png")


def loggers(folder: Path, added: Logger | Iterable[Logger] | bool | None) -> list[Logger]:
    """Returns the run's own loggers, which write into its folder, and those that the settings add."""
    board = TensorBoardLogger(folder, name="logs")
    ours = [board, CSVLogger(folder, name="logs", version=board.version)]
    if isinstance(added, bool) or added is None:
        return ours
    return [*ours, *([added] if isinstance(added, Logger) else added)]


def show_picture(logger: Any, file: Path, step: int) -> None:
    """Hands a picture to a logger in the logger's own way; one that takes none is left alone.

    A logger of one's own takes them by ``log_image(key, images, step)``, as Lightning's WandbLogger does.
    """
    if hasattr(logger, "log_image"):
        logger.log_image(file.stem, [str(file)], step=step)
    elif isinstance(logger, TensorBoardLogger):
        with Image.open(file) as image:
            logger.experiment.add_image(file.stem, np.asarray(image.convert("RGB")), step, dataformats="HWC")
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifact(logger.run_id, str(file))
    elif isinstance(logger, CometLogger):
        logger.experiment.log_image(str(file), name=file.stem, step=step)


class Pictures(Callback):
    """Hands a finished run's pictures to every logger.

    Args:
        folder: The run's; its record, a callback before this one, draws them there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the pictures are drawn, and before the loggers are closed."""
        if not trainer.is_global_zero or trainer.interrupted:
            return
        for file in filter(Path.is_file, (self.folder / name for name in PICTURES)):
            for logger in trainer.loggers:
                show_picture(logger, file, trainer.global_step)
