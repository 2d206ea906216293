"""DropBlock inside torchvision's detectors."""
