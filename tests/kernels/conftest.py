import os

import pytest
import torch

# Triton decides at its import whether kernels run in the interpreter, on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel leaves unwritten, or reads before writing, shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poisoned(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poisoned(empty_like(*args, **kwargs)))
