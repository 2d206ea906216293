"""Records and plans that somebody edited: each is named in one line, or the report is made of what it says.

No traceback, and no half of a report: what was there before a refusal is there after it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.synthetic_runs import invented_runs

from dropblock_det.errors import InputError, disk_errors
from dropblock_det.report.page import write_report

Edit = Callable[[dict[str, Any]], Any]
ODD = "$\\frac{$[/b]</script>|`\x1b[31m\u202e"
LONG = "x" * 100_000

REFUSED: dict[str, Edit] = {
    "no task": lambda r: r.pop("task"),
    "task a number": lambda r: r.update(task=1),
    "no metrics": lambda r: r.update(metrics=[]),
    "metrics an object": lambda r: r.update(metrics={}),
    "a metric less": lambda r: r["metrics"].pop(),
    "a metric twice": lambda r: r["metrics"].append(r["metrics"][0]),
    "a metric without a name": lambda r: r["metrics"][0].pop("name"),
    "a metric with another name": lambda r: r["metrics"][1].update(name="loss_2"),
    "a metric that is neither better": lambda r: r["metrics"][2].update(better="sideways"),
    "negative digits": lambda r: r["metrics"][2].update(digits=-1),
    "a million digits": lambda r: r["metrics"][2].update(digits=10**6),
    "scale 0": lambda r: r["metrics"][2].update(scale=0),
    "scale 1e300": lambda r: r["metrics"][2].update(scale=1e300),
    "little a word": lambda r: r["metrics"][2].update(little="a lot"),
    "another headline": lambda r: r.update(headline="AP50"),
    "a headline that is not there": lambda r: r.update(headline="F1"),
    "status a word": lambda r: r.update(status="done"),
    "status null": lambda r: r.update(status=None),
    "version 3": lambda r: r.update(version=3),
    "another seed": lambda r: r.update(seed=5),
    "a negative seed": lambda r: r.update(seed=-1),
    "seed a fraction": lambda r: r.update(seed=0.5),
    "another setting": lambda r: r.update(setting="b"),
    "epochs an object": lambda r: r.update(epochs={}),
    "epochs words": lambda r: r.update(epochs=["first"]),
    "an epoch without its number": lambda r: r["epochs"][1].pop("epoch"),
    "an epoch without its step": lambda r: r["epochs"][1].pop("step"),
    "an epoch's number a fraction": lambda r: r["epochs"][1].update(epoch=1.5),
    "epochs backwards": lambda r: r["epochs"].reverse(),
    "an epoch twice": lambda r: r["epochs"].insert(0, r["epochs"][0]),
    "a value a word": lambda r: r["epochs"][1].update(mAP="high"),
    "a value a list": lambda r: r["epochs"][1].update(mAP=[0.1]),
    "a value beyond all floats": lambda r: r["epochs"][1].update(mAP=10**400),
    "a value near the largest float": lambda r: r["epochs"][1].update(mAP=1.7e308),
    "config a list": lambda r: r.update(config=[]),
    "speed a word": lambda r: r.update(images_per_s="fast"),
    "speed near the largest float": lambda r: r.update(images_per_s=1.7e308),
    "memory a word": lambda r: r.update(peak_memory_bytes="much"),
    "memory beyond all floats": lambda r: r.update(peak_memory_bytes=10**400),
    "drop share a number": lambda r: r.update(drop_share=0.1),
    "drop share of words": lambda r: r.update(drop_share={"realised": "all"}),
    "versions numbers": lambda r: r.update(versions={"torch": 2.15}),
    "hardware a list": lambda r: r.update(hardware=["cpu"]),
    "hash a number": lambda r: r.update(data_hash=7),
    "samples a word": lambda r: r.update(samples="many"),
    "a sample elsewhere": lambda r: r["samples"][0].update(id="../../../etc/passwd"),
    "a sample of another kind": lambda r: r["samples"][0].update(kind="masks"),
    "a sample of no pixels": lambda r: r["samples"][0].update(height=0),
    "a sample of 2^70 pixels": lambda r: r["samples"][0].update(height=2**70),
    "a box of three numbers": lambda r: r["samples"][0]["truth"][0].update(bbox=[1, 2, 3]),
    "a box of words": lambda r: r["samples"][0]["truth"][0].update(bbox=["a", "b", "c", "d"]),
    "a category less": lambda r: r["samples"][0]["truth"][0].pop("category"),
    "a score a word": lambda r: r["samples"][0]["predicted"][0].update(score="good"),
}

READ: dict[str, Edit] = {
    "no epochs": lambda r: r.update(epochs=[]),
    "one epoch": lambda r: r.update(epochs=r["epochs"][:1]),
    "values null": lambda r: [e.update(mAP=None, loss=None, val_loss=None) for e in r["epochs"]],
    "values missing": lambda r: [e.pop("mAP") for e in r["epochs"]],
    "values that are huge": lambda r: [e.update(mAP=1e100) for e in r["epochs"]],
    "epochs far apart": lambda r: r["epochs"][-1].update(epoch=2**60),
    "unknown names": lambda r: (r.update(mood="good"), r["epochs"][0].update(mood=1)),
    "no config, versions, hardware": lambda r: [r.pop(name) for name in ("config", "versions", "hardware")],
    "drop share of other names": lambda r: r.update(drop_share={"x": 1}),
    "no samples": lambda r: r.update(samples=[]),
    "a sample less": lambda r: r["samples"].pop(0),
    "a sample twice": lambda r: r["samples"].append(r["samples"][0]),
    "a sample without marks": lambda r: r["samples"][0].update(truth=[], predicted=[]),
    "boxes without a box": lambda r: r["samples"][0]["truth"][0].update(bbox=None),
    "boxes far outside": lambda r: r["samples"][0]["truth"][0].update(bbox=[-1e9, 1e9, -5, 0]),
    "no scores": lambda r: [m.pop("score") for m in r["samples"][0]["predicted"]],
    "odd words": lambda r: (
        r["samples"][0]["truth"][0].update(category=ODD),
        r.update(versions={ODD: ODD}, hardware={ODD: ODD}, data_hash=ODD, init_hash=ODD),
        [m.update(title=ODD, meaning=ODD) for m in r["metrics"]],
    ),
    "failed for odd reasons": lambda r: r.update(status="failed", reason=ODD),
    "a failed run without a reason": lambda r: r.update(status="failed", reason=None),
    "running": lambda r: r.update(status="running"),
    "long words": lambda r: (r["samples"][0]["truth"][0].update(category=LONG), r.update(data_hash=LONG)),
}

PLANS: dict[str, Edit] = {
    "no base": lambda p: p.pop("base"),
    "base a word": lambda p: p.update(base="quickstart"),
    "base without a name": lambda p: p["base"].pop("name"),
    "settings a list": lambda p: p.update(settings=["none", "a"]),
    "a setting a word": lambda p: p["settings"].update(a="dropout"),
    "a setting elsewhere": lambda p: p["settings"].update({"../../a": {}}),
    "seeds a number": lambda p: p.update(seeds=3),
    "seeds words": lambda p: p.update(seeds=["a"]),
    "a negative seed": lambda p: p.update(seeds=[-1]),
    "seed 2^32": lambda p: p.update(seeds=[2**32]),
    "overrides numbers": lambda p: p.update(overrides=[1]),
    "announced seeds a word": lambda p: p.update(announced_seeds="all"),
    "vary_subset a word": lambda p: p.update(vary_subset="yes"),
}


def edited(path: Path, edit: Edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = invented_runs(tmp_path_factory.mktemp("edited") / "runs", settings=("none", "a"), seeds=(0, 1))
    write_report(root, root / "report")
    return root


@pytest.fixture
def edit(root):
    """Edits a file for as long as the test takes."""
    before = {}

    def edit(name: str, how: Edit) -> None:
        before[root / name] = (root / name).read_bytes()
        edited(root / name, how)

    yield edit
    for path, content in before.items():
        path.write_bytes(content)


def refused(root: Path, name: str) -> None:
    before = {path: path.read_bytes() for path in (root / "report").iterdir()}
    with pytest.raises(InputError) as caught, disk_errors(root):
        write_report(root, root / "report")
    assert name in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700
    assert {path: path.read_bytes() for path in (root / "report").iterdir()} == before


@pytest.mark.parametrize("how", REFUSED.values(), ids=REFUSED.keys())
def test_what_no_record_says_is_refused(how, edit, root):
    edit("a/seed1/record.json", how)
    refused(root, "a/seed1")


@pytest.mark.parametrize("how", READ.values(), ids=READ.keys())
def test_what_a_record_may_say_is_reported(how, edit, root):
    edit("a/seed1/record.json", how)
    write_report(root, root / "report")


@pytest.mark.parametrize("how", PLANS.values(), ids=PLANS.keys())
def test_plans_of_another_shape_are_refused(how, edit, root):
    edit("plan.json", how)
    refused(root, "plan.json")
