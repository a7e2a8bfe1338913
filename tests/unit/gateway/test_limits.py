from typing import Any

import pytest

from eunoe.gateway.limits import TenantLimits
from eunoe.runtime.errors import Overloaded, QuotaExceeded


def limits(clock: Any) -> TenantLimits:
    return TenantLimits(max_concurrent_calls=2, append_bytes_per_second=1000, clock=clock)


def test_a_call_above_the_tenants_limit_is_refused(clock: Any) -> None:
    tenants = limits(clock)

    with tenants.call("a"), tenants.call("a"), pytest.raises(Overloaded), tenants.call("a"):
        pass


def test_a_tenants_calls_do_not_count_against_another(clock: Any) -> None:
    tenants = limits(clock)

    with tenants.call("a"), tenants.call("a"), tenants.call("b"):
        pass


def test_a_call_that_ended_makes_room(clock: Any) -> None:
    tenants = limits(clock)
    for _ in range(5):
        with tenants.call("a"), tenants.call("a"):
            pass


def test_bytes_beyond_the_allowance_are_refused_with_the_time_to_wait(clock: Any) -> None:
    tenants = limits(clock)
    tenants.take_append_bytes("a", 900)

    with pytest.raises(QuotaExceeded) as caught:
        tenants.take_append_bytes("a", 600)

    assert caught.value.retry_after_seconds == pytest.approx(0.5)
    assert caught.value.quota == "append_bytes_per_second"


def test_the_allowance_refills_with_time_up_to_its_size(clock: Any) -> None:
    tenants = limits(clock)
    tenants.take_append_bytes("a", 1000)
    clock.now += 0.5
    tenants.take_append_bytes("a", 500)
    clock.now += 3600

    with pytest.raises(QuotaExceeded):
        tenants.take_append_bytes("a", 1001)


def test_a_refused_record_costs_nothing(clock: Any) -> None:
    tenants = limits(clock)
    with pytest.raises(QuotaExceeded):
        tenants.take_append_bytes("a", 1001)

    tenants.take_append_bytes("a", 1000)
