"""Image classification: torchvision's classifiers and a small CNN, accuracy in all and per class."""
