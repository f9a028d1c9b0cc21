"""Weights from elsewhere as a model that answers, for tests of their readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clbench.deployment.extension.elsewhere import learned_elsewhere
from clbench.deployment.extension.learned import LearnedModel
from clbench.nets.backbones import new_backbone
from clbench.nets.heads import ConvHead, Segmenter
from clbench.spec.settings import load_profile

NAMES = ("spleen", "liver")


def read(path: Path, structures: tuple[str, ...] = NAMES, **more: Any) -> LearnedModel:
    options = {"overrides": (), "strategy": None, "seed": 0, **more}
    return learned_elsewhere(path, structures=structures, profile=load_profile("smoke"), **options)


def built(learned: LearnedModel) -> Segmenter:
    """The model that the state is of."""
    backbone = new_backbone(learned.profile.backbone)
    model = Segmenter(backbone, ConvHead(backbone.final_channels, background=True))
    model.add(learned.structures)
    model.load_state_dict(dict(learned.states[0]["model"]))
    return model.eval()
