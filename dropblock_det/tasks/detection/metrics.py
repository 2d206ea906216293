"""The metrics of box detection, COCO's."""

from dropblock_det.tasks.metric import LOSSES, Metric

HEADLINE = "mAP"
METRICS = (
    *LOSSES,
    Metric("mAP", "mAP", "higher", meaning="COCO's mAP, the mean over IoU 0.50 to 0.95", little=0.01),
    Metric("AP50", "AP50", "higher", meaning="AP at IoU 0.50"),
    Metric("AP75", "AP75", "higher", meaning="AP at IoU 0.75"),
)
