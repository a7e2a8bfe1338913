"""Workers that share the samples of a step."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eunoe.training.decoder.curriculum import Stage
from eunoe.training.decoder.differentiable import NanoConfig, NanoDecoder
from eunoe.training.decoder.passkey import PasskeyTask
from eunoe.training.decoder.training import TrainingConfig, train

SMALL = NanoConfig(
    num_layers=2, hidden_size=16, num_query_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24
)  # fmt: skip
STAGE = Stage(
    task=PasskeyTask(length=320, least_gap=64, gap=(0, 60), questions_bytes=120),
    segment_length=32,
    bytes_per_step=640,
    max_steps=3,
    max_dilution=20.0,
    shortest=0.5,
)


class ThreadedGroup:
    """Stands for a process group whose workers are threads."""

    def __init__(self, num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_workers = num_workers
        self._barrier = threading.Barrier(num_workers, timeout=60)
        self._own = threading.local()
        self._given: dict[int, Tensor] = {}
        for name, value in (
            ("is_initialized", lambda: True),
            ("get_rank", lambda: self._own.rank),
            ("get_world_size", lambda: num_workers),
            ("all_reduce", self._all_reduce),
        ):
            monkeypatch.setattr(torch.distributed, name, value)

    def train(self, config: TrainingConfig, directory: Path) -> list[NanoDecoder]:
        """What each worker has learned."""

        def run(rank: int) -> NanoDecoder:
            self._own.rank = rank
            try:
                return train(config, directory / str(rank))
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.num_workers) as threads:
            return list(threads.map(run, range(self.num_workers)))

    def _all_reduce(self, tensor: Tensor) -> None:
        self._given[self._own.rank] = tensor.clone()
        self._barrier.wait()
        tensor.copy_(sum(self._given[rank] for rank in range(self.num_workers)))
        self._barrier.wait()


@pytest.mark.parametrize("uses_memory", [True, False])
def test_workers_learn_together_what_one_learns_alone_even_one_without_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uses_memory: bool
) -> None:
    config = TrainingConfig(model=SMALL, stages=(STAGE,), steps_per_report=1, uses_memory=uses_memory)
    alone = train(config, tmp_path / "alone")
    # Steps have two to four samples: of five workers one or more has none.
    together = ThreadedGroup(5, monkeypatch).train(config, tmp_path)
    for name, weights in alone.state_dict().items():
        torch.testing.assert_close(together[0].state_dict()[name], weights, rtol=0, atol=1e-4)
        for other in together[1:]:
            assert torch.equal(other.state_dict()[name], together[0].state_dict()[name]), name
    assert [(tmp_path / str(rank) / "checkpoint.pt").exists() for rank in range(5)] == [True] + [False] * 4
