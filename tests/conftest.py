"""Settings of all tests: seeds, one thread, Triton's interpreter, poisoned memory, fixed hypothesis runs."""

import os
import sys

# `import triton` happens inside transformers and reads the variable then, once and for all.
assert "triton" not in sys.modules, "triton was imported before TRITON_INTERPRET could be set"
if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/kfd"):  # no CUDA or ROCm driver
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Progress bars and advisory warnings of tiny models would bury a failure's output.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Fill uninitialised tensors with NaN (integers: their largest value), so that reading one shows."""

    def poisoned(make):
        def empty(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.device.type == "meta":
                return tensor
            with torch.no_grad():
                if tensor.is_floating_point() or tensor.is_complex():
                    return tensor.fill_(float("nan"))
                return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
