"""What do eviction policies keep? The share of the tokens that stay, by class, of a book and of Python code.

A text is read with slots for a quarter of its tokens. Sinks and the newest tokens stay under every policy, whatever
they are, so they count in the row "all" alone; in square brackets is how many tokens count. Beside each share is what
it is over that of all counted: above 1, the policy favours the class. Sinks-recent goes by place alone, so its column
says where in the text a class lies. The code is of the standard library of the Python that runs this.
"""

import argparse
import inspect
import json.decoder
import textwrap
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from _book import the_book
from _report import Report, arguments, existing_file
from _token_classes import CODE_CLASSES, PROSE_CLASSES, code_classes, prose_classes, token_classes

from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings
from eunoe.decoder.tokenizer import load_tokenizer
from eunoe.embedded.models import DEFAULT_MODEL, resolve_model
from eunoe.eviction import POLICIES, EvictionPolicy, Namm
from eunoe.eviction.policy_files import SHIPPED

SEGMENT_LENGTH = 512
# Heavy hitters give their newest tokens half of the budget, the other policies less.
SHARE_OF_SLOTS, SHARE_OF_NEWEST = 0.25, 0.5


def main() -> None:
    """Print the share kept by class, text and policy."""
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tokens", type=int, help="of each text, a multiple of 2,048 (default: 4,096; quick: 2,048)")
    parser.add_argument(
        "--policy", type=existing_file, action="append", help="a NAMM's file; repeatable (default: the shipped one)"
    )
    options = parser.parse_args()
    num_tokens = options.tokens or (2_048 if options.quick else 4_096)
    if num_tokens % (SEGMENT_LENGTH / SHARE_OF_SLOTS):
        parser.error(f"--tokens {num_tokens} is no multiple of 2,048")
    report = Report("eviction_token_classes", as_json=options.json)
    _, directory = resolve_model(DEFAULT_MODEL, on_step=report.say)
    tokenizer = load_tokenizer(directory)
    decoder = Decoder.load(directory, num_threads=options.threads)
    policies: dict[str, EvictionPolicy] = {name.partition("/")[0]: policy for name, policy in POLICIES.items()}
    policies |= {path.stem: Namm.load(path) for path in options.policy or [SHIPPED / "smollm2-namm.safetensors"]}

    prose = the_book()[: 8 * num_tokens]
    code = "".join(inspect.getsource(module) for module in (json.decoder, textwrap, inspect))
    for name, text, class_of_character, classes in (
        ("prose", prose, prose_classes(prose), PROSE_CLASSES),
        ("code", code, code_classes(code), CODE_CLASSES),
    ):
        token_ids = tokenizer.encode(text)[:num_tokens]
        class_of_token = token_classes([*map(tokenizer.token_bytes, token_ids)], class_of_character, text)
        shares = {}
        for policy_name, policy in policies.items():
            report.progress(f"{name}: {policy_name}")
            shares[policy_name] = kept_share(decoder, policy, token_ids)
        print_shares(report, name, class_of_token, classes, shares)
    report.finish()


def kept_share(decoder: Decoder, policy: EvictionPolicy, token_ids: Sequence[int]) -> np.ndarray:
    """The share of heads, over all layers, that keep each token, float64 [tokens]."""
    settings = MemorySettings(kv_budget_tokens=int(len(token_ids) * SHARE_OF_SLOTS), segment_length=SEGMENT_LENGTH)
    state = decoder.new_state(settings, policy)
    for start in range(0, len(token_ids), SEGMENT_LENGTH):
        decoder.prefill(state, np.array(token_ids[start : start + SEGMENT_LENGTH]), policy)
    positions_LHS = state.positions_LHS
    num_heads = positions_LHS.shape[0] * positions_LHS.shape[1]
    return np.bincount(positions_LHS.flatten().numpy(), minlength=len(token_ids)) / num_heads


def print_shares(
    report: Report,
    name: str,
    class_of_token: list[str],
    classes: Sequence[str],
    shares: dict[str, np.ndarray],
) -> None:
    """A table of classes and policies for people, and every number of it as a result."""
    num_tokens = len(class_of_token)
    is_counted = np.zeros(num_tokens, dtype=bool)
    is_counted[MemorySettings().num_sink_tokens : int(num_tokens * (1 - SHARE_OF_SLOTS * SHARE_OF_NEWEST))] = True
    counts = Counter(np.array(class_of_token)[is_counted].tolist())
    report.say(f"\n{name}, {num_tokens:,} tokens: share kept (and that over the share of all counted)")
    report.say(f"  {'':24}" + "".join(f"{policy:>16}" for policy in shares))
    rows = {"all": np.ones(num_tokens, dtype=bool), f"counted [{is_counted.sum()}]": is_counted}
    rows |= {
        f"{each} [{counts[each]}]": is_counted & (np.array(class_of_token) == each) for each in classes if counts[each]
    }
    for row, is_in in rows.items():
        cells = []
        for policy, share in shares.items():
            value = float(share[is_in].mean())
            report.results[f"{name}_{policy}_{row.partition(' [')[0]}".replace(" ", "_").replace("-", "_")] = round(
                value, 4
            )
            cells.append(f"{value:8.3f} ({value / share[is_counted].mean():4.2f})")
        report.say(f"  {row:24}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
