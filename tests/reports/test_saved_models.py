"""A saved model is what stock tools read: the base under its own names, and the adapters, which `load` finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, bert, gpt2, llama, mixtral, t5
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

import reparam
import reparam.hf.models  # registers the quantizer that reads our quantized files

MODELS: dict[str, Any] = {"llama": llama, "gpt2": gpt2, "tied": lambda: llama(tie_word_embeddings=True)}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(adapter: reparam.Adapter, seed: int = 0) -> None:
    """Give the adapter an effect, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [reparam.LoRA(r=2), reparam.DoRA(r=2), reparam.Full()], ids=lambda m: m.name)
def test_stock_transformers_read_the_base_bit_for_bit_and_load_finds_the_adapter(
    name: str, method: Any, tmp_path: Path
) -> None:
    model = MODELS[name]()
    expected = logits(model)
    adapter = reparam.attach(model, method, targets="all-linear", name="task")
    trained(adapter)
    adapted = logits(model)
    model.save_pretrained(tmp_path / "m")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert torch.equal(logits(stock), expected)
    reparam.load(stock, tmp_path / "m")
    assert torch.equal(logits(stock), adapted)


def test_of_several_adapters_the_name_chooses_and_the_method_keeps_its_settings(tmp_path: Path) -> None:
    model = llama()
    for seed, (name, method) in enumerate(
        {"a": reparam.LoRA(r=2, alpha=7), "b": reparam.DoRA(r=3), "c": reparam.MoLoRA(n=2, r=2)}.items()
    ):
        trained(reparam.attach(model, method, name=name, bias=name == "a"), seed)
    model.save_pretrained(tmp_path)
    stock = llama()
    with pytest.raises(reparam.FormatError, match="3 adapters; give the name of one of them: a, b, c"):
        reparam.load(stock, tmp_path)
    for name in "abc":
        reparam.select(model, name)
        reparam.load(stock, tmp_path, name=name)
        assert torch.equal(logits(stock), logits(model))
        assert reparam.adapters(stock)[name].method == reparam.adapters(model)[name].method


def test_a_module_that_is_trained_whole_has_the_names_of_the_original(tmp_path: Path) -> None:
    model = bert()
    expected = logits(model)
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets="attention", modules_to_save="classifier", name="task")
    trained(adapter)
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(stock), expected)
    reparam.load(stock, tmp_path, name="task")
    assert torch.equal(logits(stock), adapted)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize("state", ["bare", "adapter", "removed", "merged part", "requantized"])
def test_a_quantized_model_is_read_byte_for_byte(storage: str, state: str, tmp_path: Path) -> None:
    model = llama()
    reparam.quantize(model, storage)
    if state != "bare":
        targets = "attention" if state == "merged part" else "all-linear"
        trained(reparam.attach(model, reparam.LoRA(r=2), targets=targets, name="task"))
    if state == "removed":
        reparam.remove(model, "task")
    if state == "merged part":
        reparam.merge(model)
    if state == "requantized":
        reparam.merge(model, into=storage, force=True)
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    if state == "adapter":
        reparam.load(stock, tmp_path, name="task")
    assert torch.equal(logits(stock), logits(model))
    assert stock.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(stock.state_dict()[key], tensor), key


def test_a_dequantized_model_says_nothing_of_quantization(tmp_path: Path) -> None:
    model = llama()
    reparam.quantize(model, "int8")
    reparam.quantize(model, "dense")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model))


@pytest.mark.parametrize("storage", ["dense", "nf4", "int8"])
def test_a_state_dict_is_loaded_back_into_a_model_with_the_same_adapters(storage: str) -> None:
    models = [llama(), llama()]
    for seed, model in enumerate(models):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + seed)
        if storage != "dense":
            reparam.quantize(model, storage)
        trained(reparam.attach(model, reparam.LoRA(r=2), name="task"), seed)
    assert not torch.equal(logits(models[0]), logits(models[1]))
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(logits(models[0]), logits(models[1]))


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_models_whose_files_have_other_names_are_read_too(targets: str, tmp_path: Path) -> None:
    """transformers renames and splits the experts of Mixtral when it writes files."""
    model = mixtral()
    expected = logits(model)
    trained(reparam.attach(model, reparam.LoRA(r=2), targets=targets, name="task"))
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(stock), expected)
    reparam.load(stock, tmp_path, name="task")
    assert torch.equal(logits(stock), adapted)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = torch.randint(2, 97, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}


def run(folder: Path, storage: str, *, steps: int, resume: bool = False) -> tuple[nn.Module, Trainer]:
    torch.manual_seed(0)
    model = llama()
    if storage != "dense":
        reparam.quantize(model, storage)
    reparam.attach(model, reparam.LoRA(r=2, dropout=0.1), name="task")
    arguments = TrainingArguments(
        str(folder),
        max_steps=8,
        per_device_train_batch_size=2,
        save_steps=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=Rows())
    if steps < 8:
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                control.should_training_stop = state.global_step >= steps

        trainer.add_callback(Stop())
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_a_stock_trainer_resumes_as_if_it_had_not_stopped(storage: str, tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", storage, steps=8)
    run(tmp_path / "part", storage, steps=4)
    resumed, _ = run(tmp_path / "part", storage, steps=8, resume=True)
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_t5_and_tied_embeddings_keep_their_files(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    model = t5()
    reparam.attach(model, reparam.LoRA(r=2), targets="all-linear")
    model.save_pretrained(tmp_path)
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    for (name, one), other in zip(t5().state_dict().items(), stock.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
