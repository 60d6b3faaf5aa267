"""Block-wise distillation: hidden states at the tokens of images learn to point where those of a teacher point.

For each pair of states, a head (RMSNorm, then a linear map without bias) takes the student's state h to the teacher's
width, and the loss is the mean over image tokens of 1 - cos(head(h), v), from 0 to 2. Neither teacher nor heads are
part of the finished model.

Shapes: B images, T tokens of an image, d the teacher's width.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.core.checks import finite
from reparam.core.memory import lacks_memory
from reparam.core.surface import advice
from reparam.vision.blocks import States, blocks_of

if TYPE_CHECKING:
    from reparam.vision.patches import Vision

Pairs = Literal["aligned", "upstream"] | Sequence[tuple[int, int]]


class Teacher:
    """A frozen vision transformer, and how it sees the images of a student.

    Args:
        model: a vision model of transformers (CLIP, SigLIP, DINOv2, AIMv2 and others), or any module that takes pixels
            [B, C, H, W] and returns the outputs of its blocks, a sequence of states [B, tokens, d]. A model of
            transformers with text and vision is reduced to its vision part.
        patch: side of its patches in pixels; by default as its configuration says.
        mean: mean of its pixels by channel. By default, the student's.
        std: standard deviation of its pixels by channel. By default, the student's.

    Raises ValueError if the side of the patches is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        patch: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.model = getattr(model, "vision_model", model).eval().requires_grad_(False)
        config: Any = getattr(self.model, "config", None)
        self.states = States(blocks_of(self.model)[1]) if config is not None else None
        found = patch if patch is not None else getattr(config, "patch_size", None)
        if not isinstance(found, int):
            raise ValueError(
                f"the side of the patches of the teacher {type(model).__name__} is not known; pass Teacher(model, "
                f"patch=...)"
            )
        self.patch = found
        self.mean, self.std = mean, std

    def measured(self, vision: Vision) -> tuple[int, int]:
        """The number of blocks and the width d, found by a trial on an empty image of the student's size.

        Raises ValueError as a call does.
        """
        pixels = torch.zeros(1, vision.channels, vision.size, vision.size)
        if self.states is None:
            with torch.no_grad():
                depth = len(list(self.model(self._input(pixels, vision))))
        else:
            depth = len(self.states.blocks)
        return depth, self(pixels, vision, {1})[1].shape[2]

    @torch.no_grad()
    def __call__(self, pixels: Tensor, vision: Vision, indices: set[int]) -> dict[int, Tensor]:
        """The states [B, h * w, d] with these indices for the student's images [B, C, H, W].

        The images get the teacher's normalization, and a size that gives the same grid of patches; tokens before those
        of the patches, such as CLS, are left out. Raises ValueError if the teacher has another number of tokens, or
        refuses the size.
        """
        height, width = pixels.shape[2] // vision.patch, pixels.shape[3] // vision.patch
        found = self._states(self._input(pixels, vision), indices)
        grid = height * width
        for index, state in found.items():
            extra = state.shape[1] - grid
            if extra < 0 or extra > self._prefix():
                raise ValueError(
                    f"the teacher has {state.shape[1]} tokens for an image that the model sees as {height} x {width} "
                    f"patches, {grid} tokens; choose a teacher and a size with the same grid"
                )
            found[index] = state[:, extra:]
        return found

    def _prefix(self) -> int:
        """The most tokens that can stand before those of the patches: CLS, and registers."""
        config: Any = getattr(self.model, "config", None)
        return 1 + int(getattr(config, "num_register_tokens", 0) or 0)

    def _input(self, pixels: Tensor, vision: Vision) -> Tensor:
        """The images with the teacher's size, normalization and dtype, on its device."""
        height, width = pixels.shape[2] // vision.patch, pixels.shape[3] // vision.patch
        if self.mean is not None or self.std is not None:
            pixels = self._normalized(pixels, vision)
        if self.patch != vision.patch:
            size = (height * self.patch, width * self.patch)
            pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
        first = next(self.model.parameters(), pixels)
        return pixels.to(first.device, first.dtype)

    def _normalized(self, pixels: Tensor, vision: Vision) -> Tensor:
        """The pixels with the teacher's normalization in place of the student's."""

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=pixels.dtype, device=pixels.device).view(1, -1, 1, 1)

        plain = pixels * column(vision.std) + column(vision.mean)
        return (plain - column(self.mean or vision.mean)) / column(self.std or vision.std)

    def _states(self, pixels: Tensor, indices: set[int]) -> dict[int, Tensor]:
        if self.states is None:
            states = list(self.model(pixels))
            outside = [index for index in indices if not 1 <= index <= len(states)]
            if outside:
                raise ValueError(
                    f"the teacher returns the outputs of {len(states)} blocks, and block {outside[0]} is asked for; "
                    f"give pairs of states"
                )
            return {index: states[index - 1] for index in indices}
        more = {"interpolate_pos_encoding": True} if _interpolates(self.model) else {}
        try:
            with self.states.recording(indices):
                self.model(pixel_values=pixels, **more)
        except (ValueError, RuntimeError) as error:  # of another size than its own, if it has positions for that alone
            if lacks_memory(error):
                raise
            raise ValueError(f"the teacher cannot see images of {list(pixels.shape[2:])} pixels: {error}") from None
        return dict(self.states.found)


