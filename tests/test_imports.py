"""Importing the package needs torch alone, and imports run one way."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dropblock_det"

# Each line may import from the lines above it and, within the line, from what stands to the left.
ORDER = """
errors schedule
ops ops.reference ops.gradients ops.cpu ops.cuda ops.dropblock
layers
placement inject sites torchvision_models
detector
datasets datasets.json_records datasets.subset datasets.download datasets.manifest
datasets.prepare datasets.summary
datasets.annotations datasets.augment datasets.images datasets.sampling datasets.coco datasets.scenes
evaluation
training callbacks
records pictures runs cli
comparison report_statistics report_words report report_figure report_page
benchmark benchmark_report
"""
LAYERS = ORDER.split()


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path):
    """Modules of this package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dropblock_det"):
            module = node.module.removeprefix("dropblock_det").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".strip(".")
                yield inner if inner in LAYERS else module
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"


def test_every_module_imports_only_what_stands_before_it():
    for path in PACKAGE.rglob("*.py"):
        name = name_of(path)
        if path == PACKAGE / "__init__.py":
            continue
        assert name in LAYERS, f"{name}: say where it stands"
        late = [other for other in imports_of(path) if LAYERS.index(other) >= LAYERS.index(name)]
        assert not late, f"{name} imports {late}"
    assert {name_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"} == set(LAYERS)


def test_the_public_names_need_torch_alone():
    program = (
        "import sys; barred = ['torchvision', 'lightning', 'triton', 'pycocotools', 'matplotlib', 'rich']\n"
        "sys.modules.update(dict.fromkeys(barred))\n"
        "import torch; before = set(sys.modules); import dropblock_det\n"
        "dropblock_det.drop_block2d(torch.rand(1, 2, 8, 8), 0.3, 3)\n"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
