"""Experts with adapters compile as one graph; outputs and gradients are those of eager mode."""

import moe
import pytest
import torch

import reparam


@pytest.mark.parametrize(
    ("kind", "dtype"), [("Qwen3Moe", torch.float32), ("Mixtral", torch.float32), ("GptOss", torch.bfloat16)]
)
def test_one_graph_equals_eager(kind: str, dtype: torch.dtype) -> None:
    model = moe.build(kind, num_hidden_layers=1).to(dtype)
    adapter = moe.trained(reparam.attach(model, reparam.LoRA(r=2), targets="experts"))
    block = model.model.layers[0].mlp  # the router and the experts; the rest of a graph would only take time
    draw = torch.Generator().manual_seed(0)
    x, g = (torch.randn(2, 5, 32, generator=draw).to(dtype) for _ in range(2))
    found = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        y = run(x)
        y = y if isinstance(y, torch.Tensor) else y[0]
        y.backward(g)
        found.append((y.detach(), [torch.zeros_like(p) if p.grad is None else p.grad for p in adapter.parameters()]))
        for parameter in adapter.parameters():
            parameter.grad = None
    (eager, gradients), (compiled, others) = found
    bound = 1e-5 if dtype is torch.float32 else 0.02
    assert (eager - compiled).abs().max() <= bound * eager.abs().max()
    for one, other in zip(gradients, others, strict=True):
        assert (one - other).norm() <= bound * one.norm() + 1e-6
