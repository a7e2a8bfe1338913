"""`eunoe inspect`: a stream's text, each token shaded by how many heads still keep it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from eunoe.cli.connect import open_client
from eunoe.cli.output import JsonOption, megabytes, note, print_json, to_json
from eunoe.cli.streams import StreamArgument

if TYPE_CHECKING:
    from rich.text import Text

    from eunoe.client import HeadMemory, LogTokens, MemoryInspection

# How many heads keep a token, in words, the style where there are colours, and what stands around it where not.
_NONE, _FEW, _SOME, _MOST, _ALL = "none", "few", "some", "most", "all"
_STYLES = {_ALL: "bold bright_green", _MOST: "green", _SOME: "yellow", _FEW: "red", _NONE: "dim strike"}
_MARKS = {_ALL: ("", ""), _NONE: ("[-", "-]")} | {word: ("{" + f"{word}: ", "}") for word in (_MOST, _SOME, _FEW)}
_MEANINGS = {
    _ALL: "all heads keep it",
    _MOST: "two thirds or more",
    _SOME: "a third or more",
    _FEW: "fewer",
    _NONE: "none",
}

# What is shown at once: the oldest, where the sink tokens are, and the newest.
_NUM_OLDEST, _NUM_NEWEST = 100, 1900

# What a stream holds must not steer the terminal: pictures of control characters, but for tab and line feed.
_PICTURES = dict.fromkeys(range(0x7F, 0xA0), 0x2421) | {
    code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"
}


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the stream: its position, its bytes, and the share of heads that keep it."""

    position: int
    data: bytes
    num_keeping: int
    num_heads: int

    @property
    def kept_by(self) -> str:
        """Its share in words."""
        if self.num_keeping == self.num_heads:
            return _ALL
        if self.num_keeping == 0:
            return _NONE
        thirds = 3 * self.num_keeping // self.num_heads
        return (_FEW, _SOME, _MOST)[thirds]


def inspect(
    context: typer.Context,
    name: StreamArgument,
    layer: Annotated[int | None, typer.Option(min=0, help="Count the heads of this KV source layer only.")] = None,
    head: Annotated[int | None, typer.Option(min=0, help="Count this KV head of each layer only.")] = None,
    width: Annotated[int | None, typer.Option(min=20, help="Columns; default: the terminal's.")] = None,
    no_color: Annotated[bool, typer.Option("--no-color", help="Marks instead of colours, as in a pipe.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All tokens, however many.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Show which tokens a stream's committed memory still keeps.

    It begins where the retained log does (--retain-log keeps all); of what is older, kept tokens alone can be shown.
    """
    with open_client(context) as client:
        memory = client.inspect_memory(name, with_log=True)
    heads = [each for each in memory.heads if layer in (None, each.layer) and head in (None, each.head)]
    if not heads and memory.heads:
        last = memory.heads[-1]
        raise typer.BadParameter(f"layers are 0 to {last.layer}, and heads 0 to {last.head}")
    tokens = shaded(heads, memory.log, memory.stream.tokens)
    if json_output:
        _print_json(memory, heads, tokens)
        return
    note(f"{name}: {memory.stream.tokens:,} tokens read, memory {megabytes(memory.stream.state_bytes)}")
    if not tokens:
        note("nothing is committed yet: less than a segment was read")
        return
    num_kept = sum(token.num_keeping > 0 for token in tokens)
    num_slots = max(len(each.positions) for each in heads)
    note(f"{len(heads)} heads keep {num_slots:,} tokens each, together {num_kept:,} different ones")
    _print_shaded(tokens, width, no_color, full)


def shaded(heads: "Sequence[HeadMemory]", log: "LogTokens", num_tokens: int) -> list[Token]:
    """The tokens of the log, which end at position `num_tokens - 1`, after those older ones that a head keeps."""
    num_keeping = Counter(position for head in heads for position in head.positions)
    log_start = num_tokens - len(log.pieces)
    older = {
        position: text.encode()
        for head in heads
        for position, text in zip(head.positions, head.texts, strict=True)
        if position < log_start
    }
    data_of = older | dict(enumerate(log.pieces, start=log_start))
    return [Token(position, data_of[position], num_keeping[position], len(heads)) for position in sorted(data_of)]


def lines(tokens: Sequence[Token], *, has_colors: bool, after: int = -1) -> "Iterator[Text]":
    """Each unbroken run of positions as a text, and how many tokens are missing between runs.

    Args:
        tokens: In the order of their positions.
        has_colors: Styles instead of marks.
        after: The position before the first token's, if none is missing between them.
    """
    from rich.text import Text

    # A position less its rank is the same all through a run.
    for _, ranked in groupby(enumerate(tokens), key=lambda item: item[1].position - item[0]):
        run = [token for _, token in ranked]
        if missing := run[0].position - after - 1:
            yield Text(f"... {missing:,} tokens are gone ...", style="dim")
        after = run[-1].position
        line = Text()
        line.append(f"[{run[0].position:,}-{after:,}] ", style="dim")
        for word, alike in groupby(run, key=lambda token: token.kept_by):
            text = b"".join(token.data for token in alike).decode(errors="replace").translate(_PICTURES)
            if has_colors:
                line.append(text, style=_STYLES[word])
            else:
                line.append(text.join(_MARKS[word]))
        yield line


def legend(*, has_colors: bool) -> "Text":
    """What styles or marks mean."""
    from rich.text import Text

    parts = [
        Text(meaning, style=_STYLES[word]) if has_colors else Text(f"{'text'.join(_MARKS[word])} {meaning}")
        for word, meaning in _MEANINGS.items()
    ]
    return Text(", ").join(parts)


def _print_shaded(tokens: list[Token], width: int | None, no_color: bool, full: bool) -> None:
    from rich.console import Console

    console = Console(width=width, highlight=False, markup=False, emoji=False)
    has_colors = not no_color and not console.no_color and console.is_terminal and console.color_system is not None
    if not has_colors:
        console = Console(width=width, highlight=False, markup=False, emoji=False, color_system=None)
    console.print(legend(has_colors=has_colors), end="\n\n")
    num_left_out = 0 if full else max(0, len(tokens) - _NUM_OLDEST - _NUM_NEWEST)
    end, start = (_NUM_OLDEST, -_NUM_NEWEST) if num_left_out else (len(tokens), len(tokens))
    for line in lines(tokens[:end], has_colors=has_colors):
        console.print(line)
    if num_left_out:
        console.print(f"... {num_left_out:,} tokens are not shown (--full) ...")
        for line in lines(tokens[start:], has_colors=has_colors, after=tokens[start].position - 1):
            console.print(line)


def _print_json(memory: "MemoryInspection", heads: "Sequence[HeadMemory]", tokens: Sequence[Token]) -> None:
    print_json({"stream": to_json(memory.stream)})
    for each in heads:
        print_json({"head": to_json(each)})
    for token in tokens:
        text = token.data.decode(errors="replace")
        values = {"position": token.position, "text": text, "num_keeping": token.num_keeping}
        print_json({"token": {**values, "num_heads": token.num_heads}})
