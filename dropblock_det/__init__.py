"""DropBlock, Dropout or SpatialDropout inside a torchvision detector. Importing this needs torch alone."""

from dropblock_det.inject import RegularizerHandle, handle_of, regularize_
from dropblock_det.layers import DropBlock2d
from dropblock_det.ops.dropblock import drop_block2d
from dropblock_det.sites import list_sites

__all__ = ["DropBlock2d", "RegularizerHandle", "drop_block2d", "handle_of", "list_sites", "regularize_"]
