"""Text encodings by name: one vector per structure, all of the same length and scale.

Whatever the encoder, vectors come as (C, 512) float32: shorter ones padded with zeros,
longer ones refused, the mean norm scaled to that of CLIP's vectors, so that encodings can be
exchanged without touching the learning rate. Both facts are recorded.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from clbench.errors import SettingError, first_line
from clbench.spec import registry
from clbench.spec.settings import TextSettings
from clbench.spec.taxonomy import STRUCTURES, structure
from clbench.store.arrays import read_npy
from clbench.store.checkpoint import unpack

LENGTH = 512
"""Length of every text vector."""
CLIP_NORM = 8.85
"""Middle of the norms of the authors' CLIP ViT-B/32 vectors (8.1 to 9.6)."""
PROMPTS = {
    "v1": "A photo of a {}",
    "v2": "There is {} in this computerized tomography",
    "v3": "A computerized tomography of a {}",
}
"""Prompts of the paper's Table 7; `{}` is the structure's prompt name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vectors:
    """Text vectors and where they come from."""

    names: tuple[str, ...]
    """Structures, in the order of the rows."""
    array: NDArray[np.float32]
    """(C, 512) float32."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Provenance for `run.json`."""


def fit(
    rows: NDArray[Any], names: Sequence[str], record: Mapping[str, Any], where: object
) -> Vectors:
    """Pad, scale and record.

    Args:
        rows: (K, n) one vector per structure, n at most 512.
        names: the K structures.
        record: what to write into the record of a run beside the vectors' digest.
        where: file or setting the vectors come from; named in errors.

    Raises:
        SettingError: longer than 512, not finite, or a zero vector.
    """
    rows = np.asarray(rows, dtype=np.float32)
    if rows.ndim != 2 or rows.shape[1] > LENGTH or not np.isfinite(rows).all():
        raise SettingError(
            "these text vectors cannot be used",
            where=where,
            expected=f"finite vectors of at most {LENGTH} numbers",
            got=f"shape {rows.shape}",
            next_step="project them to 512 numbers first",
        )
    with np.errstate(over="ignore"):
        norm = float(np.linalg.norm(rows, axis=1).mean())
    empty = [name for name, row in zip(names, rows, strict=True) if not row.any()]
    if empty or not 0 < norm < np.inf:
        raise SettingError(
            "these text vectors cannot be used",
            where=where,
            expected="vectors that are not zero, of a length that float32 holds",
            got=f"zero: {', '.join(empty)}" if empty else f"a mean length of {norm:g}",
            next_step="save the vectors again as the text encoder gave them",
        )
    out = np.zeros((len(rows), LENGTH), dtype=np.float32)
    out[:, : rows.shape[1]] = rows * np.float32(CLIP_NORM / norm)
    return Vectors(
        names=tuple(names),
        array=out,
        record={
            **record,
            "length": int(rows.shape[1]),
            "padded_to": LENGTH,
            "mean_norm": norm,
            "scaled_to_norm": CLIP_NORM,
        },
    )


def minilm(structures: Sequence[str], *, prompt: str, path: str | None) -> Vectors:
    """Sentence vectors of all-MiniLM-L6-v2 (Apache-2.0), shipped with clbench; needs no network.

    Args:
        structures: canonical names, one vector each.
        prompt: which sentence around a name: the setting `text.prompt`.
        path: must be None: the vectors are shipped.
    """
    _no_path("minilm", path)
    folder = resources.files("clbench.nets")
    record = json.loads((folder / "minilm.json").read_text(encoding="utf-8"))
    rows = load_safetensors((folder / "minilm.safetensors").read_bytes())[prompt]
    place = {name: i for i, name in enumerate(record["structures"])}
    if absent := [s for s in structures if structure(s).name not in place]:
        raise SettingError(
            "clbench ships no text vector for structures that a benchmark declares itself",
            where="text.encoding=minilm",
            expected="structures of the taxonomy (see `clbench.spec.taxonomy`)",
            got=", ".join(absent),
            next_step="--set text.encoding=onehot or random, or --set text.encoding=clip "
            "--set text.path=FILE with {name: vector} for every structure of the course",
        )
    return fit(
        rows[[place[s] for s in structures]],
        structures,
        {
            "encoding": "minilm",
            "prompt": PROMPTS[prompt],
            **{k: record[k] for k in ("model", "licence", "weights_sha256")},
        },
        "text.encoding=minilm",
    )


