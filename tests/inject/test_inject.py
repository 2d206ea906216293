"""``regularize_`` puts regularizers in, leaves the stock model's face, and takes them out without a trace."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import detection

from dropblock_det.errors import InputError
from dropblock_det.inject.inject import Regularized, handle_of, regularize_
from dropblock_det.layers import DropBlock2d


def make():
    return DropBlock2d(p=0.3, block_size=3)


class Scale(nn.Module):
    """A regularizer whose effect can be computed by hand."""

    def __init__(self, factor=2.0):
        super().__init__()
        self.p, self.calls, self.factor = 0.0, 0, factor

    def forward(self, x):
        self.calls += 1
        return x * self.factor if self.training else x


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 2, 2], num_classes=7)


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def outputs(model, x):
    model.eval()
    with torch.no_grad():
        return model(x)


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


DETECTORS = {
    "retinanet_resnet50_fpn": detection.retinanet_resnet50_fpn,
    "retinanet_resnet50_fpn_v2": detection.retinanet_resnet50_fpn_v2,
    "fasterrcnn_resnet50_fpn": detection.fasterrcnn_resnet50_fpn,
}


@pytest.mark.parametrize("name", DETECTORS)
def test_inject_train_a_step_remove(name):
    torch.manual_seed(0)
    few = {"box_batch_size_per_image": 8, "rpn_post_nms_top_n_test": 20} if "rcnn" in name else {}
    model = DETECTORS[name](
        weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=96, **few
    )
    stock = copy.deepcopy(model)
    stock_repr = repr(model)
    images = [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]
    targets = [{"boxes": torch.tensor([[4.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([2])}] * 2
    keys = list(model.state_dict())

    handle = regularize_(model, make, at=["paper", "fpn"])
    assert list(model.state_dict()) == keys
    for ours, theirs in zip(outputs(model, images), outputs(stock, images), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    sum(model(images, targets).values()).backward()
    optimizer.step()
    trained = state(model)
    handle.remove()

    assert repr(model) == stock_repr
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert_same_state(model, trained)
    stock.load_state_dict(trained)
    for ours, theirs in zip(outputs(model, images), outputs(stock, images), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for ours, theirs in zip(model.modules(), stock.modules(), strict=True):
        assert ours.__dict__.keys() == theirs.__dict__.keys()


def test_the_paper_regularizes_each_unit_and_both_kinds_of_skip(resnet, x):
    """A bottleneck written out by hand, with the regularizer where the paper's authors have it."""

    def block(stock, x):
        r = lambda y: 2.0 * y  # noqa: E731
        y = r(torch.relu(stock.bn1(stock.conv1(x))))
        y = r(torch.relu(stock.bn2(stock.conv2(y))))
        y = r(stock.bn3(stock.conv3(y)))
        return torch.relu(y + r(x if stock.downsample is None else stock.downsample(x)))

    by_hand = copy.deepcopy(resnet).train()
    with torch.no_grad():
        y = by_hand.maxpool(by_hand.relu(by_hand.bn1(by_hand.conv1(x))))
        y = by_hand.layer2(by_hand.layer1(y))
        for stock in [*by_hand.layer3, *by_hand.layer4]:
            y = block(stock, y)
        expected = by_hand.fc(by_hand.avgpool(y).flatten(1))
        regularize_(resnet, Scale, at="paper")
        torch.testing.assert_close(resnet.train()(x), expected)


def test_drop_block_is_on_in_training_and_off_in_eval(resnet, x):
    stock = copy.deepcopy(resnet)
    regularize_(resnet, make)
    assert torch.equal(outputs(resnet, x), outputs(stock, x))
    resnet.train(), stock.train()
    assert not torch.allclose(resnet(x), stock(x), rtol=0.01)


def test_make_is_called_once_per_site_and_forward_once_per_call(resnet, x):
    made = []

    def counted():
        made.append(Scale())
        return made[-1]

    handle = regularize_(resnet, counted)
    assert len(made) == len(handle.sites) == 16
    resnet(x)
    assert [regularizer.calls for regularizer in made] == [1] * 16


def test_a_head_runs_once_per_level_with_a_mask_of_its_own():
    model = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2).head
    handle = regularize_(model, Scale, at="head")
    model.train()([torch.randn(1, 256, side, side) for side in (8, 4, 2)])
    assert {model.get_submodule(site).regularizer.calls for site in handle.sites} == {3}


