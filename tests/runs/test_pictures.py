"""The pictures of a run: what is written at a box can be read, wherever the box is."""

import numpy as np
import pytest
from PIL import Image

from dropblock_det.runs.pictures import prediction_figure, samples_figure
from dropblock_det.tasks.evaluation import Mark, Sample

SIZES = [(640, 480), (480, 640), (96, 128)]


def check_names_are_inside(figure, count):
    figure.draw_without_rendering()
    axes = figure.axes[0]
    inside = axes.get_window_extent()
    assert len(axes.texts) == count
    for text in axes.texts:
        box = text.get_window_extent()
        assert inside.x0 - 1 <= box.x0
        assert box.x1 <= inside.x1 + 1
        assert inside.y0 - 1 <= box.y0
        assert box.y1 <= inside.y1 + 1


def marks(width, height, score):
    """Boxes at each edge of an image."""
    places = [
        (0, 0, 1, 1),
        (0, 0, 0.3, 0.3),
        (0.8, 0, 0.2, 0.1),
        (0.9, 0.95, 0.1, 0.05),
        (0.59, 0.2, 0.1, 0.1),
        (0.2, 0.5, 0.8, 0.5),
    ]
    return [
        Mark("tennis racket", (x * width, y * height, w * width, h * height), score) for x, y, w, h in places
    ]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_names_of_the_truth_and_of_detections_are_inside_their_image(width, height, tmp_path):
    file = tmp_path / "image.png"
    Image.new("RGB", (width, height)).save(file)
    truth, predicted = marks(width, height, None), marks(width, height, 0.9)
    sample = Sample("1", "boxes", width, height, tuple(truth), tuple(predicted), str(file))
    check_names_are_inside(samples_figure([sample]), len(truth) + len(predicted))
    check_names_are_inside(samples_figure([sample] * 8), len(truth) + len(predicted))


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_names_of_predictions_are_inside_their_image(width, height):
    shown = marks(width, height, 0.9)
    check_names_are_inside(prediction_figure(np.zeros((height, width, 3), np.uint8), shown), len(shown))
