"""All of COCO's size: 118,287 images with 860,001 boxes, in seconds and little memory."""

import subprocess
import sys

import pytest
from support.coco_like import PEAK_MB, write_full_size

LOAD = """
import sys, time
from pathlib import Path
from dropblock_det.datasets.annotations import load_annotations
began = time.process_time()
annotations = load_annotations(Path(sys.argv[1]))
seconds, peak = time.process_time() - began, peak_mb()
print(f"{seconds:.1f} s on one core, peak {peak:.0f} MB")
assert len(annotations.images) == 118_287 and len(annotations.rows) == 860_001
assert seconds < 6 and peak < 700
"""


@pytest.mark.slow
def test_training_annotations(tmp_path):
    path = tmp_path / "full.json"
    write_full_size(path, polygons=(14, 16))
    subprocess.run([sys.executable, "-c", PEAK_MB + LOAD, str(path)], check=True)
