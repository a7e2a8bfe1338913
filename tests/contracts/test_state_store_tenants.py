"""What the state store promises about quotas, API keys, workers and backlogs, over every database driver."""

from dataclasses import replace

import pytest

from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import CorruptState, KeyNotFound, Overloaded, QuotaExceeded, Unauthenticated
from eunoe.state_store import keys
from eunoe.state_store.effects import Total
from eunoe.state_store.storage import PutRecord
from eunoe.state_store.store import StateStore


class TestQuotas:
    async def test_streams_beyond_the_quota_are_refused(self, caller) -> None:
        for i in range(20):
            await caller.create(f"s{i}")

        with pytest.raises(QuotaExceeded) as error:
            await caller.create("one-more")
        assert error.value.quota == "num_streams"
        await caller.store.streams.delete(caller.name("s3"))
        await caller.create("one-more")

    async def test_log_bytes_beyond_the_quota_are_refused(self, caller) -> None:
        await caller.create()
        await caller.append(b"x" * (2**20 - 1))

        with pytest.raises(QuotaExceeded) as error:
            await caller.append(b"xx")
        assert error.value.quota == "log_bytes"
        assert await caller.append(b"x") == 2**20

    async def test_checkpoints_beyond_the_quota_are_refused_before_they_are_staged(self, caller) -> None:
        await caller.create()
        fence = await caller.acquire()
        await caller.store.commit(caller.name(), await caller.manifest(0, b"x" * 65_000), fence)

        with pytest.raises(QuotaExceeded) as error:
            await caller.stage(b"x" * 600)
        assert error.value.quota == "checkpoint_bytes"
        assert await caller.used(Total.CHECKPOINT_BYTES) == 65_000

    async def test_a_backlog_beyond_the_window_is_refused_until_the_memory_catches_up(self, caller, config) -> None:
        environment = replace(caller.store.environment, config=replace(config, max_backlog_bytes=10))
        caller = type(caller)(StateStore(environment), caller.tenant)
        await caller.create()
        await caller.append(b"0123456789")

        with pytest.raises(Overloaded):
            await caller.append(b"x")
        await caller.commit(await caller.acquire(), 10)
        assert await caller.append(b"x") == 11


class TestDirectories:
    async def test_living_workers_of_a_model_are_listed(self, caller) -> None:
        model = f"model-{caller.tenant}"
        ids = [f"{letter}-{caller.tenant}" for letter in "cab"]
        for worker_id in ids:
            worker = pb.Worker(worker=worker_id, address="h:1")
            worker.model.name = model
            await caller.store.workers.renew(worker)
        await caller.store.workers.remove(ids[0])

        assert [worker.worker for worker in await caller.store.workers.living(model)] == sorted(ids[1:])
        assert await caller.store.workers.living("no such model") == []

    async def test_the_backlog_lists_most_first_and_forgets_what_is_applied(self, caller) -> None:
        model = f"model-{caller.tenant}"
        for stream_id, size in (("a", 3), ("b", 9), ("c", 5)):
            await caller.create(stream_id, model=model)
            await caller.append(b"x" * size, stream_id=stream_id)
            caller.store.backlog.note(await caller.get(stream_id))
        before = await caller.store.backlog.largest(model, 4, 10)
        await caller.commit(await caller.acquire(stream_id="b"), 9, "b")
        await caller.store.streams.delete(caller.name("c"))

        assert before == [(caller.name("b"), 9), (caller.name("c"), 5)]
        assert await caller.store.backlog.largest(model, 1, 10) == [(caller.name("a"), 3)]

    async def test_the_sweep_finds_a_backlog_whose_hint_was_lost(self, caller) -> None:
        model = f"model-{caller.tenant}"
        await caller.create(model=model)
        await caller.append(b"text")

        await caller.store.streams.sweep_stream(caller.tenant, caller.name())

        assert await caller.store.backlog.largest(model, 1, 10) == [(caller.name(), 4)]


class TestApiKeys:
    async def test_a_secret_tells_its_tenant_until_it_is_revoked(self, caller) -> None:
        api_keys = caller.store.api_keys
        key, secret = await api_keys.create(caller.tenant, "laptop")

        assert secret.startswith(f"eunoe_{key.key_id}_")
        assert await api_keys.authenticate(secret) == caller.tenant
        assert await api_keys.of_tenant(caller.tenant) == [key]
        await api_keys.revoke(key.key_id)
        with pytest.raises(Unauthenticated):
            await api_keys.authenticate(secret)
        with pytest.raises(KeyNotFound):
            await api_keys.revoke(key.key_id)
        assert await api_keys.of_tenant(caller.tenant) == []

    async def test_a_wrong_secret_is_refused(self, caller) -> None:
        key, secret = await caller.store.api_keys.create(caller.tenant, "")

        for wrong in (
            "",
            "eunoe",
            f"eunoe_{key.key_id}",
            secret[:-1],
            secret + "0",
            "eunoe_0000000000000000_00",
            "\x00_é",
        ):
            with pytest.raises(Unauthenticated):
                await caller.store.api_keys.authenticate(wrong)

    async def test_a_key_whose_record_names_another_tenant_by_damage_is_refused_and_can_be_revoked(
        self, caller
    ) -> None:
        key, secret = await caller.store.api_keys.create(caller.tenant, "")
        storage, place = caller.store.environment.storage, keys.api_key(key.key_id)
        stored = (await storage.read([place]))[0].data
        damaged = stored.replace(caller.tenant.encode(), caller.tenant[:-1].encode() + b"-")

        await storage.compare_and_swap("damage", [], [PutRecord(place, damaged)])

        with pytest.raises(CorruptState):
            await caller.store.api_keys.authenticate(secret)
        await caller.store.api_keys.revoke(key.key_id)
        with pytest.raises(Unauthenticated):
            await caller.store.api_keys.authenticate(secret)
        assert await caller.store.api_keys.of_tenant(caller.tenant) == []

    async def test_the_secret_is_stored_nowhere(self, caller) -> None:
        key, secret = await caller.store.api_keys.create(caller.tenant, "")

        stored = (await caller.store.environment.storage.read([keys.api_key(key.key_id)]))[0].data

        assert stored
        assert secret.rpartition("_")[2].encode() not in stored

    async def test_another_pepper_makes_the_hashes_worthless(self, caller) -> None:
        _, secret = await caller.store.api_keys.create(caller.tenant, "")
        peppered = StateStore(caller.store.environment, pepper=b"pepper")

        with pytest.raises(Unauthenticated):
            await peppered.api_keys.authenticate(secret)
