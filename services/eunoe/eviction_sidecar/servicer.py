"""EvictionSidecarService: translates, nothing else."""

import asyncio
from typing import Any

from eunoe.eviction.catalogue import PolicyCatalogue
from eunoe.eviction_sidecar.audit import AuditLog
from eunoe.eviction_sidecar.scoring import Scoring
from eunoe.internal.v1 import eviction_sidecar_pb2 as pb
from eunoe.internal.v1 import eviction_sidecar_pb2_grpc

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["EvictionSidecarService"].full_name


class EvictionSidecarServicer(eviction_sidecar_pb2_grpc.EvictionSidecarServiceServicer):
    """See the proto for what each RPC promises."""

    def __init__(self, catalogue: PolicyCatalogue, scoring: Scoring, audit: AuditLog | None) -> None:
        self._catalogue = catalogue
        self._scoring = scoring
        self._audit = audit

    async def ChoosePolicy(self, request: pb.ChoosePolicyRequest, context: Any) -> pb.ChoosePolicyResponse:
        choice = self._catalogue.choose(request.stream)
        shadow_policy = choice.shadow.name if choice.shadow is not None else ""
        return pb.ChoosePolicyResponse(policy=choice.policy.name, shadow_policy=shadow_policy)

    async def ScoreSlots(self, request: pb.ScoreSlotsRequest, context: Any) -> pb.ScoreSlotsResponse:
        return await self._scoring.score(request)

    async def ComparePolicies(self, request: pb.ComparePoliciesRequest, context: Any) -> pb.ComparePoliciesResponse:
        return await self._scoring.compare(request)

    async def RecordEviction(self, request: pb.RecordEvictionRequest, context: Any) -> pb.RecordEvictionResponse:
        if self._audit is not None:
            await asyncio.to_thread(self._audit.write, request)
        return pb.RecordEvictionResponse()
