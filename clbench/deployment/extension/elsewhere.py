"""Weights from elsewhere, told by what lies there: a bundle, a trained folder, or one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clbench.deployment.extension.foreign import learned_by_weights, weights_from_file
from clbench.deployment.extension.learned import LearnedModel
from clbench.deployment.extension.monai_bundle import METADATA, weights_from_bundle
from clbench.deployment.extension.nnunet import trained_folder, weights_from_nnunet
from clbench.deployment.extension.universal_model import (
    is_universal_model,
    weights_from_universal_model,
)
from clbench.deployment.extension.weights_file import read_weights
from clbench.errors import SettingError, StoreError
from clbench.spec.settings import Profile


def learned_elsewhere(
    path: Path,
    *,
    structures: Sequence[str],
    profile: Profile,
    overrides: Sequence[str],
    strategy: str | None,
    seed: int,
) -> LearnedModel:
    """A model that clbench did not train.

    Args:
        path: a file of weights, or the folder of a model.
        structures: names of the output channels, without background; none: as the folder says.
        profile: settings to teach with.
        overrides: `group.name=value` words of the command line.
        strategy: what teaches the new step; None: one that leaves the old weights as they are.
        seed: of the new step.

    Raises:
        SettingError: it cannot be read safely, or does not fit.
        StoreError: nothing of the kind lies there.
    """
    if (path / METADATA).is_file():
        weights = weights_from_bundle(path, structures)
    elif trained_folder(path) is not None:
        weights = weights_from_nnunet(path, structures)
    elif path.is_file():
        content = read_weights(path)
        if isinstance(content, dict) and {"bench", "structures", "model"} <= content.keys():
            raise SettingError(
                "a checkpoint of clbench without its run",
                where=path,
                expected="the folder of the run (it holds run.json)",
                next_step="name that folder; step 1 lies in _shared beside it and is found there",
            )
        if isinstance(content, dict) and "network_weights" in content:
            raise SettingError(
                "a checkpoint of nnU-Net without the folder it was trained in",
                where=path,
                expected="plans.json and dataset.json two folders above: "
                "TRAINED/fold_0/checkpoint_final.pth",
                next_step="copy the whole folder of the trained model, and name that",
            )
        if is_universal_model(content):
            weights = weights_from_universal_model(path, content, structures)
        else:
            weights = weights_from_file(path, content, structures)
    else:
        raise StoreError(
            "nothing that can be extended",
            where=path,
            expected="the folder of a run (it holds run.json) or one of its checkpoints; a MONAI "
            "bundle (configs/metadata.json); a folder that nnU-Net v2 trained (plans.json, "
            "dataset.json); a file of weights",
            got="no such file" if not path.exists() else "neither",
            next_step="for a run name the folder that `clbench run` printed as Results",
        )
    return learned_by_weights(weights, profile, overrides=overrides, strategy=strategy, seed=seed)
