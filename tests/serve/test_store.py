"""The adapters of an engine: names and digests, reloading, memory, and what is refused."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from serving import METHODS, SMALL, alone, prompts, save

import reparam
from reparam.serve import Engine, Limits, Request, pace

TEXT = prompts(1, seed=9)[0]


def ids(engine: Engine, name: str | None, most: int = 10) -> list[int]:
    return engine.answer([Request(TEXT, name, most)])[0].ids


def test_a_name_that_gets_new_bytes_means_the_new_adapter_and_who_has_begun_keeps_the_old_one(tmp_path: Path) -> None:
    old, new = save(models.llama(), tmp_path / "old", seed=1), save(models.llama(), tmp_path / "new", seed=2)
    answer = alone(models.llama(), tmp_path)
    expected = {name: answer(TEXT, name, 24) for name in ("old", "new")}
    assert expected["old"] != expected["new"]
    found: list[Any] = []
    with Engine(models.llama(), limits=SMALL) as engine:
        first = engine.load("name", old)
        request = [Request(TEXT, "name", 24)]
        thread = threading.Thread(target=lambda: found.extend(engine.answer(request)))
        with engine._loop.quiet():
            thread.start()
            while not len(engine._loop):
                threading.Event().wait(0.01)
        second = engine.load("name", new)
        found.extend(engine.answer(request))
        thread.join(30)
        assert first != second
        assert {one.digest: one.ids for one in found} == {first: expected["old"], second: expected["new"]}
        engine.load("other", new)  # the same contents by another name: no second copy
        assert engine._store.digests() == {"name": second, "other": second}
        assert len(engine._store._residents) <= 2
        engine.unload("other")
        assert ids(engine, "name", 24) == expected["new"]
        with pytest.raises(reparam.UnknownAdapter, match="'other'"):
            ids(engine, "other")


def test_bytes_that_change_in_the_folder_are_not_mistaken_for_the_old_ones(tmp_path: Path) -> None:
    save(models.llama(), tmp_path / "a", seed=1)
    with Engine(models.llama(), adapters=tmp_path, limits=SMALL) as engine:
        before = engine.answer([Request(TEXT, "a", 10)])[0]
        shutil.rmtree(tmp_path / "a")
        save(models.llama(), tmp_path / "a", seed=2)
        same = engine.answer([Request(TEXT, "a", 10)])[0]
        engine.load("a", tmp_path / "a")
        after = engine.answer([Request(TEXT, "a", 10)])[0]
    answer = alone(models.llama(), tmp_path)
    assert (same.digest, same.ids) == (before.digest, before.ids)
    assert after.digest != before.digest
    assert after.ids == answer(TEXT, "a", 10)


def test_more_adapters_than_the_budget_holds_all_answer_right(tmp_path: Path) -> None:
    names = [f"a{i}" for i in range(8)]
    for seed, name in enumerate(names):
        save(models.llama(), tmp_path / name, seed=seed, method=reparam.LoRA(r=1 + seed % 3))
    answer = alone(models.llama(), tmp_path)
    expected = [answer(TEXT, name, 6) for name in names]
    limits = Limits(requests=4, step_tokens=64, cache_tokens=1024, adapter_bytes=8_000)
    with Engine(models.llama(), adapters=tmp_path, limits=limits) as engine:
        for _ in range(2):
            found = engine.answer([Request(TEXT, name, 6) for name in names])
            assert [one.ids for one in found] == expected
            assert engine._store.nbytes() <= 8_000
            assert 1 < len(engine._store._residents) < 8
        save(models.llama(), tmp_path / "big", method=reparam.LoRA(r=32))
        with pytest.raises(reparam.FormatError, match=r"needs .* bytes, more than the 8,000"):
            engine.load("big", tmp_path / "big")


def test_tables_take_the_memory_of_their_adapters(tmp_path: Path) -> None:
    model = models.llama(hidden_size=128, intermediate_size=256)
    for seed, rank in enumerate([2, 2, 2, 2, 32, 2, 2, 2]):
        save(model, tmp_path / f"a{seed}", seed=seed, method=reparam.LoRA(r=rank), targets="all-linear")
    own = sum(file.stat().st_size for file in tmp_path.glob("*/*.safetensors"))
    with Engine(model, adapters=tmp_path, limits=SMALL) as engine:
        engine.answer([Request(TEXT, f"a{i}", 2) for i in range(8)])
        assert engine._banks.nbytes() <= 1.1 * own


def test_what_left_the_tables_comes_back_from_host_memory_and_otherwise_from_disk(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    for seed, name in enumerate(names):
        save(models.llama(), tmp_path / name, seed=seed, method=reparam.DoRA(r=2) if name == "a" else reparam.LoRA(r=2))
    answer = alone(models.llama(), tmp_path)
    expected = [answer(TEXT, name, 6) for name in names]
    limits = {"requests": 4, "step_tokens": 64, "cache_tokens": 1024, "adapter_bytes": 6_000}
    for host in (100_000, 0):
        folders = shutil.copytree(tmp_path, tmp_path.parent / f"copy{host}")
        with Engine(models.llama(), adapters=folders, limits=Limits(**limits, host_bytes=host)) as engine:
            digests = [engine.answer([Request(TEXT, name, 6)])[0].digest for name in names]
            assert len(engine._store._residents) < 3
            shutil.rmtree(folders)
            if host:
                found = [engine.answer([Request(TEXT, name, 6)])[0] for name in names]
                assert [one.ids for one in found] == expected
                assert [one.digest for one in found] == digests
            else:
                with pytest.raises(reparam.FormatError, match=r"no such folder|no adapter"):
                    ids(engine, "a")


def test_a_paced_thread_rests_for_most_of_the_time_while_steps_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr(pace.time, "sleep", rests.append)
    x = torch.ones(64)
    for busy in (False, True):
        begin = time.thread_time()
        with pace.Pace(lambda busy=busy: busy):  # type: ignore[misc]
            for _ in range(2000):
                x = x * 1.0
        worked = time.thread_time() - begin
        assert bool(rests) == busy
    assert sum(rests) > worked * (1 / pace.SHARE - 1) * 0.5
    assert len(rests) > 3
    assert torch.equal(x, torch.ones(64))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gates that read the input": ({"method": reparam.MoLoRA(r=2, n=2)}, "no matrix stands for it"),
    "a bottleneck": ({"method": reparam.Bottleneck(r=4), "targets": None}, "no matrix stands for it"),
    "a module that trains whole": ({"modules_to_save": ["lm_head"]}, "trains whole modules"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_matrix_stands_for_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    settings, message = REFUSED[case]
    save(models.llama(), tmp_path / "made", **settings)
    with Engine(models.llama(), adapters=tmp_path, limits=SMALL) as engine:
        with pytest.raises(reparam.FormatError, match=message) as raised:
            ids(engine, "made")
        assert str(tmp_path / "made") in str(raised.value)
        assert len(ids(engine, None)) == 10


def test_virtual_tokens_are_refused(tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    get_peft_model(models.llama(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "made"
    )
    with (
        Engine(models.llama(), adapters=tmp_path, limits=SMALL) as engine,
        pytest.raises(reparam.FormatError, match="virtual tokens"),
    ):
        ids(engine, "made")


def test_an_adapter_that_does_not_fit_or_does_nothing_is_refused(tmp_path: Path) -> None:
    fresh = models.llama()
    reparam.attach(fresh, reparam.LoRA(r=2), targets=["q_proj"]).save(tmp_path / "fresh")
    save(models.llama(num_hidden_layers=3), tmp_path / "deeper")
    other = models.llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    save(other, tmp_path / "elsewhere")
    save(models.llama(), tmp_path / "huge")
    with torch.no_grad():
        model = models.llama()
        adapter = reparam.load(model, tmp_path / "huge")
        for parameter in adapter.parameters():
            parameter.fill_(1e30)
        adapter.save(tmp_path / "huge")
    save(models.llama(), tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    expected = {
        "fresh": "does not change the model's outputs",
        "deeper": "lacks|architecture",
        "elsewhere": "base",
        "huge": "not finite",
        "cut": "cut",
    }
    with Engine(models.llama(), adapters=tmp_path, limits=SMALL) as engine:
        base = ids(engine, None)
        save(models.llama(), tmp_path.parent / "right")
        engine.load(
            "right", tmp_path.parent / "right"
        )  # of one structure with most of them, which proves nothing of them
        engine.unload("right")
        for name, message in expected.items():
            with pytest.raises(reparam.FormatError, match=message):
                ids(engine, name)
            with pytest.raises(reparam.FormatError, match=message):
                engine.load("good", tmp_path / name)
        assert "good" not in engine.adapters
        assert ids(engine, None) == base
        assert not engine._store._residents


def test_adapters_of_one_structure_are_tried_in_a_batch_once(tmp_path: Path) -> None:
    methods = [reparam.LoRA(r=2, alpha=4)] * 3 + [reparam.LoRA(r=3, alpha=4), reparam.DoRA(r=2, alpha=4)]
    for seed, method in enumerate(methods):
        save(models.llama(), tmp_path / f"a{seed}", seed=seed, method=method)
    runs = []
    with Engine(models.llama(), limits=SMALL) as engine:
        engine._store._prover.model.register_forward_pre_hook(lambda *_: runs[-1].append(1))
        for seed in range(len(methods)):
            runs.append([])
            engine.load(f"a{seed}", tmp_path / f"a{seed}")
    assert [len(own) == 1 for own in runs] == [False, True, True, False, False]


def test_names_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    save(models.llama(), tmp_path / "outside")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(reparam.FormatError, match="leads out of"):
        Engine(models.llama(), adapters=tmp_path / "root")
    (tmp_path / "root" / "link").unlink()
    save(models.llama(), tmp_path / "root" / "inside")
    with Engine(models.llama(), adapters=tmp_path / "root", limits=SMALL) as engine:
        for name in ("../outside", "/etc", "inside/../../outside", ".", ""):
            with pytest.raises(reparam.UnknownAdapter):
                ids(engine, name)
        with pytest.raises(ValueError, match="cannot be the name"):
            engine.load("../x", tmp_path / "outside")


def test_a_folder_of_peft_and_that_of_a_run_are_served(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(models.llama(), LoraConfig(r=3, target_modules=["q_proj", "o_proj"]))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path / "peft")
    save(models.llama(), tmp_path / "run" / "adapter", **METHODS["dora"])
    answer = alone(models.llama(), tmp_path)
    prompt = torch.tensor([TEXT])
    judge = theirs.generate(input_ids=prompt, max_new_tokens=10, do_sample=False, pad_token_id=0)[0].tolist()
    with Engine(models.llama(), adapters=tmp_path, limits=SMALL) as engine:
        assert engine.adapters == ["peft", "run"]
        assert ids(engine, "peft") == judge[len(TEXT) :]
        assert ids(engine, "run") == answer(TEXT, "run", 10)
