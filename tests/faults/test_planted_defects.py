"""The fault runs find what is broken on purpose, and nothing where nothing is."""

import pytest
from planted_defects import DEFECTS, FINDERS, PlantedDefect, by_search, hunt

FOUND_BY_SEARCH = [defect for defect in DEFECTS if "swap" not in defect.name and "acknowledged" not in defect.name][:11]


@pytest.mark.parametrize("defect", FOUND_BY_SEARCH, ids=lambda defect: defect.name)
def test_the_exhaustive_search_alone_finds_it(defect: PlantedDefect) -> None:
    caught = hunt(defect, {"exhaustive search": by_search})

    assert caught.finder, "nobody noticed"
    assert caught.seconds < 60


@pytest.mark.parametrize("defect", [defect for defect in DEFECTS if defect.layer == "worker"], ids=lambda d: d.name)
def test_a_defect_of_a_worker_is_found(defect: PlantedDefect) -> None:
    assert hunt(defect).finder, "nobody noticed"


def test_no_defect_is_found_in_whole_workers() -> None:
    assert [find() for find in FINDERS["worker"].values()] == ["", ""]


@pytest.mark.faults
@pytest.mark.timeout(120)
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_planted_defect_is_found(defect: PlantedDefect) -> None:
    caught = hunt(defect)
    print(caught)

    assert caught.finder, "nobody noticed"
    assert caught.seconds < 60


@pytest.mark.faults
@pytest.mark.timeout(120)
def test_nothing_is_found_where_nothing_is_broken() -> None:
    finders = {name: find for layer in FINDERS.values() for name, find in layer.items()}

    assert {name: find() for name, find in finders.items()} == dict.fromkeys(finders, "")
