"""Tables of many sites have one row for the same module in all layers."""

from pathlib import Path

import pytest
from adapters import trained
from models import llama
from rich.table import Table

from reparam import LoRA
from reparam.inspect import tables
from reparam.inspect.deep import view


def rows(table: Table) -> dict[str, list[str]]:
    cells = [list(column.cells) for column in table.columns]
    return {str(name): [str(cell) for cell in rest] for name, *rest in zip(*cells, strict=True)}


def test_many_sites_are_shown_by_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(llama(), method=LoRA(r=2), targets="all-linear").save(tmp_path)
    spectra = {site.name: site.spectrum for site in view(tmp_path, None) if site.spectrum is not None}
    single = rows(tables.spectra(spectra))
    assert len(single) == 14
    monkeypatch.setattr(tables, "MOST", 13)
    folded = tables.spectra(spectra)
    assert folded.caption == "14 sites: a row with * has the range over all layers; --json has every site"
    assert len(rows(folded)) == 7
    both = zip(single["0.self_attn.q_proj"], single["1.self_attn.q_proj"], strict=True)
    expected = [one if one == two else "–".join(sorted((one, two), key=float)) for one, two in both]
    assert rows(folded)["*.self_attn.q_proj (2)"] == expected
