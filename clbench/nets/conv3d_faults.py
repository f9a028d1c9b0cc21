"""Versions of torch and cuDNN whose 3-D convolutions in bfloat16 are reported wrong or slow.

Without torch itself: `clbench doctor` asks where torch may be broken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import Version


@dataclass(frozen=True, kw_only=True)
class _Conv3dFault:
    """What is known of bfloat16 3-D convolutions in some versions; all by others' reports."""

    torch: str
    """Releases of torch, as a specifier."""
    cudnn: tuple[int, int]
    """First version of cuDNN with it, and the first without, as torch numbers them."""
    text: str
    """What happens, and what to do."""


CONV3D_FAULTS = (
    _Conv3dFault(
        torch="<2.9",
        cudnn=(90800, 91300),
        text="3-D convolutions in bfloat16 may be silently wrong (pytorch issue 163539; seen with "
        "cuDNN 9.8 and 9.10, gone in 9.13): leave train.amp=off, or install a torch whose cuDNN is "
        "9.15 or later",
    ),
    _Conv3dFault(
        torch="==2.9.*",
        cudnn=(0, 91500),
        text="3-D convolutions in bfloat16 avoid cuDNN, which takes several times the memory and "
        "can be slower by orders of magnitude (pytorch issues 166643, 168167): install a later "
        'torch, or python -m pip install "nvidia-cudnn-cu{cuda}>=9.15"; or leave train.amp=off',
    ),
)
"""Neither was tried here: no GPU was at hand."""


def conv3d_faults(torch: str, cudnn: int | None) -> list[str]:
    """What is known to be wrong with bfloat16 3-D convolutions on a GPU.

    Args:
        torch: its version, such as `2.9.1+cu128`, which was built for CUDA 12.
        cudnn: version of cuDNN as torch numbers it, 91002 for 9.10.2; None: torch has none.
    """
    if cudnn is None:
        return []
    version = Version(torch)
    release, built = version.base_version, re.fullmatch(r"cu(\d\d)\d", version.local or "")
    cuda = built[1] if built else "12"
    return [
        f"torch {torch} with cuDNN {cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}: "
        + f.text.format(cuda=cuda)
        for f in CONV3D_FAULTS
        if f.cudnn[0] <= cudnn < f.cudnn[1] and SpecifierSet(f.torch).contains(release)
    ]
