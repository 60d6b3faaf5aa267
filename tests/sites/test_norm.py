"""Norms as sites, and changes of biases: in forward, merging, mixed batches, files and their refusals."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch
from cases import error, move
from models import IDS, logits, same
from torch import Tensor, nn
from torch.func import functional_call
from toys import registered

import reparam
from reparam.core.base import Factors, Site, Update, Weight
from reparam.core.method import Method
from reparam.errors import FormatError, InputDependentError
from reparam.sites.module import Adapted
from reparam.sites.norm import Norm
from reparam.sites.targets import resolve


class ShiftUpdate(Update):
    """W + a bᵀ of rank one, and the bias moved."""

    roles = {"a": "in", "b": "out", "shift": "core"}  # noqa: RUF012

    def __init__(self, site: Site, moved: bool) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(1, site.in_features))
        self.b = nn.Parameter(torch.zeros(site.out_features, 1))
        self.shift = nn.Parameter(torch.zeros(site.out_features)) if moved else None

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        y = weight(x, bias) + ((x @ self.a.t().to(x.dtype)) @ self.b.t().to(x.dtype))
        return y if self.shift is None else y + self.shift.to(y.dtype)

    def factors(self, weight: Weight) -> Factors:
        return Factors(self.a, self.b)

    def bias_delta(self) -> Tensor | None:
        return self.shift


@dataclasses.dataclass(frozen=True)
class Shift(Method):
    """A rank-one change, and an offset where the site has, or can be given, a bias."""

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
        return ShiftUpdate(site, site.bias or site.kind == "linear")


@pytest.fixture(autouse=True)
def _shift() -> Iterator[None]:
    with registered(shift=Shift):
        yield


class Norms(nn.Module):
    """Norms of each kind: with a bias, without, and with another formula."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.first = nn.LayerNorm(6)
        self.mid = nn.Linear(6, 6, bias=False)
        self.last = OnePlus(6)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.last(self.mid(self.first(self.embed(input_ids))), 2.0)


