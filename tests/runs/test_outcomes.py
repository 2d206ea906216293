"""``outcomes.npz``: written and read back, damaged ones named."""

import io
import zipfile
from dataclasses import fields

import numpy as np
import pytest

from dropblock_det.errors import InputError
from dropblock_det.runs.outcomes import MAX_BYTES, read_outcomes, write_outcomes
from dropblock_det.tasks.evaluation import Outcomes


def invented(images=20, rows=200, ways=10) -> Outcomes:
    rng = np.random.default_rng(0)
    return Outcomes(
        columns={"mAP": tuple(range(ways)), "AP75": (5,)},
        images=rng.choice(2**40, images, replace=False),
        categories=("cat", "Hund $x$ \u2603"),
        truths=rng.integers(0, 5, (images, 2), dtype=np.int32),
        image=np.sort(rng.integers(0, images, rows, dtype=np.int32)),
        category=np.repeat(np.arange(2, dtype=np.int32), rows // 2),
        score=rng.random(rows, dtype=np.float32),
        hit=rng.random((rows, ways)) < 0.5,
        ignored=rng.random((rows, ways)) < 0.1,
    )


@pytest.mark.parametrize("rows", [200, 0])
def test_outcomes_survive_the_disk(rows, tmp_path):
    outcomes = invented(rows=rows)
    write_outcomes(tmp_path, outcomes)
    again = read_outcomes(tmp_path)
    for field in fields(Outcomes):
        mine, other = getattr(outcomes, field.name), getattr(again, field.name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == other.dtype
            assert np.array_equal(mine, other)
        else:
            assert mine == other
    assert read_outcomes(tmp_path / "elsewhere") is None


def test_they_are_compact(tmp_path):
    """Two hundred images with a hundred detections each."""
    write_outcomes(tmp_path, invented(200, 20_000))
    assert (tmp_path / "outcomes.npz").stat().st_size < 400_000


def rewritten(path, **changes):
    with np.load(path) as file:
        arrays = dict(file)
    buffer = io.BytesIO()
    np.savez(buffer, **{name: value for name, value in (arrays | changes).items() if value is not None})
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    "changes",
    [
        {"image": np.full(200, 20, np.int32)},
        {"category": np.full(200, -1, np.int32)},
        {"score": np.full(200, np.nan, np.float32)},
        {"score": np.zeros(200)},
        {"score": None},
        {"hit": np.zeros((199, 10), bool)},
        {"hit": np.zeros(200, bool)},
        {"truths": np.full((20, 2), -1, np.int32)},
        {"categories": np.array([{}, {}], dtype=object)},
        {"metrics": np.array(["one"])},
        {"more": np.zeros(1)},
    ],
)
def test_damaged_ones_are_named(changes, tmp_path):
    write_outcomes(tmp_path, invented())
    rewritten(tmp_path / "outcomes.npz", **changes)
    with pytest.raises(InputError, match=r"outcomes.npz: not a run's outcomes \(") as caught:
        read_outcomes(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK", b"nonsense" * 100])
def test_files_of_another_kind_are_named(content, tmp_path):
    (tmp_path / "outcomes.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"outcomes.npz: not a run's outcomes \("):
        read_outcomes(tmp_path)


def test_a_bomb_is_not_unpacked(tmp_path):
    piece = bytes(2**20)
    with (
        zipfile.ZipFile(tmp_path / "outcomes.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("hit.npy", "w", force_zip64=True) as part,
    ):
        for _ in range(MAX_BYTES // len(piece) + 1):
            part.write(piece)
    with pytest.raises(InputError, match="it would fill the memory"):
        read_outcomes(tmp_path)
