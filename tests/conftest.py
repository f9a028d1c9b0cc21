"""Shared, expensive things are made once: a phantom cache and one finished smoke course."""

from __future__ import annotations

import gc
import inspect
import os
import random
import socket
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from locations import GOLDEN_FILES, SHARED
from torch import nn

from clbench.nets import backbones
from clbench.run import cost_table

LayOut = Callable[..., Path]


# Millions of objects of imported libraries are alive, and each look for cycles walks over them: at
# Python's own thresholds that is an eighth of the suite's time.
gc.set_threshold(100_000, 50, 100)
# the same examples on every machine, and no wall-clock limit for one of them
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The same number of threads on every machine, so that equal runs give equal bits.

    One: two test processes with two threads each on two cores wait for each other, at nine times
    the processor time for one update of a small network.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """Files are written in the same order and by the same calls, but nobody waits for the disk.

    The kills of the tests end processes, not the machine, so what was written is there without it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _narrow_controllers() -> Iterator[None]:
    """The small network has narrow controllers in all runs of the tests.

    At the published width, which tests of the head and of its size hold, they are nearly all of its
    weights, and a third of a smoke run goes into initialising, saving and loading them.
    """
    build = backbones.small_unet

    @wraps(build)
    def small_unet(size: int = 16) -> backbones.Backbone:
        backbone = build(size)
        backbone.controller_width = 32
        return backbone

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "small_unet", small_unet)
        yield


@pytest.fixture(scope="session", autouse=True)
def _operations_are_counted_once() -> Iterator[None]:
    """Each run counts the operations of its networks; equal networks are counted once for all."""
    count, counted = cost_table.forward_macs, dict[Any, dict[str, int]]()

    def forward_macs(model: nn.Module, patch_vox: Sequence[int]) -> dict[str, int]:
        modules = [(name, type(m), m.extra_repr()) for name, m in model.named_modules()]
        tensors = [(name, tuple(t.shape)) for name, t in model.state_dict().items()]
        key = (tuple(modules), tuple(tensors), tuple(patch_vox))
        if key not in counted:
            counted[key] = count(model, patch_vox)
        return counted[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost_table, "forward_macs", forward_macs)
        yield


@pytest.fixture
def published_controllers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small network with controllers as wide as published, as users run it."""
    monkeypatch.setattr(backbones, "small_unet", inspect.unwrap(backbones.small_unet))


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """Global random numbers that do not depend on which tests ran before."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002


@pytest.fixture(scope="session", autouse=True)
def refused_calls() -> Iterator[list[str]]:
    """No test reaches the network: whoever tries is refused, and named in this list.

    Sockets of the machine itself (loader workers talk through them) stay open.
    """
    calls: list[str] = []
    connect, ask = socket.socket.connect, socket.getaddrinfo

    def refuse(what: object) -> OSError:
        calls.append(str(what))
        return OSError(f"no network in tests: {what}")

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            raise refuse(address)
        connect(self, address)

    def guarded_ask(host: Any, *args: Any, **more: Any) -> Any:
        if host not in (None, "localhost", socket.gethostname()):
            raise refuse(host)
        return ask(host, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        patch.setattr(socket.socket, "connect_ex", guarded)
        patch.setattr(socket, "getaddrinfo", guarded_ask)
        yield calls


@pytest.fixture(scope="session")
def cache_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preprocessed volumes and the phantom, shared by all tests of the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def smoke_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder that holds finished smoke runs."""
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="session")
def smoke_run(cache_root: Path, smoke_out: Path) -> Path:
    """The run folder of `universal` on `tumor_ext`, profile `smoke`, seed 0."""
    from clbench.run.course import run_course
    from clbench.run.plan import RunSettings

    return run_course(
        RunSettings(
            bench="tumor_ext",
            strategy="universal",
            profile="smoke",
            out=smoke_out,
            cache=cache_root,
        )
    )


@pytest.fixture(scope="session")
def phantom_2_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Excerpts of runs on version 2 of the phantom: records as they were written then.

    `reference` holds fourteen strategies on `tumor_ext`, of which an independent implementation of
    the tests said what is better, worse and equivalent, and one run on `body_ext`; `ablation` two
    runs of single settings.
    """
    folder = tmp_path_factory.mktemp("phantom_2_runs")
    with tarfile.open(GOLDEN_FILES / "phantom_2_runs.tar.xz") as packed:
        packed.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def real_ct() -> Path:
    """Two real CTs beside the checkout; skips where they are absent."""
    folder = SHARED / "real_ct"
    if not folder.is_dir():
        pytest.skip("the two real CTs for pipeline checks are not on this machine")
    return folder


@pytest.fixture(scope="session")
def lay_out() -> LayOut:
    """Write one case into a folder in a layout; see the arguments of `made`."""
    import nibabel as nib

    from clbench.data.layouts import LAYOUTS

    def made(
        folder: Path,
        layout: str,
        case: str,
        image: Any,
        label: Any,
        affine: Any = None,
        masks: Mapping[str, Sequence[int]] | None = None,
    ) -> Path:
        """The path of the image; `masks`: mask → label values in it, for layouts with masks.

        Layouts with a list get one of all cases written so far.
        """
        image_path, label_path = LAYOUTS[layout].paths(folder, case)
        place = np.diag([3.0, 3.0, 3.0, 1.0]) if affine is None else affine
        arrays = {image_path: image}
        if label_path.suffix:
            arrays[label_path] = label
        for name, values in (masks or {}).items():
            arrays[label_path / f"{name}.nii.gz"] = np.isin(label, values).astype(np.uint8)
        for path, array in arrays.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, place), path)
        cases = sorted(p.name.split(".")[0] for p in image_path.parent.iterdir())
        for name, text in LAYOUTS[layout].index(cases).items():
            (folder / name).write_text(text)
        return image_path

    return made
