from pathlib import Path

import pytest

from eunoe.training.evolution import Generation
from eunoe.training.run_directory import BadRunDirectory, RunDirectory

SETTINGS = {"seed": 0, "evolution": {"sigma": 0.1, "population": 8}}


def a_generation(number: int) -> Generation:
    return Generation(
        number=number,
        ranking=(1, 0),
        fitness=(-0.5, -0.25),
        num_prompts=(4, 8),
        sigma=0.1,
        digest="abc",
        validation=None,
        seconds=1.5,
    )


def test_what_was_logged_is_there_again(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run", SETTINGS) as run:
        assert run.generations == []
        for number in range(3):
            run.append(a_generation(number))

    with RunDirectory(tmp_path / "run", SETTINGS) as run:
        assert run.generations == [a_generation(number) for number in range(3)]


def test_a_line_that_was_cut_at_any_byte_is_dropped_and_written_anew(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, SETTINGS) as run:
        run.append(a_generation(0))
        run.append(a_generation(1))
    log = tmp_path / "log.jsonl"
    whole = log.read_bytes()

    for length in range(whole.index(b"\n") + 1, len(whole)):
        log.write_bytes(whole[:length])
        with RunDirectory(tmp_path, SETTINGS) as run:
            assert run.generations == [a_generation(0)]
            run.append(a_generation(1))
        assert log.read_bytes() == whole


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    RunDirectory(tmp_path, SETTINGS).__exit__()

    with pytest.raises(BadRunDirectory, match=r"evolution.sigma was 0.1, not 0.2"):
        RunDirectory(tmp_path, SETTINGS | {"evolution": {"sigma": 0.2, "population": 8}})


def test_only_one_process_trains_in_a_directory(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, SETTINGS), pytest.raises(BadRunDirectory, match="another process"):
        RunDirectory(tmp_path, SETTINGS)

    RunDirectory(tmp_path, SETTINGS).__exit__()


@pytest.mark.parametrize("line", [b"nonsense\n", b"{}\n", b"[]\n", b"\xff\n"])
def test_a_damaged_log_is_refused(tmp_path: Path, line: bytes) -> None:
    RunDirectory(tmp_path, SETTINGS).__exit__()
    (tmp_path / "log.jsonl").write_bytes(line)

    with pytest.raises(BadRunDirectory, match=r"log.jsonl is damaged"):
        RunDirectory(tmp_path, SETTINGS)


def test_a_log_without_one_of_its_generations_is_refused(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, SETTINGS) as run:
        run.append(a_generation(0))
        run.append(a_generation(2))

    with pytest.raises(BadRunDirectory, match="missing"):
        RunDirectory(tmp_path, SETTINGS)


def test_a_damaged_run_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("nonsense")

    with pytest.raises(BadRunDirectory, match="no JSON"):
        RunDirectory(tmp_path, SETTINGS)
