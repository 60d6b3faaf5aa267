"""Experts whose weights are stacked in one parameter: each matrix of each expert is a site.

The judge is the model itself, with W + ΔW written into its parameters.
"""

import os
from pathlib import Path
from typing import Any

import experts_alone
import models
import pytest
import torch
from models import IDS, logits
from moe import KINDS, build, trained
from torch import Tensor, nn

import reparam
from reparam.sites.experts import Opened

CLASSES = experts_alone.classes()
SAMPLE = ["mixtral.MixtralExperts", "gpt_oss.GptOssExperts", "llama4.Llama4TextExperts", "aria.AriaExperts",
          "nemotron_h.NemotronHExperts", "muse_spark.MuseSparkExperts", "longcat_flash.LongcatFlashExperts",
          "jetmoe.JetMoeParallelExperts"]  # fmt: skip
CENSUS = list(CLASSES) if os.environ.get("REPARAM_TESTS") == "full" else SAMPLE


def written(model: nn.Module, adapter: reparam.Adapter) -> dict[str, Tensor]:
    """W' = W + ΔW of each changed parameter of the base, in float64, differentiable in the adapter's parameters."""
    own = {name: p.detach().double() for name, p in model.named_parameters() if ".updates." not in name}
    found: dict[str, Any] = {}
    for path, site in adapter.sites.items():
        factors = adapter.updates[path].factors(adapter.modules[path].frozen)
        delta = factors.B.double() @ factors.A.double()
        if site.kind == "expert":
            above, number, name = path.rsplit(".", 2)
            key = f"{above}.{name}"
            parts = found.setdefault(key, list(own[key]))
            parts[int(number)] = parts[int(number)] + (delta.T if site.transposed else delta)
        else:
            found[f"{path}.weight"] = own[f"{path}.weight"] + delta
    return {key: torch.stack(value) if isinstance(value, list) else value for key, value in found.items()}


@pytest.mark.parametrize("name", CENSUS)
def test_every_class_computes_with_the_updates(name: str) -> None:
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        module, args = experts_alone.alone(CLASSES[name], implementation)
        if not hasattr(module, "is_transposed") and implementation != "eager":
            continue
        model = nn.ModuleDict({"experts": module})
        base = module(*args)
        adapter = reparam.attach(model, reparam.LoRA(r=2, alpha=4), targets="experts")
        assert torch.equal(module(*args), base), implementation
        y = module(*args)
        trained(adapter)
        y = module(*args)
        for key, value in written(model, adapter).items():
            module.get_parameter(key.removeprefix("experts.")).data.copy_(value)
        reparam.remove(model, "default")
        assert type(module) is CLASSES[name]
        assert (y - base).abs().max() > 0.05 * y.abs().max()
        assert torch.allclose(y, module(*args), atol=2e-6 * float(y.abs().max())), implementation


@pytest.mark.parametrize(("kind", "implementation"), [(k, "grouped_mm") for k in KINDS] + [("GptOss", "eager")])
def test_outputs_and_gradients_are_those_of_the_dense_sum(kind: str, implementation: str) -> None:
    model = build(kind, implementation)
    base = logits(model)
    adapter = reparam.attach(model, reparam.LoRA(r=2, alpha=4))
    assert torch.equal(logits(model), base)
    assert sum(".experts." in path for path in adapter.sites) >= 8
    trained(adapter)
    g = torch.randn(base.shape, generator=torch.Generator().manual_seed(0))
    found = model(IDS).logits
    found.backward(g)
    judge = build(kind, "eager").double()
    changed = written(model, adapter)
    expected = torch.func.functional_call(judge, changed, (IDS,)).logits
    gradients = torch.autograd.grad(expected, adapter.parameters(), g.double(), allow_unused=True)
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    for (name, parameter, _), exact in zip(adapter.named_parameters(), gradients, strict=True):
        if parameter.grad is None:  # no token went to this expert
            assert exact is None or not exact.any(), name
        else:
            assert exact is not None
            assert (parameter.grad - exact).norm() < 1e-3 * exact.norm() + 1e-6, name


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize(
    "method",
    [
        reparam.LoRA(r=2),
        reparam.DoRA(r=2),
        reparam.AdaLoRA(init_r=3, target_r=2),
        reparam.Full(),
        reparam.Intrinsic(d=20, projection="dense"),
        reparam.LoRA(r=2, rank_pattern={r"experts\..*": 1, r"experts\.3\..*": 3}, dropout=0.5),
    ],
    ids=["lora", "dora", "adalora", "full", "intrinsic", "patterns"],
)
def test_methods_are_saved_loaded_merged_restored_and_removed(method: Any, kind: str, tmp_path: Path) -> None:
    model = build(kind)
    shape, before = str(model), models.frozen(model)
    base = logits(model)
    adapter = reparam.attach(model, method)
    assert (logits(model) - base).abs().max() < 1e-5
    y = trained(adapter) and logits(model)
    assert (y - base).abs().max() > 1e-3
    adapter.save(tmp_path / "a")
    other = build(kind)
    reparam.load(other, tmp_path / "a")
    assert torch.equal(logits(other), y)
    report = reparam.merge(model, keep_base=True)
    assert str(model) == shape
    assert (logits(model) - y).abs().max() < 1e-4
    report.restore()
    assert torch.equal(logits(model), y)
    reparam.remove(model, "default")
    assert str(model) == shape
    assert models.same(models.frozen(model), before)


def test_ranks_of_single_experts() -> None:
    adapter = reparam.attach(build("Qwen3Moe"), reparam.LoRA(r=4, rank_pattern={r"experts\.3\..*": 2, "down_proj": 1}))
    ranks = {path.split("experts.")[1]: len(u.A) for path, u in adapter.updates.items() if ".0.mlp.experts." in path}  # type: ignore[arg-type]
    assert ranks["0.gate_up_proj"] == 4
    assert ranks["0.down_proj"] == 1
    assert ranks["3.gate_up_proj"] == ranks["3.down_proj"] == 2


def test_an_expert_without_tokens_gets_no_gradient_and_does_not_move() -> None:
    module, (x, chosen, weights) = experts_alone.alone(CLASSES["mixtral.MixtralExperts"], "grouped_mm")
    model = nn.ModuleDict({"experts": module})
    adapter = trained(reparam.attach(model, reparam.LoRA(r=2), targets="experts"))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    for step in range(2):
        before = {name: p.detach().clone() for name, p, _ in adapter.named_parameters()}
        module(x, chosen.clamp(max=3 - step), weights).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(before["experts.3.down_proj.B"], dict(adapter.updates)["experts.3.down_proj"].B)  # type: ignore[arg-type]
    assert not torch.equal(before["experts.2.down_proj.B"], dict(adapter.updates)["experts.2.down_proj"].B)  # type: ignore[arg-type]


def test_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = build("Qwen3Moe").train()
        adapter = trained(reparam.attach(model, reparam.LoRA(r=2), targets="experts"))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        models.loss(model).backward()
        found.append([p.grad for p in adapter.parameters()])
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_implementations_that_read_the_weights_themselves_are_refused() -> None:
    model = build("Qwen3Moe")
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets="experts")
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(ValueError, match="experts_implementation='sonicmoe' computes with the stacked weights itself"):
        model(IDS)
    model.config._experts_implementation = "eager"
    model(IDS)
    assert any(isinstance(module, Opened) for module in model.modules())
    assert len(adapter.sites) == 16
