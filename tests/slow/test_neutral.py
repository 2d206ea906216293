"""A regularized model is the stock model where regularization is not wanted: every torchvision builder.

The default run takes one builder per family; ``pytest -m slow tests/test_neutral.py`` takes them all and
writes ``data/results/models.csv``, of which tools/models_table.py makes a table.
"""

import copy
import csv
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from onnx_ir import serde
from support.the_tools import tool_module
from torch import nn
from torch.utils import _pytree as pytree
from torchvision.models import list_models

from dropblock_det.inject.inject import regularize_
from dropblock_det.inject.preview import list_sites
from dropblock_det.layers import DropBlock2d
from dropblock_det.torchvision_models import SUFFIX, build_without_weights

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "data" / "results" / "models.csv"
NOT_IMAGES = (*list_models(torchvision.models.video), "mvit_v1_b", "mvit_v2_s", "s3d", "swin3d_*")
TASKS = {
    "detection": list_models(torchvision.models.detection, exclude=f"*{SUFFIX}"),
    "segmentation": list_models(torchvision.models.segmentation, exclude=f"*{SUFFIX}"),
    "optical flow": list_models(torchvision.models.optical_flow),
    "quantized": list_models(torchvision.models.quantization),
    "classification": list_models(torchvision.models, exclude=f"*{SUFFIX}"),
}
ONE_PER_FAMILY = [
    "convnext_tiny", "deeplabv3_mobilenet_v3_large", "densenet121", "efficientnet_b0",
    "fasterrcnn_mobilenet_v3_large_320_fpn", "googlenet", "inception_v3", "keypointrcnn_resnet50_fpn",
    "lraspp_mobilenet_v3_large", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "quantized_resnet18",
    "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1",
    "ssdlite320_mobilenet_v3_large", "alexnet",
]  # fmt: skip
# Transformers have no conv-norm units: their one convolution, the patch embedding, is named by pattern.
AT = {"vit_": "conv_proj", "swin_": "features.0.0"}
SIZE = {"vit_": 224, "maxvit_": 224, "inception_": 96, "quantized_inception": 96, "raft_": 128, "ssd": 320}
SMALL = {"min_size": 64, "max_size": 96}
FEW_BOXES = SMALL | {"num_classes": 3, "box_batch_size_per_image": 8, "box_detections_per_img": 4}
EVERY_BOX = {"score_thresh": 0.0}
ARGUMENTS = {
    "retinanet": SMALL | EVERY_BOX,
    "fcos": SMALL | EVERY_BOX,
    "ssd": EVERY_BOX,
    "fasterrcnn": FEW_BOXES,
    "maskrcnn": FEW_BOXES,
    "keypointrcnn": FEW_BOXES,
    "googlenet": {"init_weights": False, "aux_logits": False},  # their own initialization is slow
    "inception": {"init_weights": False, "aux_logits": False},
    "quantized_googlenet": {"aux_logits": False},
    "quantized_inception": {"aux_logits": False},
}


def lookup(table, name, default):
    """The value of the longest key with which the name starts."""
    return next((table[key] for key in sorted(table, key=len, reverse=True) if name.startswith(key)), default)


def inputs(name, batch=2):
    size = lookup(SIZE, name, 64)
    images = torch.rand(batch, 3, size, size)
    if name in TASKS["detection"]:
        return (list(images),)
    return (images, images.flip(0)) if name in TASKS["optical flow"] else (images,)


def loss_of(name, model, arguments):
    if name not in TASKS["detection"]:
        leaves = [leaf for leaf in pytree.tree_leaves(model(*arguments)) if isinstance(leaf, torch.Tensor)]
        return sum(leaf.float().square().mean() for leaf in leaves)
    boxes, labels = torch.tensor([[4.0, 6.0, 40.0, 50.0]]), torch.tensor([1])
    masks, keypoints = (
        torch.ones(1, *arguments[0][0].shape[1:], dtype=torch.uint8),
        torch.full((1, 17, 3), 20.0),
    )
    target = {"boxes": boxes, "labels": labels, "masks": masks, "keypoints": keypoints}
    return sum(model(arguments[0], [target] * len(arguments[0])).values())


