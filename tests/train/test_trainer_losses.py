"""Losses of the Trainer: a run stops if one is not finite; a penalty is not in the reported loss."""

import pytest
import torch
from small_trainer import POISON, ROWS, At, collate, history, rows, same, tiny, trainer, weights
from torch import Tensor

from reparam.errors import NotFinite
from reparam.train.checkpoint import newest

# ---- numbers that are not finite


def test_a_nan_loss_names_its_rows_and_changes_nothing(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = float("nan")
    data = rows()
    settings = {"save_steps": 1, "train_sampling_strategy": "sequential", "learning_rate": 1e-3}
    data[7]["input_ids"][2] = POISON  # step 2, its second micro-batch
    held: list[dict[str, Tensor]] = []
    run = trainer(
        tmp_path,
        model=model,
        data=data,
        row_names=[f"data.jsonl:{i + 1}" for i in range(ROWS)],
        callbacks=[At(2, lambda: held.append(weights(model)))],
        **settings,
    )
    with pytest.raises(NotFinite, match=r"the loss is nan at step 2 \(micro-batch 2 of 2\), in the rows") as caught:
        run.train()
    assert (caught.value.step, caught.value.rows) == (2, ["data.jsonl:7", "data.jsonl:8"])
    assert "the last good checkpoint is" in str(caught.value)
    assert "checkpoint-1." in str(caught.value)
    assert newest(tmp_path).path.name == "checkpoint-1"
    now = weights(model)
    assert all(torch.equal(now[key], held[0][key]) for key in now if "embed" not in key)


def test_a_nan_gradient_under_a_finite_loss_changes_nothing(tmp_path):
    model = tiny()
    held: list[dict[str, Tensor]] = []

    def penalty() -> Tensor:
        # The square root of 0: a finite value, and a gradient that is not.
        factor = 0.0 if run.state.global_step == 1 else 1.0
        return (model.lm_head.weight.square().sum() * factor).sqrt()

    run = trainer(
        tmp_path,
        model=model,
        extra_loss=penalty,
        row_names=lambda index: f"rows.jsonl:{index}",
        save_steps=1,
        train_sampling_strategy="sequential",
        callbacks=[At(2, lambda: held.append(weights(model)))],
    )
    with pytest.raises(NotFinite, match="the gradient is nan at step 2, in the rows") as caught:
        run.train()
    assert caught.value.rows == [f"rows.jsonl:{index}" for index in range(4, 8)]
    assert newest(tmp_path).path.name == "checkpoint-1"
    assert same(weights(model), held[0])


def test_without_rows_and_checkpoints_the_error_says_so(tmp_path):
    run = trainer(tmp_path, extra_loss=lambda: torch.tensor(float("inf")))
    run.data_collator = lambda batch: {key: value for key, value in collate(batch).items() if key != "row"}
    message = r"the penalty is inf at step 1 \(micro-batch 1 of 2\)\. .*there is no checkpoint yet"
    with pytest.raises(NotFinite, match=message) as caught:
        run.train()
    assert caught.value.rows == []


# ---- the penalty


@pytest.mark.parametrize("shared", [True, False], ids=["loss over all items", "loss per micro-batch"])
def test_the_penalty_moves_the_weights_and_not_the_reported_loss(tmp_path, shared):
    settings = {
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }
    models = [tiny(), tiny()]
    start = models[0].lm_head.weight.detach().clone()
    runs = []
    for model, extra in zip(models, (None, lambda: 3 * models[1].lm_head.weight.square().sum() / 2), strict=True):
        model.accepts_loss_kwargs = shared
        runs.append(trainer(tmp_path / str(len(runs)), model=model, extra_loss=extra, **settings))
        runs[-1].train()
    assert history(runs[0].state)[0]["loss"] == history(runs[1].state)[0]["loss"]
    plain, pulled = (model.lm_head.weight.detach() for model in models)
    torch.testing.assert_close(pulled, plain - 0.1 * 3 * start, rtol=1e-5, atol=1e-6)
    assert not torch.equal(plain, start)


def test_the_penalty_is_no_part_of_evaluation(tmp_path):
    plain, extra = trainer(tmp_path / "a"), trainer(tmp_path / "b", extra_loss=lambda: torch.tensor(5.0))
    assert plain.evaluate()["eval_loss"] == extra.evaluate()["eval_loss"]
