"""Outgoing gRPC channels with the platform's options."""

import grpc

from eunoe.runtime.auth import TlsConfig

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
KEEPALIVE_SECONDS = 30
KEEPALIVE_TIMEOUT_SECONDS = 10

# Both sides: a peer that vanished without closing its socket is noticed within a minute.
KEEPALIVE_OPTIONS = (
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    # By default a minute, which the keepalive waits for if any other ping was on its way when the peer vanished.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    ("grpc.http2.max_pings_without_data", 0),
)

# Chunks and records have up to 1 MiB: in frames of 16 KiB, the default, receiving them takes half as much time again.
FRAME_OPTIONS = (("grpc.http2.max_frame_size", MAX_MESSAGE_BYTES),)

_OPTIONS = (
    *KEEPALIVE_OPTIONS,
    *FRAME_OPTIONS,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Whoever calls decides about retries: most calls are idempotent only as a whole.
    ("grpc.enable_retries", 0),
    # A restarted process listens again within a second or two; the default would back off for up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # How long one attempt may take, whatever its name says: a TLS handshake with a starved or a distant server needs
    # more than the backoff, and a silent address is given up sooner than after the default 20 s.
    ("grpc.min_reconnect_backoff_ms", 5000),
)


def open_blocking_channel(address: str) -> grpc.Channel:
    """A plain channel for a thread without an event loop; `address` may be unix:path. Otherwise as `open_channel`."""
    return grpc.insecure_channel(address, options=(*_OPTIONS, ("grpc.use_local_subchannel_pool", 1)))


def open_channel(address: str, tls: TlsConfig | None = None) -> grpc.aio.Channel:
    """A channel to `host:port`, plain text without `tls`. It connects at the first call and reconnects by itself.

    Channels of one process to one address share no connection: each has its own.
    """
    options = (*_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, tls.channel_credentials(), options=options)
