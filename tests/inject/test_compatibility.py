"""Regularized models under what PyTorch offers: compile, copies, parallel training, checkpointing, fusion."""

import socket
import sys

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint_sequential
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import Bottleneck, ResNet

from dropblock_det.errors import InputError
from dropblock_det.inject.inject import Regularized, handle_of, regularize_
from dropblock_det.layers import DropBlock2d


def make():
    return DropBlock2d(p=0.3, block_size=3)


def resnet():
    torch.manual_seed(0)
    return ResNet(Bottleneck, [1, 1, 1, 2], num_classes=5)


@pytest.fixture
def model():
    return resnet()


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def training_output(model, x, seed=3):
    """The output in training mode, with masks that depend on the seed only."""
    torch.manual_seed(seed)
    return model.train()(x).detach()


def eval_output(model, x):
    with torch.no_grad():
        return model.eval()(x)


def test_compile_after_injection_and_no_recompilation_for_p(model, x):
    handle = regularize_(model, make)
    compiled = torch.compile(model, backend="aot_eager")
    assert not torch.equal(training_output(compiled, x, 3), training_output(compiled, x, 4))
    with torch._dynamo.config.patch(error_on_recompile=True):
        dropped = []
        for p in (0.0, 0.01, 0.2, 0.5):
            handle.set_p(p)
            dropped.append(training_output(compiled, x))
    torch.testing.assert_close(dropped[0], training_output(resnet(), x))
    assert not any(torch.equal(dropped[0], other) for other in dropped[1:])


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile(model)", "model.compile()"])
def test_injection_after_compile_takes_effect_and_so_does_removal(model, x, in_place):
    if in_place:
        model.compile(backend="aot_eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="aot_eager")
    stock = training_output(compiled, x)
    handle = regularize_(compiled, make)
    dropped = training_output(compiled, x)
    assert not torch.allclose(dropped, stock, rtol=0.01)
    assert not torch.equal(dropped, training_output(compiled, x, seed=4))
    handle.remove()
    torch.testing.assert_close(training_output(compiled, x), stock)


def test_averaged_model(model, x):
    regularize_(model, make)
    ema = AveragedModel(model, avg_fn=lambda old, new, count: 0.5 * old + 0.5 * new)
    assert handle_of(ema).sites == tuple(f"module.{site}" for site in handle_of(model).sites)
    ema.update_parameters(model)
    with torch.no_grad():
        model.fc.bias.add_(1.0)
    ema.update_parameters(model)
    assert torch.equal(ema.module.fc.bias, model.fc.bias - 0.5)
    stock = resnet()
    stock.load_state_dict(ema.module.state_dict())
    assert torch.equal(eval_output(ema, x), eval_output(stock, x))
    handle_of(ema).set_p(0.1)
    assert model.layer4[1].bn1.regularizer.p == 0.3, "the copy's p is its own"


def test_data_parallel_replicas_keep_the_regularizers(model, x, monkeypatch):
    handle = regularize_(model.train(), make)
    parallel = nn.DataParallel(model)  # without a GPU it calls the model itself
    assert not torch.equal(training_output(parallel, x, 3), training_output(parallel, x, 4))

    def copies(tensors, devices, detach=False):
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    # What it does with two GPUs, but for where the copies lie.
    monkeypatch.setattr(sys.modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", copies)
    handle.set_p(0.2)
    calls = []
    for site in handle.sites:
        model.get_submodule(site).regularizer.register_forward_hook(lambda *args: calls.append(args[0]))
    first, second = nn.parallel.replicate(model, [0, 1])
    for replica in (first, second):
        assert [name for name, m in replica.named_modules() if isinstance(m, Regularized)] == [*handle.sites]
        replica(x).sum().backward()
    assert {regularizer.p for regularizer in calls} == {0.2}
    assert len(set(calls)) == len(calls) == 2 * len(handle.sites), "each replica has its own, called once"
    assert torch.equal(training_output(first, x), training_output(model, x))
    assert model.layer4[1].conv1.weight.grad.abs().sum() > 0


def test_moving_and_casting(model, x):
    handle = regularize_(model.to("meta"), make)
    model.to_empty(device="cpu").load_state_dict(resnet().state_dict())
    assert {model.get_submodule(site).regularizer.p for site in handle.sites} == {0.3}
    assert not torch.equal(training_output(model, x), training_output(resnet(), x))
    output = training_output(model.to(torch.bfloat16).to(memory_format=torch.channels_last), x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()


def test_autocast(model, x):
    regularize_(model, make)
    seen = []
    for module in model.modules():
        if isinstance(module, DropBlock2d):
            module.register_forward_hook(lambda module, inputs, y: seen.append((y.dtype, (y == 0).any())))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()(x).float().sum().backward()
    assert len(seen) == 12
    assert all(dtype == torch.bfloat16 and dropped for dtype, dropped in seen)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_masks(model, x, reentrant):
    regularize_(model, make)
    layers = nn.Sequential(model.conv1, model.layer1, model.layer2, model.layer3, model.layer4).train()
    for norm in layers.modules():  # running statistics are updated by the recomputation, masks are not
        if isinstance(norm, nn.BatchNorm2d):
            norm.track_running_stats = False
    model.conv1 = nn.Conv2d(3, 64, 7, stride=2)
    layers[0] = model.conv1

    def gradients(run):
        layers.zero_grad()
        torch.manual_seed(5)
        run(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in layers.parameters() if parameter.grad is not None]

    plain = gradients(layers)
    checkpointed = gradients(
        lambda x: checkpoint_sequential(layers, 5, x.requires_grad_(), use_reentrant=reentrant)
    )
    for ours, theirs in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_checkpoint_wrapper_leaves_the_handle_working(model, x):
    handle = regularize_(model, make)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Bottleneck))
    handle.set_p(0.05)
    assert model.layer4[1].bn1.regularizer.p == 0.05
    handle.remove()
    assert not any(isinstance(module, Regularized) for module in model.modules())


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
def test_feature_extractor_and_symbolic_trace(model, x):
    stock = resnet()
    regularize_(model, make)
    ours, theirs = torch.fx.symbolic_trace(model.eval()), torch.fx.symbolic_trace(stock.eval())
    assert [(n.op, n.target) for n in ours.graph.nodes] == [(n.op, n.target) for n in theirs.graph.nodes]
    extractor = create_feature_extractor(model, ["layer4.1.bn3", "flatten"])
    stock_extractor = create_feature_extractor(stock, ["layer4.1.bn3", "flatten"])
    for name, feature in eval_output(extractor, x).items():
        assert torch.equal(feature, eval_output(stock_extractor, x)[name])
    extractor.train(), torch.manual_seed(3)
    assert (extractor(x)["layer4.1.bn3"] == 0).float().mean() > 0.1


def test_fusing_for_inference(model, x):
    regularize_(model, make)
    model.eval()
    fused = fuse_conv_bn_eval(model.layer4[0].conv1, model.layer4[0].bn1)
    y = torch.randn(1, fused.in_channels, 8, 8)
    torch.testing.assert_close(fused(y), model.layer4[0].bn1(model.layer4[0].conv1(y)), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*")
@pytest.mark.filterwarnings("ignore:.*reduce_range.*")
@pytest.mark.filterwarnings("ignore:torch.quantize_per")
def test_quantization_aware_training(x):
    """Fuse first, then regularize: eager fusing knows the stock classes only, and says so."""
    from torch.ao import quantization

    quantizable = torchvision.models.quantization.resnet18(weights=None).train()
    with regularize_(quantizable, make), pytest.raises(AssertionError, match="fuser"):
        quantizable.fuse_model(is_qat=True)

    quantizable = torchvision.models.quantization.resnet18(weights=None).train()
    quantizable.fuse_model(is_qat=True)
    quantizable.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    handle = regularize_(quantizable, make, at="paper")
    quantization.prepare_qat(quantizable, inplace=True)
    assert handle_of(quantizable).sites == handle.sites
    assert not torch.equal(training_output(quantizable, x, 3), training_output(quantizable, x, 4))
    handle.remove()
    converted = quantization.convert(quantizable.eval())
    assert isinstance(converted.layer4[0].conv1, torch.ao.nn.intrinsic.quantized.ConvReLU2d)


def test_a_class_swapped_later_has_to_be_undone_first(model):
    handle = regularize_(model, make)
    norm = model.layer4[1].bn1
    norm.__class__ = type("Later", (type(norm),), {})
    with pytest.raises(InputError, match="wrapped as Later"):
        handle.remove()
    norm.__class__ = type(norm).__bases__[0]
    handle.remove()


def test_a_layer_replaced_later_is_not_silently_off(model):
    handle = regularize_(model, make)
    model.layer4[1] = nn.Identity()
    with pytest.raises(InputError, match=r"layer4\.1\.bn1 was replaced"):
        handle.set_p(0.1)


def test_a_class_put_back_by_others_is_not_silently_off(model):
    handle = regularize_(model, make)
    model.layer4[1].bn1.__class__ = nn.BatchNorm2d
    for use in (lambda: handle.set_p(0.1), handle.remove, lambda: repr(handle)):
        with pytest.raises(InputError, match=r"layer4\.1\.bn1 was replaced"):
            use()


# Two processes


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def batch(rank):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(rank))


def ddp_job(rank):
    model = resnet()
    handle = regularize_(model, make)
    parallel = DistributedDataParallel(model.train())
    handle.set_p(0.2)
    torch.manual_seed(rank)
    output = parallel(batch(rank=0))
    output.square().sum().backward()
    return {"ddp output": output.tolist(), "ddp gradient": model.layer4[1].conv1.weight.grad.sum().item()}


def fsdp_job(rank):
    model = resnet()
    stock_keys = list(model.state_dict())
    handle = regularize_(model, make)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in (*model.layer3, *model.layer4):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh).train()
    handle.set_p(0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(rank)
    first, second = (model(batch(rank)) for _ in range(2))
    second.square().sum().backward()
    optimizer.step()
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    handle.remove()
    return {
        "fsdp drops": not torch.equal(first, second),
        "fsdp keys": rank != 0 or list(full) == stock_keys,
        "fsdp removed": not any(isinstance(module, Regularized) for module in model.modules()),
    }


def run_rank(rank, world, port, results):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    results[rank] = ddp_job(rank) | fsdp_job(rank)
    dist.barrier()
    dist.destroy_process_group()


def assert_fsdp_worked(result):
    assert result["fsdp drops"]
    assert result["fsdp keys"]
    assert result["fsdp removed"]


def test_ddp_and_fsdp2():
    results = {}
    run_rank(0, 1, free_port(), results)
    assert_fsdp_worked(results[0])


@pytest.mark.slow
def test_ddp_and_fsdp2_on_two_processes():
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(run_rank, args=(2, free_port(), results), nprocs=2)
        first, second = results[0], results[1]
    assert first["ddp output"] != second["ddp output"], "one batch, another seed: each rank has its own masks"
    assert first["ddp gradient"] == pytest.approx(second["ddp gradient"], rel=1e-6)
    assert_fsdp_worked(first)
    assert_fsdp_worked(second)