class OnePlus(nn.Module):
    """Gemma's formula, with a second argument."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, n))

    def forward(self, x: Tensor, power: float = 1.0) -> Tensor:
        return x / x.abs().pow(power).mean(-1, keepdim=True) * (1 + self.weight)


X = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["norms", "llama", "gpt2", "bert"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return {"norms": Norms, "llama": models.llama, "gpt2": models.gpt2, "bert": models.bert}[request.param]().eval()


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(X) if isinstance(model, Norms) else model(input_ids=X)
    return found if isinstance(found, Tensor) else found.logits


def test_everything_names_all_parameters_of_a_model(model: nn.Module) -> None:
    names = resolve(model, "everything")
    held = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert set(names) == held


def test_what_everything_cannot_reach_is_named() -> None:
    with pytest.warns(
        UserWarning, match=r"embed_tokens \(it shares its weight with lm_head: call reparam.untie"
    ) as told:
        names = resolve(models.tied_llama(), "everything")
    assert "lm_head" not in names
    assert "model.embed_tokens" not in names
    assert "tie=True" in str(told[0].message)
    assert any(".experts.3." in path for path in resolve(models.mixtral(), "everything"))
    model = models.tied_llama()
    reparam.untie(model)
    assert "lm_head" in resolve(model, "everything")


def test_other_words_and_expressions_leave_norms_alone() -> None:
    model = models.llama()
    for targets in ("all-linear", "attention", "mlp", "re:.*"):
        assert not [name for name in resolve(model, targets) if "norm" in name]
    assert resolve(model, "norm") == ["model.norm"]


def test_a_fresh_adapter_on_everything_changes_no_bit(model: nn.Module) -> None:
    y, shape = run(model), str(model)
    adapter = reparam.attach(model, Shift(), targets="everything", name="one")
    assert torch.equal(run(model), y)
    assert {site.kind for site in adapter.sites.values()} == {"linear", "embedding", "vector"}
    move(adapter, 1)
    assert error(run(model), y) > 1e-2
    with reparam.select(model, None):
        assert torch.equal(run(model), y)
    reparam.remove(model, "one")
    assert torch.equal(run(model), y)
    assert str(model) == shape


def test_it_computes_what_the_plain_model_does_with_the_changed_tensors(model: nn.Module) -> None:
    """Compared with the original model, called with W' and b' instead of its own tensors."""
    plain = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    adapter = reparam.attach(model, Shift(), targets="everything", name="one")
    move(adapter, 1)
    y = run(model)
    changed = dict(plain)
    added = []
    for path, update in adapter.updates.items():
        W, conv = plain[f"{path}.weight"], adapter.sites[path].transposed
        delta = (update.b @ update.a).detach()
        changed[f"{path}.weight"] = W + (delta.t() if conv else delta).reshape(W.shape)
        if update.shift is not None:
            changed[f"{path}.bias"] = plain.get(f"{path}.bias", 0) + update.shift.detach()
            added += [path] * (f"{path}.bias" not in plain)
    reparam.remove(model, "one")
    for path in added:
        model.get_submodule(path).bias = nn.Parameter(torch.zeros(changed[f"{path}.bias"].shape))
    with torch.no_grad():
        expected = functional_call(model, changed, (), {"input_ids": X})
    assert error(y, expected if isinstance(expected, Tensor) else expected.logits) < 1e-5


def test_merging_keeps_outputs_writes_biases_and_restores(model: nn.Module) -> None:
    before, y = models.frozen(model), run(model)
    without = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.bias is None]
    adapter = reparam.attach(model, Shift(), targets="everything", name="one")
    move(adapter, 1)
    changed = run(model)
    report = reparam.merge(model, keep_base=True)
    assert error(run(model), changed) < 1e-5
    assert not any(isinstance(module, Adapted) for module in model.modules())
    assert set(report.biased) == set(without)
    assert all(isinstance(model.get_submodule(path).bias, nn.Parameter) for path in without)
    assert model.state_dict().keys() == before.keys() | {f"{path}.bias" for path in without}
    report.restore()
    assert torch.equal(run(model), changed)
    reparam.remove(model, "one")
    assert same(models.frozen(model), before)
    assert torch.equal(run(model), y)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_mixed_batch_is_each_row_alone(family: str) -> None:
    model = {"llama": models.llama, "gpt2": models.gpt2}[family]()
    places = "everything"
    for number, name in enumerate(("one", "two")):
        move(reparam.attach(model, Shift(), targets=places, name=name), number)
    move(reparam.attach(model, reparam.LoRA(r=2), targets="all-linear", name="three"), 3)
    rows = ["two", None, "one", "two", "three"]
    ids = IDS[[0, 1, 2, 0, 1]]
    with torch.no_grad(), reparam.select(model, rows):
        mixed = logits(model, ids)
        written = model.generate(ids, max_new_tokens=3, do_sample=False)
    for row, name in enumerate(rows):
        with reparam.select(model, name):
            assert error(mixed[row], logits(model, ids)[row]) < 1e-5
            assert torch.equal(written[row], model.generate(ids, max_new_tokens=3, do_sample=False)[row])


def test_files_hold_vectors_and_offsets(model: nn.Module, tmp_path: Path) -> None:
    adapter = reparam.attach(model, Shift(), targets="everything", name="one")
    move(adapter, 1)
    adapter.save(tmp_path / "a")
    y, held = run(model), adapter.tensors()
    reparam.remove(model, "one")
    again = reparam.load(model, tmp_path / "a", name="again")
    assert torch.equal(run(model), y)
    assert same(again.tensors(), held)


def test_peft_has_no_equal_of_vectors_and_of_offsets(tmp_path: Path) -> None:
    model = models.llama()
    with pytest.warns(UserWarning, match="the rank exceeds"):
        adapter = reparam.attach(model, reparam.LoRA(r=2), targets=["q_proj", "norm"], name="one")
    with pytest.raises(FormatError, match=r"no equivalent of an update on a vector: model\.norm"):
        adapter.save(tmp_path / "a", format="peft")
    with pytest.raises(FormatError, match="no equivalent of the method 'shift'"):
        reparam.attach(model, Shift(), name="two").save(tmp_path / "b", format="peft")


def test_sums_refuse_offsets_and_take_vectors(tmp_path: Path) -> None:
    model = models.llama()
    move(reparam.attach(model, Shift(), targets="q_proj", name="one"), 1)
    reparam.adapters(model)["one"].save(tmp_path / "one")
    with pytest.raises(FormatError, match=r"changes the bias of model\.layers\.0\.self_attn\.q_proj"):
        reparam.blend([tmp_path / "one", tmp_path / "one"], [0.5, 0.5])
    move(reparam.attach(model, reparam.LoRA(r=1), targets="norm", name="two"), 2)
    reparam.adapters(model)["two"].save(tmp_path / "two")
    y = logits(model)
    reparam.blend([tmp_path / "two", tmp_path / "two"], [0.25, 0.75]).put(model, name="sum")
    assert error(logits(model), y) < 1e-5


def test_own_biases_of_norms_train() -> None:
    model = models.gpt2()
    adapter = reparam.attach(model, reparam.LoRA(r=1), targets="ln_f", bias=True)
    models.loss(model).backward()
    assert adapter.modules["transformer.ln_f"].biases["default"].grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_norm_has_masters_in_float32_and_gives_16_bits(dtype: torch.dtype) -> None:
    model = models.llama().to(dtype)
    y = logits(model)
    adapter = reparam.attach(model, Shift(), targets="everything")
    assert torch.equal(logits(model), y)
    models.loss(model).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in adapter.parameters())
    move(adapter, 1)
    assert logits(model).dtype == dtype
    model.float()
    assert logits(model).dtype == torch.float32


def test_an_adapter_on_everything_compiles() -> None:
    model = models.llama(num_hidden_layers=1)
    adapter = reparam.attach(model, Shift(), targets="everything")
    move(adapter, 1)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = compiled(IDS).logits, model(IDS).logits
    assert error(found, expected) < 1e-5
    gradients = [torch.autograd.grad(y.square().sum(), adapter.parameters()) for y in (found, expected)]
    assert max(error(f, e) for f, e in zip(*gradients, strict=True)) < 1e-4
    torch.compiler.reset()


def test_a_bias_that_cannot_be_is_refused() -> None:
    class Everywhere(Shift):
        def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
            return ShiftUpdate(site, True)

    model = models.llama()
    for targets, kind in (("norm", "vector"), ("embed_tokens", "embedding")):
        with pytest.raises(ValueError, match=f"changes the bias, but this {kind} module cannot have a bias"):
            reparam.attach(model, Everywhere(), targets=targets)
    assert not any(isinstance(module, Adapted) for module in model.modules())


def test_an_update_without_factors_is_refused_on_a_vector() -> None:
    class Routed(ShiftUpdate):
        def factors(self, weight: Weight) -> Factors:
            raise InputDependentError("it looks at its input")

    class Looking(Shift):
        def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
            return Routed(site, False)

    with pytest.raises(InputDependentError):
        reparam.attach(models.llama(), Looking(), targets="norm")


def test_what_is_no_norm_is_refused() -> None:
    for module, why in (
        (nn.BatchNorm1d(3), "submodules or buffers"),
        (nn.Linear(3, 1), "not a norm"),
        (nn.LayerNorm(3, elementwise_affine=False), "not a norm"),
        (nn.Bilinear(2, 2, 2), "not a norm"),
    ):
        assert why in (Norm.unsupported_reason(module) or "")
        with pytest.raises(ValueError, match=why):
            Norm.wrap(module)


def test_quantizing_refuses_vectors() -> None:
    model = models.llama()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.input_layernorm is a vector"):
        reparam.quantize(model, "int8", targets="everything")
    assert models.same(models.frozen(model), models.frozen(models.llama()))