def clip(structures: Sequence[str], *, prompt: str, path: str | None) -> Vectors:
    """CLIP ViT-B/32 vectors: from the file in `text.path`; with the word `open_clip`, through it.

    open_clip may fetch its weights from the network, so it must be asked for.

    A file of 32 or 38 rows without names is taken to be in the order of the paper's Table 2 and its
    extension; otherwise names say which row is which (`{name: vector}`).

    Args:
        structures: canonical names, one vector each.
        prompt: which sentence around a name: the setting `text.prompt`; a file holds its own.
        path: file of vectors, or the word `open_clip`.
    """
    if path not in (None, "open_clip"):
        return _from_file(structures, Path(path))
    try:
        if path is None:
            raise ImportError
        import open_clip  # type: ignore[import-not-found, unused-ignore]  # optional, heavy
    except ImportError:
        raise SettingError(
            "CLIP vectors are not shipped with clbench (their licence forbids it)",
            where="text.encoding=clip",
            expected="--set text.path=FILE, or --set text.path=open_clip with that package, which "
            "may fetch ViT-B-32 from the network",
            next_step="download txt_encoding.pth from the authors' repository "
            "(github.com/ljwztc/CLIP-Driven-Universal-Model, CC BY-NC-ND) and pass "
            "--set text.path=txt_encoding.pth, or use the default --set text.encoding=minilm",
        ) from None
    try:
        model, _, _ = open_clip.create_model_and_transforms("ViT-B-32", pretrained="openai")
    except Exception as err:  # open_clip raises what its downloader raises
        raise SettingError(
            "open_clip has no ViT-B-32 weights at hand",
            where="text.encoding=clip",
            got=err,
            next_step="fetch them with open_clip once, or pass --set text.path=FILE",
        ) from err
    sentences = [PROMPTS[prompt].format(structure(s).prompt) for s in structures]
    with torch.no_grad():
        rows = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(sentences)).numpy()
    return fit(
        rows,
        structures,
        {"encoding": "clip", "prompt": PROMPTS[prompt], "model": "open_clip ViT-B-32 openai"},
        "open_clip",
    )


def onehot(structures: Sequence[str], *, prompt: str, path: str | None) -> Vectors:
    """One coordinate per taxonomy structure: no language, the clean ablation.

    Args:
        structures: canonical names, one vector each.
        prompt: not used; every encoding takes the same arguments.
        path: must be None: nothing is read.
    """
    _no_path("onehot", path)
    # a benchmark's own structures follow the taxonomy, in the order the course learns them
    order = [*STRUCTURES, *(structure(s).name for s in structures if s not in STRUCTURES)]
    rows = np.zeros((len(structures), len(order)), dtype=np.float32)
    for i, name in enumerate(structures):
        rows[i, order.index(name)] = 1.0
    return fit(rows, structures, {"encoding": "onehot"}, "text.encoding=onehot")


def random(structures: Sequence[str], *, prompt: str, path: str | None) -> Vectors:
    """A fixed Gaussian vector per structure, drawn from its place in the taxonomy, or its name.

    Args:
        structures: canonical names, one vector each.
        prompt: not used; every encoding takes the same arguments.
        path: must be None: nothing is read.
    """
    _no_path("random", path)
    order = list(STRUCTURES)
    rows = []
    for name in structures:
        place = [order.index(name)] if name in STRUCTURES else list(structure(name).name.encode())
        rows.append(np.random.Generator(np.random.PCG64([2024, *place])).normal(size=LENGTH))
    return fit(np.stack(rows), structures, {"encoding": "random"}, "text.encoding=random")


