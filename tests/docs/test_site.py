"""The generated pages of the documentation are complete."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import ModuleType

import reparam
from reparam.cli.config_options import ALIASES
from reparam.cli.options import VERBS
from reparam.core.registry import METHODS
from reparam.train.config import SECTIONS, fields_of

ROOT = Path(__file__).parents[2]


def test_the_configuration_has_every_key_with_its_other_names(site: ModuleType) -> None:
    text = site.configuration()
    keys = {f"{section}.{name}" for section in SECTIONS for name in fields_of(section)}
    keys |= {f"method.{field.name}" for name in ("lora", "dora") for field in dataclasses.fields(METHODS[name])}
    for key in keys:
        (row, *_) = [line for line in text.splitlines() if line.startswith(f"| `{key}` |")]
        assert all(f"`{other}`" in row for other in ALIASES.get(key, [])), row
        assert not row.endswith("|  |"), f"{key} is not described"
    for name in ("lora", "adalora", "mixture", "bottleneck"):
        assert f"\n### {name}\n" in text


def test_a_key_has_its_default_as_files_have_it(site: ModuleType) -> None:
    text = site.configuration()
    assert "| `run.precision` | `Literal['float32', 'bfloat16']` | `\"float32\"` |" in text
    assert '| `base.quantized` | `tuple[str, ...]` | `["all-linear"]` |' in text
    assert "| `run.resume` | `bool` | `true` |" in text
    assert "| `adapter.start` | `str | None` |  |" in text


def test_the_command_line_has_every_verb_with_its_options(site: ModuleType) -> None:
    text = site.command_line()
    assert all(f"\n## {verb}\n" in text for verb in VERBS)
    assert "[bold]" not in text
    assert "`--learning_rate" in text.replace("`--optim.learning_rate, ", "`")
    assert "`--max-new-tokens" in text


def test_the_first_page_links_within_the_site(site: ModuleType) -> None:
    text = site.first_page((ROOT / "README.md").read_text())
    assert "README.zh-CN.md" not in text
    targets = [target for _, target in re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", text)]
    assert "qlora.md" in targets
    assert all(target.startswith("http") or (ROOT / "docs" / target).exists() for target in targets)


def test_every_exported_name_is_listed(site: ModuleType) -> None:
    text = site.names()
    assert all(f"[`{name}`]" in text for name in reparam.__all__)


def test_the_reports_are_made_from_their_figures(site: ModuleType) -> None:
    pages = dict(site.pages())
    assert {"compare/opening.html", "compare/ranks.html"} <= pages.keys()
    assert "BitFit".lower() in pages["compare/opening.html"].lower()
    assert "::: reparam.adapter.attach" in pages["reference/api/adapter.md"]
