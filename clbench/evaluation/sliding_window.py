"""Sliding window inference: a network for small patches predicts a whole volume, slab by slab.

Windows overlap; where they do, their logits are averaged with weights that
fall off from the window's center (Gaussian). Windows are visited in order along axis 0, and rows
that no later window reaches leave at once, so memory depends on the patch and on the other two
axes, never on how long the volume is along axis 0. `VolumePredictor` runs a model this way, in
stretches along axis 2 where it is asked to save memory; it leaves no trace in the model's mode or
in the random state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clbench.data.postprocess import clean_bits
from clbench.errors import SettingError, TrainingError
from clbench.evaluation.window_memory import WindowCount, is_out_of_memory
from clbench.types import Bits, bits_dtype, triple

if TYPE_CHECKING:
    from clbench.data.volume import Volume

Triple = tuple[int, int, int]
Stretch = tuple[slice, slice]
"""Columns of axis 2 that are looked at, and those of them that are kept."""

SIGMA_SCALE = 0.125
"""Width of the Gaussian, in units of the patch: MONAI's default and the authors' choice."""


def importance_map(patch_vox: Triple) -> Tensor:
    """How much each voxel of a window counts: (d, h, w) float32, 1 at the center.

    A Gaussian per axis with sigma = `SIGMA_SCALE` times the size, never below max(its minimum,
    1e-3).

    Source: MONAI's `compute_importance_map`, mode "gaussian"; equal bits. Said anew here, as
    `window_starts` is, for MONAI costs a run seconds to import, which few networks need.
    """
    weight = torch.ones(())
    for size in patch_vox:
        x = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
        weight = weight.unsqueeze(-1) * torch.exp(x**2 / (-2 * (SIGMA_SCALE * size) ** 2))
    return weight.clamp_(min=max(float(weight.min()), 1e-3))


def window_starts(size: int, patch: int, overlap: float) -> list[int]:
    """First rows of the windows along one axis of at least `patch` voxels, ascending.

    The last window is moved back so that it ends with the volume.

    Args:
        size: voxels of the volume along the axis.
        patch: voxels of a window, at most `size`.
        overlap: share of a window that its neighbor covers, in [0, 1).

    Source: MONAI's `dense_patch_slices`, at the interval of its `sliding_window_inference`.
    """
    interval = patch if size == patch else max(int(patch * (1 - overlap)), 1)
    return [*range(0, size - patch, interval), size - patch]


def stretches(starts: Sequence[int], patch: int, width: int, most: int) -> list[Stretch]:
    """Split an axis so that each part can be predicted alone, with all windows that reach it.

    Args:
        starts: first columns of the windows, ascending; what `window_starts` returns.
        patch: columns of a window.
        width: columns of the axis.
        most: columns that are looked at at a time; at least two windows are.

    Returns:
        (columns to look at, columns to keep) of each part; those to keep cover the axis once.

    Example:
        >>> from clbench.evaluation.sliding_window import stretches
        >>> [(a.start, a.stop, b.start, b.stop) for a, b in stretches([0, 4, 8, 12], 8, 20, 16)]
        [(0, 16, 0, 12), (8, 20, 12, 20)]
    """
    spans: list[Stretch] = []
    last, covered = -1, 0
    while covered < width:
        first = next(i for i, start in enumerate(starts) if start + patch > covered)
        fitting = [i for i, start in enumerate(starts) if start + patch - starts[first] <= most]
        last = max(last + 1, *fitting, 0)
        end = width if last == len(starts) - 1 else starts[last + 1]
        spans.append((slice(starts[first], starts[last] + patch), slice(covered, end)))
        covered = end
    return spans


def sliding_slabs(
    forward: Callable[[Tensor], Tensor],
    read: Callable[[slice], NDArray[np.float32]],
    shape: Sequence[int],
    *,
    patch_vox: Sequence[int],
    overlap: float = 0.5,
    windows: int | WindowCount = 1,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, int, Tensor]]:
    """Blended logits of a volume, in slabs along axis 0, in order and without gaps.

    Args:
        forward: (B, 1, *patch) float32 on `device` → (B, C, *patch) logits.
        read: rows of axis 0 → (rows, H, W) float32; asked for at most one patch of rows at a time.
        shape: (D, H, W) of the volume. Axes shorter than the patch are padded with 0 on both sides
            (the odd voxel at the end) and cropped back.
        patch_vox: window size.
        overlap: share of a window that its neighbor covers, in [0, 1).
        windows: windows per call of `forward`; fewer where a GPU has no room for them.
        device: where windows and accumulators live.

    Yields:
        (start, stop, (C, stop - start, H, W) float32 logits on the CPU).

    Raises:
        SettingError: `read` returns another size than it was asked for.
        TrainingError: `forward` returns another size than it was given.

    Source: as `monai.inferers.sliding_window_inference`, mode "gaussian": same windows, same
        weights, same sums (tested to 1e-5). Differs: accumulators cover the open slabs only.
    """
    size = triple(map(int, shape))
    patch = triple(map(int, patch_vox))
    # per axis: where the volume starts inside the padded one
    before = [max(p - s, 0) // 2 for p, s in zip(patch, size, strict=True)]
    padded = [max(p, s) for p, s in zip(patch, size, strict=True)]
    starts = [window_starts(s, p, overlap) for s, p in zip(padded, patch, strict=True)]
    corners = [(y, x) for y in starts[1] for x in starts[2]]

    weight = importance_map(patch).to(device)
    # every row of windows along axis 0 adds the same plane of weights
    plane = torch.zeros((patch[0], padded[1], padded[2]), device=device)
    for y, x in corners:
        plane[:, y : y + patch[1], x : x + patch[2]] += weight
    total = torch.zeros_like(plane)
    count = windows if isinstance(windows, WindowCount) else WindowCount(windows, device)
    sums: Tensor | None = None  # allocated once the number of channels is known

    for i, start in enumerate(starts[0]):
        slab = _read_padded(read, start, size, patch, before, padded).to(device)
        total += plane
        first = 0
        while first < len(corners):
            batch = corners[first : first + count.now]
            logits = _answer(forward, slab, batch, patch, count)
            if logits is not None:
                sums = _add(logits, slab, batch, patch, weight, sums)
                first += len(batch)
        if sums is None:  # for the type checker: every volume has a window
            raise AssertionError("a volume without windows")
        last = i + 1 == len(starts[0])
        done = patch[0] if last else starts[0][i + 1] - start
        # back to the volume's own rows and columns
        low = max(start - before[0], 0)
        high = min(start + done - before[0], size[0])
        rows = slice(low + before[0] - start, high + before[0] - start)
        inner = tuple(slice(b, b + s) for b, s in zip(before[1:], size[1:], strict=True))
        with torch.no_grad():
            answer = (sums[(slice(None), rows, *inner)] / total[(rows, *inner)]).cpu()
            if not last:
                _shift(sums, done, dim=1)
                _shift(total, done, dim=0)
        yield low, high, answer


@torch.no_grad()
def _answer(
    forward: Callable[[Tensor], Tensor],
    slab: Tensor,
    corners: Sequence[tuple[int, int]],
    patch: Triple,
    count: WindowCount,
) -> Tensor | None:
    """Run one batch of windows; None: they do not fit into memory, and `count` is smaller now."""
    image = torch.stack([slab[(slice(None), *box)] for box in _boxes(corners, patch)]).unsqueeze(1)
    try:
        logits = forward(image)
    except RuntimeError as err:
        if len(corners) == 1 or not is_out_of_memory(err):
            raise
        logits = None
    if logits is None:  # behind the handler, whose error holds what the network had allocated
        count.halve(len(corners))
        return None
    if logits.ndim != 5 or logits.shape[0] != len(corners) or tuple(logits.shape[2:]) != patch:
        raise TrainingError(
            "the model answers with another shape than it was asked",
            where="sliding window",
            expected=f"({len(corners)}, C, {', '.join(map(str, patch))})",
            got=tuple(logits.shape),
            next_step="make the model return one logit per voxel of its input",
        )
    return logits


@torch.no_grad()
def _add(
    logits: Tensor,
    slab: Tensor,
    corners: Sequence[tuple[int, int]],
    patch: Triple,
    weight: Tensor,
    sums: Tensor | None,
) -> Tensor:
    """Add the weighted logits of one batch of windows; returns the accumulator."""
    if sums is None:
        height, width = slab.shape[1:]
        sums = torch.zeros((logits.shape[1], patch[0], height, width), device=slab.device)
    for item, box in zip(logits, _boxes(corners, patch), strict=True):
        sums[(slice(None), slice(None), *box)].addcmul_(item.to(sums.dtype), weight)
    return sums


def _boxes(corners: Sequence[tuple[int, int]], patch: Triple) -> list[tuple[slice, slice]]:
    """Where windows lie on axes 1 and 2."""
    return [(slice(y, y + patch[1]), slice(x, x + patch[2])) for y, x in corners]


def _shift(array: Tensor, rows: int, *, dim: int) -> None:
    """Move `array` up by `rows` along `dim` in place and clear the rows set free."""
    size = array.shape[dim]
    for i in range(size - rows):  # row by row: source and target never share memory
        array.select(dim, i).copy_(array.select(dim, i + rows))
    array.narrow(dim, size - rows, rows).zero_()


def _read_padded(
    read: Callable[[slice], NDArray[np.float32]],
    start: int,
    size: Triple,
    patch: Triple,
    before: Sequence[int],
    padded: Sequence[int],
) -> Tensor:
    """Rows start to start + patch of the padded volume: (patch, H', W') float32."""
    low = max(start - before[0], 0)
    high = min(start + patch[0] - before[0], size[0])
    rows = np.ascontiguousarray(read(slice(low, high)), dtype=np.float32)
    if rows.shape != (high - low, *size[1:]):
        raise SettingError(
            "the volume's reader returns another shape than it was asked for",
            where="sliding window",
            expected=(high - low, *size[1:]),
            got=rows.shape,
        )
    if rows.shape == (patch[0], padded[1], padded[2]):
        return torch.from_numpy(rows if rows.flags.writeable else rows.copy())
    slab = torch.zeros((patch[0], padded[1], padded[2]))
    top = low + before[0] - start
    slab[
        top : top + high - low,
        before[1] : before[1] + size[1],
        before[2] : before[2] + size[2],
    ] = torch.from_numpy(rows if rows.flags.writeable else rows.copy())
    return slab


@dataclass(eq=False)
class VolumePredictor:
    """A model that answers for whole volumes (a `clbench.strategy.contract.Predictor`)."""

    model: nn.Module
    """Already on `device`; (B, 1, *patch) → `clbench.nets.output.Output`."""
    decode: Callable[[Tensor, tuple[str, ...]], Tensor]
    """(B, C, d, H, W) logits, structures → (B, K, d, H, W) probabilities."""
    structures: tuple[str, ...]
    """Names of the K channels."""
    _: KW_ONLY
    patch_vox: Sequence[int]
    """Sliding window."""
    overlap: float = 0.5
    """Overlap of neighboring windows."""
    windows: int | None = None
    """Windows per forward pass; None: one on a CPU, on a GPU as many as fit."""
    device: torch.device | str = "cpu"
    """Where the model computes."""
    ranges: Callable[[Volume], Mapping[str, tuple[int, int]]] = lambda volume: {}
    """Volume → structure → (start, stop) on axis 2, outside which it is empty; see
    `Strategy.axial_ranges`."""

    @cached_property
    def count(self) -> WindowCount:
        """Windows per forward pass, as far as they have fit."""
        return WindowCount(self.windows, self.device)

    def logits(
        self, volume: Volume, columns: slice = slice(None)
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Slabs (start, stop, (C, stop - start, H, W) float32 on the CPU): blended, not decoded.

        Args:
            volume: a preprocessed case.
            columns: of axis 2, the part that is looked at, as if there were no more.
        """
        d, h, w = volume.image.shape
        return sliding_slabs(
            self._forward,
            lambda rows: volume.windowed((rows, slice(None), columns)),
            (d, h, len(range(w)[columns])),
            patch_vox=self.patch_vox,
            overlap=self.overlap,
            windows=self.count,
            device=self.device,
        )

    def probabilities(
        self, volume: Volume, columns: slice = slice(None)
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Slabs (start, stop, (K, stop - start, H, W) float32 on the CPU), in order.

        Logits are blended, then decoded.

        Args:
            volume: a preprocessed case.
            columns: of axis 2, the part that is looked at, as if there were no more.

        Raises:
            TrainingError: the model's answer is not a number, or the strategy decodes to another
                number of channels than there are structures.
        """
        first = range(volume.image.shape[2])[columns].start
        limits = self._limits(volume)
        for start, stop, logits in self.logits(volume, columns):
            with torch.no_grad():
                decoded = self.decode(logits.unsqueeze(0), self.structures)
                if decoded.ndim != 5 or decoded.shape[:2] != (1, len(self.structures)):
                    raise TrainingError(
                        "the strategy's decode returns another number of structures",
                        where=f"decode, case {volume.source}/{volume.case}",
                        expected=f"(1, {len(self.structures)}, d, H, W)",
                        got=tuple(decoded.shape),
                    )
                if bool(torch.isnan(decoded.sum())):
                    raise TrainingError(
                        "the model's answer is not a number (NaN)",
                        where=f"case {volume.source}/{volume.case}, rows {start} to {stop - 1}",
                        expected="probabilities",
                        got="NaN",
                        next_step="look at the loss terms in events.jsonl; lower train.lr",
                    )
                decoded = decoded[0].float()
                if limits:
                    decoded = decoded.clone()  # decode may have answered with a view
                for k, (low, high) in limits.items():
                    decoded[k, :, :, : max(0, low - first)] = 0
                    decoded[k, :, :, max(0, high - first) :] = 0
            yield start, stop, decoded

    def _limits(self, volume: Volume) -> dict[int, tuple[int, int]]:
        """Channel → (start, stop) on axis 2.

        Raises:
            TrainingError: a range of an unknown structure or one that leaves the volume.
        """
        limits = {}
        for name, (low, high) in self.ranges(volume).items():
            size = volume.image.shape[2]
            if name not in self.structures or not 0 <= low <= high <= size:
                raise TrainingError(
                    "the strategy names an axial range that cannot be",
                    where=f"axial_ranges, case {volume.source}/{volume.case}",
                    expected=f"0 <= start <= stop <= {size} for {', '.join(self.structures)}",
                    got=f"{name}: {low}, {high}",
                )
            limits[self.structures.index(name)] = (low, high)
        return limits

    def predict(
        self,
        volume: Volume,
        *,
        postprocess: bool = False,
        watch_slab: Callable[[slice, slice, Tensor], None] | None = None,
        most_bytes: int | None = None,
    ) -> Bits:
        """The prediction as bit patterns: (D, H, W), bit k set where structures[k] is above 0.5.

        Args:
            volume: a preprocessed case.
            postprocess: apply the default rules of `clbench.data.postprocess`.
            watch_slab: given rows of axis 0, columns of axis 2, and their (K, rows, H, columns)
                probabilities, as they come.
            most_bytes: what the slabs may take; a volume that is longer on axis 2 is predicted in
                stretches, whose windows are computed twice where they meet. The logits are those
                of the whole volume to the bit: every voxel gets the same windows in the same
                order. (torch may round a sigmoid otherwise at the end of an array, which counts
                where a logit is within 1e-7 of the threshold.) None: at once; so also where
                a number of windows is asked to share a forward pass, whose bits depend on who
                shares. On a GPU windows share passes unasked, so there it holds up to rounding.
        """
        d, h, w = volume.image.shape
        dtype = bits_dtype(len(self.structures))
        bits = np.zeros((d, h, w), dtype=dtype)
        for outer, inner in self._stretches(h, w, most_bytes):
            part = slice(inner.start - outer.start, inner.stop - outer.start)
            for start, stop, probabilities in self.probabilities(volume, outer):
                rows, answer = slice(start, stop), probabilities[..., part]
                if watch_slab is not None:
                    watch_slab(rows, inner, answer)
                for k, channel in enumerate(answer):
                    bits[rows, :, inner] |= (channel > 0.5).numpy().astype(dtype) << dtype.type(k)
        return clean_bits(bits, self.structures) if postprocess else bits

    def _stretches(self, height: int, width: int, most_bytes: int | None) -> list[Stretch]:
        """Parts of axis 2 whose slabs take no more than `most_bytes`, as far as windows allow."""
        patch = self.patch_vox
        if most_bytes is None or (self.windows or 1) > 1 or width <= patch[2]:
            return [(slice(0, width), slice(0, width))]
        # float32: the sums of one patch of rows, the answer and what is decoded from it
        channels = len(self.structures) + 1
        column_bytes = 3 * 4 * channels * patch[0] * max(height, patch[1])
        starts = window_starts(width, patch[2], self.overlap)
        return stretches(starts, patch[2], width, most_bytes // column_bytes)

    def _forward(self, image: Tensor) -> Tensor:
        with undisturbed(self.model, torch.device(self.device)), torch.inference_mode():
            logits: Tensor = self.model(image).logits
        return logits


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module's mode and the random state are as before.

    Entered for each forward pass, not around the whole walk: a generator that is left standing
    would otherwise carry the mode out into training.
    """
    modes = [(module, module.training) for module in model.modules()]
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
