"""Streams of rows. The judge of what they give is `encode` of the same rows, and of a resumed one the whole stream."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from chat_tokenizers import make
from torch import Tensor

from reparam.data.batches import Encoded
from reparam.data.encode import encode
from reparam.data.feeds import Feed
from reparam.data.files import hub
from reparam.data.rows import read_rows
from reparam.data.streamed import How, Streamed
from reparam.errors import DataError
from reparam.train.state import read_tree, write_tree

ROWS = [{"prompt": f"count to {n}:", "completion": " " + "ab" * (n % 11)} for n in range(40)]
PLAIN = How(max_length=64, buffer=8)


def written(folder: Path, kind: str) -> str:
    """The rows in a source of this kind."""
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    match kind:
        case "jsonl":
            (folder / "rows.jsonl").write_text("\n" + lines)
            return str(folder / "rows.jsonl")
        case "gz":
            (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
            return str(folder / "rows.jsonl.gz")
        case "json":
            (folder / "rows.json").write_text(json.dumps(ROWS))
            return str(folder / "rows.json")
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=7)
            return str(folder / "rows.parquet")
        case "glob":
            for number in range(4):
                own = lines.splitlines(keepends=True)[10 * number : 10 * number + 10]
                (folder / f"part-{number}.jsonl").write_text("".join(own))
            return str(folder / "part-*.jsonl")
        case "saved":
            datasets.Dataset.from_list(ROWS).save_to_disk(folder / "set")
            return str(folder / "set")
        case _:
            raise AssertionError(kind)


def stream(*sources: str, how: How = PLAIN, weights: Sequence[float] = (), **others: Any) -> Streamed:
    feeds = [Feed(source, seed=how.seed, most=others.pop("most", None)) for source in sources]
    return Streamed(feeds, make(), how, length=400, behind=20, weights=weights, **others)


def items(found: Streamed, first: int, end: int) -> list[dict[str, list[int]]]:
    return [{key: value.tolist() for key, value in found[n].items()} for n in range(first, end)]


def contents(examples: Sequence[dict[str, Tensor]] | Encoded) -> Counter[tuple[tuple[int, ...], ...]]:
    found = [examples[n] for n in range(len(examples))]
    return Counter((tuple(e["input_ids"].tolist()), tuple(e["labels"].tolist())) for e in found)


@pytest.mark.parametrize("kind", ["jsonl", "gz", "json", "parquet", "glob", "saved"])
def test_each_pass_has_the_examples_of_all_rows_in_another_order(kind: str, tmp_path: Path) -> None:
    source = written(tmp_path / "a", kind)
    whole = encode(read_rows(source), make(), max_length=64)
    found = stream(source)
    passes = [[found[n] for n in range(start, start + 40)] for start in (0, 40)]
    assert contents(passes[0]) == contents(passes[1]) == contents(whole)
    first, second = ([e["input_ids"].tolist() for e in each] for each in passes)
    assert first != second
    assert first != [whole[n]["input_ids"].tolist() for n in range(40)]
    assert "80 examples came from the " in stream_notes(found)
    assert " rows read so far, in 2 passes through them" in stream_notes(found)


def stream_notes(found: Streamed) -> str:
    return "; ".join(found.notes())


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "gz", "parquet", "glob", "saved", "hub", "two"])
def test_a_stream_goes_on_where_it_stood(
    kind: str, packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is taken after the caller has asked for some items ahead, goes through a file, and again later."""
    how = How(max_length=64, buffer=8, packing=packing, seed=3)
    names, weights = ("owner/name",), ()
    if kind == "hub":
        file = written(tmp_path / "hub", "parquet")

        def loaded(name: str, *, streaming: bool) -> Any:
            return datasets.load_dataset("parquet", data_files=[file], split="train", streaming=streaming)

        monkeypatch.setattr(hub, "_loaded", loaded)
    elif kind == "two":
        names, weights = (written(tmp_path / "a", "jsonl"), written(tmp_path / "b", "parquet")), (0.8, 0.2)
    else:
        names = (written(tmp_path / "a", kind),)
    whole = items(stream(*names, how=how, weights=weights), 0, 120)
    for stop, ahead in ((0, 0), (5, 9), (38, 44), (90, 90)):
        first = stream(*names, how=how, weights=weights)
        items(first, 0, ahead)
        folder = tmp_path / f"{stop}"
        folder.mkdir()
        write_tree(folder, "state", {"stream": first.state(stop)})
        again = stream(*names, how=how, weights=weights)
        again.restore(read_tree(folder, "state")["stream"])
        assert items(again, stop, 120) == whole[stop:]
        assert again.state(120)["counts"] == first.state(120)["counts"]


