"""An eviction sidecar's process that answers as it should, until it is ordered to do otherwise for some calls.

An order is a file beside the ready file, `Order` as JSON; each call that was not answered as it should be is a line of
another. Policies, rules and scores are the real sidecar's: what is garbled is the answer on its way out, the payload
file in between, or the life of the process.
"""

import json
import os
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import torch
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from eunoe.eviction import tensor_payload
from eunoe.eviction.tensor_payload import from_message, to_message
from eunoe.eviction_sidecar import __main__ as sidecar
from eunoe.internal.v1 import eviction_sidecar_pb2 as pb
from eunoe.internal.v1 import eviction_sidecar_pb2_grpc
from eunoe.runtime.errors import DOMAIN

INLINE_BYTES = 512
"""What goes inside of a message here: the tensors of tiny models are to travel as files too."""

_SERVICE = pb.DESCRIPTOR.services_by_name["EvictionSidecarService"]
_CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]

Reply = Any
_Garble = Callable[[Reply, random.Random], Reply | bytes]


@dataclass(frozen=True, slots=True)
class Order:
    """What to do to the next `num_calls` calls of an RPC: one of `ORDERS`."""

    number: int
    rpc: str
    what: str
    num_calls: int

    def give(self, ready_file: Path) -> None:
        """Have the sidecar of that ready file follow it from its next call on."""
        partial = ready_file.with_suffix(".order.partial")
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(_order_file(ready_file))

    @staticmethod
    def withdraw(ready_file: Path) -> None:
        """Have the sidecar do as it should again."""
        _order_file(ready_file).unlink(missing_ok=True)

    def num_done(self, ready_file: Path) -> int:
        """How many calls were done as ordered."""
        done = _done_file(ready_file)
        return done.read_text().split().count(str(self.number)) if done.exists() else 0


def _on_scores(change: Callable[[torch.Tensor, random.Random], torch.Tensor]) -> _Garble:
    def garble(reply: Reply, chance: random.Random) -> Reply:
        reply.scores.CopyFrom(to_message(change(from_message(reply.scores, _payload_dir()), chance), None))
        return reply

    return garble


def _with_one_nan(scores_LHS: torch.Tensor, chance: random.Random) -> torch.Tensor:
    scores_LHS.view(-1)[chance.randrange(scores_LHS.numel())] = torch.nan
    return scores_LHS


def _random_elements(scores_LHS: torch.Tensor, chance: random.Random) -> torch.Tensor:
    return torch.frombuffer(bytearray(chance.randbytes(4 * scores_LHS.numel())), dtype=torch.float32).view_as(
        scores_LHS
    )


def _random_numbers(scores_LHS: torch.Tensor, chance: random.Random) -> torch.Tensor:
    return torch.randn(scores_LHS.shape, generator=torch.Generator().manual_seed(chance.getrandbits(60)))


def _with(**fields: Any) -> _Garble:
    def garble(reply: Reply, chance: random.Random) -> Reply:
        tensor = fields.get("scores")
        if tensor is not None:
            reply.scores.CopyFrom(tensor)
        for name in fields.keys() - {"scores"}:
            setattr(reply, name, fields[name])
        return reply

    return garble


def _half(reply: Reply, chance: random.Random) -> bytes:
    data: bytes = reply.SerializeToString()
    return data[: chance.randrange(1, len(data))]


_NONSENSE: dict[str, _Garble] = {
    "nothing": lambda reply, chance: b"",
    "random bytes": lambda reply, chance: chance.randbytes(chance.randint(1, 2000)),
    "half a message": _half,
}
_FLOAT32 = pb.TENSOR_DTYPE_FLOAT32
_SCORES: dict[str, _Garble] = _NONSENSE | {
    "one NaN": _on_scores(_with_one_nan),
    "all NaN": _on_scores(lambda scores_LHS, chance: torch.full_like(scores_LHS, torch.nan)),
    "infinity": _on_scores(lambda scores_LHS, chance: torch.full_like(scores_LHS, torch.inf)),
    "fewer slots": _on_scores(lambda scores_LHS, chance: scores_LHS[..., 1:]),
    "one axis": _on_scores(lambda scores_LHS, chance: scores_LHS.flatten()),
    "half precision": _on_scores(lambda scores_LHS, chance: scores_LHS.half()),
    "integers": _on_scores(lambda scores_LHS, chance: scores_LHS.clamp(-9, 9).int()),
    "random elements": _on_scores(_random_elements),
    "random numbers": _on_scores(_random_numbers),
    "backwards": _on_scores(lambda scores_LHS, chance: scores_LHS.flip(-1)),
    "too few bytes": _with(scores=pb.Tensor(shape=[2, 2, 64], dtype=_FLOAT32, data=b"few")),
    "a hundred axes": _with(scores=pb.Tensor(shape=[1] * 100, dtype=_FLOAT32, data=b"four")),
    "terabytes": _with(scores=pb.Tensor(shape=[1 << 20] * 2, dtype=_FLOAT32, data=b"few")),
    "no such file": _with(scores=pb.Tensor(shape=[2, 2, 64], dtype=_FLOAT32, file=pb.PayloadFile(name="none"))),
    "no file's name": _with(scores=pb.Tensor(shape=[2, 2, 64], dtype=_FLOAT32, file=pb.PayloadFile(name="a\0b"))),
    "other numerics": _with(numerics="torch-0.4"),
}
_CHOICES: dict[str, _Garble] = _NONSENSE | {
    "a policy of another digest": _with(policy="namm/1/0123456789abcdef"),
    "a shadow of another digest": _with(shadow_policy="namm/1/0123456789abcdef"),
    "a shadow that nobody observes": _with(shadow_policy="snapkv/1"),
    "a shadow without scores": _with(shadow_policy="sinks-recent/1"),
    "a shadow beside no statistics": _with(policy="sinks-recent/1", shadow_policy="heavy-hitter/1"),
    "an endless name": _with(policy="x" * 1_000_000),
}
_ERRORS = ("an error", "an error with random details", "an error with other attributes")
_PAYLOADS = tuple(f"{what} {damage}" for what in ("features", "scores") for damage in ("cut", "gone", "overwritten"))
_LIVES = ("die before scoring", "die after scoring", "stop before scoring")

