"""The cases of the conformance suite: every setting of every method, every storage. A new one needs no edit here.

A toy storage, a toy method and a toy kind of site are included, so that quantized weights, gains, shared state, updates
that depend on their input, and modules other than `nn.Linear` are always tested.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from sampled import FULL, pairs
from torch import Tensor, nn
from toys import Fixed16, Nudge, Product
from transformers.pytorch_utils import Conv1D

import reparam
import reparam.methods
import reparam.weights
from reparam.core.base import Storage
from reparam.core.method import Method
from reparam.core.registry import METHODS, STORAGES
from reparam.errors import InputDependentError
from reparam.sites import targets

TOYS: dict[str, type[Method]] = {"nudge": Nudge}
SETTINGS = [
    pytest.param(cls(**settings), id=f"{name}{index}")
    for name, cls in {**METHODS, **TOYS}.items()
    for index, settings in enumerate(cls.examples)
]
FIRST = [param for param in SETTINGS if param.id and param.id.endswith("0")]
QUANTIZED: dict[str, Storage] = {
    f"{name}{index or ''}": cls(**settings)
    for name, cls in {**STORAGES, "fixed16": Fixed16}.items()
    for index, settings in enumerate(cls.examples)
}
KINDS = ("linear", "bias", "conv1d", "embedding", "product")
PACKED = [name for name in QUANTIZED if name != "dense"]
EVERYWHERE = list(itertools.product(SETTINGS, KINDS, QUANTIZED))
PAIRS = pairs(SETTINGS, KINDS, QUANTIZED)
"""Every setting on every kind of layer and every storage, and every kind on every storage."""
SAMPLE = [
    (setting, kind, storage)
    for index, setting in enumerate(SETTINGS)
    for kind, storage in (
        *((kind, "dense") for kind in (KINDS if setting in FIRST else (KINDS[index % len(KINDS)],))),
        ("linear", PACKED[index % len(PACKED)]),
    )
]
"""The first setting of every method on every kind of layer, the others on one; and each on a quantized storage."""


class One(nn.Module):
    """A model of one layer, under a path that the examples' patterns match."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.q_proj: nn.Module = {
                "linear": lambda: nn.Linear(12, 20, bias=False),
                "bias": lambda: nn.Linear(12, 20),
                "conv1d": lambda: Conv1D(20, 12),
                "embedding": lambda: nn.Embedding(20, 12),
                "product": lambda: Product(12, 20),
            }[kind]()
            if kind == "conv1d":
                nn.init.normal_(self.q_proj.bias)  # type: ignore[arg-type]
            nn.init.normal_(self.q_proj.weight, 0, 0.3)  # type: ignore[arg-type]
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """The layer."""
        return self.q_proj(x)

    def input(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
        """A batch of this shape: vectors of width 12, or ids below 20."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "embedding":
            return torch.randint(20, shape, generator=generator)
        return torch.randn(*shape, 12, generator=generator, dtype=torch.float32).to(dtype)


def one(kind: str, method: Method, storage: str = "dense") -> tuple[One, reparam.Adapter]:
    """A one-layer model with a fresh adapter; skips the test if the method does not support embeddings."""
    model = One(kind)
    if why := method.unsupported_reason(targets.site_of("q_proj", model.q_proj)):
        pytest.skip(why)
    store(model, ["q_proj"], storage)
    try:
        return model, reparam.attach(model, method, targets=["q_proj"], name="one")
    except InputDependentError:
        if kind != "embedding":
            raise
        pytest.skip("an update that depends on its input has no rows")


def attach(
    model: nn.Module, method: Method, linear: list[str], embeddings: list[str], *, name: str = "default"
) -> reparam.Adapter:
    """Attach an adapter to the linear maps, and to these embeddings if the method supports them."""
    places = [targets.site_of(path, model.get_submodule(path)) for path in targets.resolve(model, embeddings)]
    if any(method.unsupported_reason(site) for site in places):
        return reparam.attach(model, method, targets=linear, name=name)
    try:
        return reparam.attach(model, method, targets=[*linear, *embeddings], name=name)
    except InputDependentError:
        return reparam.attach(model, method, targets=linear, name=name)


@dataclasses.dataclass(frozen=True)
class Family:
    """A whole model, and the adapter's targets in it."""

    make: Callable[[], Any]
    embedding: str
    head: str

    def build(self, storage: str = "dense") -> Any:
        """Build the model with its linear maps and its embedding in this storage."""
        model = self.make()
        store(model, targets.resolve(model, ["all-linear", self.embedding]), storage)
        return model

    def attach(self, model: nn.Module, method: Method, *, name: str = "one") -> reparam.Adapter:
        """Attach an adapter to every linear map, and to the embedding if the method supports it."""
        return attach(model, method, ["all-linear"], [self.embedding], name=name)

    def adapted(
        self, method: Method, storage: str = "dense", *, seed: int | None = None, name: str = "one"
    ) -> tuple[Any, reparam.Adapter]:
        """The model with an adapter; with a seed, its parameters are moved from their initial values."""
        model = self.build(storage)
        adapter = self.attach(model, method, name=name)
        if seed is not None:
            move(adapter, seed)
        return model, adapter


FAMILIES = {
    "llama": Family(models.llama, "embed_tokens", "lm_head"),
    "gpt2": Family(models.gpt2, "wte", "lm_head"),
}
PLAIN = ("llama", "dense")
ELSEWHERE = [("llama", storage) for storage in QUANTIZED if storage != "dense"] + [("gpt2", "dense")]


def whole_models(check: int) -> pytest.MarkDecorator:
    """Run a check of whole models with every setting, each on one model and storage; the number tells checks apart.

    Half of the settings are on a plain Llama, the others on a quantized one or, if they are the first of their method,
    on a GPT-2. Ten checks with successive numbers meet every setting on all of them. The full suite runs every check
    with all of them.
    """
    found = []
    for index, setting in enumerate(SETTINGS):
        elsewhere = [place for place in ELSEWHERE if place[0] == "llama" or setting in FIRST]
        places = [place for other in elsewhere for place in (PLAIN, other)]
        for family, storage in dict.fromkeys(places) if FULL else [places[(index + check) % len(places)]]:
            name = f"{family}-{storage}-{setting.id}"
            found.append(pytest.param(FAMILIES[family], storage, *setting.values, id=name))
    return pytest.mark.parametrize(("family", "storage", "method"), found)


def storages_in_turn(check: int) -> pytest.MarkDecorator:
    """Run a check with the first setting of every method, each on one storage; in the full suite on all of them."""
    stored = list(QUANTIZED)
    found = [
        pytest.param(storage, *setting.values, id=f"{storage}-{setting.id}")
        for index, setting in enumerate(FIRST)
        for storage in (stored if FULL else [stored[(index + check) % len(stored)]])
    ]
    return pytest.mark.parametrize(("storage", "method"), found)


def store(model: nn.Module, paths: list[str], storage: str) -> None:
    """Quantize the matrices of these modules into a storage."""
    if storage != "dense":
        reparam.quantize(model, QUANTIZED[storage], targets=paths)


@torch.no_grad()
def move(adapter: reparam.Adapter, seed: int, *, size: float = 0.1) -> None:
    """Add seeded noise to every parameter of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=size)


def has_factors(adapter: reparam.Adapter) -> bool:
    """Whether a single matrix represents the update (`factors` exists)."""
    try:
        for path, update in adapter.updates.items():
            update.factors(adapter.modules[path].frozen)
    except InputDependentError:
        return False
    return True


def base_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a model that belong to no adapter."""
    own = re.compile(r"(^|\.)(updates|biases|reparam_shared|reparam)\.")
    return {name: tensor for name, tensor in models.frozen(model).items() if not own.search(name)}


def starts_exactly(adapter: reparam.Adapter) -> bool:
    """Whether a fresh adapter gives the base's output bit for bit: no gain, and one factor is zero."""
    if not has_factors(adapter):
        return False
    found = [update.factors(adapter.modules[path].frozen) for path, update in adapter.updates.items()]
    return all(f.gain is None and not (f.A.any() and f.B.any()) for f in found)


def error(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference over the largest entry."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
