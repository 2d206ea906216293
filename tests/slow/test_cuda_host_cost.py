"""What a site costs the host on the GPU path. Needs no GPU, but a quiet machine: ``pytest -m slow -s``."""

import pytest
from support import stubbed_cuda

pytest.importorskip("triton")


@pytest.mark.slow
def test_microseconds_of_a_site():
    """At most 60, forward and backward. A training step has 36 sites with the paper's placement."""
    measured = stubbed_cuda.run()
    print(measured)
    assert measured["forward, least"] + measured["backward, least"] <= 60
