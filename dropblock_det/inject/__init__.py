"""Putting regularizers into a model and taking them out again: which layers (placement), how, and a preview.

Knows torch modules and torchvision's classes as data; no training, no data set.
"""
