"""What is prepared of cases before a step, and kept: whose it is, and where it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clbench.errors import StoreError
from clbench.store import checkpoint
from clbench.strategies.logit_replay.der import Der
from clbench.strategy.contract import Lesson
from clbench.training.pseudo_labelling import prepare


@pytest.mark.parametrize("step", [1, 2])
def test_what_another_model_made_is_refused_with_the_folder_it_lies_in(
    step: int, tmp_path: Path
) -> None:
    """Cases of earlier steps lie beside those of the step."""

    class Prepares(Der):
        def prepares(self, step: Lesson) -> bool:
            return True

    class Catalog:
        def open(self, step: int, case: str, purpose: str) -> None:
            return None

    folder = tmp_path / "pseudo" / "step2"
    place = folder if step == 2 else folder.with_name("step2_stored1")
    place.mkdir(parents=True)
    kept: dict[str, Any] = {"made": {}, "model": "another", "map": None, "seconds": 0.0}
    checkpoint.save(place / "a.pt", kept)
    lesson = Lesson(
        number=2, learns=("spleen",), structures=("liver", "spleen"), source="x",
        cases=("a",) if step == 2 else (),
    )  # fmt: skip
    catalog: Any = Catalog()
    with pytest.raises(StoreError, match="another model") as err:
        prepare(
            Prepares(),
            lesson,
            {},
            catalog,
            old=None,
            mark="this one",
            folder=folder,
            watch=lambda event: None,
            stored=[] if step == 2 else [(1, "a")],
        )
    assert f"delete {place} and" in str(err.value)
