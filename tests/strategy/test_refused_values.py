"""Options with values that cannot be meant are refused, by name, before anything is planned."""

from __future__ import annotations

from dataclasses import fields

import pytest

from clbench.errors import SettingError
from clbench.run.plan import load_strategy
from clbench.spec import registry

NEGATIVE = (
    "frozen head_lr", "lora expert_lr", "lora head_lr", "decoder_growth classifier_lr",
    "mbs weight_out", "mbs weight_feat", "mbs weight_orth", "universal_mbs weight_out",
    "lwf weight", "ilt weight", "ilt feature_weight", "mib weight", "plop feature_factor",
    "plop logit_factor", "plop floor", "plop_ct factor", "der alpha", "derpp alpha", "derpp beta",
    "ewc ewc_lambda", "mas lambda_reg", "universal soft_limit_mib", "universal+lwf weight",
    "sigmoid+ilt feature_weight", "universal+plop feature_factor", "sigmoid+plop logit_factor",
    "universal+derpp beta", "softmax+ilt+der weight",
)  # fmt: skip
OTHER = (
    ("lwf temperature", "0"), ("lwf alpha", "0"), ("mib alpha", "0"), ("mbs threshold", "1.1"),
    ("mbs threshold", "-0.1"), ("decoder_growth ema", "1.5"), ("decoder_growth attempts", "0"),
    ("decoder_growth tolerance", "1.5"), ("mas alpha", "2"), ("replay mem_size", "0"),
    ("replay batch_size_mem", "0"), ("agem sample_size", "0"),
    ("agem patterns_per_experience", "0"),
)  # fmt: skip
ZERO_IS_MEANT = ("frozen head_lr", "lwf weight", "ewc ewc_lambda", "der alpha", "mbs weight_feat")


@pytest.mark.parametrize(("option", "value"), [*((name, "-1") for name in NEGATIVE), *OTHER])
def test_a_value_that_cannot_be_meant_is_refused(option: str, value: str) -> None:
    name, field = option.split()
    with pytest.raises(SettingError, match=rf"strategy\.{field}"):
        load_strategy(name, {field: value})


@pytest.mark.parametrize("option", ZERO_IS_MEANT)
def test_a_weight_of_0_switches_a_term_off(option: str) -> None:
    name, field = option.split()
    assert getattr(load_strategy(name, {field: "0"}), field) == 0


@pytest.mark.parametrize("name", sorted(registry.entries("strategy")))
def test_defaults_are_values_that_are_taken(name: str) -> None:
    made = load_strategy(name, {})
    given = {f.name: getattr(made, f.name) for f in fields(made) if f.init}
    assert load_strategy(name, given) == made


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"mode": "online"}, "in the mode online"), ({"decay_factor": "0.5"}, "separate")],
)
def test_importance_decays_in_the_mode_online_alone(options: dict[str, str], reason: str) -> None:
    with pytest.raises(SettingError, match=r"strategy\.decay_factor") as err:
        load_strategy("ewc", options)
    assert reason in str(err.value)
    load_strategy("ewc", {"mode": "online", "decay_factor": "0.5"})
