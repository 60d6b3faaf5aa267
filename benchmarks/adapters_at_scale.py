"""Time loading and selecting an adapter when a model has 64 adapters, relative to a model with 2.

Each model starts with one adapter less; the loaded adapter is removed between rounds, which is not timed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import measure as m

import reparam

FEW, MANY = 2, 64


def main() -> None:
    quick = m.setup(__doc__)
    base = m.llama(m.TINY if quick else m.LLAMA)
    many = 6 if quick else MANY
    held = {"few": [f"a{i}" for i in range(1, FEW)], "many": [f"a{i}" for i in range(1, many)]}
    ours = {name: m.with_reparam(m.twin(base), names) for name, names in held.items()}
    theirs = {name: m.with_peft(m.twin(base), names) for name, names in held.items()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        reparam.adapters(ours["few"])["a1"].save(folder)
        theirs["few"].save_pretrained(temporary, selected_adapters=["a1"])
        work: dict[str, m.Call] = {}
        undo: dict[str, m.Call] = {}
        for name, model in ours.items():
            work[f"ours {name}"] = lambda model=model: reparam.load(model, folder, name="new")
            undo[f"ours {name}"] = lambda model=model: "new" in reparam.adapters(model) and reparam.remove(model, "new")
        for name, model in theirs.items():
            work[f"peft {name}"] = lambda model=model: model.load_adapter(str(Path(temporary) / "a1"), "new")
            undo[f"peft {name}"] = lambda model=model: "new" in model.peft_config and model.delete_adapter("new")
        load = m.interleave(work, rounds=2 if quick else 9, before=undo)
    rows = [
        m.Row(
            f"loading adapter {many} over adapter {FEW}",
            load.over("ours many", "ours few"),
            load.over("peft many", "peft few"),
            1.0,
            1.1,
        ),
        selecting(ours, theirs, many=many, rounds=3 if quick else 15),
    ]
    m.show("Many adapters", rows, "python benchmarks/adapters_at_scale.py")
    seconds = ", ".join(f"{name} {load.median(name) * 1e3:.0f}" for name in load.seconds)
    print(f"Milliseconds of a load: {seconds}\n")


def selecting(ours: dict, theirs: dict, *, many: int, rounds: int) -> m.Row:
    """Table row for switching between two adapters; every model has the adapter "new" at this point."""

    def ours_call(model) -> m.Call:
        def call() -> None:
            reparam.select(model, "a1")
            reparam.select(model, "new")

        return call

    def peft_call(model) -> m.Call:
        def call() -> None:
            model.set_adapter("a1")
            model.set_adapter("new")

        return call

    work = {f"ours {name}": ours_call(model) for name, model in ours.items()}
    work |= {f"peft {name}": peft_call(model) for name, model in theirs.items()}
    times = m.interleave(work, rounds=rounds)
    print({name: f"{times.median(name) * 1e3:.3f} ms" for name in work})
    return m.Row(
        f"select with {many} adapters over {FEW}",
        times.over("ours many", "ours few"),
        times.over("peft many", "peft few"),
        1.0,
        1.1,
    )


if __name__ == "__main__":
    main()
