"""Runs the GPU path without a GPU: Triton compiles and launches, and a stub of the driver does nothing.

``python tests/support/stubbed_cuda.py`` prints how many kernels one site launches, and how many microseconds
of the processor's time it takes. The tensors are the CPU's, whose allocation is about a microsecond cheaper.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

STUB = r"""
#include <string.h>
#include <stdint.h>
int launches = 0;
int cuLaunchKernelEx(void *config, void *function, void **arguments, void **extra) { launches++; return 0; }
int cuPointerGetAttribute(uint64_t *data, int attribute, uint64_t pointer) { *data = pointer; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 233472; return 0; }
int cuFuncGetAttribute(int *value, int which, void *function) { *value = which ? 0 : 1024; return 0; }
int cuCtxGetCurrent(void **context) { *context = &launches; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuModuleGetFunction(void **function, void *module, char *name) { *function = module; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = &launches; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "stub"; return 0; }
#define NOTHING(name) int name() { return 0; }
NOTHING(cuInit) NOTHING(cuDeviceGet) NOTHING(cuCtxSetCurrent) NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuModuleUnload) NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuCtxGetDevice)
NOTHING(cuCtxGetLimit) NOTHING(cuCtxSetLimit) NOTHING(cuStreamIsCapturing) NOTHING(cuDriverGetVersion)
NOTHING(cuOccupancyMaxActiveClusters) NOTHING(cuTensorMapEncodeTiled) NOTHING(cuTensorMapEncodeIm2col)
"""
ROUNDS = 200
SITES = 36


def build_stub(folder: Path) -> Path:
    """Compiles the stub as ``libcuda.so.1``."""
    source = folder / "stub.c"
    source.write_text(STUB)
    library = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-O1", "-o", library, source], check=True)
    return library


def measure(library: Path) -> dict[str, float]:
    """Launches of a site, forward and backward, and its microseconds: of all rounds the least, the median."""
    import ctypes

    import torch
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    from dropblock_det.ops import cuda, dropblock

    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    launches = ctypes.c_int.in_dll(stub, "launches")
    driver = CudaDriver()
    driver.get_device_capability = lambda device: (9, 0)
    driver.get_current_device = torch.cuda.current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    triton.runtime.driver.set_active(driver)
    dropblock.FORCED_PATH = "cuda"

    # What new_seed asks of the generator of a CUDA device; a CPU's has no offset.
    generator, offset = torch.Generator(), SimpleNamespace(value=0)

    def new_seed(device: torch.device) -> tuple[int, int, int]:
        generator.initial_seed()
        generator.initial_seed()
        seed = generator.initial_seed()
        offset.value += 4
        return seed & 0x7FFFFFFF, seed >> 31 & 0x7FFFFFFF, offset.value

    cuda.new_seed = new_seed
    x = torch.randn(2, 4, 25, 34, requires_grad=True)
    grad = torch.randn_like(x)

    def microseconds() -> tuple[float, float, int, int]:
        y, start, begun = x, launches.value, time.process_time()
        for _ in range(SITES):
            y = dropblock.drop_block2d(y, 0.1, 7)
        between, middle = launches.value, time.process_time()
        torch.autograd.grad(y, x, grad)
        end = time.process_time()
        return (
            (middle - begun) / SITES * 1e6,
            (end - middle) / SITES * 1e6,
            (between - start) // SITES,
            (launches.value - between) // SITES,
        )

    microseconds()  # compiles
    rounds = [microseconds() for _ in range(ROUNDS)]  # of the processor's time: others may use it too
    forward, backward, in_forward, in_backward = zip(*rounds, strict=True)
    both = [f + b for f, b in zip(forward, backward, strict=True)]
    return {
        "launches forward": in_forward[0],
        "launches backward": in_backward[0],
        "forward, least": min(forward),
        "backward, least": min(backward),
        "both, least": min(both),
        "both, median": statistics.median(both),
    }


def run() -> dict[str, float]:
    """:func:`measure` in a process of its own, whose driver is the stub."""
    with tempfile.TemporaryDirectory() as folder:
        library = build_stub(Path(folder))
        environment = os.environ | {
            "TRITON_LIBCUDA_PATH": folder,
            "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            "TRITON_CACHE_DIR": f"{folder}/cache",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [sys.executable, __file__, str(library)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: float(value) for name, value in (line.split(": ") for line in done.stdout.splitlines())}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for name, value in (measure(Path(sys.argv[1])) if len(sys.argv) > 1 else run()).items():
        print(f"{name}: {value:.4g}")
