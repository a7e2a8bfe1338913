"""How much better does eunoe-nano foretell a long text with its compressive memory? Bits a byte, and perplexity.

The same bytes are read by the same decoder with its memory, with the memory's gates shut (the window alone), and by
a twin of as many parameters that was trained for as long on the same data, but read on without its memory in the last
run, when the other one learned to use it. With full attention, on the first 2,048 bytes: there nothing leaves the
window, but the model was never trained on distances beyond two segments. Only bytes after the first 512 count.
Intervals are paired bootstrap ones of 95% over the pieces.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _report import Report, arguments

from eunoe.decoder.checkpoint import load_config, load_weights
from eunoe.decoder.config import Dtypes
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings
from eunoe.eviction import DEFAULT_POLICY
from eunoe.training.bootstrap import mean_interval
from eunoe.training.tasks import haystack

CHECKPOINT = Path(__file__).parents[1] / "services" / "eunoe" / "checkpoints" / "eunoe-nano"
TWIN = Path(__file__).parent / "peers" / "eunoe-nano-window"
WINDOW = MemorySettings(kv_budget_tokens=128, segment_length=128, num_sink_tokens=0)
NUM_UNCOUNTED = 512
FULL_ATTENTION_BYTES = 2048


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="its directory (default: eunoe-nano)")
    parser.add_argument("--twin", type=Path, default=TWIN, help="learned to read without a memory")
    parser.add_argument("--length", type=int, default=32_768, help="bytes of a piece (default: %(default)s)")
    parser.add_argument("--pieces", type=int, help="of the test books and of the train books (default: 16)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report("language_model", as_json=options.json)
    num_pieces = options.pieces or (2 if options.quick else 16)
    length = 4096 if options.quick else options.length

    decoder = a_decoder(options.model)
    contenders = {
        "memory": (decoder, WINDOW),
        "shut": (a_decoder(options.model, has_open_gates=False), WINDOW),
        # It was never taught what to do with what its memory would say.
        "twin": (a_decoder(options.twin, has_open_gates=False), WINDOW),
    }
    for split in ("test", "train"):
        texts = pieces(split, length, num_pieces)
        bits = {
            name: bits_per_byte(report, f"{split} books, {name}", *contender, texts)
            for name, contender in contenders.items()
        }
        starts = [text[:FULL_ATTENTION_BYTES] for text in texts]
        everything = MemorySettings(
            kv_budget_tokens=FULL_ATTENTION_BYTES, segment_length=WINDOW.segment_length, num_sink_tokens=0
        )
        full_bits = bits_per_byte(report, f"{split} books, full attention", decoder, everything, starts)
        start_bits = bits_per_byte(report, f"{split} books, their start", decoder, WINDOW, starts)
        for name, values in bits.items():
            report.add(f"bits_per_byte_{split}_{name}", values.mean(), f"{num_pieces} pieces of {length:,} bytes")
        report.add(f"bits_per_byte_{split}_full_attention", full_bits.mean(), f"their first {FULL_ATTENTION_BYTES:,}")
        report.add(f"bits_per_byte_{split}_start", start_bits.mean(), "the same bytes, with memory")
        suffix = "" if split == "test" else "_train"
        add_ratio(report, f"perplexity_ratio_window{suffix}", bits["memory"] - bits["twin"], "against the twin")
        add_ratio(report, f"perplexity_ratio_shut{suffix}", bits["memory"] - bits["shut"], "against shut gates")
    report.finish()


def a_decoder(directory: Path, *, has_open_gates: bool = True) -> Decoder:
    """The model of a directory, everything in float32."""
    dtypes = Dtypes.float32()
    weights = load_weights(directory, dtypes.weights)
    if not has_open_gates:
        shut = tuple(replace(each, mixing=torch.full_like(each.mixing, -math.inf)) for each in weights.memory_gates)
        weights = replace(weights, memory_gates=shut)
    return Decoder(load_config(directory), weights, dtypes)


def pieces(split: haystack.Split, length: int, count: int) -> list[np.ndarray]:
    """Texts of `length` bytes, evenly spread over the split."""
    text = np.frombuffer("".join(haystack.lines("book", split)).replace("\n", " ").encode(), np.uint8)
    starts = np.linspace(0, len(text) - length, count).astype(int)
    return [text[start : start + length] for start in starts]


def bits_per_byte(
    report: Report, what: str, decoder: Decoder, settings: MemorySettings, texts: list[np.ndarray]
) -> np.ndarray:
    """Mean -log2 of a byte's probability, of each text."""
    found = []
    for index, text in enumerate(texts):
        report.progress(f"{what}: {index + 1} of {len(texts)}")
        logits = decoder.prefill(decoder.new_state(settings), text, DEFAULT_POLICY, logits="all")
        assert logits is not None
        losses = torch.nn.functional.cross_entropy(
            logits[:-1], torch.from_numpy(text[1:].astype(np.int64)), reduction="none"
        )
        found.append(losses[NUM_UNCOUNTED:].double().mean().item() / math.log(2))
    return np.array(found)


def add_ratio(report: Report, name: str, difference: np.ndarray, against: str) -> None:
    """A ratio of perplexities a byte, with its interval."""
    low, high = (2.0**bound for bound in mean_interval(difference))
    report.add(name, 2.0 ** difference.mean(), f"{against}: {low:.4f} to {high:.4f}")


if __name__ == "__main__":
    main()
