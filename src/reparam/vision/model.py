"""A decoder language model that sees: adapters in its first blocks, an embedding of patches, and the image mask.

Shapes: B rows, L tokens of a row, N images of a batch, V entries of the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from reparam.adapter.adapter import Adapter
from reparam.adapter.attach import attach, remove
from reparam.adapter.merge import MergeReport, merge
from reparam.core.checks import whole
from reparam.core.method import Method
from reparam.errors import InputDependentError
from reparam.methods.lora import LoRA
from reparam.sites.targets import resolve
from reparam.vision.answers import generated
from reparam.vision.blocks import States, blocks_of
from reparam.vision.distill import Distillation, Pairs, Teacher
from reparam.vision.mask import check_masks, image_mask
from reparam.vision.patches import PatchEmbedding, Vision
from reparam.vision.placing import check_places, placed, positions_of
from reparam.vision.prefill import Prompt

if TYPE_CHECKING:
    from reparam.vision.processor import Processor

NAME = "vision"
"""The name of the adapter."""
Mask = Literal["image", "causal"]
PUBLISHED = Vision()
LORA = LoRA(r=64, scaling="none")


class VoRA(nn.Module):
    """Vision as LoRA on a decoder of transformers (arXiv 2503.20680).

    At the start, text alone has the outputs of `model`, bit for bit. Only the adapter, the patch embedding and the
    heads of a distillation require gradients.

    Args:
        model: a decoder language model of transformers, dense or quantized, without adapters.
        vision: the settings of the patch embedding.
        blocks: the number N of blocks, from the first one, whose linear maps are adapted; by default all of them.
        method: the adapter, any one that can be merged; by default LoRA as published: scale 1. None for no adapter, for
            a model whose adapter is merged.
        targets: which linear maps of these blocks; by default all of them.
        mask: "image" lets the tokens of one image see each other; "causal" is for comparisons.
        seed: seed of the initial values of the patch embedding. The adapter has the seed of its method.

    Attributes:
        language: the language model.
        embedding: the patch embedding.
        adapter: the adapter, or None once it is merged.
        distillation: what a teacher adds to training, or None; see `distill`.
        processor: makes inputs from texts and images; `reparam.vision.load` sets it, and `generate` needs it.

    Raises:
        ValueError: more blocks than the model has, a method that cannot be merged, a model without an attention mask,
            and what `attach` refuses.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    >>> vision = Vision(patch=2, size=4, width=8)
    >>> vora = VoRA(LlamaForCausalLM(LlamaConfig(**sizes)), vision=vision, blocks=1, method=LoRA(r=2, scaling="none"))
    >>> images = torch.tensor([[-1, 0, 0, 0, 0, -1]])
    >>> vora(torch.zeros(1, 6, dtype=torch.long), pixel_values=[torch.rand(3, 4, 4)], image_ids=images).logits.shape
    torch.Size([1, 6, 50])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        vision: Vision = PUBLISHED,
        blocks: int | None = None,
        method: Method | None = LORA,
        targets: str | Sequence[str] = "all-linear",
        mask: Mask = "image",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_masks(model)
        if mask not in get_args(Mask):
            raise ValueError(f"mask={mask!r}: expected {' or '.join(map(repr, get_args(Mask)))}")
        layers = blocks_of(model)[1]
        self.blocks = len(layers) if blocks is None else blocks
        if not whole(self.blocks, 1) or self.blocks > len(layers):
            raise ValueError(f"blocks={blocks!r}: the language model has {len(layers)} blocks; expected 1 ... that")
        self.language: Any = model
        self.vision, self.mask = vision, mask
        self.states = States(layers)
        self.adapter: Adapter | None = None
        self.distillation: Distillation | None = None
        self.processor: Processor | None = None
        if method is not None:
            self.attach(method, targets=targets)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made = PatchEmbedding(vision, model.config.get_text_config().hidden_size)  # type: ignore[operator, union-attr]
        self.embedding = made.to(next(model.parameters()).device)

    def attach(
        self, method: Method, *, targets: str | Sequence[str] = "all-linear", everywhere: bool = False
    ) -> Adapter:
        """Put a new adapter on the first `blocks` blocks, or `everywhere`; for a model whose adapter is merged.

        Raises ValueError if there is an adapter already, if the method cannot be merged, and as `reparam.attach` does.
        """
        if self.adapter is not None:
            raise ValueError("there is an adapter already: merge it first")
        if not method.changes_weights:
            raise ValueError(f"{method.name} changes no weights, so it cannot be merged; choose a method that can be")
        path = blocks_of(self.language)[0]
        first = "" if everywhere else tuple(f"{path}.{number}." for number in range(self.blocks))
        wanted = [targets] if isinstance(targets, str) else list(targets)
        names = [name for name in resolve(self.language, wanted) if name.startswith(first)]
        if not names:
            raise ValueError(f"targets: {', '.join(wanted)} selects nothing in the first {self.blocks} blocks")
        adapter = attach(self.language, method, targets=names, name=NAME)
        try:
            for site, update in list(adapter.updates.items())[:1]:
                update.factors(adapter.modules[site].frozen)
        except InputDependentError as error:
            remove(self.language, NAME)
            raise ValueError(f"{method.name} cannot be merged, which VoRA needs: {error}") from None
        self.adapter = adapter
        return adapter

    @property
    def config(self) -> Any:
        """The configuration of the language model."""
        return self.language.config

    @property
    def device(self) -> torch.device:
        """Where the patch embedding is."""
        return self.embedding.positions.device

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens, as models of transformers have it."""
        found: nn.Module = self.language.get_input_embeddings()
        return found

    def activation_checkpointing_enable(self, *args: Any, **settings: Any) -> None:
        """Recompute activations of the language model in the backward pass, as models of transformers do."""
        self.language.activation_checkpointing_enable(*args, **settings)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name: of the adapter, the patch embedding, and any heads."""
        found = {f"adapter.{name}": p for name, p, _ in (self.adapter.named_parameters() if self.adapter else ())}
        found |= {f"embedding.{name}": p for name, p in self.embedding.named_parameters()}
        if self.distillation is not None:
            found |= {f"heads.{name}": p for name, p in self.distillation.named_parameters()}
        return {name: parameter for name, parameter in found.items() if parameter.requires_grad}

    # ---- a forward pass

    def forward(
        self,
        input_ids: Tensor,
        *,
        pixel_values: Sequence[Tensor] | Tensor | None = None,
        image_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """The language model's output for text with images.

        Args:
            input_ids: token ids, [B, L] int64; those at the places of images can be any of the vocabulary.
            pixel_values: the images, each [C, H, W], in the order of their places, as the processor makes them.
            image_ids: the number of the image that each token belongs to, and -1 for text, [B, L] int64.
            attention_mask: which tokens are no padding, [B, L]; by default all.
            labels: ids to predict, [B, L]; -100 for none, as at all places of images.
            others: arguments of the language model, such as `num_items_in_batch`.

        In training with a teacher, `distillation.losses` holds its losses afterwards; `loss` does not contain them.
        Raises ValueError if images and places do not match, and for a row that is longer than the model's context.
        """
        self._check_length(input_ids.shape[1])
        pixels = [] if pixel_values is None else list(pixel_values)
        if self.distillation is not None:
            self.distillation.forget()
        if not pixels and (image_ids is None or not bool((image_ids >= 0).any())):
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **others}
            if attention_mask is not None and "position_ids" not in others:
                given["position_ids"] = positions_of(attention_mask)
            return self.language(**{key: value for key, value in given.items() if value is not None})
        if image_ids is None:
            raise ValueError(f"{len(pixels)} images are given without image_ids, the places of their tokens")
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        tokens = self.embedding(pixels)
        check_places(image_ids, [len(each) for each in tokens], labels)
        positions = others.pop("position_ids", None)
        positions = positions_of(valid) if positions is None else positions
        embeds = self._embeds(input_ids, image_ids, tokens)
        given = {"inputs_embeds": embeds, "attention_mask": valid, "labels": labels, "position_ids": positions}
        if self.mask == "image":
            given["attention_mask"] = image_mask(self.language, embeds, valid, image_ids, positions=positions)
        given = {**{key: value for key, value in given.items() if value is not None}, **others}
        if self.distillation is None or not self.training:
            return self.language(**given)
        with self.states.recording(self.distillation.student_indices):
            output = self.language(**given)
        self.distillation.compare(self.states.found, pixels, image_ids)
        return output

    def _embeds(self, input_ids: Tensor, image_ids: Tensor, tokens: Sequence[Tensor]) -> Tensor:
        embed = self.language.get_input_embeddings()
        return placed(embed(input_ids.masked_fill(image_ids >= 0, 0)), image_ids, tokens)

    def _check_length(self, length: int) -> None:
        most = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and length > most:
            raise ValueError(
                f"a row has {length:,} tokens with those of its images, and the context of the model is {most:,}; "
                f"shorten the text, or use smaller or fewer images"
            )

    # ---- generation

    def generate(
        self, text: Any, images: Any = None, *, max_new_tokens: int = 128, raw: bool | None = None, **settings: Any
    ) -> Any:
        """The answer to one prompt, or the list of answers to several; see `Processor` for texts and images.

        By default, the likeliest token is taken each time; `settings` are others of transformers' `generate`, such as
        `do_sample=True`. Raises ValueError without a processor, and as the processor does.
        """
        return generated(self, text, images, raw=raw, max_new_tokens=max_new_tokens, **settings)

    @torch.no_grad()
    def generate_ids(
        self,
        input_ids: Tensor,
        *,
        pixel_values: Sequence[Tensor] | Tensor | None = None,
        image_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        """transformers' `generate` for prompts with images, padded on the left; the arguments are those of `forward`.

        Returns token ids, [B, L + new]. The cache is the language model's own.
        """
        self._check_length(input_ids.shape[1])
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        given = {"input_ids": input_ids, "attention_mask": valid, **settings}
        pixels = [] if pixel_values is None else list(pixel_values)
        if not pixels:
            return torch.as_tensor(self.language.generate(**given))
        if image_ids is None:
            raise ValueError(f"{len(pixels)} images are given without image_ids, the places of their tokens")
        tokens = self.embedding(pixels)
        check_places(image_ids, [len(each) for each in tokens])
        embeds = self._embeds(input_ids, image_ids, tokens)
        with self._prompted(embeds, valid, image_ids):
            return torch.as_tensor(self.language.generate(**given))

    @contextlib.contextmanager
    def _prompted(self, embeds: Tensor, valid: Tensor, images: Tensor) -> Iterator[None]:
        """Give the forward passes of `generate` the images of the prompt, and their mask."""
        prompt = Prompt(embeds, valid, images, masked=self.mask == "image")
        handle = self.language.register_forward_pre_hook(prompt, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    # ---- the end of training

    def distill(
        self, teacher: Teacher | nn.Module | None, *, pairs: Pairs = "aligned", weight: float = 1.0, seed: int = 0
    ) -> Distillation | None:
        """Let a teacher's hidden states guide training; None for no teacher. The settings are `Distillation`'s.

        Raises ValueError as `Teacher` and `Distillation` do.
        """
        if teacher is None:
            self.distillation = None
            return None
        teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        hidden = self.config.get_text_config().hidden_size
        made = Distillation(
            teacher, self.vision, hidden=hidden, blocks=self.blocks, pairs=pairs, weight=weight, seed=seed
        )
        self.distillation = made.to(self.device)
        return self.distillation

    def merge(self) -> MergeReport:
        """Merge the adapter into the language model, and drop teacher and heads. Raises ValueError if that is done."""
        if self.adapter is None:
            raise ValueError("there is no vision adapter to merge: it has been merged already")
        report = merge(self.language)
        self.adapter = self.distillation = None
        return report
