"""Mixtures from the literature as presets. Each builds what `Mixture` with the same settings builds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from reparam.core.registry import method
from reparam.methods.mixture.method import Mixture

Examples = tuple[Mapping[str, Any], ...]
_SMALL: Examples = ({"n": 3, "r": 2, "alpha": 2.0, "dropout": 0.0},)


@method("task_gated")
@dataclasses.dataclass(frozen=True)
class TaskGated(Mixture):
    """MOELoRA (Liu et al. 2023, arXiv 2310.18339): experts of rank r / N, and one gate per task for the whole model.

    The defaults are those of the released trainer: A is drawn from N(0, 0.01²), and the scale is α / r, where r is the
    total rank of all experts.

    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> adapter = reparam.attach(model, reparam.TaskGated(n=2, r=4, tasks=("count", "defaults")), targets=["0"])
    >>> with reparam.context(model, tasks="count"):
    ...     print(tuple(model(torch.randn(3, 8)).shape))
    (3, 6)
    """

    examples: ClassVar[Examples] = ({"n": 2, "r": 4},)

    n: int = 8
    r: int = 16
    alpha: float = 32.0
    split: bool = True
    init: str = "gaussian"
    init_std: float | None = 0.01
    router: str = "task_embedding"
    scope: str = "model"


@method("poly")
@dataclasses.dataclass(frozen=True)
class Poly(Mixture):
    """Polytropon (Ponti et al. 2022, arXiv 2202.13914): task-dependent weights, which mix A and B separately.

    The defaults are those of PEFT with one split; the scale is 1 / r.

    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> adapter = reparam.attach(model, reparam.Poly(n=3, r=2, tasks=("count", "defaults")), targets=["0"])
    >>> [tuple(p.shape) for p in adapter.parameters()]  # A and B of all experts, logits of each task
    [(6, 8), (6, 6), (2, 3)]
    """

    examples: ClassVar[Examples] = ({"n": 3, "r": 2, "alpha": 8.0},)

    r: int = 8
    alpha: float = 1.0
    router: str = "task_logits"
    select: str = "sigmoid"
    combine: str = "factor"


@method("mov")
@dataclasses.dataclass(frozen=True)
class MoV(Mixture):
    """Mixture of (IA)³ vectors (Zadouri et al. 2023, arXiv 2309.05444), routed by the activation that they rescale.

    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> adapter = reparam.attach(model, reparam.MoV(n=3), targets=["0"])
    >>> {name: tuple(p.shape) for name, p, _ in adapter.named_parameters()}
    {'0.vectors': (3, 6), '0.router.weight': (3, 6)}
    """

    examples: ClassVar[Examples] = ({"n": 3},)

    n: int = 10
    kind: str = "vectors"
    route_on: str = "activation"
    router_std: float | None = 0.02


@method("molora")
@dataclasses.dataclass(frozen=True)
class MoLoRA(Mixture):
    """MoLORA (Zadouri et al. 2023, arXiv 2309.05444): all LoRA experts, weighted for each token; their scale is 16 / r.

    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> adapter = reparam.attach(model, reparam.MoLoRA(n=3, r=2), targets=["0"])
    >>> {name: tuple(p.shape) for name, p, _ in adapter.named_parameters()}
    {'0.A': (6, 8), '0.B': (6, 6), '0.router.weight': (3, 8)}
    """

    examples: ClassVar[Examples] = ({"n": 3, "r": 2, "alpha": 4.0},)

    n: int = 10
    alpha: float = 16.0
    init: str = "gaussian"
    init_std: float | None = 0.02
    router_std: float | None = 0.02


@method("llava_mole")
@dataclasses.dataclass(frozen=True)
class LLaVAMoLE(Mixture):
    """LLaVA-MoLE (Chen et al. 2024, arXiv 2401.16160): one expert per token in each MLP, plain LoRA in attention.

    The output of the selected expert is multiplied by its probability. The released code does not multiply, so that the
    task's loss does not train its router.

    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> x = torch.randn(2, 8)
    >>> before = model(x)
    >>> adapter = reparam.attach(model, reparam.LLaVAMoLE(n=3, r=2), targets=["0"])
    >>> torch.equal(model(x), before)  # B is zero at first
    True
    """

    examples: ClassVar[Examples] = (
        {"n": 3, "r": 2, "alpha": 2.0, "dropout": 0.0, "plain": "k_proj|c_attn", "select": "softmax"},
        {"n": 3, "r": 2, "alpha": 2.0, "plain": ""},
    )

    n: int = 3
    r: int = 32
    alpha: float = 64.0
    dropout: float = 0.05
    scope: str = "layer"
    router_bias: bool = True
    select: str = "top_k"
    plain: str = r"[^.]*[Aa]tt(n|ention)[^.]*\..*"
    losses: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"switch_balance": 0.01})


@method("moelora_contrastive")
@dataclasses.dataclass(frozen=True)
class MoELoRAContrastive(Mixture):
    """MoELoRA (Luo et al. 2024, arXiv 2402.12851): each token uses two experts, which a contrastive loss keeps apart.

    The contrastive loss is reconstructed from the paper, see docs/mixtures.md.

    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> adapter = reparam.attach(model, reparam.MoELoRAContrastive(n=3, r=2), targets=["0"])
    >>> sorted(adapter.method.losses)
    ['contrastive', 'switch_balance']
    """

    examples: ClassVar[Examples] = ({"n": 2, "r": 2, "losses": {"switch_balance": 0.01}}, {"n": 3, "r": 2})

    n: int = 8
    select: str = "top_k"
    k: int = 2
    gate: str = "renorm"
    router_std: float | None = 0.02
    losses: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"switch_balance": 0.01, "contrastive": 0.001}
    )


@method("mole")
@dataclasses.dataclass(frozen=True)
class MoLE(Mixture):
    """Mixture of trained LoRAs (Wu et al. 2024, arXiv 2404.13628): one gate per block, which reads the whole sequence.

    In a causal model the gate reads the prompt only. The balance loss is the paper's, but has a gradient.

    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> reparam.attach(model, reparam.MoLE(), targets=["0"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: mole: it combines trained adapters and trains only the router; name their folders in experts, or ...
    >>> adapter = reparam.attach(model, reparam.MoLE(n=3, r=2, frozen=False), targets=["0"])
    >>> sum(p.numel() for p in adapter.parameters())  # three new LoRAs, and a gate [3, 8]
    108
    """

    examples: ClassVar[Examples] = ({"n": 3, "r": 2, "frozen": False, "pool": "all"},)

    frozen: bool = True
    router: str = "sequence"
    scope: str = "block"
    losses: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"mole_balance": 0.5})


@method("loramoe")
@dataclasses.dataclass(frozen=True)
class LoRAMoE(Mixture):
    """LoRAMoE (Dou et al. 2023, arXiv 2312.09979): LoRA experts, weighted for each token.

    The defaults are those of the released script, in which the balance loss has the factor 0.

    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> adapter = reparam.attach(model, reparam.LoRAMoE(n=3, r=2), targets=["0"])
    >>> sum(p.numel() for p in adapter.parameters())  # three LoRAs, and a router [3, 8]
    108
    """

    examples: ClassVar[Examples] = ({"n": 3, "r": 2, "alpha": 2.0, "dropout": 0.0, "losses": {"loramoe_blc": 0.01}},)

    n: int = 8
    alpha: float = 32.0
    dropout: float = 0.05


@method("hydralora")
@dataclasses.dataclass(frozen=True)
class HydraLoRA(Mixture):
    """HydraLoRA (Tian et al. 2024, arXiv 2404.19245): one A for all experts, and one B for each.

    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> adapter = reparam.attach(model, reparam.HydraLoRA(n=3, r=2), targets=["0"])
    >>> {name: tuple(p.shape) for name, p, _ in adapter.named_parameters()}
    {'0.A': (2, 8), '0.B': (6, 6), '0.router.weight': (3, 8)}
    """

    examples: ClassVar[Examples] = _SMALL

    alpha: float = 32.0
    dropout: float = 0.05
    kind: str = "shared_a"


@method("xlora")
@dataclasses.dataclass(frozen=True)
class XLoRA(Mixture):
    """X-LoRA (Buehler & Buehler 2024, arXiv 2402.07148): trained LoRAs, weighted by the base's hidden states.

    Each forward pass runs the model twice, also in generation. All modules use the same weights. The head that computes
    them is one linear layer.

    >>> import torch, reparam
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> adapter = reparam.attach(model, reparam.XLoRA(n=3, r=2, frozen=False), targets=["0"])
    >>> sum(p.numel() for p in adapter.parameters())  # three new LoRAs, and the head with its bias
    111
    """

    examples: ClassVar[Examples] = ()

    frozen: bool = True
    router: str = "two_pass"
    router_bias: bool = True
    scope: str = "model"
