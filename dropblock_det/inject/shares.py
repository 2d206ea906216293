"""The share of elements that regularizers drop: what is expected, and what is measured in a training."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dropblock_det.inject.inject import RegularizerHandle
from dropblock_det.layers import DropBlock2d
from dropblock_det.ops.reference import block_and_grid, corner_probability, expected_drop_share


def expected_share(regularizer: nn.Module, shape: tuple[int, ...]) -> float | None:
    """The share of elements that a regularizer drops on average.

    Args:
        regularizer: ``DropBlock2d``, or a module whose attribute ``p`` is that share.
        shape: Of its input.

    Returns:
        A number in [0, 1], or ``None`` where it is not known.
    """
    if isinstance(regularizer, DropBlock2d):
        if len(shape) != 4:
            return None
        k, (height, width) = regularizer.block_size, shape[2:]
        gamma = corner_probability(regularizer.p, k, height, width, regularizer.calibration)
        return expected_drop_share(gamma, k, height, width)
    p = getattr(regularizer, "p", None)
    return None if p is None else float(p)


class SiteShares:
    """Counts, on some training steps, what each site of a handle drops.

    A zero in the input, as behind a ReLU, cannot be told from a dropped element: it does not count. The
    counts stay on the device until :meth:`collect`.
    """

    def __init__(self, handle: RegularizerHandle) -> None:
        self._handle = handle
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._calls: list[tuple[int, Tensor, float]] = []
        self._sums: Tensor | None = None
        self._masks = [0] * len(handle.sites)  # drawn independently
        self._covered: dict[str, str] = {}
        self._warned: set[str] = set()

    def start(self) -> None:
        """Counts from now on."""
        for index, site in enumerate(self._handle.sites):
            regularizer: nn.Module = self._handle.model.get_submodule(f"{site}.regularizer")
            self._hooks.append(regularizer.register_forward_hook(functools.partial(self._count, index)))

    def _count(self, index: int, regularizer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        x, site = inputs[0], self._handle.sites[index]
        alive, share = x != 0, expected_share(regularizer, tuple(x.shape))
        share = math.nan if share is None else share
        self._calls.append((index, torch.stack([(alive & (y == 0)).sum(), alive.sum()]), share))
        each_channel = isinstance(regularizer, (nn.Dropout, nn.Dropout2d))
        each_channel |= getattr(regularizer, "per_channel", False)
        self._masks[index] += x.shape[0] * (x.shape[1] if each_channel else 1)
        if isinstance(regularizer, DropBlock2d) and x.dim() == 4:
            height, width = x.shape[2:]
            if height * width > 1 and block_and_grid(height, width, regularizer.block_size)[2:] == (1, 1):
                self._covered[site] = f"{height}x{width}"

    def stop(self) -> Tensor | None:
        """Stops, and returns the share dropped since :meth:`start` over all sites; None if nothing ran."""
        for hook in self._hooks:
            hook.remove()
        calls, self._hooks, self._calls = self._calls, [], []
        if not calls:
            return None
        dropped, alive = torch.stack([counts for _, counts, _ in calls], 1)
        # In float32: Apple's GPUs have no wider one.
        expected = alive.float() * torch.tensor([share for *_, share in calls], device=alive.device)
        if self._sums is None:
            self._sums = torch.zeros(len(self._handle.sites), 3, device=alive.device)
        rows = torch.tensor([index for index, *_ in calls], device=alive.device)
        self._sums.index_add_(0, rows, torch.stack([dropped.float(), alive.float(), expected], 1))
        return dropped.sum() / alive.sum()

    def collect(
        self, device: torch.device, add_up: Callable[[Tensor], Tensor]
    ) -> tuple[float | None, dict[str, float], list[str]]:
        """What was counted since the last call.

        Args:
            device: Where the model is.
            add_up: Adds up a tensor over the processes, all of which must call this.

        Returns:
            The share dropped over all sites; site -> share, without the sites where nothing but zeros
            arrived; and warnings, each once, of sites that do not drop what they should.
        """
        sums = torch.zeros(len(self._masks), 3, device=device) if self._sums is None else self._sums
        counts, masks = add_up(sums).tolist(), self._masks
        self._sums, self._masks = None, [0] * len(masks)
        shares, odd, empty = {}, {}, []
        for site, (dropped, alive, expected), n in zip(self._handle.sites, counts, masks, strict=True):
            if alive == 0:
                empty += [site] if n else []
                continue
            share = shares[site] = dropped / alive
            wanted = expected / alive
            # Five standard errors, if a mask of its own map by map were all or nothing.
            if abs(share - wanted) > 0.2 * wanted + 5 * math.sqrt(wanted * max(0.0, 1 - wanted) / max(1, n)):
                odd[site] = f"{share:.3f} and not {wanted:.3f}"
        warnings = [
            self._warning(dict.fromkeys(empty, ""), "nothing but zeros arrives"),
            self._warning(odd, "another share is dropped than expected"),
            self._warning(self._covered, "the block covers the map, so that whole channels are dropped"),
        ]
        dropped, alive, _ = map(sum, zip(*counts, strict=True))
        return dropped / alive if alive else None, shares, [warning for warning in warnings if warning]

    def _warning(self, sites: dict[str, str], what: str) -> str:
        new = {site: detail for site, detail in sites.items() if f"{what} {site}" not in self._warned}
        self._warned.update(f"{what} {site}" for site in new)
        shown = [f"{site} ({detail})" if detail else site for site, detail in list(new.items())[:3]]
        return f"{what} at {', '.join(shown)}{', ...' if len(new) > 3 else ''}" if new else ""
