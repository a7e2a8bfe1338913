"""Commands that read a stream's memory: ask and score."""

import math
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from eunoe.cli.connect import open_client
from eunoe.cli.output import JsonOption, megabytes, note, print_json, to_json
from eunoe.cli.streams import StreamArgument

if TYPE_CHECKING:
    from eunoe.client import GenerateSummary


def ask(
    context: typer.Context,
    name: StreamArgument,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="Goes through the model's chat template.")],
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it stands, without the template.")] = False,
    remember: Annotated[bool, typer.Option("--remember", help="Append question and answer to the stream.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Most tokens to answer with.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, max=10.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Only so many of the likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Only the likeliest with this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Ask a stream a question; the answer appears as it is made."""
    with open_client(context) as client:
        answer = client.generate(
            name,
            question if raw else [("user", question)],
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop or (),
            remember=remember,
            on_catching_up=lambda lag: _show_lag(lag.accepted_offset - lag.applied_offset),
        )
        if json_output:
            print_json(answer.finish())
            return
        for tokens in answer:
            print(tokens.text, end="", flush=True)
        print(flush=True)
        assert answer.summary is not None
        note(_figures(answer.summary))


def score(
    context: typer.Context,
    name: StreamArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to score; - reads standard input.")],
    json_output: JsonOption = False,
) -> None:
    """Say how likely a text is after a stream.

    Figures are natural logarithms of its tokens' probabilities.
    """
    if text == "-":
        text = sys.stdin.read()
    with open_client(context) as client:
        scores = client.score(name, text)
    total = math.fsum(scores.log_probs)
    num_tokens = len(scores.token_ids)
    if json_output:
        print_json({**to_json(scores), "num_tokens": num_tokens, "log_prob": total})
    elif num_tokens:
        print(f"{num_tokens:,} tokens, log-probability {total:.3f}, perplexity {math.exp(-total / num_tokens):,.2f}")


def _figures(summary: "GenerateSummary") -> str:
    seconds = summary.decode_time.ToNanoseconds() / 1e9
    rate = f", {summary.num_answer_tokens / seconds:.1f} tokens/s" if seconds else ""
    remembered = {0: "", 1: ", remembered", 2: ", not remembered: another append came first"}
    return (
        f"[{summary.num_answer_tokens} tokens{rate}, on {summary.offset:,} bytes of text"
        f" from {megabytes(summary.state_bytes)} of memory{remembered[summary.remember_result]}]"
    )


def _show_lag(num_bytes: int) -> None:
    if sys.stderr.isatty():
        note(f"the memory is catching up: {num_bytes:,} bytes to go ...")
