"""LongContextService: translates each RPC into a call of the gateway's parts."""

import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.api.v1 import long_context_pb2_grpc
from eunoe.clients.state_store import StateStoreClient
from eunoe.gateway import generate
from eunoe.gateway.append import AppendCall
from eunoe.gateway.authentication import current_tenant
from eunoe.gateway.export import export_stream, import_stream, uploaded_pieces
from eunoe.gateway.limits import TenantLimits
from eunoe.gateway.models import ModelDirectory, settings_for, settings_in_effect
from eunoe.gateway.placement import Placement
from eunoe.gateway.resources import checked_request_id, new_name, page_token, resolved, stream_id_before_page
from eunoe.gateway.verification import verify_stream
from eunoe.internal.v1 import state_store_pb2 as store_pb
from eunoe.runtime.errors import InvalidRequest

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000


class LongContextServicer(long_context_pb2_grpc.LongContextServiceServicer):
    """The public API of one gateway; the tenant of every call comes from its authentication.

    Args:
        is_draining: Whether calls that would never end by themselves shall end.
    """

    def __init__(
        self,
        *,
        store: StateStoreClient,
        placement: Placement,
        models: ModelDirectory,
        limits: TenantLimits,
        window_bytes: int,
        is_draining: Callable[[], bool],
    ) -> None:
        self._store = store
        self._placement = placement
        self._models = models
        self._limits = limits
        self._window_bytes = window_bytes
        self._is_draining = is_draining

    async def CreateStream(self, request: api.CreateStreamRequest, context: Any) -> api.CreateStreamResponse:
        model = await self._models.find(request.model)
        answer = await self._store.create_stream(
            store_pb.CreateStreamRequest(
                name=new_name(request.stream_id, current_tenant()),
                model=model.name,
                settings=settings_in_effect(request.settings, model),
                expire_time=request.expire_time if request.HasField("expire_time") else None,
                request_id=checked_request_id(request.request_id),
            )
        )
        return api.CreateStreamResponse(stream=answer.record.stream)

    async def GetStream(self, request: api.GetStreamRequest, context: Any) -> api.GetStreamResponse:
        name = resolved(request.name, current_tenant())
        answer = await self._store.get_stream(store_pb.GetStreamRequest(name=name))
        return api.GetStreamResponse(stream=answer.record.stream)

    async def ListStreams(self, request: api.ListStreamsRequest, context: Any) -> api.ListStreamsResponse:
        if request.page_size < 0:
            raise InvalidRequest(f"page_size={request.page_size} is negative")
        answer = await self._store.list_streams(
            store_pb.ListStreamsRequest(
                tenant=current_tenant(),
                page_size=min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE),
                after=stream_id_before_page(request.page_token),
            )
        )
        token = page_token(answer.streams[-1].name) if answer.has_more else ""
        return api.ListStreamsResponse(streams=answer.streams, next_page_token=token)

    async def DeleteStream(self, request: api.DeleteStreamRequest, context: Any) -> api.DeleteStreamResponse:
        name = resolved(request.name, current_tenant())
        self._placement.forget(name)
        # Made up here if need be: the call to the state store is repeated if the answer is lost.
        request_id = checked_request_id(request.request_id) or uuid.uuid4().hex
        answer = await self._store.delete_stream(
            store_pb.DeleteStreamRequest(name=name, erase=request.erase, request_id=request_id)
        )
        return api.DeleteStreamResponse(receipt=answer.receipt if request.erase else None)

    async def Append(
        self, requests: AsyncIterator[api.AppendRequest], context: Any
    ) -> AsyncIterator[api.AppendResponse]:
        requests = aiter(requests)
        first = await anext(requests, None)
        if first is None or first.WhichOneof("request") != "open":
            raise InvalidRequest("the first request of an Append is `open`")
        tenant = current_tenant()
        call = AppendCall(
            store=self._store,
            placement=self._placement,
            models=self._models,
            limits=self._limits,
            tenant=tenant,
            name=resolved(first.open.stream, tenant),
            source_id=first.open.source_id,
            seen=first.open.seen if first.open.HasField("seen") else None,
            window_bytes=self._window_bytes,
            is_draining=self._is_draining,
        )
        async for response in call.run(requests):
            yield response

    def Generate(self, request: api.GenerateRequest, context: Any) -> AsyncIterator[api.GenerateResponse]:
        name = resolved(request.stream, current_tenant())
        return generate.generate(self._placement, name, request, context.time_remaining())

    def Score(self, request: api.ScoreRequest, context: Any) -> AsyncIterator[api.ScoreResponse]:
        name = resolved(request.stream, current_tenant())
        return generate.score(self._placement, name, request, context.time_remaining())

    def InspectMemory(
        self, request: api.InspectMemoryRequest, context: Any
    ) -> AsyncIterator[api.InspectMemoryResponse]:
        name = resolved(request.name, current_tenant())
        return generate.inspect_memory(self._placement, name, request, context.time_remaining())

    async def ForkStream(self, request: api.ForkStreamRequest, context: Any) -> api.ForkStreamResponse:
        tenant = current_tenant()
        forking = store_pb.ForkStreamRequest(
            parent=resolved(request.name, tenant),
            name=new_name(request.stream_id, tenant),
            at_offset=request.at_offset if request.HasField("at_offset") else None,
            expire_time=request.expire_time if request.HasField("expire_time") else None,
            request_id=checked_request_id(request.request_id),
        )
        if request.model:
            model = await self._models.find(request.model)
            parent = (await self._store.get_stream(store_pb.GetStreamRequest(name=forking.parent))).record.stream
            forking.model = model.name
            forking.settings.CopyFrom(settings_for(parent.settings, model))
            forking.shares_vocabulary = await self._models.share_vocabulary(parent.model, model.name)
        answer = await self._store.fork_stream(forking)
        return api.ForkStreamResponse(stream=answer.record.stream)

    async def ExportStream(
        self, request: api.ExportStreamRequest, context: Any
    ) -> AsyncIterator[api.ExportStreamResponse]:
        async for data in export_stream(self._store, resolved(request.name, current_tenant())):
            yield api.ExportStreamResponse(data=data)

    async def ImportStream(
        self, requests: AsyncIterator[api.ImportStreamRequest], context: Any
    ) -> api.ImportStreamResponse:
        requests = aiter(requests)
        first = await anext(requests, None)
        if first is None:
            raise InvalidRequest("an ImportStream needs at least one request")
        name = new_name(first.stream_id, current_tenant())
        request_id = checked_request_id(first.request_id)
        pieces = uploaded_pieces(first, requests)
        return api.ImportStreamResponse(stream=await import_stream(self._store, self._models, name, request_id, pieces))

    def VerifyStream(self, request: api.VerifyStreamRequest, context: Any) -> AsyncIterator[api.VerifyStreamResponse]:
        name = resolved(request.name, current_tenant())
        return verify_stream(self._placement, name, context.time_remaining())

    async def ListModels(self, request: api.ListModelsRequest, context: Any) -> api.ListModelsResponse:
        return api.ListModelsResponse(models=await self._models.served())

    async def GetUsage(self, request: api.GetUsageRequest, context: Any) -> api.GetUsageResponse:
        answer = await self._store.get_usage(store_pb.GetUsageRequest(tenant=current_tenant()))
        return answer.usage
