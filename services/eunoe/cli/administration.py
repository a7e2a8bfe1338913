"""Models, usage, API keys."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from eunoe.cli.connect import NotReachable, open_client
from eunoe.cli.output import JsonOption, megabytes, print_json, print_table, to_json

if TYPE_CHECKING:
    from eunoe.clients.state_store import StateStoreClient

T = TypeVar("T")

keys = typer.Typer(
    help="API keys. They are kept by the state store, which only administrators can reach.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

StateStoreOption = Annotated[
    str | None, typer.Option("--state-store", help="host:port of the state store; default: that of `eunoe up`.")
]


def models(context: typer.Context, json_output: JsonOption = False) -> None:
    """List the served models, and what a stream's memory takes on each."""
    with open_client(context) as client:
        found = client.list_models()
    if json_output:
        for each in found:
            print_json(each)
        return
    rows = [
        [
            each.name,
            str(each.num_workers),
            f"{each.max_positions:,}",
            f"{each.default_settings.kv_budget_tokens:,} tokens, {megabytes(each.default_state_bytes)}",
            f"{each.full_cache_bytes_per_token:,} bytes",
        ]
        for each in found
    ]
    print_table(["model", "workers", "largest budget", "default budget", "a full cache takes per token"], rows)


def usage(context: typer.Context, json_output: JsonOption = False) -> None:
    """Show what this tenant uses of its quotas."""
    with open_client(context) as client:
        found = client.get_usage()
    if json_output:
        print_json(found)
        return
    rows = [
        ["streams", f"{found.num_streams:,}", f"{found.max_streams:,}"],
        ["log", megabytes(found.log_bytes), megabytes(found.max_log_bytes)],
        ["checkpoints", megabytes(found.checkpoint_bytes), megabytes(found.max_checkpoint_bytes)],
    ]
    print_table([f"tenant {found.tenant}", "used", "allowed"], rows)


@keys.command("create")
def _create(
    tenant: Annotated[str, typer.Argument(help="Whose key: 1 to 64 of a-z, 0-9 and -.")] = "default",
    label: Annotated[str, typer.Option(help="For people; at most 64 characters.")] = "",
    state_store: StateStoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make a key. Its secret is shown once and kept nowhere."""
    from eunoe.internal.v1 import state_store_pb2 as internal

    created = _call(
        state_store, lambda store: store.create_api_key(internal.CreateApiKeyRequest(tenant=tenant, label=label))
    )
    if json_output:
        print_json(created)
    else:
        print(f"key {created.key.key_id} of tenant {created.key.tenant}; its secret, shown only now:\n{created.secret}")


@keys.command("revoke")
def _revoke(
    key_id: Annotated[str, typer.Argument(help="As `eunoe keys list` shows it.")],
    state_store: StateStoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Take a key out of use; gateways notice within seconds."""
    from eunoe.internal.v1 import state_store_pb2 as internal

    _call(state_store, lambda store: store.revoke_api_key(internal.RevokeApiKeyRequest(key_id=key_id)))
    if json_output:
        print_json({"revoked": key_id})
    else:
        print(f"key {key_id} is revoked")


@keys.command("list")
def _list(
    tenant: Annotated[str, typer.Option(help="Only this tenant's.")] = "",
    state_store: StateStoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """List keys, without their secrets."""
    from eunoe.internal.v1 import state_store_pb2 as internal

    found = _call(state_store, lambda store: store.list_api_keys(internal.ListApiKeysRequest(tenant=tenant))).keys
    if json_output:
        for each in found:
            print_json(each)
        return
    rows = [[each.key_id, each.tenant, each.label, to_json(each)["create_time"]] for each in found]
    print_table(["key", "tenant", "label", "made"], rows)


def _call(address: str | None, use: "Callable[[StateStoreClient], Awaitable[T]]") -> T:
    from eunoe.clients.state_store import StateStoreClient
    from eunoe.embedded.home import default_home, read_record
    from eunoe.runtime.grpc_channel import open_channel

    if address is None:
        record = read_record(default_home())
        if record is None or not record.state_store_address:
            raise NotReachable("no platform runs here (`eunoe up` starts one), and no --state-store is given")
        address = record.state_store_address

    async def call(address: str) -> T:
        async with open_channel(address) as channel:
            return await use(StateStoreClient(channel))

    return asyncio.run(call(address))
