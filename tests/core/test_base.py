"""The nouns that everything is written in: factors, storages, registries, the bank, the handle of an adapter."""

import copy
import math
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import IDS, logits
from torch import Tensor, nn

import reparam
from reparam.core.base import Factors, Site, Storage, Update, Weight
from reparam.core.checks import nearest
from reparam.core.method import Method
from reparam.core.registry import METHODS, STORAGES, find_method, find_storage
from reparam.sites.bank import Bank, Routing
from reparam.sites.embedding import Embedding
from reparam.sites.fingerprint import agree, base_tensors, fingerprint
from reparam.sites.linear import Linear
from reparam.weights.dense import DenseWeight

sizes = st.integers(1, 8)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- factors


@given(o=sizes, i=sizes, r=sizes, gained=st.booleans(), seed=st.integers(0, 99))
def test_factors_are_the_normal_form(o: int, i: int, r: int, gained: bool, seed: int) -> None:
    A, B, W = numbers(r, i, seed=seed), numbers(o, r, seed=seed + 1), numbers(o, i, seed=seed + 2)
    gain = numbers(o, seed=seed + 3) if gained else None
    expected = (W if gain is None else torch.diag(gain) @ W) + B @ A
    torch.testing.assert_close(Factors(A, B, gain).apply(W), expected)
    norm = float(torch.linalg.matrix_norm(B @ A))
    assert Factors(A, B, gain).low_rank_norm() == pytest.approx(norm, rel=1e-6, abs=1e-9)


def test_the_norm_of_a_product_that_cancels_is_no_nan() -> None:
    A = torch.cat([numbers(1, 6), -numbers(1, 6)]).float()
    assert Factors(A, torch.ones(4, 2)).low_rank_norm() == pytest.approx(0, abs=1e-6)


def test_factors_are_differentiable_and_take_the_dtype_of_the_matrix() -> None:
    parts = [t.requires_grad_() for t in (numbers(2, 3), numbers(4, 2), numbers(4))]
    assert torch.autograd.gradcheck(lambda A, B, g: Factors(A, B, g).apply(numbers(4, 3, seed=9)), tuple(parts))
    assert Factors(*(t.detach().float() for t in parts)).apply(numbers(4, 3).bfloat16()).dtype == torch.bfloat16


# ---- storages


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_storage_is_an_operator_that_agrees_with_its_matrix(name: str, dtype: torch.dtype) -> None:
    weight = STORAGES[name]().quantize(numbers(24, 64).to(dtype))
    W = weight.dense()
    assert (weight.out_features, weight.in_features) == W.shape == (24, 64)
    assert W.dtype == torch.float32
    assert not any(p.requires_grad for p in weight.parameters())
    assert weight.storage.name == name
    assert type(weight.storage)(**weight.storage.settings()) == weight.storage
    x, bias = numbers(5, 64, seed=1).to(weight.dtype), numbers(24, seed=2).to(weight.dtype)
    loose = {"rtol": 3e-2, "atol": 3e-2} if weight.dtype.itemsize < 4 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(weight(x, bias).float(), x.float() @ W.T + bias.float(), **loose)
    torch.testing.assert_close(weight(x).float(), x.float() @ W.T, **loose)
    ids = torch.tensor([[3, 3], [0, 23]])
    torch.testing.assert_close(weight.rows(ids).float(), W[ids], **loose)
    assert torch.equal(weight.dense(slice(3, 7)), W[3:7])
    assert weight.tensor().dtype == weight.dtype
    torch.testing.assert_close(weight.tensor().float(), W, **loose)
    again = weight.storage.quantize(2 * W)
    assert type(again) is type(weight)
    torch.testing.assert_close(again.dense(), 2 * W, rtol=0.1, atol=0.1)
    x = x.requires_grad_()
    (found,) = torch.autograd.grad(weight(x).float().sum(), x)
    torch.testing.assert_close(found.float(), W.sum(0).expand(5, 64), rtol=3e-2, atol=3e-1)


def test_the_dense_storage_takes_a_parameter_over() -> None:
    parameter = nn.Parameter(torch.randn(3, 4))
    weight = DenseWeight(parameter)
    assert weight.W is parameter
    assert not parameter.requires_grad
    assert weight.dense().data_ptr() == weight.tensor().data_ptr() == parameter.data_ptr()
    assert weight.dense_or_none is parameter


# ---- registries


