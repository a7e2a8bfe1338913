"""Redis over TLS: both sides show certificates, and a server that is not trusted gets nothing."""

import datetime
import ipaddress
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from eunoe.embedded.processes import free_ports
from eunoe.embedded.redis_server import server_binary
from eunoe.runtime.errors import Unavailable
from eunoe.state_store.redis_client import RedisTls
from eunoe.state_store.redis_storage import RedisStorage
from eunoe.state_store.storage import PutRecord, Versioned


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with {ours,other}.{pem,key}: certificates of 127.0.0.1 that trust themselves alone."""
    directory = tmp_path_factory.mktemp("certificates")
    now = datetime.datetime.now(datetime.UTC)
    for name in ("ours", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
            .sign(key, hashes.SHA256())
        )
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        (directory / f"{name}.pem").write_bytes(certificate.public_bytes(pem))
        (directory / f"{name}.key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return directory


@pytest.fixture(scope="module")
def url(start_redis, certificates: Path) -> str:
    """Of a server that asks for certificates."""
    linked = subprocess.run(["ldd", server_binary()], capture_output=True, text=True, check=False).stdout
    if "libssl" not in linked:
        pytest.skip(f"{server_binary()} is built without TLS")
    port = str(free_ports(1)[0])
    files = {"cert": "ours.pem", "key": "ours.key", "ca-cert": "ours.pem"}
    settings = [part for name, file in files.items() for part in (f"--tls-{name}-file", str(certificates / file))]
    start_redis("--bind", "127.0.0.1", "--tls-port", port, *settings)
    return f"rediss://127.0.0.1:{port}"


def tls(certificates: Path, *, trusted: str = "ours", own: str | None = "ours") -> RedisTls:
    own_files = {} if own is None else {"certificate_file": certificates / f"{own}.pem"}
    own_files |= {} if own is None else {"key_file": certificates / f"{own}.key"}
    return RedisTls(ca_file=certificates / f"{trusted}.pem", **own_files)


async def test_records_are_written_and_read_over_tls(url: str, certificates: Path) -> None:
    storage = RedisStorage(url, tls=tls(certificates))
    await storage.load_function()
    await storage.compare_and_swap("t", [], [PutRecord("eunoe:tls", b"data")])

    await storage.stage([("eunoe:tls-chunk", b"chunk")], 60_000)

    assert await storage.read(["eunoe:tls"]) == [Versioned("t", b"data")]
    assert await storage.get(["eunoe:tls-chunk"]) == [b"chunk"]
    await storage.close()


@pytest.mark.parametrize(
    ("change", "host", "message"),
    [
        ({"trusted": "other"}, "127.0.0.1", "certificate verify failed"),
        # Here the server hangs up.
        ({"own": None}, "127.0.0.1", "Redis cannot be reached"),
        ({"own": "other"}, "127.0.0.1", "Redis cannot be reached"),
        ({}, "localhost", "certificate is not valid for 'localhost'"),
    ],
)
async def test_who_is_not_trusted_is_not_talked_to(
    url: str, certificates: Path, change: dict, host: str, message: str
) -> None:
    storage = RedisStorage(url.replace("127.0.0.1", host), tls=tls(certificates, **change))

    with pytest.raises(Unavailable, match=message):
        await storage.read(["eunoe:tls"])
    with pytest.raises(Unavailable, match=message):
        await storage.stage([("eunoe:tls-chunk", b"chunk")], 60_000)
    await storage.close()
