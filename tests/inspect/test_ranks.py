"""`reparam inspect` on ranks and sizes: the map in the terminal and as a PNG, |ΔW| of DoRA with its base."""

import io
import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from inspected import saved, told
from rich.console import Console

import reparam
from reparam.inspect import ranks
from reparam.inspect.show import show
from reparam.inspect.summary import summarize

PATTERN = {"q_proj": 1, r"1\.mlp\.up_proj": 7}


def test_layers_and_kinds() -> None:
    found = ranks.rank_map(
        {
            "encoder.block.0.q": 1,
            "decoder.block.0.q": 2,
            "decoder.block.10.q": 3,
            "decoder.block.2.experts.5.w": 0,
            "h": 4,
        }
    )
    assert found.layers == (0, 2, 10, None)
    assert found.kinds == ("encoder.block.q", "decoder.block.q", "decoder.block.experts.5.w", "h")
    assert found.ranks[10, "decoder.block.q"] == 3
    assert found.highest == 4
    assert ranks.short(found.kinds) == ["encoder.block.q", "decoder.block.q", "experts.5.w", "h"]


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert ranks.short(("self_attn.q_proj", "mlp.up_proj")) == ["q_proj", "up_proj"]
    assert ranks.short(("a.x", "b.x")) == ["a.x", "b.x"]


def test_the_map_is_shown_where_ranks_differ(tmp_path: Path) -> None:
    saved(tmp_path, reparam.LoRA(r=4, rank_pattern=PATTERN))
    text = told(tmp_path)
    assert "rank by layer and kind of site" in text
    row = next(line for line in text.splitlines() if line.strip("│ ").startswith("1 ") and "7" in line)
    assert [cell for cell in row.replace("│", " ").split() if cell.isdigit()] == [
        "1",
        "1",
        "4",
        "4",
        "4",
        "4",
        "7",
        "4",
        "28",
    ]
    assert "\x1b[" in told(tmp_path, ansi=True), "shades"


def test_it_is_not_shown_where_they_do_not(tmp_path: Path) -> None:
    saved(tmp_path, reparam.LoRA(r=4))
    assert "rank by layer" not in told(tmp_path)


def test_plots(tmp_path: Path) -> None:
    saved(tmp_path, reparam.AdaLoRA(init_r=4, target_r=2, rank_pattern={"up_proj": 0, **PATTERN}))
    told(tmp_path, plot=tmp_path / "plots")
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["ranks.png"]
    assert f"plots are in {tmp_path}"[:12] in told(
        tmp_path, plot=tmp_path / "plots", overwrite=True, base=str(tmp_path / "base")
    )
    for name in ("ranks.png", "directions.png"):
        image = matplotlib.image.imread(tmp_path / "plots" / name)
        assert image.std() > 0.05, name


@pytest.mark.parametrize("method", [reparam.DoRA(r=2), reparam.DoRA(r=2, norm_axis="input"), reparam.LoRA(r=2)])
def test_sizes_and_directions_are_those_of_the_dense_change(method: Any, tmp_path: Path) -> None:
    adapter = saved(tmp_path, method)
    from reparam.hf.models import load_base

    base = load_base(str(tmp_path / "base"))
    merged = load_base(str(tmp_path / "base"))
    reparam.load(merged, tmp_path / "adapter")
    reparam.merge(merged)
    for site in summarize(tmp_path / "adapter", base).sites:
        w, new = (net.get_submodule(site.name).weight.detach().double() for net in (base, merged))
        assert site.change == pytest.approx(float((new - w).norm()), rel=1e-4)
        assert site.weight == pytest.approx(float(w.norm()), rel=1e-6)
        assert site.moved is not None
        axis = 0 if method == reparam.DoRA(r=2, norm_axis="input") else 1
        assert site.moved.magnitude == pytest.approx(
            float((new.norm(dim=axis) - w.norm(dim=axis)).abs().mean()), rel=1e-3
        )
    assert len(adapter.sites) == 14


def test_without_its_base_dora_says_what_shows_the_size(tmp_path: Path) -> None:
    saved(tmp_path, reparam.DoRA(r=2))
    assert "|ΔW| depends on W for this method; to show it, pass --base" in told(tmp_path)
    assert "--base shows it" not in told(tmp_path, base=str(tmp_path / "base"))
    found = json.loads(told(tmp_path, json=True, base=str(tmp_path / "base")))
    assert all(site["change"] > 0 and site["moved"]["magnitude"] > 0 for site in found["sites"])
    assert f"correlation of ΔM and ΔD over the sites: {found['correlation']:+.2f}" in told(
        tmp_path, base=str(tmp_path / "base")
    )


def test_plots_that_cannot_be_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, reparam.LoRA(r=2))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        told(tmp_path, plot=tmp_path / "file")
    with pytest.raises(ValueError, match="--plot is for adapters"):
        show(tmp_path / "base", None, Console(file=io.StringIO()), plot=tmp_path / "plots")
    assert not (tmp_path / "plots").exists()