def test_regularizers_take_mode_and_device_of_their_site(resnet):
    resnet.eval()
    resnet.layer4[1].train()
    handle = regularize_(resnet, make)
    training = {site: resnet.get_submodule(site).regularizer.training for site in handle.sites}
    assert training == {site: site.startswith("layer4.1.") for site in handle.sites}


def test_print_shows_the_regularizer(resnet):
    regularize_(resnet, make)
    assert "(regularizer): DropBlock2d(p=0.3, block_size=3" in repr(resnet)
    assert "RegularizedBatchNorm2d" in repr(resnet)


def test_handle_says_what_was_done(resnet):
    handle = regularize_(resnet, make)
    assert "16 sites" in repr(handle)
    assert "DropBlock2d(p=0.3, block_size=3" in repr(handle)
    assert handle.sites[0] in repr(handle)
    handle.remove()
    assert "not regularized" in repr(handle)


def test_set_p_reaches_every_site(resnet):
    handle = regularize_(resnet, make)
    handle.set_p(0.05)
    assert {resnet.get_submodule(site).regularizer.p for site in handle.sites} == {0.05}
    with pytest.raises(InputError, match=r"p must be a number between 0 and 1, not 1\.5"):
        handle.set_p(1.5)


def test_two_settings_side_by_side(resnet):
    """The paper's smaller p for group 3: a call per group."""
    three, four = regularize_(resnet, make, at="stage3"), regularize_(resnet, make, at="stage4")
    three.set_p(0.025), four.set_p(0.1)
    assert resnet.layer3[1].bn1.regularizer.p == 0.025
    assert resnet.layer4[1].bn1.regularizer.p == 0.1
    assert set(handle_of(resnet).sites) == {*three.sites, *four.sites}
    three.remove()
    assert handle_of(resnet).sites == four.sites


def test_context_manager_removes_also_after_an_error(resnet):
    before = repr(resnet)
    with pytest.raises(RuntimeError, match="input to conv2d"), regularize_(resnet, make):
        resnet(torch.zeros(1, 5))
    assert repr(resnet) == before


def test_remove_twice_is_remove_once(resnet):
    handle = regularize_(resnet, make)
    handle.remove()
    handle.remove()
    with pytest.raises(InputError, match="nothing in ResNet is regularized"):
        handle_of(resnet)


class Patched(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.conv.forward = self.conv.forward
        self.lazy = nn.LazyConv2d(3, 1)
        self.dict = nn.ModuleDict({"a": nn.ReLU()})
        self.script = torch.jit.trace(nn.ReLU(), torch.zeros(1))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    PATCHED = Patched()

SHARED = nn.Dropout()
REFUSALS = [
    ("layer5", make, "nearest names are layer4"),
    (["layer4", "layer4.1.bn1"], make, "contains it"),
    ("fpn", make, "nothing of that kind"),
    ("paper", lambda: 3, "make must return a torch.nn.Module, not int"),
    ("paper", lambda: nn.BatchNorm2d(3), "parameters or buffers"),
    ("paper", lambda: SHARED, "the same module twice"),
    ("layer3.*.bn1", make, "layer3.0.bn1 is regularized already"),
]


@pytest.mark.parametrize(("at", "maker", "message"), REFUSALS, ids=[message for *_, message in REFUSALS])
def test_refusals_leave_the_model_untouched(resnet, at, maker, message):
    if "already" in message:
        regularize_(resnet, make, at="layer3.0.bn1")
    before, before_state = repr(resnet), state(resnet)
    with pytest.raises(InputError, match=message):
        regularize_(resnet, maker, at=at)
    assert repr(resnet) == before
    assert_same_state(resnet, before_state)
    assert all(block.__dict__.get("downsample", 0) is None for block in (resnet.layer3[1], resnet.layer4[1]))


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("conv", "patched onto the instance"),
        ("lazy", "run one batch first"),
        ("dict", "ModuleDict, which runs its children"),
        ("script", "TorchScript"),
    ],
)
def test_sites_that_would_be_silently_off_are_refused(at, message):
    with pytest.raises(InputError, match=message):
        regularize_(PATCHED, make, at=at)


