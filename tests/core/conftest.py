"""For the tests of the numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fourfold.core.kernels import cuda

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Thousands of operations on a few kB each: threads would only wait for one another, 70 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(
    scope="module",
    params=[pytest.param("cpu", id="interpreted"), pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])],
)
def device(request: pytest.FixtureRequest) -> str:
    """Where the Triton kernels run: in the interpreter, or compiled on a GPU."""
    name: str = request.param
    if name == "cpu" and torch.cuda.is_available() and not cuda.INTERPRETED:
        pytest.skip("kernels are compiled on a machine with a GPU; TRITON_INTERPRET=1 interprets them there")
    assert (name == "cpu") == cuda.INTERPRETED, "triton was imported before TRITON_INTERPRET was set"
    return name
