"""Regularizers kept on in eval mode, for a while."""

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Regularizers = Sequence[tuple[nn.Module, float | None]]
"""Regularizers, each with the ``p`` that it shall have, or ``None`` to leave it."""


@dataclass(eq=False)
class _Episode:
    """A model from the first entry to the last exit."""

    modes: dict[nn.Module, bool]
    """Every module's mode before."""
    p: dict[nn.Module, float] = field(default_factory=dict)
    """The ``p`` before, of the regularizers that were given another."""
    on: set[nn.Module] = field(default_factory=set)
    entries: list[Regularizers] = field(default_factory=list)


_lock = threading.Lock()
_episodes: weakref.WeakKeyDictionary[nn.Module, _Episode] = weakref.WeakKeyDictionary()
_kept_on: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_kept_on(regularizer: nn.Module) -> bool:
    """Whether a regularizer stays on when its model is put in eval mode."""
    return regularizer in _kept_on


@contextmanager
def keep_on(model: nn.Module, regularizers: Regularizers) -> Iterator[None]:
    """Puts a model in eval mode with some regularizers on; gives every mode and ``p`` back at the end.

    Entries may be nested and may overlap in any order, also between threads: what was there before the first
    comes back after the last.
    """
    with _lock:
        episode = _episodes.setdefault(model, _Episode({m: m.training for m in model.modules()}))
        episode.entries.append(regularizers)
        _apply(model, episode)
    try:
        yield
    finally:
        with _lock:
            episode.entries = [entry for entry in episode.entries if entry is not regularizers]
            _apply(model, episode)
            if not episode.entries:
                del _episodes[model]
                for module, mode in episode.modes.items():
                    module.training = mode


def _apply(model: nn.Module, episode: _Episode) -> None:
    """Sets modes and ``p`` as the entries want them, the last one winning."""
    wanted = {regularizer: p for entry in episode.entries for regularizer, p in entry if p is not None}
    on = {regularizer for entry in episode.entries for regularizer, _ in entry}
    elsewhere = {r for other in _episodes.values() if other is not episode for r in other.on}
    for regularizer in episode.on - on - elsewhere:
        _kept_on.discard(regularizer)
        regularizer.eval()
    for regularizer in on - episode.on:
        _kept_on.add(regularizer)
    episode.on = on
    model.eval()
    for regularizer in {**episode.p, **wanted}:
        own: Any = regularizer
        own.p = wanted.get(regularizer, episode.p.setdefault(regularizer, own.p))
