"""The first Universal Model's head: one controller for all structures, told apart by text alone.

Room: row 2. Growing adds a fixed text vector and no parameter, so old logits stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clbench.errors import TrainingError
from clbench.nets.heads import SIZES, Constants, UniversalHead, prior_logit


class SharedHead(UniversalHead):
    """One linear controller over [image vector, projected text vector].

    Args:
        final_channels: channels of `final`.
        bottleneck_channels: channels of `bottleneck`.
        text_dim: length of a text vector.
        image_dim: length of the image vector and of the projected text.
        groups: groups of the normalizations.

    Source: Liu et al., ICCV 2023 (CLIP-driven Universal Model); the paper, section 4.1.2.
    """

    vectors: Constants

    def __init__(
        self,
        final_channels: int,
        bottleneck_channels: int,
        text_dim: int = 512,
        *,
        image_dim: int = 256,
        groups: int = 16,
    ) -> None:
        super().__init__(
            final_channels, bottleneck_channels, text_dim, image_dim=image_dim, groups=groups
        )
        self.project = nn.Sequential(nn.Linear(text_dim, image_dim), nn.ReLU())
        self.controller = nn.Linear(2 * image_dim, sum(SIZES))

    def add(self, name: str, vector: Tensor | None) -> None:
        """A text vector for one more structure.

        Raises:
            TrainingError: it is there already, or the vector has another length.
        """
        if name in self.vectors or vector is None or vector.shape != (self.text_dim,):
            raise TrainingError(
                f"the head cannot take {name!r}",
                expected=f"a new name and a vector of length {self.text_dim}",
                got="known already"
                if name in self.vectors
                else None
                if vector is None
                else tuple(vector.shape),
            )
        self.vectors[name] = vector.detach().clone().to(self.controller.weight.device)

    def start(self, name: str, prior: float) -> None:
        """Let every structure's voxels start near a probability: there is one bias for all."""
        with torch.no_grad():
            self.controller.bias[-1] = prior_logit(prior)

    def generator(self) -> list[nn.Parameter]:
        """The projection of the text and the one controller."""
        return [*self.project.parameters(), *self.controller.parameters()]

    def generate(self, bottleneck: Tensor, names: Sequence[str]) -> Tensor:
        """(B, C_b, d, h, w) → (B, len(names), 153): the parameters of the structures in use."""
        image = self.gap(bottleneck).flatten(1)
        text = self.project(torch.stack([self.vectors[n] for n in names]).to(image.dtype))
        pairs = (len(image), len(names), -1)
        both = [image[:, None].expand(pairs), text[None].expand(pairs)]
        found: Tensor = self.controller(torch.cat(both, dim=2))
        return found
