"""Box detection: torchvision's detectors, losses and detections from one pass, COCO's metrics, pictures."""