def test_packs_hold_each_example_of_a_pass_once(tmp_path: Path) -> None:
    source = written(tmp_path / "a", "jsonl")
    found = stream(source, how=How(max_length=64, buffer=16, packing=True))
    taken: Counter[str] = Counter()
    for number in range(60):
        pack = found[number]
        assert len(pack["input_ids"]) <= 64
        assert len(pack["row"]) == int((pack["position_ids"] == 0).sum())
        taken.update(found.names(row) for row in pack["row"].tolist())
        if taken.total() == len(ROWS):
            break
    assert set(taken.values()) == {1}


def test_shares_are_met(tmp_path: Path) -> None:
    found = stream(written(tmp_path / "a", "jsonl"), written(tmp_path / "b", "gz"), weights=(0.75, 0.25))
    gz = sum(".gz" in found.names(int(found[n]["row"])) for n in range(400))
    assert 70 < gz < 130  # 100, with a standard deviation of 8.7


def test_rows_are_read_when_they_are_needed(tmp_path: Path) -> None:
    (file := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 30) + "[]\n")
    found = stream(str(file))
    items(found, 0, 300)  # a chunk has 256 rows
    with pytest.raises(DataError, match=r"rows.jsonl:1201: expected an object, got a list\n.*bad_rows drop"):
        Streamed([Feed(str(file))], make(), PLAIN, length=2000, behind=1)[1300]


def test_rows_that_are_left_out_or_cut_are_counted(tmp_path: Path) -> None:
    bad: list[Any] = [{"prompt": "a"}, {"text": "a"}, 7]
    long = [{"prompt": "a" * 90, "completion": "b"}, {"prompt": "a", "completion": "b" * 90}]
    (file := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*bad[::2], *long, *ROWS]))
    found = stream(str(file), how=How(max_length=64, buffer=8, bad_rows="drop"))
    items(found, 0, 41)
    notes = stream_notes(found)
    assert "cannot be trained on, so they are left out: " in notes
    assert "rows.jsonl:1" in notes
    assert "rows.jsonl:2: expected an object" in notes
    assert "max_length=64 is too short, so these are left out (" in notes  # auto cannot refuse a row that comes late
    assert "max_length=64 cuts off tokens that would carry loss (" in notes


def test_what_cannot_be_trained_on_ends_the_stream(tmp_path: Path) -> None:
    (file := tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"text": "a b"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: a text row, and other rows are not"):
        stream(str(file))[0]
    file.write_text("[]\n")
    with pytest.raises(DataError, match=r"no rows are left.*expected an object"):
        stream(str(file), how=How(max_length=64, bad_rows="drop"))[0]
    file.write_text("")
    with pytest.raises(DataError, match="there are no rows"):
        stream(str(file))[0]
    file.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        Streamed([Feed(str(file))], make(None), PLAIN, length=2, behind=1)[0]


def test_held_out_rows_never_come(tmp_path: Path) -> None:
    source = written(tmp_path / "a", "jsonl")
    held = [row.source for row in read_rows(source)[::4]]
    found = stream(source, held=held)
    names = {found.names(int(found[n]["row"])) for n in range(60)}
    assert len(names) == 30
    assert not names & set(held)


def test_only_the_first_rows_of_a_source_come(tmp_path: Path) -> None:
    found = stream(written(tmp_path / "a", "glob"), most=12)
    names = {found.names(int(found[n]["row"])) for n in range(60)}
    assert {name.rpartition("/")[2] for name in names} == {
        *(f"part-0.jsonl:{n}" for n in range(1, 11)),
        "part-1.jsonl:1",
        "part-1.jsonl:2",
    }
