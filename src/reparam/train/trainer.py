"""transformers' Trainer with atomic checkpoints and exact resuming.

transformers does the training itself (accumulation, bf16, activation checkpointing, evaluation, schedules, several
devices, loggers). `Resumable`, put before it or a trainer made from it, changes how state is saved and restored, and
how training stops:

- Checkpoints are those of `reparam.train.checkpoint`. They hold what `save_trained` writes, not the whole model.
- On one CPU machine, with the same number of threads, a resumed run has the same weights, losses and logs, bit for bit,
  as an uninterrupted run. Comments mark where transformers itself would differ. The collator must not draw random
  numbers: batches are prefetched, so a resumed run would draw them in another order.
- SIGINT and SIGTERM stop training after the current step, with a checkpoint; a second SIGINT stops it immediately.
- A loss or gradient that is not finite stops training before the weights change; the error names the rows.

Private methods of transformers 5.23 are overridden only where there is no public way; comments give the reasons.
"""

import signal
from collections.abc import Callable, Sequence, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset, RandomSampler, Sampler
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import SaveStrategy, TrainOutput

from reparam.errors import StateError
from reparam.io.staged import staged_folder
from reparam.train import processes
from reparam.train.between_steps import BetweenSteps
from reparam.train.checkpoint import Found, RunLock, commit, prune, resume_point, verify
from reparam.train.guard import Finite, Interrupts, stopped_early
from reparam.train.order import ByEpoch, Filled, WithEmpty, row_order, unsupported
from reparam.train.state import TrainingState, load_state, random_state, restore, save_state, set_random_state

if TYPE_CHECKING:
    _Trainer = transformers.Trainer
else:
    _Trainer = object  # `Resumable` is put before transformers' Trainer, or one made from it


