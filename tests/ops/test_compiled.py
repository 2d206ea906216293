"""Under ``torch.compile`` only drawing the mask is an operator; Inductor fuses the rest."""

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from dropblock_det.layers import DropBlock2d
from dropblock_det.ops import dropblock

SHAPE = (4, 16, 32, 40)  # of the map


def code(between: nn.Module, x: torch.Tensor) -> str:
    """What Inductor writes for forward and backward of a block with this module before its ReLU."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), between, nn.ReLU(), nn.Conv2d(16, 8, 3)
    )
    compiled = torch.compile(block, fullgraph=True)
    return "\n".join(run_and_get_code(lambda: compiled(x).sum().backward())[1])


def kernels(code: str) -> list[str]:
    return re.findall(r"(cpp_fused\w+) = async_compile", code)


def maps(code: str, dtype: str) -> int:
    """How many maps the code allocates."""
    return len(re.findall(rf"empty_strided_cpu\(\({str(SHAPE)[1:-1]}\), \([\d, ]*\), torch\.{dtype}\)", code))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("per_channel", [True, False])
def test_inductor_gives_it_no_pass_of_its_own(memory_format, per_channel):
    x = torch.randn(4, 8, 32, 40).contiguous(memory_format=memory_format)
    without, ours = code(nn.Identity(), x), code(DropBlock2d(0.1, 5, per_channel), x)
    assert maps(without, "float32") > 0
    assert maps(ours, "float32") == maps(without, "float32")
    masked = [name for name in kernels(ours) if "where" in name]
    assert any("relu" in name for name in masked)
    assert all("native_batch_norm" in name for name in masked)
    assert len(masked) == 2  # forward and backward
    assert len(kernels(ours)) <= len(kernels(without)) + 2  # numbers: the seed, the scale
    assert ours.count("torch.ops.dropblock_det.draw_mask.default(") == 1


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_gpus_words_are_unpacked_inside_the_kernels_that_use_them(per_channel, monkeypatch):
    """In Inductor's C++, with words that anything may have drawn: what it fuses does not depend on them."""
    pytest.importorskip("triton")
    from dropblock_det.ops import cuda

    def draw(p, seed, shape, block_size, calibration, device):
        planes, height, width = shape
        words = torch.randint(2**31, ((planes + 31) // 32, height, width), dtype=torch.int32)
        return words, torch.zeros(1, dtype=torch.int32)

    monkeypatch.setattr(cuda, "draw", draw)
    monkeypatch.setattr(dropblock, "FORCED_PATH", "cuda")
    x = torch.randn(4, 8, 32, 40)
    without, ours = code(nn.Identity(), x), code(DropBlock2d(0.1, 5, per_channel), x)
    assert ours.count("torch.ops.dropblock_det.draw_words.default(") == 1
    # Backward, Inductor would rather keep the masked gradient between its two uses than unpack twice.
    assert maps(ours, "float32") <= maps(without, "float32") + 2
    assert maps(ours, "bool") == maps(without, "bool")  # no mask: the words are kept for backward
    assert len([name for name in kernels(ours) if "where" in name and "native_batch_norm" in name]) == 2
    assert len(kernels(ours)) <= len(kernels(without)) + 2  # numbers: the seed, the scale


def test_an_operator_for_the_whole_would_be_a_pass_of_its_own():
    """The check above sees one."""

    @torch.library.custom_op("dropblock_det_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    double.register_fake(torch.empty_like)
    double.register_autograd(lambda ctx, grad: double(grad))

    class Double(nn.Module):
        def forward(self, x):
            return double(x)

    x = torch.randn(4, 8, 32, 40)
    assert maps(code(Double(), x), "float32") > maps(code(nn.Identity(), x), "float32")
