"""`check_strategy`: every rule for a strategy, in the order in which they are tried."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clbench.run.plan import load_strategy
from clbench.strategy.contract import Strategy
from clbench.testing.fixtures import reproducible
from clbench.testing.harness import StrategyHarness, describe
from clbench.testing.report import Report, Rule, judge
from clbench.testing.rules import (
    contract,
    divided_updates,
    hooks,
    losses,
    unknown_labels,
    whole_run,
)

Check = Callable[[StrategyHarness], None]
BASE: tuple[Check, ...] = (contract.declarations_are_legal, contract.builds)
TAUGHT: tuple[Check, ...] = (
    *BASE,
    contract.grows_in_any_order,
    losses.losses_are_finite_on_empty_and_full_masks,
    losses.losses_of_later_steps_are_finite_too,
    hooks.a_step_can_be_taught,
)
EXACT: tuple[Check, ...] = (*TAUGHT, hooks.hooks_repeat_to_the_bit)
PENAL: tuple[Check, ...] = (*EXACT, losses.declared_penalties_have_gradients)

RULES: tuple[Rule[StrategyHarness], ...] = (
    Rule(check=contract.declarations_are_legal),
    Rule(check=contract.builds, needs=(contract.declarations_are_legal,)),
    Rule(check=contract.grows_in_any_order, needs=BASE),
    Rule(check=contract.starts_from_what_it_declares, needs=TAUGHT),
    Rule(check=contract.growth_keeps_old_logits_as_declared, needs=TAUGHT[:3]),
    Rule(check=contract.another_seed_gives_other_weights, needs=BASE),
    Rule(check=contract.decodes_to_probabilities, needs=TAUGHT[:3]),
    Rule(check=losses.losses_are_finite_on_empty_and_full_masks, needs=BASE),
    Rule(check=losses.losses_of_later_steps_are_finite_too, needs=TAUGHT[:4]),
    Rule(check=hooks.a_step_can_be_taught, needs=TAUGHT[:5]),
    Rule(check=hooks.hooks_repeat_to_the_bit, needs=TAUGHT),
    Rule(check=hooks.hooks_leave_the_strategy_as_it_was, needs=TAUGHT),
    Rule(check=hooks.serving_leaves_the_model_as_it_was, needs=TAUGHT),
    Rule(check=losses.step_1_equals_its_first_step, needs=EXACT),
    Rule(check=losses.declared_penalties_have_gradients, needs=EXACT),
    Rule(check=losses.the_teacher_stays_without_gradient, needs=EXACT),
    Rule(check=losses.the_teacher_is_used, needs=PENAL),
    Rule(check=unknown_labels.unknown_voxels_are_treated_as_declared, needs=PENAL),
    Rule(check=losses.gradient_stays_in_the_declared_groups, needs=EXACT),
    Rule(check=whole_run.memory_can_be_saved, needs=TAUGHT),
    Rule(check=whole_run.no_test_case_is_asked_for, needs=EXACT),
    Rule(
        check=whole_run.the_past_is_used_as_declared,
        needs=(*EXACT, whole_run.no_test_case_is_asked_for),
    ),
)
LATE: tuple[Check, ...] = (
    whole_run.saved_and_loaded_it_scores_the_same,
    whole_run.no_test_case_is_read,
    whole_run.past_data_is_read_through_the_catalog,
    whole_run.the_same_seed_gives_the_same_numbers,
)
RULES += (
    Rule(
        check=divided_updates.gradients_of_parts_add_up, needs=tuple(rule.check for rule in RULES)
    ),
)
EARLY: tuple[Check, ...] = tuple(rule.check for rule in RULES)
RULES += tuple(Rule(check=check, needs=(*EARLY, *LATE[:i])) for i, check in enumerate(LATE))
"""Every rule; each stands behind those it needs. Whole courses are run where all else holds."""


def check_strategy(
    strategy: str | Strategy,
    *,
    overrides: dict[str, str] | None = None,
    only: Sequence[str] = (),
    cache: Path | None = None,
) -> Report:
    """Try every rule on a strategy, on the CPU, in seconds.

    Args:
        strategy: a registered name, or the object itself.
        overrides: hyperparameters, as with `--set strategy.name=value`; for names only.
        only: names of rules; others are left out, unless one of these needs them.
        cache: where the tiny phantom is kept; None: in the folder that is thrown away.

    Returns:
        The report: `report.ok`, `report.failed`, and `print(report)`.

    Raises:
        ClbenchError: there is no such strategy, hyperparameter or rule.
    """
    if isinstance(strategy, str):
        name, method = strategy, load_strategy(strategy, overrides or {})
    else:
        name, method = type(strategy).__name__, strategy
    promised: Any = getattr(method, "declaration", method)  # of no `Strategy`: a rule says so
    declared = (
        f"declares past={promised.past}, starts_from={promised.starts_from}, "
        f"unlabelled={promised.unlabelled}, keeps_old_logits={promised.keeps_old_logits}, "
        f"penalties=({', '.join(map(str, promised.penalties))})"
    )
    report = Report(title=f"strategy {name}: {describe(method)}", facts=(declared,))
    with tempfile.TemporaryDirectory(prefix="clbench-check-") as folder, reproducible():
        home = Path(folder)
        harness = StrategyHarness(method, name=name, folder=home, cache=cache or home / "cache")
        return judge(harness, RULES, report, only)