def test_a_name_that_nobody_registered_is_an_error_that_names_the_nearest() -> None:
    assert find_method("lora") is reparam.LoRA is METHODS["lora"]
    with pytest.raises(ValueError, match=r"unknown method 'lroa' \(did you mean 'lora'.*\?\): the methods are .*lora"):
        find_method("lroa")
    assert nearest("zzz", METHODS) == ""
    assert find_storage("nf4") is reparam.NF4
    with pytest.raises(ValueError, match=r"unknown storage 'fn4' \(did you mean 'nf4'\?\): the storages are .*int8"):
        find_storage("fn4")


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_a_method_is_its_settings(method: type[Method]) -> None:
    # xlora needs hidden states, which the conformance suite's layers do not have; PEFT builds the other two
    assert method.examples or method.name in ("xlora", "prefix", "prompt")
    for settings in method.examples or ({},):
        made = method(**settings)
        assert METHODS[made.name](**made.settings()) == made
        with pytest.raises(AttributeError):
            made.anything = 1  # type: ignore[attr-defined]


def test_what_a_subclass_has_to_implement_says_so() -> None:
    for call in (
        lambda: Storage().quantize(torch.ones(1, 1)),
        lambda: Weight().storage,
        lambda: Weight()(torch.ones(1)),
        lambda: Weight().rows(torch.ones(1)),
        lambda: Weight().dense(),
        lambda: Weight().dtype,
        lambda: Update()(torch.ones(1), Weight()),
        lambda: Update().factors(Weight()),
        lambda: Method().build(Site("", "linear", 1, 1), Weight(), None),
    ):
        with pytest.raises(NotImplementedError):
            call()
    assert Update().penalty() is None
    assert Method().controller({}) is None


# ---- the bank


@given(
    rows=st.lists(st.integers(-1, 3), min_size=1, max_size=6),
    tokens=st.integers(1, 3),
    kind=st.sampled_from(["plain", "gain", "bias", "both"]),
    embedding=st.booleans(),
    seed=st.integers(0, 50),
)
def test_each_row_of_a_bank_is_its_own_matrix(
    rows: list[int], tokens: int, kind: str, embedding: bool, seed: int
) -> None:
    """Against dense matrices; slots with different ranks, one that leaves the site alone, gains only in some."""
    o, i = (9, 5) if embedding else (4, 5)
    W, base_bias = numbers(o, i, seed=seed), None if embedding else numbers(o, seed=seed + 1)
    weight = DenseWeight(W)
    routing = Routing(torch.tensor(rows))
    bank = Bank(weight, routing).eval()
    gains, biases = kind in ("gain", "both"), kind in ("bias", "both") and not embedding
    matrices, offsets = [], []
    for slot, rank in enumerate((2, 0, 5, 1)):
        gain = numbers(o, seed=seed + 10 + slot) if gains and slot % 2 else None
        offset = numbers(o, seed=seed + 20 + slot) if biases and slot != 2 else None
        factors = Factors(numbers(rank, i, seed=seed + slot), numbers(o, rank, seed=seed + 30 + slot), gain)
        bank.write(slot, factors if rank else None, offset)
        matrices.append(factors.apply(W) if rank else W)
        offsets.append(torch.zeros(o, dtype=W.dtype) if offset is None else offset)
    if embedding:
        ids = torch.randint(o, (len(rows), tokens), generator=torch.Generator().manual_seed(seed))
        found = bank.rows(ids, weight)
        expected = torch.stack([(W if s < 0 else matrices[s])[ids[b]] for b, s in enumerate(rows)])
    else:
        assert base_bias is not None
        x = numbers(len(rows), tokens, i, seed=seed + 5)
        found = bank(x, weight, base_bias)
        expected = torch.stack(
            [
                x[b] @ (W if s < 0 else matrices[s]).T + base_bias + (0 if s < 0 else offsets[s])
                for b, s in enumerate(rows)
            ]
        )
        routing.tokens = tokens
        torch.testing.assert_close(bank(x.view(-1, i), weight, base_bias), expected.view(-1, o))
    torch.testing.assert_close(found, expected)


def test_a_slot_that_is_written_again_keeps_nothing_of_before() -> None:
    weight = DenseWeight(numbers(4, 5))
    bank = Bank(weight, Routing(torch.tensor([0]))).eval()
    x = numbers(1, 2, 5)
    bank.write(0, Factors(numbers(6, 5), numbers(4, 6), numbers(4)), numbers(4))
    bank.write(0, Factors(numbers(1, 5, seed=1), numbers(4, 1, seed=2)))
    torch.testing.assert_close(bank(x, weight), x @ (weight.W + numbers(4, 1, seed=2) @ numbers(1, 5, seed=1)).T)
    bank.write(0, None)
    torch.testing.assert_close(bank(x, weight), weight(x))


