"""The statistics of the policies that count attention: how much a slot received, one float32."""

from dataclasses import dataclass

import torch

from eunoe_kernels.attention_received import attention_received


@dataclass(frozen=True, slots=True)
class AttentionReceived:
    """Attention that a slot received, averaged over the query heads of its KV head and summed over queries."""

    num_last_queries: int | None = None
    """None: all queries ever. Else so many of the newest pass's last queries, and nothing of what was before."""
    num_bytes: int = 4

    @property
    def name(self) -> str:
        """See `Statistics`."""
        return f"attention-received/1/{'all' if self.num_last_queries is None else self.num_last_queries}"

    def observe(
        self,
        statistics_HNB: torch.Tensor,
        query_HGTD: torch.Tensor,
        key_HTD: torch.Tensor,
        past_key_HSD: torch.Tensor,
    ) -> None:
        """See `Statistics`."""
        received_HN = self.unpack(statistics_HNB)
        if self.num_last_queries is None:
            received_HN += attention_received(query_HGTD, key_HTD, past_key_HSD)
        else:
            last = query_HGTD[:, :, -self.num_last_queries :]
            received_HN.copy_(attention_received(last, key_HTD, past_key_HSD))

    def finish(self, statistics_LHTB: torch.Tensor, key_LHTD: torch.Tensor, value_LHTD: torch.Tensor) -> None:
        """See `Statistics`: nothing to add."""

    def unpack(self, statistics_B: torch.Tensor) -> torch.Tensor:
        """The sums of packed slots [..., 4] as float32 [...], a view."""
        return statistics_B.view(torch.float32)[..., 0]
