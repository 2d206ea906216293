"""Which images come when, and on which process: pure functions of (seed, epoch, rank)."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class TrainSampler(Sampler[tuple[int, int]]):
    """Yields one process's share of a shuffled epoch as ``(index, draw_seed)`` pairs.

    ``draw_seed`` seeds the augmentation of that image in that epoch, so that it depends on
    (seed, epoch, index) alone and not on the number of workers or processes. As in torch's
    ``DistributedSampler``, a few images come twice where the processes do not divide the data set.

    Args:
        size: Number of images.
        seed: Any integer from 0.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.size, self.seed, self.rank, self.world_size = size, seed, rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration yields; Lightning calls it before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // self.world_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in epoch_order(self.size, self.seed, self.epoch, self.rank, self.world_size).tolist():
            yield index, draw_seed(self.seed, self.epoch, index)


def epoch_order(size: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """Returns one process's share of a shuffled epoch: indices, int64, as many for every process."""
    order = np.random.default_rng((seed, epoch)).permutation(size)
    # Repeats from the start where the processes do not divide the data set.
    return np.resize(order, -(-size // world_size) * world_size)[rank::world_size]


def draw_seed(seed: int, epoch: int, index: int) -> int:
    """Returns a 63-bit seed that is a pure function of its arguments, unrelated for neighbours."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))


class ValBatches(Sampler[list[int]]):
    """Yields one process's share of the validation batches, every image exactly once over all processes.

    Whole batches are shared out, and a batch holds the same images whatever the number of processes: images
    of a batch are padded to a common size, so that detections would otherwise depend on that number. Every
    process gets as many batches as the others, the last one empty where they don't go round: a process that
    stopped earlier would leave the others waiting for it.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        rounds = -(-size // (world_size * batch_size))
        self.starts = [(turn * world_size + rank) * batch_size for turn in range(rounds)]
        self.size, self.batch_size = size, batch_size

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.starts:
            yield list(range(start, min(start + self.batch_size, self.size)))