class OnTensors(nn.Module):
    """A detector as tracing takes it: a batch in, a flat list of tensors out."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images):
        return [
            detections[key]
            for detections in self.detector(list(images.unbind()))
            for key in sorted(detections)
        ]


def graphs(name, model, arguments, onnx_nodes):
    """The exported, the ONNX and the traced graph, without names that differ from one trace to the next.

    Detectors are traced whole. What torch.export takes of them is the backbone: the boxes' number depends on
    the data. The ONNX graph is the exported program, translated; up to ``onnx_nodes`` nodes are.
    """
    trace = traced(name, model, arguments)
    if name in TASKS["detection"]:
        model, arguments = model.backbone, (torch.stack(arguments[0]),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, arguments)
        nodes = [
            (str(node.op), str(node.target), str(node.args), str(node.kwargs)) for node in program.graph.nodes
        ]
        found = {"trace": trace, "export": (nodes, str(program.graph_signature))}
        if len(nodes) <= onnx_nodes:
            found["onnx"] = onnx_graph(program)
    return found


def traced(name, model, arguments):
    if name in TASKS["detection"]:
        model, arguments = OnTensors(model), (torch.stack(arguments[0]),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.jit.trace(model, arguments, check_trace=False, strict=False).inlined_graph
    torch._C._jit_pass_dce(graph)
    text = re.sub(r"___torch_mangle_\d+\.|#.*", "", str(torch._C._jit_pass_canonicalize(graph)))
    text = re.sub(r" : \S+", "", text)
    order: dict[str, str] = {}
    return re.sub(r"%[\w.]+", lambda match: order.setdefault(match[0], f"%{len(order)}"), text)


def onnx_graph(program):
    """The ONNX graph, without weights' values and stack traces; ``None`` where torch cannot translate it."""
    try:
        model = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False).model
    except torch.onnx.OnnxExporterError:
        return None
    nodes = []
    for node in map(serde.serialize_node, model.graph):
        del node.metadata_props[:]
        nodes.append(node.SerializeToString(deterministic=True))
    ends = [model.graph.inputs, model.graph.initializers.values(), model.graph.outputs]
    return nodes, [[(str(value.name), str(value.type), str(value.shape)) for value in end] for end in ends]


def evaluate(model, arguments):
    torch.manual_seed(0)  # for the quantizable models' and RAFT's sake: nothing here should draw
    with torch.no_grad():
        return [
            leaf for leaf in pytree.tree_leaves(model.eval()(*arguments)) if isinstance(leaf, torch.Tensor)
        ]


