"""Evictions of the whole platform are chosen by its rules and recorded in its audit log."""

import json
import time

import torch

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.client import Client
from eunoe.embedded.platform import Platform
from eunoe.eviction import Namm
from eunoe.eviction.backward_attention import NUM_PARAMETERS, BackwardAttention
from eunoe.eviction.namm import Normalization

SETTINGS = api.StreamSettings(kv_budget_tokens=256, segment_length=64)


def test_a_namm_that_is_put_into_the_home_decides_for_the_streams_of_its_rule(
    platform: Platform, client: Client
) -> None:
    parameters = 0.3 * torch.randn(NUM_PARAMETERS, generator=torch.Generator().manual_seed(0))
    namm = Namm(BackwardAttention(parameters), Normalization(torch.full((17,), 0.01), torch.full((17,), 0.02)))
    namm.save(platform.home / "policies" / "mine.safetensors")
    beside = platform.home / "policies" / "rules.new"
    beside.write_text('[[rules]]\nstreams = "tenants/default/streams/ruled*"\npolicy = "mine"')
    beside.replace(platform.home / "policies" / "rules.toml")
    text = "All that was acknowledged is still there. " * 200

    deadline = time.monotonic() + 60
    policies = set()
    while namm.name not in policies:
        assert time.monotonic() < deadline, policies
        name = f"ruled{len(policies)}-{time.time_ns()}"
        client.create_stream(name, settings=SETTINGS)
        policies.add(client.append(name, text).policy)
    client.create_stream("unruled", settings=SETTINGS)

    assert client.append("unruled", text).policy == "sinks-recent/1"
    audit = platform.home / "logs" / "evictions.jsonl"
    while not any(line["policy"] == namm.name for line in map(json.loads, audit.read_text().splitlines())):
        assert time.monotonic() < deadline
