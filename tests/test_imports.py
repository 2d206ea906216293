"""Patching a model needs torch alone; who may import whom in the package is a contract in pyproject.toml."""

import subprocess
import sys


def test_the_public_names_need_torch_alone():
    program = """
import sys
barred = "torchvision lightning torchmetrics pycocotools PIL msgspec yaml urllib3 jsonargparse rich scipy"
sys.modules.update(dict.fromkeys([*barred.split(), "matplotlib", "triton"]))
import torch
import dropblock_det, dropblock_det.tasks.detection
dropblock_det.drop_block2d(torch.rand(1, 2, 8, 8), 0.3, 3)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
with dropblock_det.regularize_(model, lambda: dropblock_det.DropBlock2d(0.3, 3), at="1"):
    model(torch.rand(1, 3, 8, 8))
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