@pytest.mark.parametrize(
    ("builder", "at"),
    [
        ("swin_t", "features.1.*"),
        ("swin_t", "features.1.0.mlp"),
        ("swin_t", "norm"),
        ("vit_b_16", "encoder.layers.*"),
        ("maxvit_t", "blocks.3.layers.0.layers.grid_attention.mlp_layer"),
        ("resnet18", "fc"),
    ],
)
def test_dropblock_across_channels_is_refused(builder, at):
    with torch.device("meta"):
        model = torchvision.models.get_model(builder, weights=None)
    before = repr(model)
    for maker in (make, nn.Dropout2d):
        with pytest.raises(InputError, match=r"channels in the last dimension .* use nn\.Dropout"):
            regularize_(model, maker, at)
    assert repr(model) == before
    regularize_(model, nn.Dropout, at)


@pytest.mark.parametrize(
    ("builder", "at"),
    [
        ("swin_t", "permute"),
        ("maxvit_t", "blocks.3.layers.0.layers.grid_attention"),
        ("convnext_tiny", "features.0.1"),
    ],
)
def test_maps_with_channels_first_are_not_refused(builder, at):
    model = torchvision.models.get_model(builder, weights=None)
    (site,) = regularize_(model, make, at).sites
    with torch.no_grad():
        shapes = []
        model.get_submodule(site).regularizer.register_forward_hook(
            lambda *args: shapes.append(args[2].shape)
        )
        model.train()(torch.rand(2, 3, 224, 224))
    assert [tuple(shape[2:]) for shape in shapes] == [
        {"permute": (7, 7), "features.0.1": (56, 56)}.get(at, (7, 7))
    ]


def test_freezing_a_batch_norm_does_not_switch_its_regularizer_off(resnet, x):
    """The loop that people freeze statistics with, before and after regularizing."""

    def freeze(model):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    stock = copy.deepcopy(resnet).train()
    freeze(resnet.train()), freeze(stock)
    handle = regularize_(resnet, make)
    modes = lambda: {resnet.get_submodule(site).regularizer.training for site in handle.sites}  # noqa: E731
    assert modes() == {True}
    freeze(resnet.train())
    assert modes() == {True}
    before = state(resnet)
    assert not torch.equal(resnet(x), stock(x))
    assert_same_state(resnet, before)
    for module in (resnet.layer3, resnet.layer4):  # and eval() of what is around the norms does
        module.eval()
    assert modes() == {False}
    assert torch.equal(resnet(x), stock(x))


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_regularized_and_independent(resnet, x, duplicate):
    stock = repr(resnet)
    handle = regularize_(resnet, make)
    twin = duplicate(resnet)
    copied = handle_of(twin)
    assert copied.sites == handle.sites
    copied.set_p(0.2)
    assert resnet.layer4[1].bn1.regularizer.p == 0.3
    assert twin.layer4[1].bn1.regularizer.p == 0.2
    assert torch.equal(outputs(resnet, x), outputs(twin, x))
    twin.train()
    assert not torch.equal(twin(x), twin(x))
    copied.remove()
    assert repr(twin) == stock
    assert isinstance(resnet.layer4[1].bn1, Regularized)


def test_state_dicts_travel_both_ways(resnet):
    stock = copy.deepcopy(resnet)
    regularize_(resnet, make)
    assert not any(resnet.load_state_dict(stock.state_dict(), strict=True))
    assert not any(stock.load_state_dict(resnet.state_dict(), strict=True))


def test_sync_batchnorm_conversion_keeps_the_regularizers(resnet):
    handle = regularize_(resnet, make, at=["paper", "layer1.*.conv1"])
    sites = handle.sites
    resnet = nn.SyncBatchNorm.convert_sync_batchnorm(resnet)
    assert handle_of(resnet).sites == sites
    assert isinstance(resnet.layer4[1].bn1, nn.SyncBatchNorm)
    handle.set_p(0.07)
    assert "DropBlock2d(p=0.07" in repr(resnet.layer4[1].bn1)
    calls = []
    resnet.eval().layer4[1].bn1.regularizer.train().register_forward_hook(lambda *args: calls.append(args))
    resnet(torch.randn(1, 3, 32, 32))
    assert len(calls) == 1
    handle.remove()
    assert type(resnet.layer4[1].bn1) is nn.SyncBatchNorm
    assert not list(resnet.layer4[1].bn1.children())


def test_no_forward_hooks(resnet):
    regularize_(resnet, make)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in resnet.modules())
