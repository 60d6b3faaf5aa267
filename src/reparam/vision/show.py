"""The output of a stage: what is trained, where images stand in the rows, progress and scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from reparam.core.text import counted
from reparam.evaluation.terminal import say
from reparam.train.config import tables
from reparam.train.show import Show
from reparam.train.show_json import ShowJson

if TYPE_CHECKING:
    from reparam.train.checkpoint import Found
    from reparam.train.job import Result
    from reparam.vision.config import StageConfig
    from reparam.vision.job import VisionJob
    from reparam.vision.rows import Seen


class ShowVision(Show):
    """Prints the progress and the result of a stage."""

    def vision_job(self, held: VisionJob) -> None:
        """Print what will be trained, and a preview of the rows, in which `<image>` is the place of an image."""
        vora, vision = held.vora, held.vora.vision
        self.job(held.job)
        own = sum(p.numel() for p in vora.embedding.parameters())
        say(self.console, f"also trained    the patch embedding, {counted(own, 'parameter')}")
        if vora.distillation is not None:
            heads = sum(p.numel() for p in vora.distillation.parameters())
            pairs = ", ".join(f"{student}-{teacher}" for student, teacher in vora.distillation.pairs)
            say(
                self.console,
                f"teacher         {held.stage.vision.teacher}; states of model and teacher: {pairs}; "
                f"{counted(heads, 'parameter')} of heads, which are dropped after training",
            )
        for rows in (held.train, held.valid):
            for line in left(rows):
                self.note(line)
        seen = sum(count > 0 for count in held.train.counts)
        say(
            self.console,
            f"images          {counted(seen, 'training row')} of {len(held.train):,} have images; <image> stands for "
            f"{vision.side**2} tokens ({vision.side} x {vision.side} patches of {vision.patch} pixels)",
        )

    def vision_plan(self, stage: StageConfig, steps: int, found: Found) -> None:
        """Print the resolved configuration and the steps of a stage that `--dry-run` describes."""
        config = stage.train
        say(self.console, "resolved configuration")
        say(self.console, "\n".join(f"    {line}".rstrip() for line in stage.dump().splitlines()))
        rows = config.run.batch_size * config.run.accumulation
        say(self.console, f"{counted(steps, 'step')} of {counted(rows, 'row')}")
        self.found(found, steps=steps, before=steps, schedule=config.optim.schedule)
        say(self.console, f"dry run: nothing was trained, and nothing was written to {Path(config.run.output)}")

    def vision_result(self, result: Result, difference: float) -> None:
        """Print the scores before and after training, up to five answers, and where the model is."""
        self.scores(result)
        say(
            self.console,
            f"The saved model was read back: its outputs equal those of the trained one bit for bit, and its adapter "
            f"changes logits by up to {difference:.3g}.",
        )
        say(self.console, f"model           {result.folder / 'vora'}  (merge it with `reparam vision merge`)")
        say(self.console, f"figures, plot   {result.folder / 'figures.json'}, {result.folder / 'loss.png'}")


class ShowVisionJson(ShowJson):
    """Prints a stage as lines of JSON, each with an `event`, as `ShowJson` does a run."""

    part = "vora"

    def vision_job(self, held: VisionJob) -> None:
        """Print what will be trained, and on which rows."""
        self.job(held.job)
        distillation = held.vora.distillation
        heads = distillation.parameters() if distillation is not None else ()
        self._say(
            "vision",
            blocks=held.vora.blocks,
            tokens_of_an_image=held.vora.vision.side**2,
            rows_with_images=sum(count > 0 for count in held.train.counts),
            parameters_of_the_patch_embedding=sum(p.numel() for p in held.vora.embedding.parameters()),
            teacher=held.stage.vision.teacher,
            pairs=[list(pair) for pair in distillation.pairs] if distillation is not None else [],
            parameters_of_heads=sum(p.numel() for p in heads),
            cut=[*held.train.cut, *held.valid.cut],
            left_out=[*held.train.left_out, *held.valid.left_out],
        )

    def vision_plan(self, stage: StageConfig, steps: int, found: Found) -> None:
        """Print the resolved configuration and the number of steps of a stage that `--dry-run` describes."""
        checkpoint = None if found.path is None else str(found.path)
        own = dataclasses.asdict(stage.vision) if stage.stage == "pretrain" else None
        configuration = tables(stage.train) | ({"vision": own} if own is not None else {})
        self._say("plan", steps=steps, checkpoint=checkpoint, configuration=configuration)

    def vision_result(self, result: Result, difference: float) -> None:
        """Print the scores before and after training, and where the model is."""
        self.result(result, difference)


Shows = ShowVision | ShowVisionJson


def left(rows: Seen) -> list[str]:
    """What became of rows that are too long, as sentences."""
    found = ((rows.cut, "cuts off tokens with loss of"), (rows.left_out, "is too short, so these are left out:"))
    return [
        f"max_length={rows.longest} {what} {counted(len(names), 'row')}: {', '.join(names[:3])}"
        + (", ..." if len(names) > 3 else "")
        for names, what in found
        if names
    ]
