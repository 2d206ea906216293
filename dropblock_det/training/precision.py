"""``--trainer.precision auto``: bfloat16 where the hardware computes with it, else float32."""

from typing import Any, Literal

import torch
from lightning.fabric.connector import _PRECISION_INPUT
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.utilities.exceptions import MisconfigurationException

FAST, EXACT = "bf16-mixed", "32-true"


class AutoTrainer(Trainer):
    """Lightning's trainer, whose ``precision`` may be ``auto`` until the settings are resolved.

    Args:
        precision: Lightning's, or ``auto``: ``bf16-mixed`` on devices that compute with bfloat16 (CUDA from
            Ampere on, CPUs with AVX-512 BF16 or AMX), else ``32-true``.
        **settings: Lightning's.
    """

    def __init__(
        self, *, precision: _PRECISION_INPUT | Literal["auto"] | None = None, **settings: Any
    ) -> None:
        super().__init__(precision=precision, **settings)  # type: ignore[arg-type]


def resolve_precision(accelerator: Any, devices: Any) -> str:
    """Returns what ``auto`` stands for on the devices that a trainer with these settings uses.

    Apple's GPUs get float32, as nobody has measured them here.

    Args:
        accelerator: The trainer's.
        devices: The trainer's: how many, their numbers, or ``auto``.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        try:
            numbers = CUDAAccelerator.parse_devices(-1 if devices == "auto" else devices) or []
        except MisconfigurationException:  # the trainer will say what is wrong with them
            return EXACT
        return (
            FAST if all(torch.cuda.get_device_capability(number) >= (8, 0) for number in numbers) else EXACT
        )
    if accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available()):
        known = torch.cpu.get_capabilities()
        return FAST if known.get("avx512_bf16") or known.get("amx_bf16") else EXACT
    return EXACT