def encoded(structures: Sequence[str], text: TextSettings) -> Vectors:
    """The vectors of some structures, as the settings say.

    Args:
        structures: canonical names, one vector each.
        text: encoding, prompt and file; and what structures get that a course declares itself.

    Raises:
        UnknownName: no such encoding.
        SettingError: the encoding has no vector for one of them.
    """
    encoder: Callable[..., Vectors] = registry.load("encoding", text.encoding)
    if text.declared == "encoded" or all(name in STRUCTURES for name in structures):
        return encoder(structures, prompt=text.prompt, path=text.path)
    known = [name for name in structures if name in STRUCTURES]
    drawn = [name for name in structures if name not in STRUCTURES]
    by_name: dict[str, NDArray[np.float32]] = {}
    record: dict[str, Any] = {"encoding": "random"}
    for names, vectors in (
        (drawn, random(drawn, prompt=text.prompt, path=None)),
        (known, encoder(known, prompt=text.prompt, path=text.path) if known else None),
    ):
        if vectors is not None:
            by_name.update(zip(names, vectors.array, strict=True))
            record = dict(vectors.record)
    return Vectors(
        names=tuple(structures),
        array=np.stack([by_name[name] for name in structures]),
        record={**record, "random": drawn},
    )


def _no_path(name: str, path: str | None) -> None:
    if path is not None:
        raise SettingError(
            f"the encoding {name!r} reads no file",
            where="text.path",
            got=path,
            next_step="--set text.encoding=clip reads one",
        )


def _from_file(structures: Sequence[str], path: Path) -> Vectors:
    content = _read(path)
    if isinstance(content, Mapping):
        by_name = {}
        for key, value in content.items():
            try:
                by_name[structure(str(key), path).name] = np.asarray(value, np.float32).reshape(-1)
            except Exception:  # noqa: S112  # a file may hold more than we know
                continue
    else:
        rows = np.asarray(content, dtype=np.float32)
        order = sorted(
            (s for s in STRUCTURES.values() if s.template_id), key=lambda s: s.template_id or 0
        )
        if rows.ndim != 2 or len(rows) not in (32, len(order)):
            raise SettingError(
                "the file has no names, and not the rows of the paper's table",
                where=path,
                expected=f"32 or {len(order)} rows, or a mapping of structure → vector",
                got=f"shape {rows.shape}",
                next_step="save {name: vector} with torch.save or safetensors",
            )
        by_name = {s.name: row for s, row in zip(order, rows, strict=False)}
    if absent := [s for s in structures if structure(s).name not in by_name]:
        raise SettingError(
            "the file has no vector for some structures",
            where=path,
            expected=", ".join(structures),
            got=f"missing: {', '.join(absent)}",
            next_step="add them under their names (see `clbench list`)",
        )
    picked = [by_name[structure(s).name] for s in structures]
    if len({len(p) for p in picked}) != 1:
        raise SettingError("the vectors of the file differ in length", where=path)
    return fit(np.stack(picked), structures, {"encoding": "clip", "file": path.name}, path)


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return {k: _plain(v) for k, v in load_safetensors(path.read_bytes()).items()}
        if path.suffix == ".npy":
            return _real(read_npy(path))
        content = unpack(path)
        if isinstance(content, Mapping):
            return {k: _plain(v) for k, v in content.items() if isinstance(v, torch.Tensor)}
        return _plain(content)
    except FileNotFoundError:
        raise SettingError(
            "the file of text vectors does not exist", where="text.path", got=path
        ) from None
    except (
        OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError,
        pickle.UnpicklingError, SafetensorError,
    ) as err:  # fmt: skip
        raise SettingError(
            "the file of text vectors cannot be read safely",
            where=path,
            expected=".pth, .npy or .safetensors with tensors alone",
            got=first_line(err),
            next_step="save the vectors again with safetensors",
        ) from err


def _plain(tensor: torch.Tensor) -> Any:
    """A tensor as an array; one that repeats its memory may ask for any amount of it."""
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} that is not whole")
    if tensor.is_complex():
        raise ValueError("complex numbers")
    return tensor.detach().float().numpy()


def _real(array: NDArray[Any]) -> NDArray[np.float32]:
    """The numbers of an array, which must be real."""
    if np.iscomplexobj(array):
        raise ValueError("complex numbers")
    return np.asarray(array, dtype=np.float32)
