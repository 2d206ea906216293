"""All of COCO's size: training annotations in seconds and little memory, and what validation costs.

118,287 images with 860,001 boxes for training; for validation 5,000 with 36,781 boxes and 100 detections
each.
"""

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

VALIDATE = """
import contextlib, io, pickle, sys, time
import numpy as np
from pycocotools.cocoeval import COCOeval
from support.coco_like import val2017_like
from dropblock_det.datasets.annotations import coco_index
from dropblock_det.tasks.detection.coco_eval import (
    coco_evaluation, detections_to_coco, metrics_of, outcomes_of
)

annotations, detections, categories = val2017_like()
coco = coco_index(annotations)
ids = [image["id"] for image in annotations["images"]]

def timed(name, function):
    began = time.process_time()
    result = function()
    seconds[name] = time.process_time() - began
    print(f"{name}: {seconds[name]:.1f} s on one core, peak so far {peak_mb():.0f} MB", flush=True)
    return result

def theirs():
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes([dict(result) for result in results]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats

seconds = {}
results = timed("collecting", lambda: detections_to_coco(ids, detections, categories))
timed("sending and receiving them", lambda: pickle.loads(pickle.dumps(results)))
evaluation = timed("evaluation", lambda: coco_evaluation(coco, results, ids))
timed("what was right, image by image", lambda: outcomes_of(evaluation))
values = list(metrics_of(evaluation).values())
del evaluation
np.testing.assert_array_equal(timed("pycocotools alone", theirs), values)
print(f"ours / pycocotools alone: {sum(list(seconds.values())[:-1]) / seconds['pycocotools alone']:.2f}")
assert sum(list(seconds.values())[:-1]) < 1.1 * seconds["pycocotools alone"]
"""


@pytest.mark.slow
def test_training_annotations(tmp_path):
    path = tmp_path / "full.json"
    write_full_size(path, polygons=(14, 16))
    subprocess.run([sys.executable, "-c", PEAK_MB + LOAD, str(path)], check=True)


@pytest.mark.slow
def test_validation():
    """All that validation adds to pycocotools' own evaluation is less than a tenth of it."""
    subprocess.run([sys.executable, "-c", PEAK_MB + VALIDATE], check=True)
