"""GRPO: raise the model's own answers that a reward prefers to its others (Shao et al. 2024, arXiv 2402.03300)."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer

from reparam.adapter.context import tasks_of
from reparam.data.framing import Frame
from reparam.data.prompts import Asked, Prompts, encode_prompts, read_prompts
from reparam.errors import ConfigError
from reparam.evaluation.complete import complete
from reparam.evaluation.score import Answer, Score
from reparam.train import processes
from reparam.train.config import Config
from reparam.train.data import Data, read_parts
from reparam.train.job import Job
from reparam.train.objectives.objective import Objective
from reparam.train.objectives.reference import Reference, before_training
from reparam.train.objectives.with_trl import ARGUMENTS, FromTRL, score_any_head, without_dropout
from reparam.train.order import ByEpoch
from reparam.train.reading import check_chats, frame_of, prompt_format
from reparam.train.reward import EXAMPLE, Reward
from reparam.train.trainer import Resumable


class GRPO(Objective):
    """The objective grpo."""

    name = "grpo"
    reads = ("optim.beta", "prefer.reward", "prefer.samples", "prefer.new_tokens", "prefer.temperature")
    metrics = ("loss", "mean_reward")

    def check(self, config: Config) -> None:
        """Raise ConfigError for settings that the objective cannot use, and if there is no reward."""
        super().check(config)
        run, prefer = config.run, config.prefer
        if run.keeps_best and run.metric == "loss":
            raise ConfigError(
                "run.metric: the loss of grpo does not tell which weights are better; set it to mean_reward for "
                "run.best and run.patience"
            )
        if prefer.reward is None:
            raise ConfigError(
                f"prefer.reward must be set for grpo: the function that rewards answers, such as {EXAMPLE}"
            )
        Reward(prefer.reward)
        if run.batch_size * run.accumulation % prefer.samples:
            raise ConfigError(
                f"prefer.samples: a step has {run.batch_size * run.accumulation} answers (run.batch_size times "
                f"run.accumulation), which is no multiple of the {prefer.samples} answers for each prompt"
            )
        if processes.count() > 1:
            raise ConfigError("run.objective: grpo runs in one process here: call it without torchrun")

    def unsupported(self, config: Config) -> dict[str, bool]:
        """The keys of settings that the objective does not support, and whether each is set."""
        data = config.data
        return super().unsupported(config) | {
            "data.too_long": data.too_long not in ("auto", "error"),
            "data.loss_on": data.loss_on != "answers",
            "data.thinking": data.thinking is not None,
        }

    def data(self, config: Config, tokenizer: Any) -> Data:
        """Read and encode the prompts."""
        data = config.data
        train, valid = read_parts(config, lambda source: read_prompts(source, data.renamed()))
        framed = frame_of(data, tokenizer)
        kinds: Counter[str] = Counter("completion" if isinstance(each.prompt, str) else "chat" for each in train)
        check_chats(data, kinds)
        train, valid = ([_framed(each, framed) for each in part] for part in (train, valid))
        parts = [
            encode_prompts(part, tokenizer, samples=config.prefer.samples, max_length=data.max_length)
            for part in (train, valid)
        ]
        return Data(parts[0], parts[1], [], config.method, tuple(parts), prompt_format(data, tokenizer, kinds))

    def start(self, job: Job) -> str | None:
        """The model before training."""
        return before_training(job)

    def trainer(self, job: Job, arguments: Mapping[str, Any], **others: Any) -> Resumable:
        """TRL's GRPOTrainer."""
        if tasks_of(job.model):
            raise ConfigError("run.objective: TRL's GRPO passes no task to the model; use a method without tasks")
        assert isinstance(job.train, Prompts)
        assert isinstance(job.valid, Prompts)
        without_dropout(job)
        prefer, run = job.config.prefer, job.config.run
        fixed = {key: value for key, value in ARGUMENTS.items() if key != "max_length"}
        given = GRPOConfig(
            **{**arguments, **fixed, "include_num_input_tokens_seen": "no", "max_steps": run.steps(len(job.train))},
            num_generations=prefer.samples,
            max_completion_length=prefer.new_tokens,
            temperature=prefer.temperature,
            beta=0.0,
        )
        assert prefer.reward is not None
        install = score_any_head(job.model, temperature=prefer.temperature)
        made = _GRPOTrainer(
            job.model,
            given,
            reward_funcs=Reward(prefer.reward),
            processing_class=job.tokenizer,
            train_dataset=_dataset(job.train.asked),
            eval_dataset=_dataset(job.valid.asked),
            **others,
        )
        install()
        if job.config.optim.beta is not None:  # TRL would load a second copy of the model for it
            reference: Any = Reference(job.model, self.start(job))
            made.beta, made.ref_model = job.config.optim.beta, reference
        return made

    def score(self, job: Job) -> tuple[tuple[Score, ...], list[Answer]]:
        """The mean reward of greedy answers to held-out prompts, with its 95 % interval."""
        assert isinstance(job.valid, Prompts)
        prefer, count = job.config.prefer, max(1, job.config.data.score_rows)
        asked = job.valid.asked[:count]
        prompts = [job.valid.encoded[i]["input_ids"].tolist() for i in range(len(asked))]
        texts = complete(job.model, job.tokenizer, prompts, max_new_tokens=prefer.new_tokens)
        assert prefer.reward is not None
        columns = _dataset(asked).to_dict()
        ids = [list(job.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        found = Reward(prefer.reward)(
            prompts=columns.pop("prompt"),
            completions=[_answer(each, text) for each, text in zip(asked, texts, strict=True)],
            completion_ids=ids,
            **columns,
        )
        rewards = torch.tensor(found, dtype=torch.float64)
        half = 1.96 * float(rewards.std()) / math.sqrt(len(rewards)) if len(rewards) > 1 else 0.0
        mean = float(rewards.mean())
        return (Score("mean reward", mean, mean - half, mean + half, len(rewards), larger_is_better=True),), []


def _framed(asked: Asked, framed: Frame) -> Asked:
    """The prompt with the system message of the run, if it is a chat without one."""
    if isinstance(asked.prompt, str):
        return asked
    return dataclasses.replace(asked, prompt=tuple(framed.messages(asked.prompt)))


def _answer(asked: Asked, text: str) -> Any:
    """An answer as TRL passes it to a reward function: a string, or a list with a message."""
    return text if isinstance(asked.prompt, str) else [{"role": "assistant", "content": text}]


def _dataset(asked: Any) -> Dataset:
    keys = sorted({key for each in asked for key in each.columns} - {"prompt", "completion", "completion_ids"})
    prompts = [
        each.prompt if isinstance(each.prompt, str) else [dict(message) for message in each.prompt] for each in asked
    ]
    return Dataset.from_dict({"prompt": prompts, **{key: [each.columns.get(key) for each in asked] for key in keys}})


class _GRPOTrainer(FromTRL, Resumable, GRPOTrainer):
    """TRL's trainer with reparam's checkpoints."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self._finite.batches.append(None)  # the rows of TRL's batches have no numbers
        return super(Resumable, self).training_step(model, inputs, num_items_in_batch)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super(Resumable, self).prediction_step(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> ByEpoch:
        # Overridden because a resumed run would draw the order of the first epoch again.
        return ByEpoch(cast(Any, super()._get_train_sampler(train_dataset)), cast(int, self.args.data_seed))


OBJECTIVE = GRPO()
