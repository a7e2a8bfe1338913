"""Which models are served, by the worker directory, and the settings that their streams may have."""

import logging
import time
from collections import Counter
from collections.abc import Callable

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.state_store import StateStoreClient
from eunoe.internal.v1 import state_store_pb2 as store_pb
from eunoe.runtime.errors import InvalidRequest, ModelNotFound

logger = logging.getLogger(__name__)

DEFAULT_KV_BUDGET_TOKENS = 1024
DEFAULT_SEGMENT_LENGTH = 512
DEFAULT_NUM_SINK_TOKENS = 4
MIN_SEGMENT_LENGTH = 16
MAX_SEGMENT_LENGTH = 2048

_CACHE_SECONDS = 1.0


class ModelDirectory:
    """The models of the living workers. A model once seen stays known while its workers are away."""

    def __init__(self, store: StateStoreClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._served: dict[str, api.Model] = {}
        self._known: dict[str, api.Model] = {}
        self._read_again = float("-inf")

    async def served(self) -> list[api.Model]:
        """The models that a living worker serves, sorted by name, with their numbers of workers."""
        if self._clock() >= self._read_again:
            await self._read()
        return [self._served[name] for name in sorted(self._served)]

    async def find(self, name: str) -> api.Model:
        """The model of that name; an empty name is the only one served, the only one known while none is.

        Raises:
            ModelNotFound: If no worker serves it, or none did since this gateway started.
            InvalidRequest: If the name is empty and there are several.
        """
        served = await self.served()
        if not name:
            models = served or [self._known[each] for each in sorted(self._known)]
            if len(models) > 1:
                raise InvalidRequest(f"there are several models, name one: {[model.name for model in models]}")
            if not models:
                raise ModelNotFound("no model is served")
            return models[0]
        if name not in self._known:
            raise ModelNotFound(f"no worker serves model {name!r}; served: {[model.name for model in served]}")
        return self._known[name]

    async def share_vocabulary(self, one: str, other: str) -> bool:
        """Whether token ids of one model are those of the other, as far as their vocabularies' sizes tell."""
        if one == other:
            return True
        await self.served()
        first, second = self._known.get(one), self._known.get(other)
        return first is not None and second is not None and first.vocab_size == second.vocab_size

    async def _read(self) -> None:
        workers = (await self._store.list_workers(store_pb.ListWorkersRequest())).workers
        num_workers = Counter(worker.model.name for worker in workers)
        self._served = {}
        for worker in workers:
            model = api.Model()
            model.CopyFrom(worker.model)
            model.num_workers = num_workers[model.name]
            try:
                model.default_settings.CopyFrom(settings_in_effect(api.StreamSettings(), model))
            except InvalidRequest as error:
                # One strange worker must not keep everybody from the models of the others.
                logger.warning("a model cannot be served", extra={"model": model.name, "problem": error.message})
                continue
            self._served[model.name] = model
        self._known |= self._served
        self._read_again = self._clock() + _CACHE_SECONDS


def settings_for(settings: api.StreamSettings, model: api.Model) -> api.StreamSettings:
    """A stream's settings for another model: the same, with a KV budget that is within its range.

    Raises:
        InvalidRequest: If that leaves no room for more than the sinks.
    """
    within = api.StreamSettings()
    within.CopyFrom(settings)
    within.kv_budget_tokens = min(settings.kv_budget_tokens, model.max_positions)
    return settings_in_effect(within, model)


def settings_in_effect(requested: api.StreamSettings, model: api.Model) -> api.StreamSettings:
    """What was asked for, with defaults filled in: the model's own, else those of all models.

    Raises:
        InvalidRequest: If a value is out of the model's range.
    """
    settings = api.StreamSettings(
        kv_budget_tokens=min(DEFAULT_KV_BUDGET_TOKENS, model.max_positions),
        segment_length=DEFAULT_SEGMENT_LENGTH,
        num_sink_tokens=DEFAULT_NUM_SINK_TOKENS,
        positions=api.POSITION_MODE_COMPACT,
    )
    # Merging leaves what is not set: for the number of sink tokens zero is a value, elsewhere it is none.
    settings.MergeFrom(model.default_settings)
    settings.MergeFrom(requested)
    if settings.kv_budget_tokens > model.max_positions:
        raise InvalidRequest(
            f"kv_budget_tokens={settings.kv_budget_tokens} exceeds the {model.max_positions} positions of {model.name}"
        )
    if not MIN_SEGMENT_LENGTH <= settings.segment_length <= MAX_SEGMENT_LENGTH:
        raise InvalidRequest(
            f"segment_length={settings.segment_length} is not in {MIN_SEGMENT_LENGTH}..{MAX_SEGMENT_LENGTH}"
        )
    if settings.num_sink_tokens >= settings.kv_budget_tokens:
        raise InvalidRequest(
            f"num_sink_tokens={settings.num_sink_tokens} fills the whole kv_budget_tokens={settings.kv_budget_tokens}"
        )
    if settings.positions not in (api.POSITION_MODE_ORIGINAL, api.POSITION_MODE_COMPACT):
        raise InvalidRequest(f"positions={settings.positions} is no PositionMode")
    return settings
