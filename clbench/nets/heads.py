"""Output heads: feature maps in, one logit per structure out; they grow and keep old weights.

`UniversalHead` generates each structure's three little convolutions from text and
image; `ConvHead` is the plain output layer of the softmax methods.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from clbench.errors import TrainingError
from clbench.nets.output import Output

WIDTH = 8
"""Channels the generated convolutions work on."""
SIZES = (WIDTH * WIDTH, WIDTH * WIDTH, WIDTH, WIDTH, WIDTH, 1)
"""W1 (8 by 8, row = out), W2 (8 by 8), W3 (1 by 8), b1, b2, b3: 153 numbers per structure."""
IMAGE_DIM = 256
"""Length of the image vector, and of a projected text vector."""
NORM_GROUPS = 16
"""Groups of the normalizations, or the next smaller number that divides their channels."""
BLOCK_VALUES = 1 << 17
"""Hidden values of one block of voxels: 512 kB, so that a block stays in a core's cache."""
BLOCK_VALUES_CUDA = 1 << 26
"""On a GPU: 256 MB, so that few kernels are started."""
Done = TypeVar("Done")


class HeadParameters(NamedTuple):
    """Three little convolutions of each of C structures, or the gradient of their parameters."""

    w1: Tensor
    """(C, 8, 8), row = out."""
    w2: Tensor
    """(C, 8, 8)."""
    w3: Tensor
    """(C, 1, 8)."""
    b1: Tensor
    """(C, 8, 1)."""
    b2: Tensor
    """(C, 8, 1)."""
    b3: Tensor
    """(C, 1, 1)."""


def split_parameters(params: Tensor) -> HeadParameters:
    """(C, 153) → the parameters by name."""
    w1, w2, w3, b1, b2, b3 = torch.split(params, list(SIZES), dim=1)
    return HeadParameters(
        w1=w1.reshape(-1, WIDTH, WIDTH),
        w2=w2.reshape(-1, WIDTH, WIDTH),
        w3=w3.reshape(-1, 1, WIDTH),
        b1=b1.reshape(-1, WIDTH, 1),
        b2=b2.reshape(-1, WIDTH, 1),
        b3=b3.reshape(-1, 1, 1),
    )


