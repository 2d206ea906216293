"""The layer and the table of regularizers."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from dropblock_det.errors import InputError
from dropblock_det.layers import REGULARIZERS, DropBlock2d, make_regularizer


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


@pytest.mark.parametrize("arguments", [{"p": 2}, {"block_size": 0}, {"calibration": "no"}])
def test_bad_arguments_fail_when_built(arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        DropBlock2d(**arguments)


@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.double, lambda m: m.to("cpu", torch.bfloat16)])
def test_moving_keeps_the_exact_p(move):
    layer = move(DropBlock2d(0.1, 3))
    assert layer.p == 0.1
    assert layer._p_tensor.dtype == torch.float32
    assert layer._p_tensor.item() == pytest.approx(0.1, rel=1e-7)


def test_built_on_meta_and_materialized():
    with torch.device("meta"):
        layer = DropBlock2d(0.25, 3)
    layer = layer.to_empty(device="cpu")
    assert layer._p_tensor.item() == 0.25


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_independent(copied):
    layer = DropBlock2d(0.1, 3)
    other = copied(layer)
    other.p = 0.5
    assert layer.p == 0.1
    assert layer._p_tensor.item() == pytest.approx(0.1)
    assert other._p_tensor.item() == 0.5


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
