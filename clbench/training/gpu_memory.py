"""Out of memory: the error names the settings in force and the first smaller one to try."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from clbench.errors import SettingError, TrainingError, first_line
from clbench.evaluation.window_memory import is_out_of_memory
from clbench.spec.settings import Profile

SMALLEST_SIDE_VOX = 64
"""No side of a patch is advised below it."""


@contextmanager
def noted(where: str) -> Iterator[None]:
    """Let an error of torch carry where it happened, for `enough_memory` to say."""
    try:
        yield
    except RuntimeError as err:
        err.add_note(where)
        raise


@contextmanager
def enough_memory(
    doing: str,
    profile: Profile,
    patch_vox: Sequence[int],
    *,
    teaching: bool = True,
    processes: int = 1,
) -> Iterator[None]:
    """Turn a GPU that is out of memory into an error that names a smaller setting.

    Args:
        doing: what goes on, with its step.
        profile: the settings in force.
        patch_vox: (D, H, W) of crops and windows, in voxels.
        teaching: whether batch and precision matter, or windows.
        processes: that share an update's crops.

    Raises:
        SettingError: out of memory inside.
        TrainingError: a loader process was killed.
    """
    try:
        yield
    except RuntimeError as err:
        if first_line(err).startswith("DataLoader worker"):  # torch says so wherever we are
            raise TrainingError(
                "a loader process was killed",
                where=doing,
                got=first_line(err),
                next_step="use fewer with --workers, or none (0): each takes memory, and room in "
                "/dev/shm; the same command goes on at the last saved place",
            ) from err
        if not is_out_of_memory(err):
            raise
        patch = "x".join(map(str, patch_vox))
        where = "; ".join([doing, *getattr(err, "__notes__", ())])
        advice = smaller_setting(profile, patch_vox, teaching=teaching, processes=processes)
        traceback.clear_frames(err.__traceback__)  # they hold what the update had allocated
        raise SettingError(
            "the GPU is out of memory",
            where=where,
            expected=f"room for train.batch = {profile.train.batch}, data.patch_vox = {patch}, "
            f"train.amp = {profile.train.amp}, "
            f"examine.windows = {profile.examine.windows or 'as many as fit'}, "
            f"backbone.size = {profile.backbone.size}",
            got=first_line(err),
            next_step=f"{advice}, or free the GPU of other processes",
        ) from err


def smaller_setting(
    profile: Profile, patch_vox: Sequence[int], *, teaching: bool = True, processes: int = 1
) -> str:
    """The first smaller setting to try.

    Windows or batch are halved, for what a forward pass holds grows in proportion to them (and as
    many more batches accumulated, where that makes the same update); then
    mixed precision; then the longest sides of the patch go down to a multiple of 32 (what five
    halvings need), not below 64.

    Args:
        profile: the settings that did not fit.
        patch_vox: (D, H, W) of crops and windows, in voxels.
        teaching: halve the batch; else the windows at a time.
        processes: that share an update's crops, of which each holds a part at once.
    """
    crops = profile.train.crops
    share = max(1, crops // processes)
    at_once = max(n for n in range(1, share + 1) if share % n == 0 and n <= profile.train.batch)
    if teaching and at_once > 1:
        # the same update, in less memory
        fewer = max(n for n in range(1, at_once // 2 + 1) if share % n == 0)
        plain = "--set train.compile=false " if profile.train.compile else ""
        return f"try {plain}--set train.batch={fewer} --set train.accumulate={crops // fewer}"
    if not teaching and (windows := profile.examine.windows or 1) > 1:
        return f"try --set examine.windows={windows // 2}"
    if teaching and profile.train.amp == "off":
        return "try --set train.amp=bf16"
    if max(patch_vox) > SMALLEST_SIDE_VOX:
        longest = max(SMALLEST_SIDE_VOX, (max(patch_vox) - 1) // 32 * 32)
        return f"try --set data.patch_vox={','.join(str(min(n, longest)) for n in patch_vox)}"
    return "take a smaller network (--set backbone.size=…), a GPU with more memory or --device cpu"
