"""What people do to a regularized model, and what goes wrong in theirs: nothing is off in silence."""

import copy
import threading
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import remove_parametrizations

from dropblock_det.errors import InputError
from dropblock_det.inject.inject import handle_of, regularize_
from dropblock_det.layers import DropBlock2d


def make():
    return DropBlock2d(p=0.3, block_size=3)


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=5)


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


class Owner(nn.Conv2d):
    """A layer that has a child called `regularizer`."""

    def __init__(self):
        super().__init__(3, 3, 1)
        self.regularizer = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.regularizer(super().forward(x))


def test_a_child_called_regularizer_is_neither_replaced_nor_hidden():
    model = nn.Sequential(Owner(), nn.ReLU())
    keys = list(model.state_dict())
    with pytest.raises(InputError, match="0 has a `regularizer` of its own"):
        regularize_(model, make, "0")
    with regularize_(model, make, "0.regularizer") as handle:
        assert handle.sites == ("0.regularizer",)
        assert list(model.state_dict()) == keys
        assert (model.train()(torch.ones(4, 3, 16, 16)) == 0).any()
    assert list(model.state_dict()) == keys


def test_a_batch_norms_own_regularizer_does_not_make_it_one_of_ours():
    class Norm(nn.BatchNorm2d):
        def __init__(self):
            super().__init__(3)
            self.regularizer = nn.ReLU()

    regularize_(nn.Sequential(nn.Conv2d(3, 3, 1)), make, "0")  # from now on conversions are watched
    assert type(Norm()) is Norm


def test_attentions_own_projection_is_refused():
    layer = nn.TransformerEncoderLayer(16, 2)
    with pytest.raises(InputError, match=r"self_attn\.out_proj is never called"):
        regularize_(layer, nn.Dropout, "self_attn.out_proj")
    with pytest.raises(InputError, match="self_attn returns a pair"):
        regularize_(layer, nn.Dropout, "self_attn")


