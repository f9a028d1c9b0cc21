"""The words that compositions are made of, and what each is; imports nothing that trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

HEAD_NAMES: Mapping[str, str] = {
    "universal": "the Universal Model's language-driven heads",
    "sigmoid": "a plain output layer, one sigmoid per structure",
    "softmax": "a plain output layer with background, softmax",
}
PART_NAMES: Mapping[str, str] = {
    "der": "a few stored cases whose logits are held",
    "derpp": "the same, trained on their labels as well",
    "ilt": "distillation of outputs and encoder features",
    "lwf": "distillation of outputs",
    "mbs": "selective labels and distillation, class vectors apart; brings old labels",
    "mib": "old structures within background, and its distillation; softmax alone",
    "plop": "pooled distillation of every map; under a softmax also sure pseudo labels",
}


def listed() -> Iterator[tuple[str, str]]:
    """Every head and part, and what it is."""
    yield from ((f"{name}+…", what) for name, what in HEAD_NAMES.items())
    yield from ((f"…+{name}", what) for name, what in PART_NAMES.items())