def test_rows_and_tokens_are_told_from_the_shape() -> None:
    routing = Routing(torch.tensor([0, 1, -1]))
    assert routing.split(torch.Size([3, 7, 5])) == (3, 7)
    assert routing.split(torch.Size([3, 5])) == (3, 1)
    assert routing.split(torch.Size([3, 2, 2, 5])) == (3, 4)
    for shape in ([21, 5], [1, 7, 5], [7, 3, 5]):
        with pytest.raises(ValueError, match="whose rows it cannot tell apart; select one adapter at a time"):
            routing.split(torch.Size(shape))
    routing.tokens = 7
    assert routing.split(torch.Size([21, 5])) == (3, 7)
    with pytest.raises(ValueError, match=r"a mixed batch of 3 rows met an activation of shape \[14, 5\]"):
        routing.split(torch.Size([14, 5]))


# ---- attaching


class Fails(Method):
    """A method whose last site cannot be built."""

    name = "fails"

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
        if "layers.1.mlp.down" in site.name or "h.1.mlp.c_proj" in site.name:
            raise ValueError("not here")
        return reparam.LoRA(r=2).build(site, weight, shared)


@pytest.mark.parametrize("make", [models.llama, models.gpt2])
def test_a_method_that_fails_leaves_the_model_untouched(make: Any) -> None:
    model = make()
    before, state, names = str(model), models.frozen(model), [n for n, _ in model.named_parameters()]
    y = logits(model)
    with pytest.raises(ValueError, match="not here"):
        reparam.attach(model, Fails())
    assert str(model) == before
    assert [n for n, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters())
    assert models.same(models.frozen(model), state)
    assert torch.equal(logits(model), y)
    assert reparam.adapters(model) == {}