class Half(nn.Module):
    """Calls one of its two layers."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.used(x)


def test_a_site_that_does_not_run_is_named_after_the_first_step(x):
    model = Half()
    handle = regularize_(model, make, "*")
    assert handle.idle_sites == ("used", "spare")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.set_p(0.1)  # before the first step nothing has run
        model.eval()(x)
    model.train()(x)
    assert handle.idle_sites == ("spare",)
    with pytest.warns(UserWarning, match="1 of 2 regularized sites did not run .* at spare"):
        handle.set_p(0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.set_p(0.3)  # said once


def test_a_layer_that_returns_a_pair_is_named():
    model = nn.Sequential(nn.LSTM(4, 4))
    regularize_(model, nn.Dropout, "0")
    with pytest.raises(InputError, match="0 returns a tuple, and a regularizer takes one tensor"):
        model.train()(torch.rand(3, 2, 4))


@pytest.mark.parametrize("first", ["parametrization", "regularizer"])
@pytest.mark.parametrize("removed", ["parametrization", "regularizer"])
def test_parametrizations_and_regularizers_leave_each_other_alone(resnet, x, first, removed):
    before = repr(resnet)
    conv = resnet.layer4[1].conv1
    if first == "regularizer":
        handle = regularize_(resnet, make, "layer4.1.conv1")
    parametrizations.weight_norm(conv)
    if first == "parametrization":
        handle = regularize_(resnet, make, "layer4.1.conv1")
    assert (conv.train()(torch.rand(2, 512, 8, 8)) == 0).float().mean() > 0.05
    weight = conv.weight.clone()
    steps = [lambda: remove_parametrizations(conv, "weight"), handle.remove]
    steps[removed == "regularizer"]()
    assert torch.allclose(conv.weight, weight)
    drops = (conv(torch.rand(2, 512, 8, 8)) == 0).any()
    assert drops == (removed == "parametrization")
    steps[removed == "parametrization"]()
    assert repr(resnet) == before
    assert type(conv) is nn.Conv2d
    assert torch.allclose(conv.weight, weight)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripting_says_to_remove_first(resnet, x):
    handle = regularize_(resnet, make)
    with pytest.raises(InputError, match=r"torch\.jit\.script .* call remove\(\) first"):
        torch.jit.script(resnet)
    handle.remove()
    assert torch.jit.script(resnet.eval())(x).shape == (2, 5)


@pytest.mark.parametrize("model", [None, "resnet18", nn.Linear, [nn.Linear(1, 1)]])
def test_what_is_no_model_is_a_type_error(model):
    with pytest.raises(TypeError, match="model must be a"):
        regularize_(model, make)


@pytest.mark.parametrize("p", ["0.1", None, True, float("nan"), -0.1, 2, [0.1], torch.tensor(0.1)])
def test_a_p_that_is_none_is_refused(resnet, p):
    handle = regularize_(resnet, make)
    with pytest.raises(InputError, match="p must be a number between 0 and 1, not "):
        handle.set_p(p)


def test_setting_p_is_all_or_nothing(resnet):
    class Fussy(nn.Module):
        def __init__(self):
            super().__init__()
            self._p = 0.3

        @property
        def p(self):
            return self._p

        @p.setter
        def p(self, value):
            if value == 0.2:
                raise RuntimeError("planned")
            self._p = value

        def forward(self, x):
            return x

    makes = iter([make, make, Fussy])
    handle = regularize_(
        resnet, lambda: next(makes)(), ["layer4.1.bn1", "layer4.1.bn2", "layer4.1.downsample"]
    )
    with pytest.raises(RuntimeError, match="planned"):
        handle.set_p(0.2)
    assert {resnet.get_submodule(site).regularizer.p for site in handle.sites} == {0.3}
    handle.remove()
    makes = iter([make, nn.Identity])
    handle = regularize_(resnet, lambda: next(makes)(), ["layer4.1.bn1", "layer4.1.bn2"])
    with pytest.raises(InputError, match=r"the Identity at layer4\.1\.bn2 has no drop probability"):
        handle.set_p(0.2)
    assert resnet.layer4[1].bn1.regularizer.p == 0.3


@pytest.mark.parametrize(
    "at",
    [
        5,
        None,
        b"paper",
        nn.ReLU(),
        [nn.ReLU()],
        [3],
        [["paper"]],
        {"paper": "1"},
        {"paper": -1},
        {"paper": float("inf")},
    ],
)
def test_an_at_that_is_none_is_refused(resnet, at):
    with pytest.raises((InputError, TypeError), match=r"at|unhashable"):
        regularize_(resnet, make, at)


# Factors


def test_factors_multiply_p_and_stay(resnet):
    handle = regularize_(resnet, make, at={"stage3": 0.25, "stage4": 1.0})

    def p():
        return {site.split(".")[0]: resnet.get_submodule(site).regularizer.p for site in handle.sites}

    assert p() == {"layer3": 0.075, "layer4": 0.3}
    handle.set_p(0.2)
    assert p() == {"layer3": 0.05, "layer4": 0.2}
    handle_of(resnet).set_p(0.4)
    assert p() == {"layer3": 0.1, "layer4": 0.4}
    resnet = nn.SyncBatchNorm.convert_sync_batchnorm(resnet)
    handle_of(resnet).set_p(0.8)
    assert p() == {"layer3": 0.2, "layer4": 0.8}


def test_paper_groups_are_the_authors_factors(resnet):
    with regularize_(resnet, make, "paper_groups") as handle:
        groups = {site: resnet.get_submodule(site).regularizer.p for site in handle.sites}
    with regularize_(resnet, make, {"stage3": 0.25, "stage4": 1}) as handle:
        assert groups == {site: resnet.get_submodule(site).regularizer.p for site in handle.sites}
    assert groups["layer3.0.bn1"] == 0.3 / 4 ** (4 - 3)


def test_factors_that_cannot_be_are_refused(resnet):
    with pytest.raises(InputError, match=r"at gives layer4\.0\.bn1 the factors 1 and 0\.5"):
        regularize_(resnet, make, {"stage4": 1, "paper": 0.5})
    with pytest.raises(InputError, match=r"p=0\.3 times the factor 4 at layer4\.0\.bn1 is over 1"):
        regularize_(resnet, make, {"stage4": 4})
    with pytest.raises(InputError, match="has no drop probability"):
        regularize_(resnet, nn.Identity, {"stage4": 0.5})
    handle = regularize_(resnet, make, {"stage3": 1, "stage4": 2})
    with pytest.raises(InputError, match=r"p=0\.6 times the factor 2"):
        handle.set_p(0.6)
    assert resnet.layer3[0].bn1.regularizer.p == 0.3, "all or nothing"


# On in eval mode


def state_of(model):
    return {name: (m.training, getattr(m, "p", None)) for name, m in model.named_modules()}


@pytest.mark.parametrize("maker", [make, lambda: nn.Dropout(0.3), lambda: nn.Dropout2d(0.3)])
@pytest.mark.parametrize("mode", [True, False])
def test_active_regularizers_in_a_model_at_rest(resnet, x, maker, mode):
    stock = resnet.eval()(x)
    handle = regularize_(resnet.train(mode), maker)
    before, buffers = state_of(resnet), {k: v.clone() for k, v in resnet.named_buffers()}
    with torch.no_grad(), handle.active():
        first, second = resnet(x), resnet(x)
        resnet.eval()
        assert not torch.equal(resnet(x), first), "eval() of the model leaves them on"
    assert not torch.equal(first, second)
    assert not torch.equal(first, stock)
    assert state_of(resnet) == before
    assert all(torch.equal(v, buffers[k]) for k, v in resnet.named_buffers()), "batch norms rest"
    assert torch.equal(resnet.eval()(x), stock)


def test_active_p_nested_and_after_an_exception(resnet):
    handle = regularize_(resnet.eval(), make, {"stage3": 0.5, "stage4": 1})
    before = state_of(resnet)
    regularizer = resnet.layer3[0].bn1.regularizer

    def fail():
        assert regularizer.p == 0.4
        with handle.active():
            assert (regularizer.p, regularizer.training) == (0.4, True)
            with handle_of(resnet).active(0.2):
                assert regularizer.p == 0.1
        assert (regularizer.p, regularizer.training) == (0.4, True)
        raise RuntimeError("planned")

    with pytest.raises(RuntimeError, match="planned"), handle.active(0.8):
        fail()
    assert state_of(resnet) == before
    with pytest.raises(InputError, match="p must be a number"):
        handle.active(1.2).__enter__()
    assert state_of(resnet) == before


def test_active_nested_in_that_of_a_module_around_it(resnet):
    """As where ``mc_detections`` samples the detector of an active LightningModule."""
    around = nn.ModuleDict({"net": resnet})
    handle = regularize_(around.eval(), make)
    before = state_of(around)
    with handle.active():
        with handle_of(resnet).active(0.2):
            assert resnet.layer3[0].bn1.regularizer.p == 0.2
        around.eval()
        assert resnet.layer3[0].bn1.regularizer.training
    assert state_of(around) == before


def test_active_in_threads_that_leave_in_any_order(resnet, x):
    handle = regularize_(resnet.eval(), make)
    before, stock = state_of(resnet), resnet(x)
    inside, leave = threading.Barrier(5), [threading.Event() for _ in range(4)]
    drew = []

    def sample(index):
        with torch.no_grad(), handle.active(0.1 * (index + 1)):
            inside.wait()
            leave[index].wait()
            drew.append(not torch.equal(resnet(x), stock))

    threads = [threading.Thread(target=sample, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    inside.wait()
    for index in (2, 0, 3, 1):
        leave[index].set()
        threads[index].join()
    assert drew == [True] * 4
    assert state_of(resnet) == before
    assert torch.equal(resnet(x), stock)


def test_a_copy_made_meanwhile_is_a_model_like_any_other(resnet, x):
    handle = regularize_(resnet.eval(), make)
    with handle.active():
        twin = copy.deepcopy(resnet)
    twin.eval()
    assert torch.equal(twin(x), twin(x))
