"""Transport security: TLS and mutual TLS from PEM files."""

from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsConfig:
    """PEM files of one side of a connection.

    A server needs certificate and key; with `ca_file` it also demands a certificate of that authority from every
    client (mTLS). A client trusts `ca_file` (the system's authorities without it) and presents its certificate and
    key if it has them.
    """

    certificate_file: Path | None = None
    key_file: Path | None = None
    ca_file: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("a TLS certificate needs its key, and a key its certificate")

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials of a listening port.

        Raises:
            ValueError: If there is no certificate.
        """
        if self.certificate_file is None or self.key_file is None:
            raise ValueError("a TLS server needs a certificate and its key")
        return grpc.ssl_server_credentials(
            [(self.key_file.read_bytes(), self.certificate_file.read_bytes())],
            root_certificates=_read(self.ca_file),
            require_client_auth=self.ca_file is not None,
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials of an outgoing connection."""
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.ca_file),
            private_key=_read(self.key_file),
            certificate_chain=_read(self.certificate_file),
        )


def tls_from_files(certificate_file: Path | None, key_file: Path | None, ca_file: Path | None) -> TlsConfig | None:
    """The TLS of these files, or None (plain text) where there are none."""
    if certificate_file is None and key_file is None and ca_file is None:
        return None
    return TlsConfig(certificate_file=certificate_file, key_file=key_file, ca_file=ca_file)


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()
