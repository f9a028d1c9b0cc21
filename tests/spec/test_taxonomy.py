"""The taxonomy names what the paper names, once each, and its family ties hold."""

import pytest

from clbench.errors import UnknownName
from clbench.spec.taxonomy import STRUCTURES, ancestors, canonical, structure, with_descendants


def test_the_papers_template_is_complete_and_in_order() -> None:
    ids = [s.template_id for s in STRUCTURES.values() if s.template_id is not None]
    assert ids == list(range(1, 39))
    assert {"left_iliac_artery", "right_iliac_artery"} < set(STRUCTURES)


def test_family_ties_point_both_ways() -> None:
    for s in STRUCTURES.values():
        if s.mirror:
            assert STRUCTURES[s.mirror].mirror == s.name
        if s.parent:
            assert s.parent in ancestors(s.name)
    assert with_descendants("liver", ["spleen", "liver", "liver_tumor"]) == ("liver", "liver_tumor")


def test_aliases_are_unique_and_lead_home() -> None:
    seen: dict[str, str] = {}
    for s in STRUCTURES.values():
        for alias in (s.name, *s.aliases):
            assert seen.setdefault(alias, s.name) == s.name
    assert canonical("vC") == "postcava"
    for written in ("SPLEEN", "Spleen", " spleen "):
        assert canonical(written) == "spleen"
    for written in ("Left Kidney", "left-kidney", "LEFT_KIDNEY"):
        assert canonical(written) == "left_kidney"
    assert canonical("Veins") == "portal_and_splenic_vein"


def test_unknown_names_get_a_guess() -> None:
    with pytest.raises(UnknownName, match="there is no structure called 'livr'") as err:
        structure("livr")
    assert "did you mean 'liver'?" in str(err.value)
