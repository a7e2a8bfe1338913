from typing import Any

import pytest

from eunoe.gateway.authentication import Authenticator
from eunoe.runtime.errors import Unauthenticated

LOOPBACK = "ipv4:127.0.0.1:5000"


def an_authenticator(store: Any, clock: Any, *, requires_key: bool = True) -> Authenticator:
    return Authenticator(store, requires_key=requires_key, cache_seconds=10, clock=clock)


def bearing(secret: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "test"), ("authorization", f"Bearer {secret}")]


async def test_the_tenant_comes_from_the_key(store: Any, clock: Any) -> None:
    store.keys["s1"] = "acme"

    assert await an_authenticator(store, clock).tenant(bearing("s1"), "ipv4:10.0.0.1:1") == "acme"


async def test_an_unknown_key_is_refused_even_where_none_is_needed(store: Any, clock: Any) -> None:
    with pytest.raises(Unauthenticated):
        await an_authenticator(store, clock, requires_key=False).tenant(bearing("nonsense"), LOOPBACK)


async def test_a_known_key_is_asked_for_once_within_the_cache_time(store: Any, clock: Any) -> None:
    store.keys["s1"] = "acme"
    authenticator = an_authenticator(store, clock)

    for _ in range(3):
        await authenticator.tenant(bearing("s1"), LOOPBACK)

    assert store.num_calls["authenticate"] == 1


async def test_a_revoked_key_is_refused_once_the_cache_time_is_over(store: Any, clock: Any) -> None:
    store.keys["s1"] = "acme"
    authenticator = an_authenticator(store, clock)
    await authenticator.tenant(bearing("s1"), LOOPBACK)
    del store.keys["s1"]
    clock.now += 10

    with pytest.raises(Unauthenticated):
        await authenticator.tenant(bearing("s1"), LOOPBACK)


@pytest.mark.parametrize("peer", [LOOPBACK, "ipv6:%5B::1%5D:5000", "ipv6:[::1]:5000", "unix:/run/eunoe.sock"])
async def test_loopback_needs_no_key_where_the_config_says_so(store: Any, clock: Any, peer: str) -> None:
    assert await an_authenticator(store, clock, requires_key=False).tenant([], peer) == "default"


@pytest.mark.parametrize("peer", ["ipv4:10.0.0.1:5000", "ipv6:[::2]:1", "ipv4:10.127.0.1:1", ""])
async def test_other_hosts_need_a_key_always(store: Any, clock: Any, peer: str) -> None:
    with pytest.raises(Unauthenticated):
        await an_authenticator(store, clock, requires_key=False).tenant([], peer)


async def test_loopback_needs_a_key_by_default(store: Any, clock: Any) -> None:
    with pytest.raises(Unauthenticated):
        await an_authenticator(store, clock).tenant([], LOOPBACK)


@pytest.mark.parametrize("value", ["Basic s1", "Bearer", "Bearer ", "s1", ""])
async def test_another_form_of_credential_is_refused(store: Any, clock: Any, value: str) -> None:
    store.keys["s1"] = "acme"

    with pytest.raises(Unauthenticated):
        await an_authenticator(store, clock).tenant([("authorization", value)], LOOPBACK)


async def test_two_credentials_are_refused(store: Any, clock: Any) -> None:
    store.keys |= {"s1": "acme", "s2": "other"}

    with pytest.raises(Unauthenticated):
        await an_authenticator(store, clock).tenant(bearing("s1") + bearing("s2"), LOOPBACK)
