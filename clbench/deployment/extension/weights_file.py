"""Files of weights from elsewhere, read as tensors and plain values; nothing in them is executed.

torch's reader for weights builds tensors and containers alone, and refuses every other name a
pickle asks for. Training programs leave numpy's numbers beside the weights (scores, epochs). Their
names are answered by a class that throws its arguments away, so no code of numpy sees the file.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from clbench.errors import SettingError
from clbench.store.checkpoint import unpack

LARGEST_JSON = 64 << 20
"""Bytes of the largest list of settings that is read."""


class PassedOver:
    """Stands for a number of numpy's in a file of weights; its value is not read."""

    def __init__(self, *args: object) -> None:
        """Take anything, keep nothing."""

    def __setstate__(self, state: object) -> None:
        """Take anything, keep nothing."""


PASSED_OVER = (
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Int64", "Int32", "Bool")),
    *(f"numpy.{kind}" for kind in ("float64", "float32", "int64", "int32", "bool_")),
)
"""The names answered by `PassedOver`."""


def read_weights(path: Path) -> Any:
    """What a file of weights holds.

    Args:
        path: `.pt`, `.pth`, `.bin` or `.safetensors`.

    Raises:
        SettingError: it is not there, is damaged, or asks for anything but tensors and plain
            values; the error names what.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([(PassedOver, name) for name in PASSED_OVER]):
            return unpack(path)
    except FileNotFoundError:
        raise SettingError("the file of weights does not exist", where=path) from None
    except pickle.UnpicklingError as err:
        raise SettingError(
            "a file of weights holds more than tensors and plain values; it was not opened",
            where=path,
            expected="tensors, numbers, text, lists and dictionaries",
            got=_reason(err),
            next_step="let the one who made it save the state_dict alone (torch.save or "
            "safetensors); to convert it yourself is to run its code",
        ) from err
    except (OSError, ValueError, SafetensorError) as err:
        raise SettingError(
            "a file of weights cannot be read",
            where=path,
            expected="a file of torch.save, or safetensors",
            got=_reason(err),
            next_step="copy or download it again",
        ) from err


def _reason(err: Exception) -> str:
    """The line of an error that says what was found; advice of torch to trust the file is cut."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    said = next((line for line in lines if "GLOBAL" in line or "nsupported" in line), "")
    text = said or (lines[0] if lines else type(err).__name__)
    return text.partition(" was not an allowed")[0].partition("WeightsUnpickler error: ")[2] or text


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON file beside weights: plans, labels, metadata.

    Raises:
        SettingError: it is not there, is no JSON object, or is larger than any such file.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"{path.stat().st_size} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingError(
            "a file that belongs to the weights is missing",
            where=path,
            next_step="copy the whole folder of the trained model",
        ) from None
    except (OSError, ValueError, RecursionError) as err:
        raise SettingError("a file beside the weights is not JSON", where=path, got=err) from err
    if not isinstance(content, dict):
        raise SettingError(
            "a file beside the weights holds no settings", where=path, expected="a JSON object"
        )
    return content


def nested(value: Any, *keys: str) -> dict[str, Any]:
    """The object at the end of the keys within a JSON value; empty where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}
