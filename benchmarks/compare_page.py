"""Copy finished comparisons to `docs/`: figures, a screenshot of the report, and the tables of evidence/compare.md.

    python benchmarks/compare_page.py opening ranks

This reads out/compare-NAME for each NAME. The tables of all comparisons in docs/compare/ replace everything after
"## Tables" in evidence/compare.md. `make docs` renders the reports from the figures. Screenshots need Chromium or
Chrome, as do the report's tests.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from reparam.compare.write import plus_minus

DOCS = Path("docs")
TABLES = "## Tables\n"


def table(found: dict[str, Any]) -> str:
    """The report's main table as Markdown, with the best contestant first."""
    others = list(dict.fromkeys(name for row in found["rows"] for name in row["others"]))
    heads = [
        "contestant",
        "trained parameters",
        found["metric"],
        f"difference to {found['reference']}",
        *others,
        "rate",
    ]
    heads += ["step ms", "peak MiB", "decode ms", "merged ms", "adapter KiB"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in found["rows"]:
        serving = row["serving"]
        merged = "no" if serving["merged_seconds"] is None else f"{1000 * serving['merged_seconds']:.1f}"
        cells = [
            row["label"],
            f"{row['parameters']:,}",
            plus_minus(row["score"]),
            "" if row["difference"] is None else plus_minus(row["difference"], sign="+"),
            *(plus_minus(row["others"][name]) for name in others),
            f"{row['rate']:g}" + (" (an end of the grid)" if row["edge"] else ""),
            f"{1000 * row['step_seconds']:.0f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{1000 * serving['seconds']:.1f}",
            merged,
            f"{serving['adapter_bytes'] / 1024:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(report: Path, file: Path) -> None:
    """Save a screenshot of the top of a report."""
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=browser, args=["--disable-gpu", *sandbox])
        page = opened.new_page(viewport={"width": 1280, "height": 1180})
        page.goto(report.resolve().as_uri())
        page.screenshot(path=file)
        opened.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    for name in parser.parse_args().names:
        (DOCS / "compare").mkdir(exist_ok=True)
        shutil.copy(f"out/compare-{name}/results.json", DOCS / "compare" / f"{name}.json")
        picture(Path(f"out/compare-{name}/report.html"), DOCS / "images" / f"compare-{name}.png")
    parts = []
    for file in sorted((DOCS / "compare").glob("*.json")):
        found = json.loads(file.read_text())
        length = f"{found['steps']} steps, seeds {', '.join(map(str, found['seeds']))}"
        head = f"**{file.stem}** ([report](../compare/{file.stem}.html); {length}). "
        command = f"    reparam compare benchmarks/compare/{file.stem}.toml\n"
        parts.append("\n\n".join([head + found["recommendation"], table(found), command]))
    page = DOCS / "evidence" / "compare.md"
    page.write_text(page.read_text().partition(TABLES)[0] + TABLES + "\n" + "\n".join(parts))


if __name__ == "__main__":
    main()
