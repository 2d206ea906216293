"""The layer and the table of regularizers."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import StochasticDepth

from dropblock_det.errors import InputError
from dropblock_det.layers import REGULARIZERS, DropBlock2d, changing_many, make_regularizer
from dropblock_det.ops import reference
from dropblock_det.ops.dropblock import drop_block2d


def test_layer_is_the_function_in_training_and_nothing_in_eval():
    layer = DropBlock2d(0.3, 3)
    x = torch.randn(2, 4, 12, 12)
    y = layer(x)
    assert 0 < (y == 0).float().mean() < 1
    assert layer.eval()(x) is x


def test_it_has_no_state_and_prints_its_settings():
    layer = DropBlock2d(p=0.1, block_size=5)
    assert not layer.state_dict()
    assert not list(layer.parameters())
    assert not list(layer.buffers())
    assert str(layer) == "DropBlock2d(p=0.1, block_size=5, per_channel=True, calibration='paper')"


def test_a_rectangular_block():
    layer = DropBlock2d(0.3, [np.int64(1), 6])
    assert layer.block_size == (1, 6)
    assert "block_size=(1, 6)," in str(layer)
    dropped = (layer(torch.ones(2, 4, 12, 12)) == 0).flatten(0, 2)
    assert dropped.any()
    for row in dropped.int().tolist():
        assert all(len(run) >= 6 for run in "".join(map(str, row)).split("0") if run)


def test_p_is_set_like_dropouts_and_checked():
    layer = DropBlock2d(0.1, 1)
    layer.p = 1.0
    assert layer.p == 1.0
    assert (layer(torch.randn(1, 2, 5, 5)) == 0).all()
    with pytest.raises(InputError, match=r"p must .* 1\.2"):
        layer.p = 1.2
    assert layer.p == 1.0
    layer.p = 0.0
    x = torch.randn(1, 2, 5, 5)
    assert layer(x) is x


@pytest.mark.parametrize(
    "arguments", [{"p": 2}, {"block_size": 0}, {"per_channel": "false"}, {"calibration": "no"}]
)
def test_bad_arguments_fail_when_built(arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        DropBlock2d(**arguments)


@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.double, lambda m: m.to("cpu", torch.bfloat16)])
def test_moving_keeps_the_exact_p(move):
    layer = move(DropBlock2d(0.1, 3))
    assert layer.p == 0.1
    assert layer._p_tensor.dtype == torch.float32
    assert layer._p_tensor.item() == pytest.approx(0.1, rel=1e-7)


@pytest.mark.parametrize("how", ["to_empty", "assign", "to_meta_and_back"])
@pytest.mark.parametrize("compiled", [False, True])
def test_built_on_meta_it_trains_once_materialized(how, compiled):
    """The share is the one expected at p = 0.3, within 0.03, five standard errors; at 0.2 it is 0.08 less."""
    with torch.device("cpu" if how == "to_meta_and_back" else "meta"):
        model = nn.Sequential(nn.Conv2d(3, 16, 1), DropBlock2d(0.2, 3))
    if how == "assign":
        model.load_state_dict(nn.Sequential(nn.Conv2d(3, 16, 1)).state_dict(), assign=True)
    else:
        model = model.to("meta").to_empty(device="cpu")
        nn.init.ones_(model[0].weight)
        nn.init.zeros_(model[0].bias)
    model[1].p = 0.3
    torch._dynamo.reset()
    y = (torch.compile(model, backend="aot_eager") if compiled else model)(torch.rand(4, 3, 30, 30) + 1)
    gamma = reference.corner_probability(0.3, 3, 30, 30)
    expected = reference.expected_drop_share(gamma, 3, 30, 30)
    assert (y == 0).float().mean().item() == pytest.approx(expected, abs=0.03)
    y.sum().backward()
    assert model[0].weight.grad.isfinite().all()


def test_on_the_meta_device_it_gives_the_shape():
    layer = DropBlock2d(0.3, 3)
    assert layer(torch.empty(2, 3, 9, 9, device="meta")).shape == (2, 3, 9, 9)
    assert (layer(torch.ones(2, 3, 9, 9)) == 0).any()


@pytest.mark.parametrize("inside", [lambda: DropBlock2d(0.1, 1), lambda: DropBlock2d(0.1, 1).cpu()])
def test_p_can_be_set_after_inference_mode(inside):
    with torch.inference_mode():
        layer = inside()
        layer(torch.ones(1, 2, 9, 9))
    layer.p = 1.0
    x = torch.ones(1, 2, 9, 9, requires_grad=True)
    layer(x).sum().backward()
    assert (x.grad == 0).all()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert (compiled(x) == 0).all()


def test_no_tensor_is_a_type_error():
    with pytest.raises(TypeError, match="x must be a tensor"):
        DropBlock2d(0.1, 3)("x")


class Net(nn.Module):
    """A user's own model with a bare layer."""

    def __init__(self, *arguments, **more):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.layer = DropBlock2d(*arguments, **more, calibration="exact")

    def forward(self, x):
        return self.layer(self.conv(x)).relu()


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("block_size", [5, 4, (3, 11)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_symbolic_trace_follows_p_and_training(p, block_size, per_channel):
    traced = torch.fx.symbolic_trace(Net(p, block_size, per_channel))
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
    x = torch.rand(2, 3, 20, 20)
    dropped = (traced(x) == 0).float().mean()
    assert torch.equal(traced.eval()(x), traced.conv(x).relu())
    traced.train().layer.p = 1.0
    assert (traced(x) == 0).all()
    assert dropped < 1


@pytest.mark.parametrize("training", [True, False])
def test_the_layer_alone_can_be_traced(training):
    traced = torch.fx.symbolic_trace(DropBlock2d(1.0, 3, calibration="exact").train(training))
    assert (traced(torch.ones(1, 2, 9, 9)) == 0).all() == training


def test_the_function_can_be_traced():
    traced = torch.fx.symbolic_trace(lambda x: drop_block2d(x.exp(), 1.0, 3, calibration="exact"))
    assert (traced(torch.ones(1, 2, 9, 9)) == 0).all()


def test_torchvisions_feature_extractor():
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = Net(1.0, 3)
    names = feature_extraction.get_graph_node_names(model)
    assert names[0] == names[1] == ["x", "conv", "layer", "relu"]
    extract = feature_extraction.create_feature_extractor(model, ["layer"])
    x = torch.rand(1, 3, 9, 9)
    assert (extract(x)["layer"] == 0).all()
    assert torch.equal(extract.eval()(x)["layer"], model.conv(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_independent(copied):
    layer = DropBlock2d(0.1, 3)
    other = copied(layer)
    other.p = 0.5
    assert layer.p == 0.1
    assert layer._p_tensor.item() == pytest.approx(0.1)
    assert other._p_tensor.item() == 0.5


class OnAGpu(torch.Tensor):
    """Says that it is on one."""

    is_cuda = True


def test_a_call_that_warms_up_moves_p_for_the_graph_that_is_captured_next(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    layer = DropBlock2d(0.3, 3)
    layer._p_tensor = layer._p_tensor.to("meta")  # any other device
    layer(torch.ones(1, 2, 9, 9).as_subclass(OnAGpu))
    assert layer._p_tensor.item() == pytest.approx(0.3)


def test_compiled_follows_p_without_recompilation():
    torch._dynamo.reset()
    layer = DropBlock2d(0.1, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.ones(4, 8, 20, 20)
    shares = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for p in (0.1, 0.5, 1.0, 0.0):
            layer.p = p
            shares.append((compiled(x) == 0).float().mean().item())
    assert 0.05 < shares[0] < 0.15 < shares[1] < 0.6
    assert shares[2] > shares[1]
    assert shares[3] == 0


def test_exported_in_eval_mode_it_leaves_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), DropBlock2d(0.3, 3), nn.ReLU()).eval()
    program = torch.export.export(model, (torch.randn(1, 3, 8, 8),))
    assert "dropblock" not in str(program.graph)
    assert "rand" not in str(program.graph)
    assert {name.split(".")[0] for name in program.state_dict} == {"0"}


def test_table():
    kinds = {
        "none": nn.Identity,
        "dropout": nn.Dropout,
        "spatial_dropout": nn.Dropout2d,
        "dropblock": DropBlock2d,
        "stochastic_depth": StochasticDepth,
    }
    assert list(REGULARIZERS) == list(kinds)
    for name, kind in kinds.items():
        made = make_regularizer(name, 0.2, block_size=3)
        assert type(made) is kind
        assert getattr(made, "p", 0.2) == 0.2
    shared = make_regularizer("dropblock", 0.2, 3, per_channel=False, calibration="exact")
    assert (shared.block_size, shared.per_channel, shared.calibration) == (3, False, "exact")
    with pytest.raises(InputError, match=r"regularizer.*'drop'"):
        make_regularizer("drop", 0.2)
    with pytest.raises(InputError, match="p must"):
        make_regularizer("dropout", 1.2)


class Operations(TorchDispatchMode):
    """Collects the names of the operations inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def test_many_layers_change_p_in_two_operations_and_in_none_if_unchanged():
    layers = [DropBlock2d(0.1, 3) for _ in range(5)]
    for values, expected in (([0.2, 0.3, 0.4, 0.4, 1.0], 2), ([0.2, 0.3, 0.4, 0.4, 1.0], 0), ([0.0] * 5, 2)):
        with Operations() as operations, changing_many():
            for layer, value in zip(layers, values, strict=True):
                layer.p = 0.7 if expected else value  # set twice, it is still the last value
                layer.p = value
        assert len(operations.names) == expected, operations.names
        assert [layer.p for layer in layers] == values
        assert [layer._p_tensor.item() for layer in layers] == torch.tensor(values).tolist()

    def fails_half_way():
        with changing_many():
            layers[0].p = 0.5
            layers[1].p = 2.0

    with pytest.raises(InputError):
        fails_half_way()
    assert layers[0]._p_tensor.item() == layers[0].p == 0.5
    layers[0].p = 0.25
    assert layers[0]._p_tensor.item() == 0.25
