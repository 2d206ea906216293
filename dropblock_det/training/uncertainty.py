"""What ``evaluate --samples`` adds: detections merged from samples, and a picture of their calibration."""

import functools
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dropblock_det.arguments import checked_arguments
from dropblock_det.datasets.sampling import draw_seed
from dropblock_det.errors import InputError
from dropblock_det.inject.backbones import walk
from dropblock_det.inject.inject import install
from dropblock_det.layers import REGULARIZERS, make_regularizer
from dropblock_det.tasks.detection.calibration import Reliability
from dropblock_det.tasks.detection.coco_eval import detections_to_coco
from dropblock_det.tasks.detection.uncertainty import mc_detections


def regularize_as_trained(module: LightningModule, content: dict[str, Any], checkpoint: Path) -> None:
    """Puts the regularizers of the training into a module, as the checkpoint has them.

    Raises:
        InputError: There was none, it was a class of one's own, or it does not fit the module.
    """
    if not content.get("regularizers"):
        raise InputError(
            f"{checkpoint}: trained without a regularizer (or written by an older version, which did not "
            "note it), so that all samples would be the same; leave --samples out"
        )
    for noted in content["regularizers"]:
        name, sites = noted["name"], noted["sites"]
        if name not in REGULARIZERS:
            raise InputError(
                f"{checkpoint}: trained with {name}, which a checkpoint does not hold; call regularize_ and "
                "dropblock_det.tasks.detection.mc_detections in Python"
            )
        arguments = {key: value for key, value in noted.items() if key != "sites"}
        arguments = checked_arguments(make_regularizer, arguments, f"{checkpoint}: regularizers: ")
        if unknown := sites.keys() - dict(walk(module)):
            raise InputError(f"{checkpoint}: regularizers: its model has no {min(unknown)}")
        try:
            install(module, sites, functools.partial(make_regularizer, **arguments))
        except InputError as error:
            raise InputError(f"{checkpoint}: regularizers: {error}") from None


class Samples(Callback):
    """Samples each validated batch; the merged detections are then in ``results``, in COCO's format.

    Beside the standard keys they have ``found_share`` and ``corner_spread``, in pixels, ``None`` where one
    sample alone found the object; ``score`` is the mean.

    Args:
        samples: Forwards for each batch.
        seed: Of the masks; each batch draws its own.
    """

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed = samples, seed
        self.results: list[dict[str, Any]] = []
        self.image_ids: list[int] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Samples the batch."""
        ids, settings = pl_module.image_ids(batch), pl_module.hparams
        seed = draw_seed(self.seed, 0, batch_idx)
        with trainer.precision_plugin.forward_context():  # as the single pass
            merged = mc_detections(pl_module.detector, batch[0], samples=self.samples, seed=seed)
        for image_id, found in zip(ids, merged, strict=True):
            objects = found["labels"] > 0  # some detectors have a score for the background
            best = {name: values[objects][: settings["detections_per_img"]] for name, values in found.items()}
            results = detections_to_coco([image_id], [best], settings["categories"])
            shares, spreads = best["found_shares"].tolist(), best["corner_spreads"].tolist()
            for result, share, spread in zip(results, shares, spreads, strict=True):
                known = None if math.isnan(spread) else spread
                self.results.append({**result, "found_share": share, "corner_spread": known})
        self.image_ids += ids


def reliability_figure(bins: dict[str, Reliability]) -> Figure:
    """Draws the precision over the score, a panel for the single pass and one for the merged detections."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    for axes, (name, of) in zip(figure.subplots(1, len(bins), sharey=True), bins.items(), strict=True):
        _reliability(axes, of)
        axes.set_title(f"{name}: calibration error {of.error:.3f}", fontsize=10)
    figure.axes[0].set_ylabel("share of detections that are right (IoU 0.5)")
    return figure


def _reliability(axes: Axes, of: Reliability) -> None:
    width = 1 / len(of.counts)
    filled = of.counts > 0
    left = [number * width for number in range(len(of.counts))]
    axes.bar(left, of.precision, width, align="edge", color="#56B4E9", edgecolor="white")
    axes.plot([0, 1], [0, 1], "--", color="0.4", linewidth=1)
    axes.plot(of.scores[filled], of.precision[filled], "o", color="black", markersize=4)
    for place, count, height in zip(left, of.counts, of.precision, strict=True):
        if count:
            axes.text(place + width / 2, height + 0.01, f"{count}", ha="center", va="bottom", fontsize=7)
    axes.set(xlim=(0, 1), ylim=(0, 1.05), xlabel="score (numbers: detections in the bin)")
    axes.spines[["top", "right"]].set_visible(False)
