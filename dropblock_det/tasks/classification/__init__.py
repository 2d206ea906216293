"""Image classification: torchvision's classifiers and a small CNN, accuracy over all images and per class.

Knows no other task, and nothing of runs and reports.
"""
