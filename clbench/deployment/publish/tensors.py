"""The content of a checkpoint as one safetensors file: tensors, and the rest of it as JSON.

Nothing in such a file can be run. Tensors lie under the path of their keys (`model/…`,
`memory/…`); the header's entry `clbench` is the JSON of everything around them, in which
`{"tensor": NAME}` stands for a tensor, `{"dict": [[key, value], …]}` for a dict in its order, and
`{"tuple": […]}` for a tuple.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from clbench.errors import StoreError, first_line
from clbench.store import checkpoint

HEADER = "clbench"
"""Entry of the safetensors header; one alone, so that equal content gives equal bytes."""


def write_tensors(file: BinaryIO, content: dict[str, Any]) -> None:
    """Write the content of a checkpoint.

    Args:
        file: opened for writing.
        content: as `clbench.store.checkpoint.load` returned it.

    Raises:
        StoreError: a tensor of a kind that safetensors does not know (sparse, quantized).
    """
    tensors: dict[str, Tensor] = {}
    try:
        tree = _encoded(content, "", tensors)
        header = json.dumps({"content": tree, "sha256": checkpoint.checksum(content)})
        packed = save(tensors, {HEADER: header})
    except (SafetensorError, KeyError, ValueError, RuntimeError, NotImplementedError) as err:
        raise StoreError(
            "a checkpoint holds a tensor that safetensors cannot",
            where=getattr(file, "name", None),
            expected="dense tensors of usual types",
            got=first_line(err),
            next_step="a strategy keeps such tensors in its memory as plain ones",
        ) from err
    file.write(packed)


def read_tensors(path: Path) -> dict[str, Any]:
    """Read what `write_tensors` wrote, onto the CPU, equal to the bit.

    Raises:
        StoreError: damaged, altered, or not written by it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        unused = set(tensors)
        content = _decoded(header["content"], tensors, unused)
        if unused or not isinstance(content, dict):
            raise ValueError(f"no place for {', '.join(sorted(unused)[:3]) or 'the content'}")
        got, expected = checkpoint.checksum(content), header["sha256"]
    except (
        OSError,
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ) as err:
        raise StoreError(
            "a file of weights cannot be read",
            where=path,
            expected="safetensors written by `clbench export`",
            got=first_line(err),
            next_step="download or export it again",
        ) from err
    if got != expected:
        raise StoreError(
            "a file of weights was altered",
            where=path,
            expected=f"checksum {str(expected)[:16]}",
            got=got[:16],
            next_step="download or export it again",
        )
    return content


def _encoded(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; its tensors go to `tensors`, each with memory of its own."""
    if isinstance(value, Tensor):
        name = path
        while name in tensors:  # keys may hold slashes themselves
            name += "'"
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        items = [
            [k, _encoded(v, f"{path}/{k}" if path else str(k), tensors)] for k, v in value.items()
        ]
        return {"dict": items}
    if isinstance(value, list | tuple):
        items = [_encoded(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    return value


def _decoded(value: Any, tensors: dict[str, Tensor], unused: set[str]) -> Any:
    """What `_encoded` was given; takes the names of tensors out of `unused`."""
    if isinstance(value, list):
        return [_decoded(v, tensors, unused) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        unused.discard(inner)
        return tensors[inner]
    if kind == "tuple":
        return tuple(_decoded(v, tensors, unused) for v in inner)
    if kind != "dict" or not all(isinstance(k, str | int) for k, _ in inner):
        raise ValueError(f"{kind!r} in the header")
    return {k: _decoded(v, tensors, unused) for k, v in inner}
