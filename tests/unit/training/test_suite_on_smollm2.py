from pathlib import Path

import pytest

from eunoe.decoder.decoder import Decoder
from eunoe.decoder.tokenizer import load_tokenizer
from eunoe.training.evaluation import Evaluation
from eunoe.training.tasks.haystack import Split
from eunoe.training.tasks.suite import SUITE, suite

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_full_cache_answers_single_needles_and_most_of_the_rest(smollm2_directory: Path, split: Split) -> None:
    cases = suite(1024, len(SUITE), seed=3, split=split, tokenizer=load_tokenizer(smollm2_directory))
    evaluation = Evaluation(decoder=Decoder.load(smollm2_directory), share=1.0)

    answered = [(case, evaluation.score(case, None).is_exact) for case in cases]

    print({(case.task, case.kind): is_exact for case, is_exact in answered})
    assert all(is_exact for case, is_exact in answered if case.task == "single")
    assert sum(is_exact for _, is_exact in answered) >= 2 / 3 * len(cases)