ORDERS: dict[str, tuple[str, ...]] = {
    "nonsense scores": (*_SCORES, *_ERRORS),
    "nonsense choices": (*_CHOICES, *_ERRORS),
    "damaged payload": _PAYLOADS,
    "in a call": _LIVES,
}
"""What may be ordered, by kind."""


def main() -> int:
    """Run the sidecar's process; its exit status."""
    tensor_payload.INLINE_BYTES = INLINE_BYTES
    eviction_sidecar_pb2_grpc.add_EvictionSidecarServiceServicer_to_server = _add_garbling_servicer
    return sidecar.main()


def _add_garbling_servicer(servicer: Any, server: grpc.aio.Server) -> None:
    handlers = {}
    for method in _SERVICE.methods:
        request, reply = (getattr(pb, each.name) for each in (method.input_type, method.output_type))
        handlers[method.name] = grpc.unary_unary_rpc_method_handler(
            _garbling(method.name, getattr(servicer, method.name), reply), request.FromString, _serialized
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers),))


def _serialized(reply: Reply | bytes) -> bytes:
    return reply if isinstance(reply, bytes) else reply.SerializeToString()


def _garbling(
    rpc: str, answer: Callable[[Any, Any], Awaitable[Reply]], reply_type: Any
) -> Callable[[Any, Any], Awaitable[Reply | bytes]]:
    async def answered(request: Any, context: Any) -> Reply | bytes:
        order = _order(rpc)
        if order is None or (order.what in _PAYLOADS and not request.features.HasField("file")):
            return await answer(request, context)
        _note(order)
        chance = random.Random(f"{order.number} {os.getpid()}")
        if order.what in _ERRORS:
            await context.abort(*_error(order.what, chance))
        elif order.what in _PAYLOADS:
            return await _damaged(order.what, request, lambda: answer(request, context), chance)
        elif order.what in _LIVES:
            if order.what == "die after scoring":
                await answer(request, context)
            os.kill(os.getpid(), signal.SIGSTOP if order.what.startswith("stop") else signal.SIGKILL)
        reply = await answer(request, context)
        garble = (_SCORES if rpc == "ScoreSlots" else _CHOICES).get(order.what)
        return reply if garble is None else garble(reply, chance)

    return answered


def _error(what: str, chance: random.Random) -> tuple[Any, ...]:
    code = chance.choice(_CODES)
    if what == "an error":
        return code, "no"
    details = chance.randbytes(100)
    if what == "an error with other attributes":
        info = any_pb2.Any()
        info.Pack(error_details_pb2.ErrorInfo(domain=DOMAIN, reason="NOT_OWNER", metadata={"epoch": "the last one"}))
        details = status_pb2.Status(code=code.value[0], details=[info]).SerializeToString()
    return code, "no", (("grpc-status-details-bin", details),)


async def _damaged(
    what: str, request: pb.ScoreSlotsRequest, answer: Callable[[], Awaitable[Reply]], chance: random.Random
) -> Reply:
    tensor, _, damage = what.partition(" ")
    if tensor == "features":
        _damage(request.features, damage, chance)
        return await answer()
    reply = await answer()
    _damage(reply.scores, damage, chance)
    return reply


def _damage(tensor: pb.Tensor, damage: str, chance: random.Random) -> None:
    assert tensor.HasField("file"), f"of {tensor.shape} nothing is in a file"
    directory = _payload_dir()
    assert directory is not None
    path = directory / tensor.file.name
    if damage == "cut":
        os.truncate(path, chance.randrange(path.stat().st_size))
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(chance.randbytes(path.stat().st_size))


def _order(rpc: str) -> Order | None:
    """The order for a call of that RPC, if there is one and it is not done yet."""
    try:
        order = Order(**json.loads(_order_file(_ready_file()).read_text()))
    except FileNotFoundError:
        return None
    return order if order.rpc == rpc and order.num_done(_ready_file()) < order.num_calls else None


def _note(order: Order) -> None:
    with _done_file(_ready_file()).open("a") as done:
        done.write(f"{order.number}\n")


def _ready_file() -> Path:
    return Path(os.environ["EUNOE_EVICTION_SIDECAR_READY_FILE"])


def _payload_dir() -> Path | None:
    return Path(os.environ["EUNOE_EVICTION_SIDECAR_PAYLOAD_DIR"])


def _order_file(ready_file: Path) -> Path:
    return ready_file.with_suffix(".order")


def _done_file(ready_file: Path) -> Path:
    return ready_file.with_suffix(".done")
