from pathlib import Path
from typing import Any

import grpc
import pytest

from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.internal.v1 import state_store_pb2_grpc
from eunoe.runtime.auth import TlsConfig, tls_from_files


class Servicer(state_store_pb2_grpc.StateStoreServiceServicer):
    async def GetUsage(self, request: pb.GetUsageRequest, context: Any) -> pb.GetUsageResponse:
        return pb.GetUsageResponse()


def tls(directory: Path, *, own: str | None = None, trusts: str | None = None) -> TlsConfig:
    return TlsConfig(
        certificate_file=directory / f"{own}.pem" if own else None,
        key_file=directory / f"{own}.key" if own else None,
        ca_file=directory / f"{trusts}.pem" if trusts else None,
    )


async def test_a_client_that_trusts_the_authority_is_served_over_tls(serve: Any, certificates: Path) -> None:
    server_tls = tls(certificates, own="server")
    async with serve(Servicer(), tls=server_tls, client_tls=tls(certificates, trusts="ca")) as (_, stub):
        assert await stub.GetUsage(pb.GetUsageRequest(), timeout=10) == pb.GetUsageResponse()


async def test_a_client_that_does_not_trust_the_server_refuses_it(serve: Any, certificates: Path) -> None:
    server_tls = tls(certificates, own="server")
    async with serve(Servicer(), tls=server_tls, client_tls=tls(certificates, trusts="stranger")) as (_, stub):
        await assert_unavailable(stub)


async def test_a_plain_text_client_is_not_served_over_tls(serve: Any, certificates: Path) -> None:
    async with serve(Servicer(), tls=tls(certificates, own="server")) as (_, stub):
        await assert_unavailable(stub)


async def test_mutual_tls_serves_a_client_with_a_certificate_of_the_authority(serve: Any, certificates: Path) -> None:
    server_tls = tls(certificates, own="server", trusts="ca")
    client_tls = tls(certificates, own="client", trusts="ca")
    async with serve(Servicer(), tls=server_tls, client_tls=client_tls) as (_, stub):
        assert await stub.GetUsage(pb.GetUsageRequest(), timeout=10) == pb.GetUsageResponse()


@pytest.mark.parametrize("own", [None, "stranger"])
async def test_mutual_tls_refuses_every_other_client(serve: Any, certificates: Path, own: str | None) -> None:
    server_tls = tls(certificates, own="server", trusts="ca")
    async with serve(Servicer(), tls=server_tls, client_tls=tls(certificates, own=own, trusts="ca")) as (_, stub):
        await assert_unavailable(stub)


def test_a_certificate_without_its_key_is_refused(certificates: Path) -> None:
    with pytest.raises(ValueError, match="key"):
        TlsConfig(certificate_file=certificates / "server.pem")


def test_a_server_needs_a_certificate(certificates: Path) -> None:
    with pytest.raises(ValueError, match="certificate"):
        tls(certificates, trusts="ca").server_credentials()


def test_no_files_mean_plain_text() -> None:
    assert tls_from_files(None, None, None) is None


async def assert_unavailable(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await stub.GetUsage(pb.GetUsageRequest(), timeout=10)

    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
