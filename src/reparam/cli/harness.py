"""The verb lm_eval: the command of EleutherAI's lm-evaluation-harness, with the model `reparam`."""

from __future__ import annotations

import sys

import typer


def lm_eval(ctx: typer.Context) -> None:
    """Run lm_eval, the command of EleutherAI's lm-evaluation-harness, with the model reparam: a base and an adapter.

    All options are those of lm_eval. In --model_args, base=..., adapter=..., dtype=..., storage=... and task=... name
    the model. Needs lm-eval: pip install 'reparam\\[lm-eval]'.

    [bold]reparam lm_eval --model reparam --model_args adapter=out/first --tasks arc_easy,hellaswag[/bold]
    """
    try:
        from reparam.evaluation.harness import cli_evaluate
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ValueError(
            "lm_eval needs EleutherAI's lm-eval, which is not installed: pip install 'reparam[lm-eval]'"
        ) from None
    given = ctx.args
    if (
        given
        and not {"run", "ls", "validate"} & set(given[:1])
        and not any(a.startswith(("--model=", "-M")) or a == "--model" for a in given)
    ):
        given = ["--model", "reparam", *given]
    before = sys.argv
    sys.argv = ["lm_eval", *given]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


lm_eval.context_settings = {"allow_extra_args": True, "ignore_unknown_options": True}  # type: ignore[attr-defined]
