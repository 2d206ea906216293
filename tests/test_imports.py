"""Importing the package needs torch alone; who may import whom inside it is a contract in pyproject.toml."""

import subprocess
import sys


def test_the_public_names_need_torch_alone():
    program = (
        "import sys; barred = ['torchvision', 'lightning', 'triton', 'pycocotools', 'matplotlib', 'rich']\n"
        "sys.modules.update(dict.fromkeys(barred))\n"
        "import torch; before = set(sys.modules); import dropblock_det, dropblock_det.tasks.detection\n"
        "dropblock_det.drop_block2d(torch.rand(1, 2, 8, 8), 0.3, 3)\n"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