class _Dynamic(torch.autograd.Function):
    """All structures at once, a block of voxels at a time, forward and backward.

    Nothing of size classes × voxels is kept but the logits: backward computes the hidden values of
    a block again.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, params: Tensor) -> Tensor:
        ctx.save_for_backward(features, params)
        batch, _, voxels = features.shape
        count = params.shape[1]
        out = features.new_empty(batch, count, voxels)
        for b in range(batch):
            _each_share(_logits, split_parameters(params[b]), features[b], out[b])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        features, params = ctx.saved_tensors
        count = params.shape[1]
        to_features = torch.empty_like(features)
        to_params = torch.empty_like(params)
        for b in range(len(features)):
            head = split_parameters(params[b])
            shares = _each_share(_gradient, head, features[b], grad[b], to_features[b])
            to_head = [torch.stack(parts).sum(0) for parts in zip(*shares, strict=True)]
            to_params[b] = torch.cat([t.reshape(count, -1) for t in to_head], dim=1)
        return to_features, to_params


# TorchScript runs these two (`_compiled`), so they keep to what it knows of Python.


def _logits(head: HeadParameters, features: Tensor, out: Tensor, block: int) -> None:
    """Fill `out` (C, voxels) with the logits of `features` (8, voxels), block by block."""
    count, width = out.size(0), features.size(0)
    w1, b1 = head.w1.flatten(0, 1), head.b1.flatten(0, 1)
    first = out.new_empty([0])
    second, third = first, first
    voxels = -1
    for x, logits in zip(torch.split(features, block, 1), torch.split(out, block, 1)):  # noqa: B905
        if x.size(1) != voxels:  # the first block, or a rest: the same memory for all others
            voxels = x.size(1)
            first = out.new_empty([count, width, voxels])
            second, third = torch.empty_like(first), out.new_empty([count, 1, voxels])
        torch.addmm(b1, w1, x, out=first.view(-1, voxels)).relu_()
        torch.baddbmm(head.b2, head.w2, first, out=second).relu_()
        torch.baddbmm(head.b3, head.w3, second, out=third)
        logits.copy_(third.view(-1, voxels))


def _gradient(
    head: HeadParameters, features: Tensor, grad: Tensor, to_features: Tensor, block: int
) -> HeadParameters:
    """The parameters' gradient over `grad` (C, voxels); the features' is filled in.

    Hidden values are computed again, `block` voxels at a time.
    """
    count, width = grad.size(0), features.size(0)
    w1, b1, up = head.w1.flatten(0, 1), head.b1.flatten(0, 1), head.w3.transpose(1, 2)
    to_w1, to_b1 = torch.zeros_like(head.w1), torch.zeros_like(head.b1)
    to_w2, to_b2 = torch.zeros_like(head.w2), torch.zeros_like(head.b2)
    to_w3, to_b3 = torch.zeros_like(head.w3), torch.zeros_like(head.b3)
    first = grad.new_empty([0])
    second, third = first, first
    voxels = -1
    for x, given, to_x in zip(  # noqa: B905
        torch.split(features, block, 1),
        torch.split(grad, block, 1),
        torch.split(to_features, block, 1),
    ):
        if x.size(1) != voxels:
            voxels = x.size(1)
            first = grad.new_empty([count, width, voxels])
            second, third = torch.empty_like(first), torch.empty_like(first)
        torch.addmm(b1, w1, x, out=first.view(-1, voxels)).relu_()
        torch.baddbmm(head.b2, head.w2, first, out=second).relu_()
        above = given.unsqueeze(1)  # (C, 1, block)
        to_w3.baddbmm_(above, second.transpose(1, 2))
        to_b3.add_(above.sum(2, keepdim=True))
        torch.mul(up, above, out=third)
        torch.ops.aten.threshold_backward(third, second, 0, grad_input=third)  # where ReLU let by
        to_w2.baddbmm_(third, first.transpose(1, 2))
        to_b2.add_(third.sum(2, keepdim=True))
        # what the second layer held is not needed any more
        torch.bmm(head.w2.transpose(1, 2), third, out=second)
        torch.ops.aten.threshold_backward(second, first, 0, grad_input=second)
        rows = second.view(-1, voxels)
        to_w1.view(-1, width).addmm_(rows, x.t())
        to_b1.add_(second.sum(2, keepdim=True))
        to_x.copy_(w1.t() @ rows)
    return HeadParameters(to_w1, to_w2, to_w3, to_b1, to_b2, to_b3)


def _block(voxels: int, count: int, device: torch.device) -> int:
    if device.type == "meta":
        return voxels  # nothing is computed, and each operator takes its time
    values = BLOCK_VALUES_CUDA if device.type == "cuda" else BLOCK_VALUES
    return max(256, values // (WIDTH * count))


def _each_share(work: Callable[..., Done], head: HeadParameters, *maps: Tensor) -> list[Done]:
    """Do `work` on all voxels, each thread on its own share of neighbours.

    A block is too little work to divide among threads: they would wait for each other in every
    product, and on a busy machine for a thread that is not running. So a thread takes whole blocks.

    Args:
        work: takes the parameters, a share of each map, and the voxels of a block; called without
            gradients being recorded.
        head: parameters of C structures.
        maps: (rows, voxels) each; the second one has C rows.

    Returns:
        What `work` returned for each share, in the order of the voxels.
    """
    voxels, on_cpu = maps[1].shape[1], maps[1].device.type == "cpu"
    block = _block(voxels, len(maps[1]), maps[1].device)
    blocks = -(-voxels // block)
    # a mode that counts operations, say, belongs to the thread that set it
    counted = is_in_torch_dispatch_mode()
    threads = torch.get_num_threads() if on_cpu and not counted else 1
    if on_cpu and not counted:
        work = _compiled(work)
    if threads == 1 or blocks < threads:
        return [work(head, *maps, block)]
    size = -(-blocks // threads) * block
    shares = zip(*(torch.split(of, size, 1) for of in maps), strict=True)

    # the mode belongs to a thread, too, and tensors made in inference may be filled in it alone
    without_gradient = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    def quietly(share: tuple[Tensor, ...]) -> Done:
        with without_gradient():
            return work(head, *share, block)

    return list(_threads(threads, os.getpid()).map(quietly, shares))


@functools.cache
def _compiled(work: Callable[..., Done]) -> Callable[..., Done]:
    """The function as TorchScript: equal bits, without Python between two small operations.

    Python lets one thread at a time go on, so threads that all work in blocks wait for it between
    any two. Where torch cannot compile it, the function itself.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return cast("Callable[..., Done]", torch.jit.script(work))
        except Exception:  # no TorchScript, no source at hand: all the same
            return work


@functools.cache
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """Threads in which torch's operations take one thread each.

    Args:
        count: how many.
        process: its number; a forked process has none of its parent's threads.
    """
    together = Barrier(count + 1)

    def alone() -> None:
        torch.get_num_threads()  # a thread's first call, of any kind, sets it to what others have
        torch.set_num_threads(1)
        together.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="clbench-head", initializer=alone)
    for _ in range(count):
        pool.submit(int)
    together.wait()
    torch.set_num_threads(count)  # of this thread and later ones: the last call counts for those
    return pool


