"""Making a COCO subset on disk: choosing images, fetching them, the manifest that proves them.

Needs no torch: it runs where nothing is trained.
"""
