"""Mixtures on one layer and on tiny transformers models: what they compute, and what trains."""

from typing import Any

import models
import pytest
import torch
from cases import error, move
from mixtures import BY_TASK, SMALL, adapted, layer, on_one_layer, preset, presets, run
from models import IDS, logits
from torch import Tensor, nn

import reparam
from reparam.core.registry import METHODS
from reparam.methods.mixture import Mixture, experts
from reparam.methods.mixture.select import choose

# ---- what a mixture is


@presets
def test_a_preset_is_nothing_but_settings(name: str) -> None:
    one, _ = adapted(name)
    other = models.llama()
    method = Mixture(**preset(name).settings())
    move(reparam.attach(other, method, name="one"), 1, size=0.2)
    assert torch.equal(run(one, name), run(other, name))
    assert METHODS[name](**preset(name).settings()) == preset(name)


@presets
def test_a_fresh_mixture_is_the_base(name: str) -> None:
    base = logits(models.llama())
    model, _ = adapted(name, seed=None)
    assert torch.equal(run(model, name), base)


@presets
def test_one_expert_is_a_single_adapter_and_merges(name: str) -> None:
    changes: dict[str, Any] = {"n": 1, "k": 1, "gate": "prob", "losses": {}}
    model, adapter = adapted(name, **changes)
    method = adapter.method
    other = models.llama()
    if name == "mov":
        with torch.no_grad():
            for path, update in adapter.updates.items():
                other.get_submodule(path).weight.mul_(update.vectors[0][:, None])
    else:
        plain = reparam.LoRA(r=method.r, alpha=method.alpha, scaling=method.scaling)
        twin = reparam.attach(other, plain)
        with torch.no_grad():
            for path, update in adapter.updates.items():
                twin.updates[path].A.copy_(update.A)
                twin.updates[path].B.copy_(update.B)
    y = run(model, name)
    assert error(y, logits(other)) < 1e-5
    with reparam.context(model, tasks=0) if name in BY_TASK else reparam.select(model, "one"):
        reparam.merge(model)
    assert error(logits(model), y) < 1e-5


@on_one_layer
def test_the_output_is_the_sum_over_experts(name: str) -> None:
    """Computed expert by expert, from probabilities computed in the test."""
    model, adapter, x = layer(name)
    update, method = adapter.updates["0"], adapter.method
    tasks = torch.tensor([2, 0, 1])
    found = model(x, task=tasks) if name in BY_TASK else model(x)
    base = nn.functional.linear(x, model[0].frozen.tensor())
    router = update.router if update.router is not None else next(iter(adapter.shared.routers.values()))
    n, s = method.n, update.scale
    if name == "task_gated":
        z = (router.embedding[tasks] @ router.weight.t())[:, None].expand(3, 5, n)
    elif name == "poly":
        z = router.logits[tasks][:, None].expand(3, 5, n)
    elif name == "mole":
        mean = x.mean(1)
        z = (mean / mean.norm(dim=-1, keepdim=True) @ router.weight.t())[:, None].expand(3, 5, n)
    else:
        z = (base if name == "mov" else x) @ router.weight.t()
        z = z if router.bias is None else z + router.bias
    p = torch.softmax(z, -1) if name != "poly" else torch.sigmoid(z) / torch.sigmoid(z).sum(-1, keepdim=True)
    if method.select == "top_k":
        kept = torch.zeros_like(p).scatter(-1, p.topk(method.k).indices, p.topk(method.k).values)
        p = kept / kept.sum(-1, keepdim=True) if method.gate == "renorm" else kept
    if name == "mov":
        expected = base * sum(p[..., i, None] * update.vectors[i] for i in range(n))
    elif name == "hydralora":
        expected = base + s * sum(
            p[..., i, None] * (x @ update.A.t() @ b.t()) for i, b in enumerate(update.B.chunk(n, 1))
        )
    elif name == "poly":
        mixed = sum(p[..., j, None] * (x @ a.t()) for j, a in enumerate(update.A.chunk(n)))
        expected = base + s * sum(p[..., i, None] * (mixed @ b.t()) for i, b in enumerate(update.B.chunk(n, 1)))
    else:
        pairs = enumerate(zip(update.A.chunk(n), update.B.chunk(n, 1), strict=True))
        expected = base + s * sum(p[..., i, None] * (x @ a.t() @ b.t()) for i, (a, b) in pairs)
    assert error(found, expected + model[0].bias) < 1e-12


@pytest.mark.parametrize("ranks", [(2, 2, 2, 2), (1, 4, 0, 3)])
@pytest.mark.parametrize("case", ["spread", "one expert", "one token", "top 2"])
def test_scattered_experts_equal_the_dense_mask(ranks: tuple[int, ...], case: str) -> None:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = 1 if case == "one token" else 9
    x, A, B, y = random(tokens, 6), random(sum(ranks), 6), random(7, sum(ranks)), random(tokens, 7)
    z = random(tokens, 4) + (torch.tensor([0, 99, 0, 0]) if case == "one expert" else 0)
    choice = choose(z, select="top_k", k=2 if case == "top 2" else 1)
    slots = torch.repeat_interleave(torch.arange(4), torch.tensor(ranks))
    leaves = [t.requires_grad_() for t in (x, A, B)]
    dense = y + 1.5 * experts.delta(x, A, choice.weights, slots) @ B.t()
    sparse = experts.scatter(y.clone(), x, A, B, choice.weights, choice.counted, ranks, 1.5)
    assert error(sparse, dense) < 1e-12
    weights = random(tokens, 7)
    for one, other in zip(
        torch.autograd.grad((dense * weights).sum(), leaves),
        torch.autograd.grad((sparse * weights).sum(), leaves),
        strict=True,
    ):
        assert error(one, other) < 1e-12