def dynamic_head(features: Tensor, params: Tensor) -> Tensor:
    """Each structure's three generated 1×1×1 convolutions, applied to every voxel.

    Equal to three grouped convolutions, but faster, and in memory that does not grow with the
    number of classes.

    Args:
        features: (B, 8, D, H, W).
        params: (B, C, 153).

    Returns:
        (B, C, D, H, W) logits.
    """
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    # autocast would round each block: on a CPU that costs more than it saves, on a GPU the logits
    kind = features.device.type  # or `meta`, where operations are only counted
    with torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False):
        flat: Tensor = _Dynamic.apply(  # type: ignore[no-untyped-call]  # torch
            features.flatten(2), params.to(features.dtype)
        )
    return flat.view(*flat.shape[:2], *features.shape[2:])


def prior_logit(p: float) -> float:
    """The bias with which a sigmoid answers `p`."""
    return math.log(p / (1 - p))


class Constants(nn.Module):
    """Tensors by name that are saved with the model and never trained.

    Buffers, not parameters: whoever trains `model.parameters()` would train those as well.
    """

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.register_buffer(f"of_{name}", value)

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(f"of_{name}")

    def __contains__(self, name: str) -> bool:
        return f"of_{name}" in self._buffers


class UniversalHead(nn.Module):
    """Language-driven parameter generator and class-specific heads, one controller per structure.

    Args:
        final_channels: channels of `final`.
        bottleneck_channels: channels of `bottleneck`.
        text_dim: length of a text vector.
        hidden: width of a controller.

    Source: Liu et al., Medical Image Analysis 2024, section 3.2.2, eq. 2. Image vector first, text
    vector second, as in the authors' code (the paper writes them the other way round).
    """

    def __init__(
        self,
        final_channels: int,
        bottleneck_channels: int,
        text_dim: int = 512,
        *,
        hidden: int = 512,
    ) -> None:
        super().__init__()
        self.text_dim, self.hidden = text_dim, hidden
        self.gap = nn.Sequential(
            nn.GroupNorm(_groups(bottleneck_channels), bottleneck_channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool3d(1),
            nn.Conv3d(bottleneck_channels, IMAGE_DIM, 1),
        )
        self.pre = nn.Sequential(
            nn.GroupNorm(_groups(final_channels), final_channels),
            nn.ReLU(),
            nn.Conv3d(final_channels, WIDTH, 1),
        )
        self.controllers = nn.ModuleDict()
        self.vectors = Constants()

    def add(self, name: str, vector: Tensor | None) -> None:
        """A controller for one more structure, with torch's default initialisation.

        Args:
            name: the structure.
            vector: (text_dim,) its text vector; fixed, never trained.

        Raises:
            TrainingError: it is there already, or the vector has another length.
        """
        self._keep_vector(name, vector)
        self.controllers[name] = nn.Sequential(
            nn.Linear(IMAGE_DIM + self.text_dim, self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, sum(SIZES)),
        ).to(self.vectors[name].device)

    def _keep_vector(self, name: str, vector: Tensor | None) -> None:
        if name in self.vectors or vector is None or vector.shape != (self.text_dim,):
            known = "known already" if name in self.vectors else None
            raise TrainingError(
                f"the head cannot take {name!r}",
                expected=f"a new name and a vector of length {self.text_dim}",
                got=known or (None if vector is None else tuple(vector.shape)),
            )
        self.vectors[name] = vector.detach().clone().to(next(self.parameters()).device)

    def start(self, name: str, prior: float) -> None:
        """Let the structure's voxels start near a probability instead of near 0.5."""
        controller: Any = self.controllers[name]
        with torch.no_grad():
            controller[-1].bias[-1] = prior_logit(prior)  # b3 is the last of the 153

    def generator(self) -> list[nn.Parameter]:
        """What turns image and text vectors into weights; `train.generator_lr` is for these."""
        return list(self.controllers.parameters())

    def generate(self, bottleneck: Tensor, names: Sequence[str]) -> Tensor:
        """(B, C_b, d, h, w) → (B, len(names), 153): the parameters of the structures in use."""
        image = self.gap(bottleneck).flatten(1)
        params = []
        for name in names:
            text = self.vectors[name].to(image.dtype).expand(len(image), -1)
            params.append(self.controllers[name](torch.cat([image, text], dim=1)))
        return torch.stack(params, dim=1)

    def forward(self, maps: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        """Maps → (B, len(names), D, H, W) logits."""
        return dynamic_head(self.pre(maps["final"]), self.generate(maps["bottleneck"], names))


def _groups(channels: int) -> int:
    return next(n for n in range(NORM_GROUPS, 0, -1) if channels % n == 0)


class ConvHead(nn.Module):
    """A 1×1×1 output layer whose channels carry names and grow.

    Args:
        final_channels: channels of `final`.
        background: whether channel 0 is background (softmax), or every channel a structure.
    """

    def __init__(self, final_channels: int, *, background: bool) -> None:
        super().__init__()
        self.final_channels = final_channels
        self.background = background
        self.weight = nn.ParameterDict()
        self.bias = nn.ParameterDict()
        if background:
            self.add("background")

    def add(self, name: str, vector: Tensor | None = None) -> None:
        """One more channel, with the default initialisation of a convolution.

        Args:
            name: the structure.
            vector: not used; heads share this signature.

        Raises:
            TrainingError: it is there already.
        """
        if name in self.weight:
            raise TrainingError(f"the head already has {name!r}")
        like = next(iter(self.weight.values()), None)
        fresh = nn.Conv3d(self.final_channels, 1, 1)
        at = torch.device("cpu") if like is None else like.device
        weight, bias = fresh.parameters()
        self.weight[name] = nn.Parameter(weight.detach()[0].to(at))
        self.bias[name] = nn.Parameter(bias.detach().to(at))

    def start(self, name: str, prior: float) -> None:
        """Let the structure's voxels start near a probability instead of near 0.5."""
        with torch.no_grad():
            self.bias[name].fill_(math.log(prior) if self.background else prior_logit(prior))

    def split_background(self, names: Sequence[str]) -> None:
        """Let channels start as equal shares of background, which keeps one share itself.

        No other channel's logit or probability changes; background's logit does.

        Source: Cermelli et al., CVPR 2020, section 3.2 (initialization of the classifier).
        """
        with torch.no_grad():
            share = self.bias["background"] - math.log(len(names) + 1)
            for name in ("background", *names):
                self.weight[name].copy_(self.weight["background"])
                self.bias[name].copy_(share)

    def forward(self, maps: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        """Maps → (B, [background +] len(names), D, H, W) logits."""
        order = ["background", *names] if self.background else list(names)
        return self.logits(maps["final"], order)

    def logits(self, final: Tensor, order: Sequence[str]) -> Tensor:
        """Logits of the named outputs, in their order, from the last map of a decoder."""
        weight = torch.stack([self.weight[n] for n in order])
        return functional.conv3d(final, weight, torch.cat([self.bias[n] for n in order]))


class Segmenter(nn.Module):
    """A backbone, a head, and the structures they know, in channel order.

    Args:
        backbone: see `clbench.nets.backbones`.
        head: `UniversalHead`, `ConvHead`, or anything with their `add` and `forward`.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.structures: tuple[str, ...] = ()

    def add(
        self, names: Sequence[str], vectors: Tensor | None = None, prior: float | None = None
    ) -> None:
        """Learn to answer for more structures.

        Args:
            names: the structures.
            vectors: (len(names), text_dim) text vectors, for heads that use them.
            prior: probability with which their voxels start; None: as torch initialises.
        """
        for i, name in enumerate(names):
            head: Any = self.head
            head.add(name, None if vectors is None else vectors[i])
            if prior is not None:
                head.start(name, prior)
        self.structures = (*self.structures, *names)

    def forward(self, image: Tensor) -> Output:
        """(B, 1, D, H, W) → logits (B, C, D, H, W) and every feature map."""
        maps = self.backbone(image)
        return Output(logits=self.head(maps, self.structures), features=maps)


class SharedHead(UniversalHead):
    """The first Universal Model's: one linear controller over [image vector, projected text].

    Growing adds a fixed text vector and no parameter, so old logits stay as they are.

    Args:
        final_channels: channels of `final`.
        bottleneck_channels: channels of `bottleneck`.

    Source: Liu et al., ICCV 2023 (CLIP-driven Universal Model); the paper, section 4.1.2.
    """

    vectors: Constants

    def __init__(self, final_channels: int, bottleneck_channels: int) -> None:
        super().__init__(final_channels, bottleneck_channels)
        self.project = nn.Sequential(nn.Linear(self.text_dim, IMAGE_DIM), nn.ReLU())
        self.controller = nn.Linear(2 * IMAGE_DIM, sum(SIZES))

    def add(self, name: str, vector: Tensor | None) -> None:
        """A text vector for one more structure.

        Raises:
            TrainingError: it is there already, or the vector has another length.
        """
        self._keep_vector(name, vector)

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
        params: Tensor = self.controller(torch.cat(both, dim=2))
        return params