class Distillation(nn.Module):
    """What a teacher adds to the training of a `VoRA`. Its parameters are the heads; the teacher is not part of it.

    Args:
        teacher: the teacher.
        vision: the pixels and patches of the student.
        hidden: width of the language model.
        blocks: number of blocks of the student that are adapted.
        pairs: which state meets which, as pairs (student's, teacher's): state 0 enters the first block, and state k
            leaves block k - 1. "aligned": outputs of the same blocks, (1, 1) ... (N, N). "upstream": as in the code of
            the paper's authors, what enters block i meets the output of the teacher's block i, (0, 1) ... (N - 1, N).
        weight: weight of the loss beside the language model's.
        seed: seed of the heads' initial values.

    Attributes:
        losses: after a forward pass in training, the loss of each pair, a scalar with gradients; empty without images.
        last: the values of the last losses.

    Raises ValueError for pairs outside of the blocks, and if the teacher has another number of blocks and no pairs are
    given.
    """

    def __init__(
        self,
        teacher: Teacher,
        vision: Vision,
        *,
        hidden: int,
        blocks: int,
        pairs: Pairs = "aligned",
        weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not finite(weight) or weight <= 0:
            raise ValueError(f"weight={weight!r}: expected a finite number above 0")
        self._teacher = (teacher,)  # a tuple, so that it is no submodule
        self.vision, self.weight = vision, weight
        depth, width = teacher.measured(vision)
        self.pairs = _pairs(pairs, blocks, depth)
        self.losses: list[Tensor] = []
        self.last: list[float] = []
        self._told = False
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(
                nn.Sequential(nn.RMSNorm(hidden, eps=1e-5), nn.Linear(hidden, width, bias=False)) for _ in self.pairs
            )

    @property
    def student_indices(self) -> set[int]:
        """The indices of the student's states that are compared."""
        return {student for student, _ in self.pairs}

    def forget(self) -> None:
        """Drop the losses of the last forward pass."""
        self.losses = []

    def compare(self, states: dict[int, Tensor], pixels: Sequence[Tensor], images: Tensor) -> None:
        """Compute the losses of a forward pass with images; see `VoRA.forward` for shapes."""
        teacher = self._teacher[0]
        device = images.device
        wanted = {index for _, index in self.pairs}
        taught: dict[int, dict[int, Tensor]] = {index: {} for index in wanted}
        shapes: dict[torch.Size, list[int]] = {}
        for number, image in enumerate(pixels):
            shapes.setdefault(image.shape, []).append(number)
        for numbers in shapes.values():
            found = teacher(torch.stack([pixels[number] for number in numbers]).to(device), self.vision, wanted)
            for index, state in found.items():
                taught[index] |= dict(zip(numbers, state, strict=True))
        targets = {index: torch.cat([held[n] for n in range(len(pixels))]) for index, held in taught.items()}
        self.losses = []
        for head, (student, index) in zip(self.heads, self.pairs, strict=True):
            mine = head(states[student][images >= 0].to(head[1].weight.dtype))  # type: ignore[index]
            self.losses.append(self._loss(mine, targets[index].to(mine.dtype)))
        self.last = torch.stack(self.losses).tolist()

    def _loss(self, mine: Tensor, theirs: Tensor) -> Tensor:
        empty = int((theirs.norm(dim=1) == 0).sum())
        if empty and not self._told:
            self._told = True
            warnings.warn(
                f"{empty} states of the teacher are zero and have no direction; their loss is 1", stacklevel=2
            )
        return (1 - F.cosine_similarity(mine, theirs, dim=1, eps=1e-8)).mean()

    def total(self) -> Tensor | None:
        """The loss to add to the language model's: the weighted mean over pairs, or None without images."""
        return self.weight * torch.stack(self.losses).mean() if self.losses else None


def _pairs(pairs: Pairs, blocks: int, depth: int) -> tuple[tuple[int, int], ...]:
    if isinstance(pairs, str):
        if pairs not in ("aligned", "upstream"):
            raise ValueError(f"pairs={pairs!r}: expected 'aligned', 'upstream', or pairs of states such as (1, 2)")
        if depth != blocks:
            raise ValueError(
                f"the teacher has {depth} blocks, and {blocks} blocks of the model are adapted: "
                + advice(
                    f"adapt as many, with blocks={depth}, or give pairs of states, such as (1, 2) for the first block "
                    "of the model and the second one of the teacher",
                    f"adapt as many, with --vision.blocks {depth}, or take another teacher",
                )
            )
        return tuple((number if pairs == "aligned" else number - 1, number) for number in range(1, blocks + 1))
    found = tuple((int(student), int(teacher)) for student, teacher in pairs)
    if not found:
        raise ValueError("pairs: expected at least one pair of states")
    for student, teacher in found:
        if not 0 <= student <= blocks or not 0 <= teacher <= depth:
            raise ValueError(
                f"pairs: ({student}, {teacher}): expected states 0 ... {blocks} of the model and 0 ... {depth} of the "
                f"teacher"
            )
    return found


def _interpolates(model: nn.Module) -> bool:
    """Whether the model fits its table of positions to the size of the images if it is asked to."""
    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
