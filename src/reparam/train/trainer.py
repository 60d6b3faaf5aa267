"""transformers' Trainer with checkpoints that are committed or absent, and a resume that equals no interruption.

Everything about training itself (accumulation, bf16, activation checkpointing, evaluation, schedules, several
devices, loggers) is transformers'. This class changes what happens to the state:

- Checkpoints are `reparam.train.checkpoint`'s, and hold what `save_trained` writes instead of the whole model.
- On one CPU machine, with the same number of threads, a resumed run has the same weights, losses and logs as one that
  was never stopped, bit for bit. Where transformers does otherwise, a comment says what the trap is. The collator must
  not draw random numbers: batches are fetched ahead, so a resumed run would draw them in another order.
- SIGINT and SIGTERM end training after the step, with a checkpoint; a second SIGINT ends it at once.
- A loss or gradient that is not finite ends training before the weights change, and names the rows.

Private methods of transformers 5.23 are overridden where it has no public way; each says why.
"""

import logging
import signal
from collections.abc import Callable, Sequence, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import SaveStrategy, TrainOutput

from reparam.errors import StateError
from reparam.io.staged import staged_folder
from reparam.train.checkpoint import Found, RunLock, commit, prune, resume_point, verify
from reparam.train.guard import Finite, Interrupts
from reparam.train.order import ByEpoch, row_order, unsupported
from reparam.train.state import TrainingState, load_state, random_state, restore_optimizer, save_state, set_random_state

_log = logging.getLogger(__name__)