class Resumable(_Trainer):
    """Makes a Trainer of transformers write and resume from reparam's checkpoints.

    Args:
        model: a model in which only the parameters to train require gradients.
        args: transformers' arguments. `output_dir` is the run folder. It can be used by one run at a time, and a new
            run needs a folder without checkpoints. Arguments that conflict with the guarantees above are refused.
        train_dataset: must have a length.
        save_trained: writes the trained parameters into an empty folder.
        load_trained: reads a folder that `save_trained` wrote into the same parameters.
        data_collator: may add `row`, the indices of the examples, int64 [B]; it is removed before the forward pass.
        row_names: the name of each row index, such as "file:line": a sequence or a function.
        extra_loss: a penalty whose gradient is added in each micro-batch, averaged over gradient accumulation. It is
            not part of the reported loss.
        others: further arguments of the trainer.

    Attributes:
        filled: whether rows without loss fill up the last batches of several processes; else, rows come twice.
        resumed: the checkpoint that `train` resumed from and those it skipped, or None.
        lock: the lock of the run folder. `train` acquires it; acquire it first to write into the folder yourself.

    Raises:
        ValueError: arguments that this class does not support; the message lists all of them.
    """

    filled = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: Dataset,
        save_trained: Callable[[Path], object],
        load_trained: Callable[[Path], object],
        row_names: Callable[[int], str] | Sequence[str] | None = None,
        extra_loss: Callable[[], Tensor | None] | None = None,
        **others: Any,
    ) -> None:
        if problems := unsupported(args, train_dataset):
            raise ValueError("unsupported training arguments: " + "; ".join(problems))
        # Otherwise the order of the data depends on the last seed that torch got before `train`.
        args.data_seed = args.seed if args.data_seed is None else args.data_seed
        # Otherwise early stopping restarts its count on resume.
        args.restore_callback_states_from_checkpoint = True
        # compute_loss already checks the loss, and a second check would synchronize with the device again.
        args.logging_nan_inf_filter = False
        train_dataset = WithEmpty(train_dataset) if self.filled and args.world_size > 1 else train_dataset
        super().__init__(model=model, args=args, train_dataset=train_dataset, **others)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("FSDP and DeepSpeed shard the optimizer state, which checkpoints cannot hold: use DDP")
        assert args.output_dir is not None  # transformers has a default
        self.run_folder = Path(args.output_dir)
        self.lock = RunLock(self.run_folder)
        self.resumed: Found | None = None
        self._save_trained, self._load_trained, self._extra_loss = save_trained, load_trained, extra_loss
        self._finite = Finite(self.run_folder, row_names)
        self._interrupts = Interrupts()
        self._saved_step = 0
        self._loaded: TrainingState | None = None
        self._between = BetweenSteps(self._interrupts, self._finite, begin=self._restore_progress)
        self.add_callback(self._between)

    @property
    def interrupted(self) -> signal.Signals | None:
        """The signal that stopped `train`, or None."""
        return self._interrupts.received

    # ---- a run

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: True for the newest intact checkpoint in the run folder, or its path.
            trial: ignored; part of transformers' signature.
            ignore_keys_for_eval: as in transformers.

        Raises:
            RunLocked: another run uses the folder.
            ValueError: there is no checkpoint to resume from, the checkpoint cannot be used, or a new run was requested
                in a folder that already has checkpoints.
            NotFinite: the loss, penalty or gradient is NaN or infinite.
            DiskFull: there was no disk space for a checkpoint; the previous one is intact.
        """
        self._between.stopping = False
        with self.lock if self.is_world_process_zero() else nullcontext(), self._interrupts:
            self.accelerator.wait_for_everyone()
            path = self._read_checkpoint(resume_from_checkpoint)
            return super().train(str(path) if path else None, None, ignore_keys_for_eval)

    def _read_checkpoint(self, wish: str | bool | None) -> Path | None:
        """Choose and read the checkpoint to start from, so that an unusable one is an error before training starts."""
        self.resumed = self._loaded = None
        found = resume_point(self.run_folder, wish)
        if found.path is None:
            return None
        if not (found.path / TRAINER_STATE_NAME).is_file():
            raise StateError(f"{found.path} lacks {TRAINER_STATE_NAME}: this trainer did not save it")
        state = load_state(found.path)
        then, now = state.progress["row_order"], self._row_order()
        changed = [f"{key} was {then.get(key)!r} and is now {now[key]!r}" for key in now if then.get(key) != now[key]]
        if changed:
            raise ValueError(
                f"cannot resume from {found.path}, because the order of the rows would change: {'; '.join(changed)}"
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
        # Overridden because resuming a complete run, or one that stopped early, would train on, and because the stored
        # path of the best checkpoint is wrong if the folder has been moved.
        place = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if self.state.best_global_step:
            best = self.run_folder / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        over = self.state.global_step >= max_steps or stopped_early(self.callback_handler.callbacks)
        return (num_train_epochs, 0) if over else place

    # ---- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Overridden because transformers writes pickles one by one directly into the final folder.
        self.store_flos()
        step = self.state.global_step
        best = self.run_folder / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step == step or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        exported = [cb for cb in [*self.callback_handler.callbacks, self.control] if isinstance(cb, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=cast(Any, exported)).stateful_callbacks
        rng = gather_object([random_state()]) if self.args.world_size > 1 else [random_state()]
        # The sum of losses since the last log entry. transformers does not save it, so the next entry would be wrong.
        progress = {
            "row_order": self._row_order(),
            "loss": self._tr_loss.item(),
            "logged": self._globalstep_last_logged,
            "unlogged": self.unlogged(),
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

        def save() -> None:
            path = commit(self.run_folder, step, write)
            if self.args.save_total_limit:
                best = Path(self.state.best_model_checkpoint or path)
                prune(self.run_folder, self.args.save_total_limit, protect=[path, best])

        processes.first(save)
        self._saved_step = step

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Overridden because a checkpoint holds what `save_trained` wrote, not a model.
        self._load_trained(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        # Overridden as _load_from_checkpoint is. After a signal, the weights of the last step are kept.
        best = self.state.best_model_checkpoint
        if best is None or self._between.stopping:
            return
        if problems := verify(best):
            raise ValueError(f"cannot load the best weights from {best}: " + "; ".join(problems))
        self._load_trained(Path(best))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Overridden because transformers reads pickles, and continues with a new state if a file is missing.
        if self._loaded is None:
            return
        optimizer, scheduler = cast(torch.optim.Optimizer, self.optimizer), cast(LRScheduler, self.lr_scheduler)
        restore(self._loaded, optimizer, scheduler, self.accelerator.scaler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Overridden as _load_optimizer_and_scheduler is. transformers calls this at the right time: after drawing the
        # batches to skip, or before the first batch of an epoch.
        if self._loaded is not None:
            set_random_state(self._loaded.rng[self.args.process_index])
            self._loaded = None

    def _restore_progress(self) -> None:
        self._saved_step = self.state.global_step
        if self._loaded is not None:
            loss = self._loaded.progress["loss"]
            self._tr_loss = torch.tensor(loss, device=self.args.device)
            self._globalstep_last_logged = self._loaded.progress["logged"]
            self.log_later(self._loaded.progress.get("unlogged"))
            self._total_loss_scalar = -loss  # so that train_loss is the mean over the steps of this call

    def unlogged(self) -> Any:
        """What else belongs to a checkpoint, such as what the next log entry will hold: plain values and tensors."""
        return None

    def log_later(self, values: Any) -> None:
        """Restore what `unlogged` returned."""

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        # Overridden because the final save must come after the events of the last epoch (its evaluation draws random
        # numbers) and before the weights of the best checkpoint are loaded.
        wanted = self._between.stopping or self.args.save_strategy != SaveStrategy.NO
        if wanted and self._saved_step != self.state.global_step:
            self._save_checkpoint(cast(nn.Module, self.model), trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return super()._finalize_training(trial, num_train_samples, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained parameters to `output_dir`. Raises ValueError if it is the run folder or not given."""
        if output_dir is None or Path(output_dir).resolve() == self.run_folder.resolve():
            raise ValueError("save_model needs an output_dir other than the run folder, which holds the checkpoints")
        if self.is_world_process_zero():
            with staged_folder(output_dir) as folder:
                self._save_trained(folder)

    # ---- a step

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in transformers, but removes `row` from the inputs and remembers it for error messages."""
        self._finite.batches.append(inputs.pop("row", None))
        return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As in transformers, but removes `row` from the inputs."""
        inputs.pop("row", None)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """As in transformers. In training, checks the loss, and adds the penalty's gradient but not its value."""
        found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = found if return_outputs else (found, None)
        if model.training:
            self._check("loss", loss)
            penalty = self._extra_loss() if self._extra_loss is not None else None
            if penalty is not None:
                self._check("penalty", penalty)
                # A loss that is normalized over all micro-batches is already a share; the Trainer divides other losses.
                shared = self.model_accepts_loss_kwargs and num_items_in_batch is not None
                share = penalty / self.current_gradient_accumulation_steps if shared else penalty
                loss = loss + (share - share.detach()).to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Overridden because a NaN gradient with a finite loss would destroy the weights and then the next checkpoint.
        # With fp16, infinite gradients are normal: the loss scaler skips the step.
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:
            self._check("gradient", torch.as_tensor(norm), whole_step=True)
        return norm

    def _check(self, what: str, value: Tensor, *, whole_step: bool = False) -> None:
        if self.args.world_size > 1 and not whole_step:
            return  # the other processes go on to the gradients, where a loss that is not finite ends all
        step, of = self.state.global_step + 1, self.current_gradient_accumulation_steps
        self._finite.check(what, value, step=step, of=of, whole_step=whole_step)

    # ---- data

    def _set_signature_columns_if_needed(self) -> None:
        # Overridden because transformers would drop `row`, which the model's forward does not take, before collating.
        super()._set_signature_columns_if_needed()
        if "row" not in (columns := cast(list[str], self._signature_columns)):
            columns.append("row")

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        # Overridden for the reasons in the docstrings of ByEpoch and Filled.
        sampler, seed = super()._get_train_sampler(train_dataset), cast(int, self.args.data_seed)
        if isinstance(sampler, LengthGroupedSampler):
            sampler = ByEpoch(sampler, seed)
        alone = self.args.world_size == 1 or not self.filled
        if alone or not isinstance(sampler, RandomSampler | ByEpoch) or train_dataset is None:
            return sampler
        return Filled(sampler, train_dataset, multiple=self.args.train_batch_size * self.args.world_size, seed=seed)


class Trainer(Resumable, transformers.Trainer):
    """transformers' Trainer with the checkpoints of `Resumable`."""
