"""Box detection: torchvision's detectors, losses and detections from one pass, COCO's metrics, pictures.

Knows no other task, and nothing of runs and reports.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dropblock_det.tasks.detection.eval_losses import losses_and_detections
    from dropblock_det.tasks.detection.uncertainty import mc_detections

__all__ = ["losses_and_detections", "mc_detections"]
_HOMES = {"losses_and_detections": "eval_losses", "mc_detections": "uncertainty"}


def __getattr__(name: str) -> Any:
    # Drawing pictures and computing COCO's metrics needs no torchvision.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