def test_a_site_of_many_ranks_runs_scattered_and_gives_the_same() -> None:
    """With enough tokens and unused ranks; experts that no token selected get no gradient."""
    model = nn.Sequential(nn.Linear(10, 14))
    method = preset("llava_mole", n=16, r=8, plain="", scope="module", router_bias=False)
    adapter = reparam.attach(model, method, targets=["0"])
    move(adapter, 1, size=0.5)
    model.double().eval()
    x = torch.randn(8, 40, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    update = adapter.updates["0"]
    choice = update.choice(x)
    assert update._sparse(choice, 320)
    g = choice.weights.flatten(0, 1)
    expected = model[0].frozen(x, model[0].bias).flatten(0, 1)
    expected = expected + update.scale * experts.delta(x.flatten(0, 1), update.A, g, update.slots) @ update.B.t()
    assert error(model(x).flatten(0, 1), expected) < 1e-12
    used = choice.counted.flatten(0, 1).any(0)
    model(x).square().sum().backward()
    grads = update.A.grad.view(16, 8, 10).abs().amax((1, 2))
    assert torch.equal(grads > 0, used)


@on_one_layer
def test_permuting_experts_changes_nothing(name: str) -> None:
    model, adapter, x = layer(name)
    task = {"task": 1} if name in BY_TASK else {}
    y = model(x, **task)
    update, n = adapter.updates["0"], adapter.method.n
    order = torch.tensor([2, 0, 1, 3][:n])
    router = update.router if update.router is not None else next(iter(adapter.shared.routers.values()))
    with torch.no_grad():
        for key, parameter in [*update.named_parameters(recurse=False), *router.named_parameters()]:
            if key == "A" and name != "hydralora":
                parameter.copy_(parameter.view(n, -1, parameter.shape[1])[order].flatten(0, 1))
            elif key == "B":
                parameter.copy_(parameter.view(len(parameter), n, -1)[:, order].flatten(1))
            elif key == "logits":
                parameter.copy_(parameter[..., order])
            elif key not in ("A", "embedding"):
                parameter.copy_(parameter[order])
    assert error(model(x, **task), y) < 1e-12


@presets
def test_rows_do_not_see_each_other(name: str) -> None:
    """With a task for each row if there are tasks; also with as many rows as tokens."""
    model, _ = adapted(name)
    for rows, length in ((3, 7), (5, 5)):
        ids = torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(rows))
        tasks = {"task": torch.arange(rows) % 3} if name in BY_TASK else {}
        whole = run(model, name, ids, **tasks)
        for row in range(rows):
            alone = run(model, name, ids[row : row + 1], **({"task": row % 3} if tasks else {}))
            assert error(whole[row], alone[0]) < 1e-5
        if tasks:
            assert error(whole, run(model, name, ids, task=0)) > 1e-3


@presets
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name: str, side: str) -> None:
    model, _ = adapted(name)
    short = IDS[:1, :4]
    junk = torch.full((1, 3), 5)
    ids = torch.cat([junk, short] if side == "left" else [short, junk], 1)
    keep = slice(3, 7) if side == "left" else slice(0, 4)
    mask = torch.zeros_like(ids)
    mask[:, keep] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = run(model, name, ids, attention_mask=mask, position_ids=positions)
    assert error(padded[:, keep], run(model, name, short)) < 1e-5


# ---- training


@presets
def test_exactly_what_is_declared_trains(name: str) -> None:
    model, adapter = adapted(name)
    model.train()
    inputs = {"task": torch.tensor([0, 1, 2])} if name in BY_TASK else {}
    model(input_ids=IDS, labels=IDS, **inputs).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(adapter.parameters())
    each = {"mov": lambda s: adapter.method.n * s.out_features}.get(name)
    if name == "task_gated":  # the experts are as large as one LoRA of rank r, and gates are there once
        sizes = sum(8 * (s.in_features + s.out_features) for s in adapter.sites.values())
        assert sum(p.numel() for p in adapter.parameters()) == sizes + (3 + 4) * 64
    elif each is not None:
        routers = sum(adapter.method.n * s.out_features for s in adapter.sites.values())
        assert sum(p.numel() for p in adapter.parameters()) == routers + sum(map(each, adapter.sites.values()))


@pytest.mark.parametrize("name", [n for n in SMALL if n != "mov"])
def test_at_the_start_b_alone_moves(name: str) -> None:
    model, adapter = adapted(name, seed=None, losses={})
    inputs = {"task": torch.tensor([0, 1, 2])} if name in BY_TASK else {}
    model(input_ids=IDS, labels=IDS, **inputs).loss.backward()
    for key, parameter, _ in adapter.named_parameters():
        assert bool(parameter.grad.any()) == key.endswith(".B"), key


@pytest.mark.parametrize(
    ("changes", "reached"),
    [
        ({"select": "softmax"}, True),
        ({"k": 2, "gate": "renorm"}, True),
        ({"k": 1, "gate": "prob"}, True),
        ({"k": 1, "gate": "ste"}, True),
        ({"k": 1, "gate": "one"}, False),
    ],
)
def test_which_routers_the_task_teaches(changes: dict, reached: bool) -> None:
    model = models.llama()
    method = preset("llava_mole", losses={}, **changes)
    if reached:
        adapter = reparam.attach(model, method)
    else:
        with pytest.warns(UserWarning, match="gate='one' gives the router no gradient at all"):
            adapter = reparam.attach(model, method)
    move(adapter, 1)
    models.loss(model).backward()
    grads = [p.grad for n, p, _ in adapter.named_parameters() if "router" in n]
    assert grads
    assert all(g is not None and bool(g.any()) if reached else g is None or not g.any() for g in grads)
