"""An adapter has the same names on a model in a wrapper (compiled, data-parallel, checkpointed) as on the bare one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import llama, logits
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from selecting import change
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.parallel import DistributedDataParallel

import reparam


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process, which DDP needs."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.compiler.reset()


def compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager")


def in_parts(model: Any) -> Any:
    """Blocks, and in one of them a module that holds sites and a site itself, compiled on their own."""
    model.model.layers[0] = compiled(model.model.layers[0])
    model.model.layers[1].mlp = compiled(model.model.layers[1].mlp)
    model.model.layers[1].self_attn.q_proj = compiled(model.model.layers[1].self_attn.q_proj)
    model.lm_head = compiled(model.lm_head)
    return model


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    model.model.layers[0].compile(backend="eager")
    return model


def checkpointed(model: Any) -> Any:
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer")
    return model


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compiled": compiled,
    "compiled in parts": in_parts,
    "compiled in place": in_place,
    "DataParallel": nn.DataParallel,
    "DDP": DistributedDataParallel,
    "DDP of a compiled model": lambda model: DistributedDataParallel(compiled(model)),
    "checkpointed": checkpointed,
}


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def attached(model: Any) -> reparam.Adapter:
    adapter = reparam.attach(model, reparam.LoRA(r=2), modules_to_save=["lm_head"], name="a")
    change(adapter, 1)
    return adapter


@pytest.mark.parametrize("order", ["wrapped first", "adapted first"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_files_and_merges_are_those_of_the_bare_model(wrapper: str, order: str, tmp_path: Path) -> None:
    bare, model = llama(), llama()
    plain = attached(bare)
    expected = logits(bare)
    wrapped = model if order == "adapted first" else WRAPPERS[wrapper](model)
    adapter = attached(wrapped)
    if order == "adapted first":
        wrapped = WRAPPERS[wrapper](model)
    assert list(adapter.sites) == list(plain.sites)
    assert list(adapter.replaced) == ["lm_head"]
    assert adapter.tensors().keys() == plain.tensors().keys()
    assert list(reparam.adapters(wrapped)) == ["a"]

    adapter.save(tmp_path / "wrapped")
    plain.save(tmp_path / "bare")
    adapter.save(tmp_path / "peft", format="peft")
    for folder in ("wrapped", "bare", "peft"):
        for other in (llama(), WRAPPERS[wrapper](llama())):
            reparam.load(other, tmp_path / folder)
            with torch.compiler.set_stance("force_eager"):
                assert_near(logits(reparam.adapters(other)["default"].model), expected)

    with torch.compiler.set_stance("force_eager"):
        with reparam.select(wrapped, None):
            assert_near(logits(model), logits(llama()))
        with reparam.select(wrapped, ["a", None, "a"]):
            assert_near(logits(model)[[0, 2]], expected[[0, 2]])
            assert_near(logits(model)[1], logits(llama())[1])
        reparam.merge(wrapped)
        assert_near(logits(model), expected)
    assert not reparam.adapters(wrapped)


@pytest.mark.parametrize("order", ["wrapped first", "adapted first"])
@pytest.mark.parametrize("wrapper", [*WRAPPERS, "FSDP1"])
def test_the_files_of_a_whole_wrapped_model_hold_the_adapter(wrapper: str, order: str, tmp_path: Path) -> None:
    model = llama()
    put = WRAPPERS.get(wrapper, in_parts)
    whole = model if order == "adapted first" else put(model)
    adapter = attached(whole)
    whole = put(model) if order == "adapted first" else whole
    with torch.compiler.set_stance("force_eager"):
        expected = logits(adapter.model)
    tensors = whole.state_dict()
    if wrapper == "FSDP1":  # as torch's FullyShardedDataParallel names its parts
        tensors = {key.replace("_orig_mod", "_fsdp_wrapped_module"): value for key, value in tensors.items()}
        assert any("layers.0._fsdp_wrapped_module." in key for key in tensors)
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "model.safetensors")
    found = llama()
    reparam.load(found, tmp_path, name="a")
    assert_near(logits(found), expected)


def test_keys_of_wrappers_in_peft_folders(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    plain = load_file(file)
    save_file({key.replace("layers.0", "layers.0._orig_mod"): value for key, value in plain.items()}, file)
    found = llama()
    reparam.load(found, tmp_path)
    assert_near(logits(found), expected)
    first = next(key for key in plain if "layers.0" in key)
    save_file(plain | {first.replace("layers.0", "layers.0._orig_mod"): plain[first].clone()}, file)
    with pytest.raises(reparam.FormatError, match=r"two tensors have the key .* of an adapter or of a wrapper"):
        reparam.load(llama(), tmp_path)


def test_a_compiled_model_computes_with_an_adapter_that_was_put_on_it_later() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 3)))
    x = torch.randn(5, 4)
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    ways: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = [(whole, compiled(whole)), (parts, parts)]
    parts[1] = compiled(parts[1])
    for inner, run in ways:
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x))
            adapter = reparam.attach(run, reparam.LoRA(r=2), targets="re:0|1.1")  # type: ignore[arg-type]
            assert list(adapter.sites) == ["0", "1.1"]
            change(adapter, 1)
            twin = copy.deepcopy(model)
            change(reparam.attach(twin, reparam.LoRA(r=2), targets="re:0|1.1"), 1)
            torch.testing.assert_close(run(x), twin(x))
            assert not torch.allclose(run(x), model(x))
            reparam.remove(inner, "default")
            torch.testing.assert_close(run(x), model(x))


def test_an_adapter_on_a_model_in_ddp_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP sums only the gradients of parameters that it was made with: the processes' adapters would drift apart."""
    model = DistributedDataParallel(llama())
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    with pytest.raises(ValueError, match="put the adapter on the model first, and wrap it then"):
        reparam.attach(model, reparam.LoRA(r=2))
    with pytest.raises(ValueError, match="put the adapter on the model first, and wrap it then"):
        reparam.load(model, "anywhere", trainable=True)