def test_attaching_freezes_everything_else() -> None:
    model = models.llama()
    one = reparam.attach(model, reparam.LoRA(r=2), name="one", bias=True, modules_to_save=["lm_head", "norm"])
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trains) == len(one.parameters()) == 2 * 14 + 2
    assert {id(p) for p in one.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
    two = reparam.attach(model, reparam.LoRA(r=2), name="two")
    assert {id(p) for p in two.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
    one.requires_grad_()
    two.requires_grad_(False)
    assert {id(p) for p in one.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_module_that_is_trained_whole_gets_no_update_besides() -> None:
    model = models.llama()
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets=["q_proj", "lm_head"], modules_to_save=["lm_head"])
    assert set(adapter.replaced) == {"lm_head"}
    assert set(adapter.sites) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    base = logits(models.llama())
    with torch.no_grad():
        adapter.replaced["lm_head"].updates["default"].weight.mul_(2)  # type: ignore[operator,union-attr]
        assert torch.allclose(logits(model), 2 * base, atol=1e-5)
        with reparam.select(model, None):
            assert torch.equal(logits(model), base)


def test_what_one_adapter_adapts_no_other_trains_whole_and_the_other_way_round() -> None:
    model = models.llama()
    reparam.attach(model, reparam.LoRA(r=2), targets=["up_proj"], name="a")
    for whole, why in {
        "up_proj": "up_proj in it is adapted as well",
        "layers.1.mlp": "up_proj in it is adapted as well",
        "self_attn": "LlamaAttention takes more than one input",
        "layers": "a ModuleList has no forward of its own",
    }.items():
        with pytest.raises(ValueError, match=rf"cannot be trained whole: .*{why}"):
            reparam.attach(model, reparam.LoRA(r=2), targets=["v_proj"], modules_to_save=[whole], name="b")
    reparam.attach(model, reparam.LoRA(r=2), targets=["v_proj"], modules_to_save=["lm_head"], name="b")
    with pytest.raises(ValueError, match=r"lm_head: b trains this module whole"):
        reparam.attach(model, reparam.LoRA(r=2), targets=["lm_head"], name="c")
    assert reparam.adapters(model).keys() == {"a", "b"}


# ---- the handle


def test_the_handle_knows_names_parameters_and_roles() -> None:
    model = models.gpt2()
    adapter = reparam.attach(
        model, reparam.LoRA(r=2), targets=["c_fc"], name="task", bias=True, modules_to_save=["lm_head"]
    )
    found = {name: role for name, _, role in adapter.named_parameters()}
    site = "transformer.h.0.mlp.c_fc"
    assert found[f"{site}.A"] == "in"
    assert found[f"{site}.B"] == "out"
    assert found[f"{site}.bias"] is None
    assert found["lm_head.weight"] is None
    assert len(found) == 2 * 3 + 1
    count = 2 * (2 * (32 + 128) + 128) + 97 * 32
    assert repr(adapter) == f"Adapter('task', lora, 2 sites, {count:,} parameters)"
    assert set(adapter.tensors()) == set(found)
    assert reparam.adapters(model)["task"] is adapter


def test_an_optimizer_that_would_train_less_is_refused() -> None:
    adapter = reparam.attach(models.llama(), reparam.LoRA(r=2), name="task")
    with pytest.raises(ValueError, match=r"adapter 'task': 27 parameters are not in the optimizer \(first: model"):
        adapter.bind(torch.optim.SGD(adapter.parameters()[:1], lr=1))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1)
    assert adapter.bind(optimizer) is adapter
    adapter.parameters()[3].requires_grad_(False)
    with pytest.raises(ValueError, match=r"1 parameters are frozen .*layers\.0\.self_attn\.k_proj\.B"):
        adapter.bind(optimizer)


class Counted(Method):
    """LoRA that counts what happens around optimizer steps."""

    name = "counted"

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
        return reparam.LoRA(r=2).build(site, weight, shared)

    def controller(self, updates: Any) -> Any:
        return Events()


class Events(list[str]):
    """The calls, in order."""

    def plan(self, total_steps: int | None) -> None:
        self.total_steps = total_steps

    def before_step(self) -> None:
        self.append("before")

    def after_step(self, optimizer: Any) -> None:
        self.append("after")


def test_a_controller_is_called_once_around_each_step_of_the_bound_optimizer() -> None:
    model = models.llama()
    adapter = reparam.attach(model, Counted())
    first, second = (torch.optim.SGD(adapter.parameters(), lr=0.1) for _ in range(2))
    adapter.bind(first)
    first.step()
    assert adapter.controller == ["before", "after"]
    adapter.bind(first).bind(second)
    first.step()
    assert adapter.controller == ["before", "after"]
    second.step()
    second.step()
    assert adapter.controller == ["before", "after"] * 3
    twin = reparam.adapters(copy.deepcopy(model))["default"]
    second.step()
    assert len(twin.controller) == 6  # type: ignore[arg-type]
    assert len(adapter.controller) == 8


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_not_saved(value: float, tmp_path: Path) -> None:
    adapter = reparam.attach(models.llama(), reparam.LoRA(r=2), name="task")
    with torch.no_grad():
        adapter.parameters()[5][0, 0] = value
    with pytest.raises(ValueError, match=r"adapter 'task': NaN or infinity in model\.layers\.0\.self_attn\.v_proj\.B"):
        adapter.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_the_file_holds_the_adapter_and_nothing_of_the_base(tmp_path: Path) -> None:
    adapter = reparam.attach(models.llama(), reparam.LoRA(r=2))
    adapter.save(tmp_path / "a")
    size = (tmp_path / "a/adapter.safetensors").stat().st_size
    payload = 4 * sum(p.numel() for p in adapter.parameters())
    assert payload <= size < payload + 4096


# ---- layers


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Embedding(4, 3)], ids=["linear", "embedding"])
def test_a_wrapped_layer_computes_what_it_did_and_comes_back(layer: nn.Module) -> None:
    layer.weight.requires_grad_(False)  # type: ignore[union-attr,operator]
    x = torch.tensor([[0, 3]]) if isinstance(layer, nn.Embedding) else torch.randn(2, 3)
    y = layer(x)
    wrapped = (Embedding if isinstance(layer, nn.Embedding) else Linear).wrap(layer)
    assert torch.equal(wrapped(x), y)
    assert wrapped.site("here").kind == wrapped.kind
    assert wrapped.restore() is layer
    assert torch.equal(layer(x), y)


# ---- fingerprints


def test_a_fingerprint_is_of_the_base_whatever_is_on_it() -> None:
    plain = fingerprint(models.gpt2())
    model = models.gpt2()
    reparam.attach(model, reparam.LoRA(r=2), targets=["all-linear", "wte"], modules_to_save=["lm_head"], bias=True)
    with reparam.select(model, ["default", None, "default"]), torch.no_grad():
        logits(model)
        assert fingerprint(model) == plain
    assert {name for name, _ in base_tensors(model)} == {name for name, _ in models.gpt2().named_parameters()}
    own = dict(models.gpt2().named_parameters())
    assert all(torch.equal(tensor, own[name]) for name, tensor in base_tensors(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_fingerprint_survives_the_dtype_a_model_is_loaded_in(dtype: torch.dtype) -> None:
    """Saved in 16 bits, and loaded in 16 or in 32."""
    model = models.llama().to(dtype)
    assert agree(fingerprint(model), fingerprint(copy.deepcopy(model).float()))


def test_a_fingerprint_tells_models_apart() -> None:
    plain = fingerprint(models.llama())
    model = models.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    models.loss(model, IDS).backward()
    optimizer.step()
    assert not agree(fingerprint(model), plain)
    assert not agree(fingerprint(models.llama(hidden_size=16)), plain)
    assert agree(fingerprint(models.llama()), plain)