class Trainer(transformers.Trainer):
    """A transformers Trainer that writes and resumes from reparam's checkpoints.

    Args:
        model: the model, what is not trained in it frozen.
        args: transformers' arguments. `output_dir` is the run folder: one run at a time, and a new run only into a
            folder without checkpoints. Arguments that would break the promises above are refused.
        train_dataset: with a length.
        save_trained: writes what is trained into an empty folder.
        load_trained: reads it back, into the same parameters.
        data_collator: may give `row`, a tensor [B] with each example's index, which the model does not see.
        row_names: what `row` means to the user, as "file:line": a sequence or a function.
        extra_loss: added to the loss of each micro-batch for the gradient, as a mean over the accumulated ones;
            not part of the loss that is reported.

    Attributes:
        resumed: what `train` resumed from and what it skipped, or None.
        lock: the lock of the run folder, taken by `train`; take it before to write into the folder.

    Raises:
        ValueError: arguments that cannot be combined with this class, all at once.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: Dataset,
        save_trained: Callable[[Path], object],
        load_trained: Callable[[Path], object],
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        row_names: Callable[[int], str] | Sequence[str] | None = None,
        extra_loss: Callable[[], Tensor | None] | None = None,
    ) -> None:
        problems = unsupported(args) + ([] if hasattr(train_dataset, "__len__") else ["train_dataset has no length"])
        if problems:
            raise ValueError("cannot train like this: " + "; ".join(problems))
        # Otherwise the data order follows whatever seed torch was given last before `train`.
        args.data_seed = args.seed if args.data_seed is None else args.data_seed
        # Otherwise early stopping starts counting anew on resume.
        args.restore_callback_states_from_checkpoint = True
        # The check in compute_loss comes before it, and waiting for the device once is enough.
        args.logging_nan_inf_filter = False
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("FSDP and DeepSpeed shard the optimizer, which these checkpoints cannot hold: use DDP")
        assert args.output_dir is not None  # transformers has a default
        self.run_folder = Path(args.output_dir)
        self.lock = RunLock(self.run_folder)
        self.resumed: Found | None = None
        self._save_trained, self._load_trained, self._extra_loss = save_trained, load_trained, extra_loss
        self._finite = Finite(self.run_folder, row_names)
        self._interrupts = Interrupts()
        self._stopping = False
        self._loaded: TrainingState | None = None
        self._saved_step = 0
        self.add_callback(_Hooks(self))

    @property
    def interrupted(self) -> signal.Signals | None:
        """The signal that came during `train`, or None."""
        return self._interrupts.received

    # ---- a run

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: True for the newest intact checkpoint in the run folder, or its path.
            trial: not used; transformers' signature.
            ignore_keys_for_eval: as in transformers.

        Raises:
            RunLocked: another run holds the folder.
            ValueError: there is nothing to resume from, the checkpoint cannot be resumed from, or a new run would mix
                with an old one.
            NotFinite: the loss or gradient became NaN or infinite.
            DiskFull: a checkpoint did not fit; the one before it is intact.
        """
        self._stopping = False
        with self.lock if self.is_world_process_zero() else nullcontext(), self._interrupts:
            self.accelerator.wait_for_everyone()
            path = self._read_checkpoint(resume_from_checkpoint)
            return super().train(str(path) if path else None, None, ignore_keys_for_eval)

    def _read_checkpoint(self, wish: str | bool | None) -> Path | None:
        """Choose and read the checkpoint to start from, so that what speaks against it is an error before anything."""
        self.resumed = self._loaded = None
        found = resume_point(self.run_folder, wish)
        if found.path is None:
            return None
        if not (found.path / TRAINER_STATE_NAME).is_file():
            raise StateError(f"{found.path} lacks {TRAINER_STATE_NAME}: it was not saved by this trainer")
        state = load_state(found.path)
        then, now = state.progress["row_order"], self._row_order()
        changed = [f"{key} was {then.get(key)!r} and is {now[key]!r}" for key in now if then.get(key) != now[key]]
        if changed:
            raise ValueError(
                f"cannot resume from {found.path}, because the rows would come in another order: {'; '.join(changed)}"
            )
        self.resumed, self._loaded = found, state
        return found.path

    def _row_order(self) -> dict[str, Any]:
        return row_order(self.args, len(cast(Sized, self.train_dataset)))

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        # Overridden because resuming a run that is complete would train one step more, and because the path of the
        # best checkpoint is stored as it was when the folder may since have been moved.
        place = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if self.state.best_global_step:
            best = self.run_folder / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else place

    # ---- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Overridden because transformers writes pickles, one after the other, straight into the final folder.
        self.store_flos()
        step = self.state.global_step
        best = self.run_folder / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step == step or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        exported = [cb for cb in [*self.callback_handler.callbacks, self.control] if isinstance(cb, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=cast(Any, exported)).stateful_callbacks
        rng = gather_object([random_state()]) if self.args.world_size > 1 else [random_state()]
        # The sum of losses since the last log entry: transformers forgets it, and the next entry would lack them.
        progress = {
            "row_order": self._row_order(),
            "loss": self._tr_loss.item(),
            "logged": self._globalstep_last_logged,
        }

        def write(folder: Path) -> None:
            self._save_trained(folder)
            save_state(
                folder,
                optimizer=cast(torch.optim.Optimizer, self.optimizer),
                scheduler=cast(LRScheduler, self.lr_scheduler),
                progress=progress,
                rng=rng,
                scaler=self.accelerator.scaler,
            )
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

        if self.is_world_process_zero():
            path = commit(self.run_folder, step, write)
            if self.args.save_total_limit:
                best = Path(self.state.best_model_checkpoint or path)
                prune(self.run_folder, self.args.save_total_limit, protect=[path, best])
        self._saved_step = step
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Overridden because a checkpoint holds what `save_trained` wrote, and not a model.
        self._load_trained(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        # As _load_from_checkpoint. After a signal the weights stay those of the last step.
        best = self.state.best_model_checkpoint
        if best is None or self._stopping:
            return
        if problems := verify(best):
            raise ValueError(f"cannot load the best weights from {best}: " + "; ".join(problems))
        self._load_trained(Path(best))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Overridden because transformers reads pickles, and goes on with a fresh state where one is missing.
        if self._loaded is None:
            return
        restore_optimizer(cast(torch.optim.Optimizer, self.optimizer), self._loaded.optimizer)
        cast(LRScheduler, self.lr_scheduler).load_state_dict(self._loaded.scheduler)
        if self.accelerator.scaler is not None and self._loaded.scaler is not None:
            self.accelerator.scaler.load_state_dict(self._loaded.scaler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # As _load_optimizer_and_scheduler. transformers calls it at the right time: after the batches that are
        # skipped were drawn, or before an epoch's first.
        if self._loaded is not None:
            set_random_state(self._loaded.rng[self.args.process_index])
            self._loaded = None

    def _restore_progress(self) -> None:
        if self._loaded is not None:
            loss = self._loaded.progress["loss"]
            self._tr_loss = torch.tensor(loss, device=self.args.device)
            self._globalstep_last_logged = self._loaded.progress["logged"]
            self._total_loss_scalar = -loss  # train_loss, at the end, is the mean over the steps of this call

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        # Overridden because the save at the end has to come after the last epoch's own events (its evaluation draws
        # random numbers) and before the weights become those of the best checkpoint.
        wanted = self._stopping or self.args.save_strategy != SaveStrategy.NO
        if wanted and self._saved_step != self.state.global_step:
            self._save_checkpoint(cast(nn.Module, self.model), trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return super()._finalize_training(trial, num_train_samples, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained, and nothing of the frozen model, into a folder of its own."""
        if output_dir is None or Path(output_dir).resolve() == self.run_folder.resolve():
            raise ValueError("give save_model a folder of its own: the run folder holds the checkpoints")
        if self.is_world_process_zero():
            with staged_folder(output_dir) as folder:
                self._save_trained(folder)

    # ---- a step

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in transformers; remembers which rows the micro-batch holds."""
        self._finite.batches.append(inputs.pop("row", None))
        return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As in transformers, without the rows."""
        inputs.pop("row", None)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """As in transformers; in training also checks the loss, and adds the penalty's gradient but not its value."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self._check("loss", loss)
            penalty = self._extra_loss() if self._extra_loss is not None else None
            if penalty is not None:
                self._check("penalty", penalty)
                # A loss over the items of all micro-batches is a share of the whole; other losses are divided later.
                shared = self.model_accepts_loss_kwargs and num_items_in_batch is not None
                share = penalty / self.current_gradient_accumulation_steps if shared else penalty
                loss = loss + (share - share.detach()).to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Overridden because a NaN gradient under a finite loss would destroy the weights, and the save after it the
        # checkpoint. With fp16 an infinite one is normal: the loss scaler skips the step.
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:
            self._check("gradient", torch.as_tensor(norm), whole_step=True)
        return norm

    def _check(self, what: str, value: Tensor, *, whole_step: bool = False) -> None:
        step, of = self.state.global_step + 1, self.current_gradient_accumulation_steps
        self._finite.check(what, value, step=step, of=of, whole_step=whole_step)

    # ---- data

    def _set_signature_columns_if_needed(self) -> None:
        # Overridden because the model's forward does not know `row`, which would be dropped before the collator.
        super()._set_signature_columns_if_needed()
        columns = cast(list[str], self._signature_columns)
        if "row" not in columns:
            columns.append("row")

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        # Overridden because of what ByEpoch's docstring says.
        sampler = super()._get_train_sampler(train_dataset)
        return (
            ByEpoch(sampler, cast(int, self.args.data_seed)) if isinstance(sampler, LengthGroupedSampler) else sampler
        )


class _Hooks(TrainerCallback):
    """What happens between the steps. Added last, so that it sees what the others decided."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.save_after_epoch = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._saved_step = state.global_step
        self.trainer._restore_progress()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._finite.batches.clear()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        received = self.trainer._interrupts.agreed(args.world_size, args.device)
        if received is not None:
            _log.warning("%s: stopping after step %d", received.name, state.global_step)
            self.trainer._stopping = control.should_training_stop = True
        # The epoch's own log entry and evaluation come after this step and belong to it: a checkpoint from before
        # them would be resumed after them, and they would never happen.
        self.save_after_epoch = control.should_save and float(state.epoch).is_integer()
        control.should_save = control.should_save and not self.save_after_epoch

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.save_after_epoch:
            control.should_save = True
        if self.trainer._stopping and not float(state.epoch).is_integer():
            # transformers takes every stop for the end of the epoch; the resumed run will come to the real one.
            control.should_log = control.should_evaluate = control.should_save = False
