from typing import Any

import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.gateway.models import ModelDirectory, settings_in_effect
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import InvalidRequest, ModelNotFound


def a_worker(model: api.Model, name: str = "w1") -> pb.Worker:
    return pb.Worker(worker=name, address="127.0.0.1:1", model=model)


async def test_served_models_are_sorted_and_count_their_workers(store: Any, clock: Any, model: api.Model) -> None:
    other = api.Model(name="big", max_positions=8192)
    store.workers = [a_worker(model, "w1"), a_worker(model, "w2"), a_worker(other, "w3")]

    served = await ModelDirectory(store, clock).served()

    assert [(m.name, m.num_workers) for m in served] == [("big", 1), ("tiny", 2)]


async def test_a_model_without_room_for_a_stream_hides_no_other(store: Any, clock: Any, model: api.Model) -> None:
    store.workers = [a_worker(api.Model(name="broken", max_positions=0)), a_worker(model, "w2")]
    directory = ModelDirectory(store, clock)

    served = await directory.served()

    assert [m.name for m in served] == ["tiny"]
    with pytest.raises(ModelNotFound):
        await directory.find("broken")


async def test_an_empty_name_is_the_only_model(store: Any, clock: Any, model: api.Model) -> None:
    store.workers = [a_worker(model)]

    assert (await ModelDirectory(store, clock).find("")).name == "tiny"


async def test_an_empty_name_among_several_models_is_invalid(store: Any, clock: Any, model: api.Model) -> None:
    store.workers = [a_worker(model), a_worker(api.Model(name="big", max_positions=8192))]

    with pytest.raises(InvalidRequest):
        await ModelDirectory(store, clock).find("")


@pytest.mark.parametrize("name", ["", "gpt"])
async def test_a_model_that_nobody_serves_is_not_found(store: Any, clock: Any, name: str) -> None:
    with pytest.raises(ModelNotFound):
        await ModelDirectory(store, clock).find(name)


async def test_a_model_stays_known_while_its_workers_are_away(store: Any, clock: Any, model: api.Model) -> None:
    directory = ModelDirectory(store, clock)
    store.workers = [a_worker(model)]
    await directory.served()
    store.workers = []
    clock.now += 60

    assert (await directory.find("tiny")).vocab_size == 512
    assert await directory.served() == []


async def test_an_empty_name_is_the_only_known_model_while_its_workers_are_away(
    store: Any, clock: Any, model: api.Model
) -> None:
    directory = ModelDirectory(store, clock)
    store.workers = [a_worker(model)]
    await directory.served()
    store.workers = []
    clock.now += 60

    assert (await directory.find("")).name == "tiny"


async def test_an_empty_name_among_several_known_models_is_invalid_while_all_are_away(
    store: Any, clock: Any, model: api.Model
) -> None:
    directory = ModelDirectory(store, clock)
    store.workers = [a_worker(model), a_worker(api.Model(name="big", max_positions=8192))]
    await directory.served()
    store.workers = []
    clock.now += 60

    with pytest.raises(InvalidRequest):
        await directory.find("")


async def test_the_directory_is_read_once_a_second(store: Any, clock: Any) -> None:
    directory = ModelDirectory(store, clock)
    await directory.served()
    await directory.served()
    clock.now += 1
    await directory.served()

    assert store.num_calls["list_workers"] == 2


def test_settings_default_to_what_the_model_can_do(model: api.Model) -> None:
    settings = settings_in_effect(api.StreamSettings(), model)

    assert (settings.kv_budget_tokens, settings.segment_length, settings.num_sink_tokens) == (512, 512, 4)
    assert settings.positions == api.POSITION_MODE_COMPACT


async def test_a_models_own_defaults_go_before_those_of_all_models(store: Any, clock: Any, model: api.Model) -> None:
    own = api.StreamSettings(kv_budget_tokens=128, segment_length=64, num_sink_tokens=0)
    model.default_settings.CopyFrom(own)
    store.workers = [a_worker(model)]

    found = await ModelDirectory(store, clock).find("tiny")
    settings = settings_in_effect(api.StreamSettings(segment_length=32), found)

    own.positions = api.POSITION_MODE_COMPACT
    assert found.default_settings == own
    assert (settings.kv_budget_tokens, settings.segment_length, settings.num_sink_tokens) == (128, 32, 0)


@pytest.mark.parametrize(
    "asked", [api.StreamSettings(kv_budget_tokens=513), api.StreamSettings(num_sink_tokens=64), api.StreamSettings()]
)
def test_a_models_own_defaults_are_checked_with_what_was_asked_for(model: api.Model, asked: api.StreamSettings) -> None:
    model.default_settings.CopyFrom(api.StreamSettings(kv_budget_tokens=64, segment_length=64))
    if asked == api.StreamSettings():
        model.default_settings.segment_length = 8

    with pytest.raises(InvalidRequest):
        settings_in_effect(asked, model)


async def test_a_model_with_impossible_defaults_hides_no_other(store: Any, clock: Any, model: api.Model) -> None:
    broken = api.Model(name="broken", max_positions=512, default_settings=api.StreamSettings(kv_budget_tokens=1024))
    store.workers = [a_worker(broken), a_worker(model, "w2")]

    assert [m.name for m in await ModelDirectory(store, clock).served()] == ["tiny"]


def test_zero_sinks_are_a_choice(model: api.Model) -> None:
    assert settings_in_effect(api.StreamSettings(num_sink_tokens=0), model).num_sink_tokens == 0


@pytest.mark.parametrize(
    "settings",
    [
        api.StreamSettings(kv_budget_tokens=513),
        api.StreamSettings(segment_length=15),
        api.StreamSettings(segment_length=2049),
        api.StreamSettings(kv_budget_tokens=4),
        api.StreamSettings(kv_budget_tokens=64, num_sink_tokens=64),
        api.StreamSettings(positions=9),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range_are_invalid(model: api.Model, settings: api.StreamSettings) -> None:
    with pytest.raises(InvalidRequest):
        settings_in_effect(settings, model)