def same(ours, theirs):
    return len(ours) == len(theirs) > 0 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def examine(name, onnx_nodes=sys.maxsize):
    """Regularizes, compares with the stock model, trains a step, removes, compares again."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_without_weights(name, **lookup(ARGUMENTS, name, {}))
    for parameter in model.parameters():
        if (
            parameter.dim() > 1 and not parameter.any()
        ):  # a ViT's head starts at zero and would hide everything
            torch.nn.init.normal_(parameter, std=0.02)
    at = lookup(AT, name, "paper")
    arguments = inputs(name)
    stock = evaluate(model, arguments)
    stock_graphs = graphs(name, model, arguments, onnx_nodes)
    stock_repr, stock_state = repr(model), copy.deepcopy(model.state_dict())
    assert all(torch.isfinite(leaf).all() and leaf.numel() for leaf in stock), (
        "the comparison would say nothing"
    )

    sites = list_sites(model, at, arguments)
    handle = regularize_(model, lambda: DropBlock2d(p=0.1, block_size=3), at)
    ours = graphs(name, model, arguments, onnx_nodes)
    neutral = {
        "keys": list(model.state_dict()) == list(stock_state),
        "strict load": not any(model.load_state_dict(stock_state, strict=True)),
        "eval": same(evaluate(model, arguments), stock),
        **{kind: ours[kind] == graph for kind, graph in stock_graphs.items()},
    }

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    loss = loss_of(name, model.train(), arguments)
    with torch.no_grad():
        torch.manual_seed(1)
        first = loss_of(name, model, arguments)
        torch.manual_seed(1)
        handle.set_p(0.0)
        without = loss_of(name, model, arguments)
    loss.backward()
    optimizer.step()
    trains = {
        "all sites run": all(len(shape) == 4 for site in sites for shape in site.shapes or [()]),
        "finite loss": bool(torch.isfinite(loss)),
        "finite gradients": all(
            p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters()
        ),
        "drops": not torch.equal(first, without),
    }

    handle.remove()
    model.load_state_dict(stock_state)
    neutral["remove"] = repr(model) == stock_repr and same(evaluate(model, arguments), stock)
    onnx = "stock fails" if stock_graphs.get("onnx", ()) is None else neutral.get("onnx", "not tried")
    return {"sites": len(sites), "at": at, "neutral": neutral, "onnx": onnx, "trains": trains}


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_one_builder_per_family_is_neutral_and_trains(name):
    seen = examine(name, onnx_nodes=400)  # larger ones take long
    assert all(seen["neutral"].values()), seen["neutral"]
    assert all(seen["trains"].values()), seen["trains"]
    assert seen["sites"] > 0


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "maskrcnn_resnet50_fpn"])
def test_regularizers_of_pyramids_and_heads_leave_no_trace(name):
    model = build_without_weights(name, **lookup(ARGUMENTS, name, {})).eval()
    arguments = inputs(name)
    stock = traced(name, model, arguments)
    handle = regularize_(model, nn.Dropout, ["fpn", "head"])
    assert traced(name, model, arguments) == stock
    model.get_submodule(handle.sites[-1]).regularizer.train()
    assert traced(name, model, arguments) != stock, "the trace would not show them"


BUILDERS = [(task, name) for task, names in TASKS.items() for name in names]


@pytest.fixture(scope="module")
def record():
    """Takes rows, and writes them when every builder has one: the table is of one run."""
    rows = {}
    yield lambda row: rows.update({row["model"]: row})
    if len(rows) < len(BUILDERS):
        return
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(next(iter(rows.values()))))
        writer.writeheader()
        writer.writerows(rows.values())


@pytest.mark.slow
@pytest.mark.parametrize(("task", "name"), BUILDERS)
def test_every_builder_is_neutral_and_trains(task, name, record):
    seen = examine(name)
    said = {kind: "yes" if all(seen[kind].values()) else "no" for kind in ("neutral", "trains")}
    onnx = {True: "identical", False: "differs"}.get(seen["onnx"], seen["onnx"])
    record(
        {"model": name, "task": task, "at": seen["at"], "sites": str(seen["sites"])}
        | {"neutral": said["neutral"], "ONNX": onnx, "trains a step": said["trains"]}
        | {"torch": torch.__version__, "torchvision": torchvision.__version__}
    )
    assert said == {"neutral": "yes", "trains": "yes"}, seen


def test_the_table_shows_the_last_sweep():
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tool_module("models_table.py").rendered(TABLE) == TABLE.with_suffix(".md").read_text()
    assert {row["neutral"] + row["trains a step"] for row in rows} == {"yesyes"}
    assert all(int(row["sites"]) > 0 for row in rows)
    if rows[0]["torchvision"] == torchvision.__version__:
        assert [row["model"] for row in rows] == [name for _, name in BUILDERS]


def test_the_sweep_leaves_no_builder_out():
    covered = {name for names in TASKS.values() for name in names}
    assert covered | set(NOT_IMAGES) >= set(list_models(exclude=[f"*{SUFFIX}"]))
