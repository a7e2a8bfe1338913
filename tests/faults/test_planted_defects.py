"""The fault runs find what is broken on purpose, and nothing where nothing is."""

import pytest
from planted_defects import DEFECTS, FINDERS, PlantedDefect, by_search, hunt

FOUND_BY_SEARCH = [defect for defect in DEFECTS if "swap" not in defect.name and "acknowledged" not in defect.name][:11]


@pytest.mark.parametrize("defect", FOUND_BY_SEARCH, ids=lambda defect: defect.name)
def test_the_exhaustive_search_alone_finds_it(defect: PlantedDefect) -> None:
    caught = hunt(defect, {"exhaustive search": by_search})

    assert caught.finder, "nobody noticed"
    assert caught.seconds < 60


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
    assert {name: find() for name, find in FINDERS.items()} == dict.fromkeys(FINDERS, "")
