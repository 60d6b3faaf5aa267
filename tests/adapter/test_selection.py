"""Which adapter a model uses: one, none, one for each row; and that nothing of a choice is left behind."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from models import IDS, logits
from torch import Tensor, nn

import reparam
from reparam.adapter.selection import BANK
from reparam.sites.bank import Bank


def moved(model: nn.Module, name: str, seed: int, **settings: Any) -> reparam.Adapter:
    """An adapter that changes the outputs."""
    adapter = reparam.attach(model, reparam.LoRA(r=settings.pop("r", 2), alpha=8), name=name, **settings)
    change(adapter, seed)
    return adapter


@torch.no_grad()
def change(adapter: reparam.Adapter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)


def two(make: Callable[[], Any] = models.llama) -> Any:
    """A model with the adapters a and b; a is selected."""
    model = make()
    moved(model, "a", 1)
    moved(model, "b", 2, r=3)
    reparam.select(model, "a")
    return model


@torch.no_grad()
def under(model: nn.Module, which: Any, ids: Tensor = IDS) -> Tensor:
    with reparam.select(model, which):
        return logits(model, ids)


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def check_rows(model: nn.Module, rows: list[str | None], ids: Tensor = IDS) -> None:
    """Each row of a mixed batch is what it is alone, and the rows differ."""
    alone = {name: under(model, name, ids) for name in set(rows)}
    mixed = under(model, rows, ids)
    for row, name in enumerate(rows):
        assert close(mixed[row], alone[name][row]), name
    different = [alone[name] for name in alone]
    for i, one in enumerate(different):
        assert not any(close(one, other) for other in different[i + 1 :])


def banks(model: nn.Module) -> list[Bank]:
    return [module for module in model.modules() if isinstance(module, Bank)]


# ---- one or none


def test_one_is_used_at_a_time() -> None:
    model = two()
    outputs = {name: under(model, name) for name in ("a", "b", None)}
    base = logits(models.llama())
    assert torch.equal(outputs[None], base)
    assert not close(outputs["a"], outputs["b"])
    assert not close(outputs["a"], base)
    reparam.select(model, "b")
    assert torch.equal(logits(model), outputs["b"])
    reparam.select(model, None)
    assert torch.equal(logits(model), base)
    assert reparam.adapters(model).keys() == {"a", "b"}


@pytest.mark.parametrize("which", ["aa", ["a", "aa", None], ["aa"], [3]])
def test_an_unknown_name_is_refused_at_once_and_the_choice_stays(which: Any) -> None:
    model = two()
    y = logits(model)
    with pytest.raises(ValueError, match=r"no adapter is called ('aa' \(did you mean 'a'\?\)|3); there are: a, b"):
        reparam.select(model, which)
    assert torch.equal(logits(model), y)


def test_a_model_without_adapters_says_so() -> None:
    model = models.llama()
    assert reparam.adapters(model) == {}
    for use in (reparam.select, reparam.remove):
        with pytest.raises(ValueError, match="this LlamaForCausalLM has no adapter on it; attach or load one first"):
            use(model, "a")


def test_a_name_that_cannot_be_one_is_refused_and_leaves_nothing() -> None:
    model = models.llama()
    before = str(model)
    for name, message in {
        "": "letters, digits",
        "a.b": "letters, digits",
        "*": "letters, digits",
        "keys": "torch's containers",
        "copy": "torch's containers",
        "training": "torch's containers",
        "_modules": "torch's containers",
    }.items():
        with pytest.raises(ValueError, match=message):
            reparam.attach(model, reparam.LoRA(), name=name)
    assert str(model) == before
    moved(model, "a", 1)
    with pytest.raises(ValueError, match=r"name='a' is taken; remove\(model, 'a'\) first"):
        reparam.attach(model, reparam.LoRA(), name="a")


# ---- a mixed batch


def test_rows_may_be_any_sequence() -> None:
    model = two()
    expected = under(model, ["a", None, "b"])
    assert torch.equal(under(model, ("a", None, "b")), expected)
    assert torch.equal(under(model, iter(["a", None, "b"])), expected)
    with pytest.raises(ValueError, match="an empty list; give one name, or None, for each row"):
        reparam.select(model, [])


@pytest.mark.parametrize("make", list(models.ALL.values()), ids=list(models.ALL))
@pytest.mark.filterwarnings("ignore:LoRA. the rank exceeds", "ignore:targets. no update goes on .*experts")
def test_every_architecture_takes_mixed_batches(make: Callable[[], Any]) -> None:
    """Also where a layer gets rows and tokens in one dimension (a shared expert), or one vector a row (a pooler)."""
    model = two(make)
    check_rows(model, ["b", None, "a"])
    check_rows(model, ["a", "b", "a"])


@pytest.mark.parametrize("rows", [["a", None], ["a", "b", None, "a"], ["a"] * 21, [None]], ids=len)
def test_a_list_of_the_wrong_length_is_refused_before_any_compute(rows: list[str | None]) -> None:
    model = two()
    calls: list[nn.Module] = []
    for module in model.modules():
        if module is not model:
            module.register_forward_pre_hook(lambda module, _: calls.append(module))
    reparam.select(model, rows)
    for batch in ({"input_ids": IDS}, {"inputs_embeds": torch.zeros(3, 7, 32)}):
        with pytest.raises(ValueError, match=rf"{len(rows)} adapter names were selected, one per row, but .*\[3, 7"):
            model(**batch)
    with pytest.raises(ValueError, match="adapter names were selected"):
        model(IDS)
    with pytest.raises(ValueError, match="adapter names were selected"):
        model.generate(IDS, max_new_tokens=2)
    assert calls == []


def test_one_token_and_one_row() -> None:
    model = two()
    check_rows(model, ["b", "a", None], IDS[:, :1])
    check_rows(model, ["b"], IDS[:1])
    check_rows(model, ["b"], IDS[:1, :1])


def test_beams_are_rows() -> None:
    model = two()
    length = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    with reparam.select(model, ["a", None, "b"]), pytest.raises(ValueError, match=r"with beams .* repeat each name"):
        model.generate(IDS, **length)
    with reparam.select(model, ["a", "a", None, None, "b", "b"]):
        found = model.generate(IDS, **length)
    for row, name in enumerate(["a", None, "b"]):
        with reparam.select(model, name):
            assert torch.equal(found[row], model.generate(IDS, **length)[row])


def test_padding_on_the_left_is_each_row_alone() -> None:
    model = two()
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    length = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    with reparam.select(model, ["b", "a", None]):
        found = model.generate(IDS, **length)
    for row, name in enumerate(["b", "a", None]):
        with reparam.select(model, name):
            assert torch.equal(found[row], model.generate(IDS, **length)[row])


def test_an_encoder_and_a_decoder_generate_row_by_row() -> None:
    model = two(models.t5)
    length = {"max_new_tokens": 4, "do_sample": False}
    with reparam.select(model, ["b", "a", None]):
        found = model.generate(input_ids=IDS, **length)
        with pytest.raises(ValueError, match="a mixed batch of 3 rows met an activation"):
            model.generate(input_ids=IDS[:2], **length)
    for row, name in enumerate(["b", "a", None]):
        with reparam.select(model, name):
            assert torch.equal(found[row], model.generate(input_ids=IDS, **length)[row])


def test_rows_that_cannot_be_told_apart_are_refused() -> None:
    """GPT-2 looks positions up once for the whole batch."""
    model = models.gpt2()
    moved(model, "a", 1, targets=["wpe", "c_attn"])
    with pytest.raises(ValueError, match=r"met an activation of shape \[1, 7, 1\] whose rows it cannot tell apart"):
        under(model, ["a", None, "a"])


def test_adapters_on_different_sites_with_biases_and_embeddings() -> None:
    model = models.gpt2()
    moved(model, "a", 1, targets=["wte", "c_fc"], bias=True)
    moved(model, "b", 2, targets="attention", r=5)
    moved(model, "c", 3, bias=True)
    moved(model, "d", 4, targets=["wte", "lm_head"])
    rows: list[str | None] = ["a", "b", "c", "d", None, "a"]
    check_rows(model, rows, torch.cat([IDS, IDS.flip(0)]))


def test_an_adapter_that_comes_later_joins_the_bank() -> None:
    model = models.llama()
    moved(model, "a", 1, targets=["q_proj"])
    under(model, ["a", None, "a"])
    moved(model, "b", 2, targets=["v_proj", "q_proj"], r=4)
    moved(model, "c", 3, targets=["down_proj"])
    check_rows(model, ["c", "b", "a"])
    check_rows(model, ["a", None, "a"])


@pytest.mark.parametrize("make", [models.bert, models.llama])
def test_modules_that_are_trained_whole_go_by_row(make: Callable[[], Any]) -> None:
    model = make()
    head = "classifier" if make is models.bert else "lm_head"
    moved(model, "a", 1, modules_to_save=[head])
    moved(model, "b", 2)
    moved(model, "c", 3, modules_to_save=[head], targets="attention")
    ids = torch.cat([IDS, IDS[:2]])
    check_rows(model, ["b", "a", None, "c", "a"], ids)
    with reparam.select(model, ["a", None, "c"]), pytest.raises(ValueError, match="3 adapter names were selected"):
        logits(model, ids)


def test_training_through_a_mixed_batch_is_refused() -> None:
    model = two().train()
    with reparam.select(model, ["a", "b", None]):
        with pytest.raises(ValueError, match="a mixed batch is for inference: select one adapter to train it"):
            models.scores(model)
        with torch.no_grad():
            logits(model)


# ---- the bank


def optimize(model: nn.Module, adapter: reparam.Adapter) -> None:
    reparam.select(model, adapter.name)
    adapter.requires_grad_()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    models.loss(model).backward()
    optimizer.step()


def overwrite(model: nn.Module, adapter: reparam.Adapter) -> None:
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items() if ".updates.a." in name}
    model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("way", [optimize, overwrite])
def test_an_adapter_that_changed_is_written_again(way: Callable[[nn.Module, reparam.Adapter], None]) -> None:
    model = two()
    before = under(model, ["a", "b", None])
    way(model, reparam.adapters(model)["a"])
    after = under(model, ["a", "b", None])
    assert not close(after[0], before[0])
    assert close(after[0], under(model, "a")[0])
    assert torch.equal(after[1:], before[1:])


def test_an_adapter_that_did_not_change_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two()
    written: list[int] = []
    write = Bank.write
    monkeypatch.setattr(Bank, "write", lambda bank, slot, *rest: (written.append(slot), write(bank, slot, *rest)))
    sites = len(reparam.adapters(model)["a"].sites)
    reparam.select(model, ["a", "a", None])
    assert written == [0] * sites  # b is not in use
    reparam.select(model, ["a", "b", None])
    assert written == [0] * sites + [1] * sites
    reparam.select(model, ["b", "a"])
    assert len(written) == 2 * sites


def test_slots_are_used_again_after_removal() -> None:
    model = two()
    moved(model, "c", 3, bias=True)
    under(model, ["a", "b", "c"])
    size = {len(bank.A) for bank in banks(model)}
    names = ["b", "d", "e", "f", "g"]
    for seed, (old, new) in enumerate(itertools.pairwise(names)):
        reparam.remove(model, old)
        moved(model, new, 4 + seed, r=1)
        check_rows(model, [new, "a", "c"])
    assert {len(bank.A) for bank in banks(model)} == size


def test_the_bank_is_no_part_of_the_state() -> None:
    model = two()
    before, count = model.state_dict().keys(), sum(1 for _ in model.parameters())
    under(model, ["a", "b", None])
    assert banks(model)
    assert model.state_dict().keys() == before
    assert sum(1 for _ in model.parameters()) == count


def test_a_bank_moves_with_the_model() -> None:
    model = two()
    under(model, ["a", "b", None])
    model.double()
    check_rows(model, ["b", None, "a"])
    assert under(model, ["b", None, "a"]).dtype == torch.float64


# ---- nothing left behind


def test_with_puts_the_choice_back() -> None:
    model = two()
    a, mixed = logits(model), under(model, ["b", None, "a"])
    with reparam.select(model, "b"):
        with reparam.select(model, ["b", None, "a"]):
            with reparam.select(model, None):
                assert torch.equal(logits(model), logits(models.llama()))
            assert torch.equal(logits(model), mixed)
        assert not close(logits(model), a)
    assert torch.equal(logits(model), a)
    assert not model._forward_pre_hooks


class BreakError(Exception):
    """Raised in the middle of a forward."""


@pytest.mark.parametrize("which", [None, "b", ["b", None, "a"]], ids=str)
def test_an_exception_in_a_forward_leaves_no_routing(which: Any) -> None:
    model = two()
    y = logits(model)

    def fail(*_: Any) -> None:
        raise BreakError

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(BreakError), reparam.select(model, which):
        logits(model)
    handle.remove()
    assert torch.equal(logits(model), y)
    assert torch.equal(logits(model, IDS[:2]), y[:2]) or close(logits(model, IDS[:2]), y[:2])
    assert not model._forward_pre_hooks


def test_leaving_a_mixed_batch_frees_the_length() -> None:
    model = two()
    with reparam.select(model, ["a", "b"]):
        logits(model, IDS[:2])
    for rows in (1, 2, 3):
        logits(model, IDS[:rows])
    reparam.select(model, ["a", "b"])
    reparam.select(model, None)
    logits(model)
    assert not model._forward_pre_hooks


def test_a_refused_list_leaves_a_mixed_batch_as_it_was() -> None:
    model = two()
    reparam.select(model, ["a", "b", None])
    mixed = logits(model)
    with pytest.raises(ValueError, match="no adapter is called 'x'"):
        reparam.select(model, ["x", "a", "b"])
    assert torch.equal(logits(model), mixed)
    with pytest.raises(ValueError, match="3 adapter names"):
        logits(model, IDS[:2])


@pytest.mark.parametrize("which", ["a", ["a", None, "b"]], ids=str)
def test_removing_the_chosen_adapter_selects_the_base(which: Any) -> None:
    model = two()
    reparam.select(model, which)
    reparam.remove(model, "a")
    base = logits(models.llama())
    assert torch.equal(logits(model), base)
    assert not model._forward_pre_hooks
    with pytest.raises(ValueError, match=r"no adapter is called 'a'.*there are: b"):
        reparam.remove(model, "a")
    assert not close(under(model, "b"), base)


def test_removing_another_keeps_the_choice() -> None:
    model = two()
    y = logits(model)
    reparam.remove(model, "b")
    assert torch.equal(logits(model), y)


@pytest.mark.parametrize("make", list(models.ALL.values()), ids=list(models.ALL))
@pytest.mark.filterwarnings("ignore:LoRA. the rank exceeds", "ignore:targets. no update goes on .*experts")
def test_removing_all_gives_the_plain_model_back(make: Callable[[], Any]) -> None:
    plain, model = make(), two(make)
    under(model, ["a", "b", None])
    reparam.remove(model, "b")
    reparam.remove(model, "a")
    assert str(model) == str(plain)
    assert models.same(models.frozen(model), models.frozen(plain))
    assert torch.equal(logits(model), logits(plain))
    assert not hasattr(model, "reparam_state")
    assert vars(model).keys() == vars(plain).keys()
    moved(model, "a", 1)  # and it can be adapted again
    assert torch.equal(logits(model), under(two(make), "a"))


@pytest.mark.parametrize("before", ["a", ["a", "b", None]], ids=str)
def test_merging_inside_with_leaves_the_merged_model(before: Any) -> None:
    model = two()
    reparam.select(model, before)
    with reparam.select(model, "b"):
        y = logits(model)
        reparam.merge(model)
    assert close(logits(model), y)
    assert str(model) == str(models.llama())
    assert not model._forward_pre_hooks


def test_removing_inside_with_what_was_chosen_before_leaves_the_base() -> None:
    model = two()
    with reparam.select(model, "b"):
        reparam.remove(model, "a")
        assert not close(logits(model), logits(models.llama()))
    assert torch.equal(logits(model), logits(models.llama()))
    with reparam.select(model, None):
        reparam.remove(model, "b")
    assert str(model) == str(models.llama())


def test_a_copy_made_during_a_mixed_batch_is_apart() -> None:
    model = two()
    reparam.select(model, ["a", "b", None])
    twin = copy.deepcopy(model)
    mixed = logits(model)
    assert torch.equal(logits(twin), mixed)
    reparam.select(twin, ["b", "a"])
    logits(twin, IDS[:2])
    assert torch.equal(logits(model), mixed)
    reparam.select(twin, None)
    assert not twin._forward_pre_hooks
    assert len(model._forward_pre_hooks) == 1
    change(reparam.adapters(twin)["a"], 9)
    assert torch.equal(logits(model), mixed)
    assert torch.equal(under(model, ["a", "b", None]), mixed)


def test_the_bank_of_a_merged_and_restored_model_still_serves() -> None:
    model = two()
    mixed = under(model, ["a", "b", None])
    reparam.merge(model, keep_base=True).restore()
    assert torch.equal(under(model, ["a", "b", None]), mixed)
    check_rows(model, ["b", None, "a"])


def test_every_site_has_one_bank_that_is_used_when_mixed_only() -> None:
    model = two()
    state = model.reparam_state
    reparam.select(model, ["a", "b", None])
    assert {module.active for module in state.sites.values()} == {BANK}
    assert len(banks(model)) == len(state.sites)
    reparam.select(model, "a")
    assert {module.active for module in state.sites.values()} == {"a"}


def test_a_mixed_batch_sees_the_steps_of_a_fused_optimizer() -> None:
    """AdamW with fused=True changes parameters without raising their version counters."""
    model = two()
    adapter = reparam.adapters(model)["a"].requires_grad_()
    before = under(model, ["a", "b", None])
    reparam.select(model, "a")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, fused=True)
    models.loss(model).backward()
    optimizer.step()
    after = under(model, ["a", "b", None])
    assert not close(after[0], before[0])
    assert close(after[0], under(model, "a")[0])
    assert torch.equal(after[1:], before[1:])
