"""What only a device can show. Run with ``-m gpu``."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dropblock_det.layers import DropBlock2d
from dropblock_det.ops import reference
from dropblock_det.ops.dropblock import drop_block2d


@pytest.mark.gpu
class TestOnAGpu:
    """What only a device can show."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("per_channel", [True, False])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_output_and_gradient(self, dtype, per_channel, memory_format):
        # None so small that float16 has fewer digits for it.
        x = torch.rand(4, 24, 25, 34, device="cuda").add(0.5).to(dtype, memory_format=memory_format)
        x.requires_grad_()
        y = drop_block2d(x, 0.3, 5, per_channel=per_channel)
        kept = (y != 0) if per_channel else (y != 0).any(1, keepdim=True).expand_as(y)
        scale = 1 / kept.double().mean()
        grad = torch.rand_like(y) + 0.5
        (found,) = torch.autograd.grad(y, x, grad)
        rtol = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        assert y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y.double(), x.double() * kept * scale, rtol=rtol, atol=0)
        torch.testing.assert_close(found.double(), grad.double() * kept * scale, rtol=rtol, atol=0)

    @pytest.mark.parametrize("calibration", ["paper", "exact"])
    @pytest.mark.parametrize(
        ("size", "block_size", "p"), [((7, 11), 7, 0.1), ((50, 68), 7, 0.1), ((100, 136), 3, 0.3)]
    )
    def test_realised_share(self, size, block_size, p, calibration):
        """Within 1 % at a standard error of at most 0.25 %."""
        gamma = reference.corner_probability(p, block_size, *size, calibration)
        expected = reference.expected_drop_share(gamma, block_size, *size)
        x = torch.ones(1, 100_000_000 // (size[0] * size[1]), *size, device="cuda")
        shares = (drop_block2d(x, p, block_size, calibration=calibration) == 0).flatten(2).float().mean(2)
        assert shares.std() / shares.numel() ** 0.5 < 0.0025 * expected
        assert shares.mean().item() == pytest.approx(expected, rel=0.01)

    def test_no_synchronization_and_memory_for_backward(self):
        x = torch.randn(8, 256, 50, 68, device="cuda", requires_grad=True)
        p = torch.tensor(0.1, device="cuda")
        drop_block2d(x, p, 7)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = drop_block2d(x, p, 7)
            kept_for_backward = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
            y.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert kept_for_backward <= x.numel() / 8 + 4096

    def test_captured_graph_draws_new_masks_and_follows_p(self):
        x = torch.ones(2, 16, 50, 68, device="cuda")
        p = torch.tensor(0.1, device="cuda")
        drop_block2d(x, p, 7)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = drop_block2d(x, p, 7)
        masks = []
        for value in (0.1, 0.1, 0.5):
            p.fill_(value)
            graph.replay()
            masks.append((y == 0).clone())
        assert not torch.equal(masks[0], masks[1])
        assert masks[2].float().mean() > 2 * masks[1].float().mean()

    def test_graph_of_a_layer_captured_at_p_0_follows_p(self):
        """A linear schedule starts at 0."""
        x = torch.ones(2, 16, 50, 68, device="cuda")
        layer = DropBlock2d(0.1, 7)
        layer(x)
        layer.p = 0.0
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        assert torch.equal(y, x)
        layer.p = 0.3
        graph.replay()
        assert 0.2 < (y == 0).float().mean() < 0.3

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("channels", [3, 40, 64])
    def test_same_seed_same_mask_in_every_memory_format(self, channels, memory_format):
        x = torch.ones(5, channels, 25, 34, device="cuda")
        torch.manual_seed(1)
        y = drop_block2d(x, 0.3, 5)
        torch.manual_seed(1)
        assert torch.equal(drop_block2d(x.contiguous(memory_format=memory_format), 0.3, 5), y)

    def test_manual_seed_and_generator_state(self):
        x = torch.randn(2, 16, 50, 68, device="cuda")
        torch.manual_seed(1)
        first, state = drop_block2d(x, 0.3, 5), torch.cuda.get_rng_state()
        second = drop_block2d(x, 0.3, 5)
        assert not torch.equal(second, first)
        torch.manual_seed(1)
        assert torch.equal(drop_block2d(x, 0.3, 5), first)
        torch.cuda.set_rng_state(state)
        assert torch.equal(drop_block2d(x, 0.3, 5), second)
        torch.manual_seed(2)
        assert not torch.equal(drop_block2d(x, 0.3, 5), first)

    def test_pytorchs_own_random_numbers_move_on_and_are_others(self):
        """Neither takes numbers that the other has drawn or is going to draw."""
        x = torch.ones(2, 16, 50, 68, device="cuda")
        torch.manual_seed(3)
        alone = torch.rand_like(x)
        torch.manual_seed(3)
        mask = drop_block2d(x, 0.5, 1) == 0
        after = torch.rand_like(x)
        assert not torch.equal(after, alone)
        for uniform in (alone, after):  # both are halves: agreement has a standard error of 0.12 %
            assert (mask == (uniform < 0.5)).double().mean().item() == pytest.approx(0.5, abs=0.006)

    def test_checkpointing_draws_the_same_mask(self):
        x = torch.randn(2, 16, 50, 68, device="cuda", requires_grad=True)
        for reentrant in (False, True):
            x.grad = None
            y = checkpoint(lambda x: drop_block2d(x.exp(), 0.3, 3), x, use_reentrant=reentrant)
            y.sum().backward()
            torch.testing.assert_close(x.grad, y)

    def test_autocast(self):
        x = torch.randn(2, 16, 50, 68, device="cuda")
        weight = torch.randn(8, 16, 3, 3, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            assert drop_block2d(x, 0.3, 3).dtype == torch.float32
            assert drop_block2d(torch.conv2d(x, weight), 0.3, 3).dtype == torch.bfloat16

    def test_several_streams(self):
        """Each stream sees its own masks whole: a mask read too early would not explain its output."""
        x = torch.rand(4, 64, 100, 136, device="cuda") + 0.5
        streams = [torch.cuda.Stream() for _ in range(4)]
        torch.cuda.synchronize()
        made = []
        for turn in range(20):
            with torch.cuda.stream(streams[turn % 4]):
                made.append(drop_block2d(x, 0.1, 7))
        torch.cuda.synchronize()
        for y in made:
            kept = y != 0
            torch.testing.assert_close(
                y.double(), x.double() * kept / kept.double().mean(), rtol=1e-6, atol=0
            )
        assert not torch.equal(made[0], made[1])

    @pytest.mark.skipif("torch.cuda.device_count() < 2")
    def test_a_device_that_is_not_the_current_one(self):
        x = torch.rand(4, 24, 25, 34, device="cuda:1").add(0.5).requires_grad_()
        torch.manual_seed(1)
        y = drop_block2d(x, 0.3, 5)
        assert y.device == x.device
        assert torch.cuda.current_device() == 0
        kept = y != 0
        torch.testing.assert_close(y, x * kept / kept.double().mean().float(), rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient != 0, kept)

    def test_launches(self):
        """Two forward, one backward, whatever p and the memory format."""
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 64, 50, 68, device="cuda").contiguous(memory_format=memory_format)
            layer, grad = DropBlock2d(0.1, 7), torch.randn_like(x)
            x.requires_grad_()
            torch.autograd.grad(layer(x), x, grad)
            layer.p = 0.2
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                torch.autograd.grad(layer(x), x, grad)
                torch.cuda.synchronize()
            on_the_gpu = torch.autograd.DeviceType.CUDA
            kernels = [event.name for event in profile.events() if event.device_type == on_the_gpu]
            assert kernels == ["draw_mask", "scaled_copy", "scaled_copy"]

    def test_misaligned_input(self):
        """A view that begins anywhere: vectors of 16 bytes may not be assumed."""
        memory = torch.rand(2 * 16 * 24 * 32 + 1, device="cuda", dtype=torch.bfloat16) + 0.5
        for first in (0, 1):
            x = memory[first : first + 2 * 16 * 24 * 32].view(2, 16, 24, 32)
            y = drop_block2d(x, 0.3, 5)
            kept = y != 0
            torch.testing.assert_close(
                y.double(), x.double() * kept / kept.double().mean(), rtol=8e-3, atol=0
            )

    def test_compiled(self):
        torch._dynamo.reset()
        p = torch.tensor(0.1, device="cuda")
        compiled = torch.compile(lambda x: drop_block2d(x, p, 3) * 2, fullgraph=True)
        x = torch.ones(2, 16, 50, 68, device="cuda", requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for value in (0.1, 0.5, 0.0):
                p.fill_(value)
                y = compiled(x)
                (gradient,) = torch.autograd.grad(y.sum(), x)
                torch.testing.assert_close(gradient, y)

    @pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1000)])
    @pytest.mark.parametrize("block_size", [1, 7, 1000])
    def test_extreme_maps(self, size, block_size):
        x = torch.ones(2, 3, *size, device="cuda")
        kept = drop_block2d(x, 0.3, block_size) != 0
        dropped = torch.nn.functional.avg_pool2d(
            (~kept).float(), [min(block_size, s) for s in size], stride=1
        )
        assert torch.equal(reference.mask_from_corners(dropped > 0.9999, block_size, *size), kept)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_more_than_2_to_31_elements(self, memory_format):
        x = torch.ones(9, 256, 1000, 1000, dtype=torch.bfloat16, device="cuda")
        kept = drop_block2d(x.contiguous(memory_format=memory_format), 0.1, 7)[-1] != 0
        assert (~kept).float().mean().item() == pytest.approx(0.0951, rel=0.01)

    def test_a_sample_of_more_than_2_to_31_elements_with_a_shared_mask(self):
        x = torch.ones(1, 250, 3000, 3000, dtype=torch.bfloat16, device="cuda")
        kept = drop_block2d(x, 0.1, 7, per_channel=False)[0] != 0
        assert (kept == kept[0]).all()
        assert (~kept[0]).float().mean().item() == pytest.approx(0.0951, rel=0.03)  # four standard errors
