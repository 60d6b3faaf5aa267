"""Two processes compute what one does, for every storage and method, with sharded tensors or with copies.

FSDP2 shards what is quantized as it is; DistributedDataParallel keeps copies of the model. Every method is sharded in
float32. Half of the methods also run as copies, and the other half sharded in bfloat16; in the full suite all run in
all ways.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from cases import FAMILIES, FIRST, QUANTIZED
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from toys import Nudge, registered
from two_processes import two_processes

import reparam
from reparam.core.method import Method
from reparam.sites.module import SHARED

IDS = torch.randint(2, models.VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(7))
METHODS: list[Method] = [case.values[0] for case in FIRST]
FULL = os.environ.get("REPARAM_TESTS") == "full"
STORED = [name for name in QUANTIZED if name != "fixed16"]  # gloo cannot send the toy's 16-bit integers
# Each method with one storage, all storages in turn; with all of them in the full suite.
PAIRS = [(s, m) for j, m in enumerate(METHODS) for i, s in enumerate(STORED) if FULL or i == j % len(STORED)]


def base_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a model that belong to no adapter, under the names that sharded ones keep."""
    held = [*model.named_parameters(), *model.named_buffers()]
    adapters = (".updates.", ".biases.", "reparam_shared.")
    return {name: t.detach().clone() for name, t in held if not any(part in f".{name}" for part in adapters)}


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, also if several processes hold parts of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step(model: Any, adapter: reparam.Adapter, ids: Tensor) -> dict[str, Tensor]:
    """Output, loss and gradients, and the adapter after a step of an optimizer that got the whole model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    gradients = {name: whole(p.grad) for name, p, _ in adapter.named_parameters() if p.grad is not None}
    optimizer.step()
    return {
        "output": out.logits.detach().float(),
        "loss": out.loss.detach(),
        **{f"gradient of {name}": gradient for name, gradient in gradients.items()},
        **{f"new {name}": whole(p.detach()) for name, p, _ in adapter.named_parameters()},
    }


def alone(storage: str, method: Method, dtype: torch.dtype) -> dict[str, Tensor]:
    """A step of one process on all rows; in bfloat16 the adapter is cast too, as the policy does."""
    model, adapter = FAMILIES["llama"].adapted(method, storage, seed=1)
    if dtype == torch.float32:
        return step(model, adapter, IDS)
    masters = {name: p.detach().clone() for name, p, _ in adapter.named_parameters()}
    found = step(model.to(dtype), adapter, IDS)
    gradients = {name: found[f"gradient of {name}"].float() for name in masters}
    return found | {f"new {name}": masters[name] - 0.1 * gradients[name] for name in masters}


def check(storage: str, method: Method, dtype: torch.dtype, alone: dict[str, Tensor], *, sharded: bool) -> None:
    """Check one step of this process on its half of the rows against that of one process alone."""
    rank = dist.get_rank()
    expected = alone | {"output": alone["output"].chunk(2)[rank]}

    model, adapter = FAMILIES["llama"].adapted(method, storage, seed=1)
    before = base_of(model)
    if sharded:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for part in (*model.model.layers, model):
            fully_shard(part, mp_policy=policy)
        check_shares(model)
        with pytest.raises(ValueError, match=r"parameters are sharded .*full_tensor"):
            adapter.save("nowhere")
    found = step(model if sharded else DistributedDataParallel(model), adapter, IDS.chunk(2)[rank])
    dist.all_reduce(found["loss"])
    found["loss"] /= 2

    assert found.keys() == expected.keys()
    small = 1e-5 if dtype == torch.float32 else 0.15  # two roundings to bfloat16 of what half cancels
    many = 0.5 if dtype == torch.bfloat16 else small  # what all sites share: a sum over them, most of which cancels
    least = {name: many if SHARED in name else small for name in expected}
    wrong = {name: e for name in expected if (e := apart(found[name], expected[name])) > least[name]}
    assert not wrong, f"{storage}, {method}, {dtype}, {sharded=}: {wrong}"
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    assert models.same({name: whole(tensor) for name, tensor in base_of(model).items()}, before)


def check_shares(model: nn.Module) -> None:
    """Check that each process holds about half of all frozen tensors."""
    assert all(isinstance(p, DTensor) for p in model.parameters())
    held = [p for p in model.parameters() if isinstance(p, DTensor) and not p.requires_grad]
    total, here = sum(p.nbytes for p in held), sum(p.to_local().nbytes for p in held)
    assert 0.45 < here / total < 0.55


def apart(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def run() -> None:
    """The work of each process."""
    dist.init_process_group("gloo")
    with registered(nudge=Nudge):
        for turn, (storage, method) in enumerate(PAIRS):
            expected = alone(storage, method, torch.float32)
            check(storage, method, torch.float32, expected, sharded=True)
            copied = turn // len(STORED) % 2 == 0  # so each storage meets both of what takes turns
            if FULL or copied:
                check(storage, method, torch.float32, expected, sharded=False)
            if FULL or not copied:
                check(storage, method, torch.bfloat16, alone(storage, method, torch.bfloat16), sharded=True)
    dist.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    assert {storage for storage, _ in PAIRS} == set(STORED)
    for code, _, errors in two_processes(run, tmp_path):
        assert code == 0, errors[:4000]
