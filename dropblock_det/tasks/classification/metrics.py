"""The metrics of classification."""

from dropblock_det.tasks.metric import LOSSES, Metric

HEADLINE = "accuracy"
METRICS = (
    *LOSSES,
    Metric("accuracy", "accuracy", "higher", meaning="share of the validation images given their own class"),
)
