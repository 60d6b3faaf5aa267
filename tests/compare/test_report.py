"""The report in a headless browser, and its text without one."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from reparam.compare.recommend import recommend
from reparam.compare.report import render
from reparam.compare.svg import placed, ticks

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HOSTILE = "<script>alert('x')</script> & \"quoted\""


def row(label: str, mean: float, half: float, parameters: int, *, merged: bool = True) -> dict[str, Any]:
    return {
        "label": label,
        "method": "lora",
        "settings": {},
        "storage": "dense",
        "rate": 0.01,
        "edge": label == "bitfit",
        "parameters": parameters,
        "score": {"mean": mean, "low": mean - half, "high": mean + half, "count": 3},
        "others": {"loss per token": {"mean": 2 - mean, "low": 1.9 - mean, "high": 2.1 - mean, "count": 3}},
        "difference": None
        if label == "lora"
        else {"mean": mean - 0.7, "low": mean - 0.75, "high": mean - 0.65, "count": 3},
        "seeds": {},
        "failed": {},
        "step_seconds": 0.1 + parameters / 1e8,
        "peak_bytes": 160 * 2**20 + parameters * 16,
        "decode_seconds": 0.005,
        "serving": {
            "adapter_bytes": 4 * parameters,
            "base_seconds": 0.004,
            "seconds": 0.005,
            "merged_seconds": 0.004 if merged else None,
            "merged": "yes" if merged else "no: the update depends on its input",
        },
        "curve": [(step, 2 - mean + 3 / step) for step in (10, 20, 30)],
        "command": f"reparam train --method.name lora --data.train '{HOSTILE}'",
    }


@pytest.fixture
def results() -> dict[str, Any]:
    rows = [row("full", 0.78, 0.03, 5_475_584), row("lora", 0.70, 0.02, 224_256), row("bitfit", 0.5, 0.06, 14_592)]
    rows.append(row(HOSTILE, 0.65, 0.05, 150_000, merged=False))
    front = ["bitfit", "lora", "full"]
    return {
        "format": 1,
        "metric": "exact match",
        "larger_is_better": True,
        "reference": "lora",
        "recommendation": "Take full.",
        "steps": 60,
        "seeds": [0, 1, 2],
        "rates": [0.001, 0.01],
        "base": {"exact match": {"value": 0.0}},
        "rows": rows,
        "fronts": dict.fromkeys(("parameters", "step_seconds", "peak_bytes", "decode_seconds"), front),
        "stopped": {"dora": "after 15 steps"},
        "tuning": [{"label": r["label"], "rate": 0.01, "losses": {"15": {"0.001": 2.0, "0.01": None}}} for r in rows],
        "notes": ["a note"],
        "missing": [],
        "machine": "a machine",
        "plan": {"base.path": "model", "data.train": HOSTILE},
    }


@pytest.fixture
def file(results: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "report.html"
    file.write_text(render(results))
    return file


def test_a_browser_renders_it_without_complaint_and_without_a_request(browser: Browser, file: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    assert page.title() == "Comparison: exact match of 4 contestants"
    assert page.locator("#recommendation").inner_text() == "Take full."
    plots = page.locator("svg")
    assert plots.count() == 1 + 4 + 4
    for i in range(plots.count()):
        box = plots.nth(i).bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) > 50
        assert plots.nth(i).locator("circle, polyline").count() > 0
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()


def test_its_table_is_sorted_by_a_click_or_a_key(browser: Browser, file: Path) -> None:
    page = browser.new_page()
    page.goto(file.as_uri())

    def column(name: str) -> list[str]:
        at = page.locator("#table thead th").all_inner_texts()
        place = next(i for i, text in enumerate(at) if text.startswith(name))
        return [r.locator("th, td").nth(place).inner_text() for r in page.locator("#table tbody tr").all()]

    parameters = page.locator("#table thead button", has_text="parameters")
    parameters.click()
    assert column("parameters") == ["14,592", "150,000", "224,256", "5,475,584"]
    head = page.locator("#table thead th", has_text="parameters")
    assert head.get_attribute("aria-sort") == "ascending"
    parameters.focus()
    page.keyboard.press("Enter")
    assert column("parameters") == ["5,475,584", "224,256", "150,000", "14,592"]
    assert head.get_attribute("aria-sort") == "descending"
    merged = page.locator("#table thead button", has_text="merged")
    for _ in range(2):  # what has no number is last both ways
        merged.click()
        assert column("merged")[-1] == "no"
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_scrolls_the_table_and_not_the_page(browser: Browser, file: Path, scheme: Any) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.querySelector('.scroll').scrollWidth") > 390
    ink, paper = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    dark = [sum(map(int, re.findall(r"\d+", color)[:3])) < 384 for color in (ink, paper)]
    assert dark == [scheme == "light", scheme == "dark"]
    page.close()


def test_paper_gets_everything_in_black_on_white(browser: Browser, file: Path) -> None:
    page = browser.new_page(viewport={"width": 720, "height": 1000}, color_scheme="dark")
    page.goto(file.as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    colors = "(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))"
    assert page.evaluate(colors) == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 720
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    page.close()


def test_whatever_the_user_wrote_is_text_and_no_markup(results: dict[str, Any]) -> None:
    html = render(results)
    assert HOSTILE not in html
    assert html.count("<script") == 1  # the page's own


def test_the_page_names_no_address_that_it_could_ask(results: dict[str, Any]) -> None:
    html = render(results)
    assert set(re.findall(r"https?://[^\"'\s<)]+", html)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|<link(?![^>]*data:)|<img|url\(", html)


def test_a_comparison_that_has_only_begun_still_has_a_report(results: dict[str, Any]) -> None:
    empty = copy.deepcopy(results)
    empty.update(rows=[], fronts={}, base={}, seeds=[], tuning=[], stopped={}, missing=["nothing was run"])
    assert "nothing was run" in render(empty)
    failed = copy.deepcopy(results)
    failed["rows"][0].update(score=None, difference=None, others={}, curve=[], serving=None, failed={"0": "NaN"})
    failed["fronts"] = {cost: ["lora"] for cost in failed["fronts"]}
    assert "1 failed" in render(failed)


def test_labels_of_points_that_stand_together_do_not_cover_each_other() -> None:
    points = {name: (200.0 + i, 100.0) for i, name in enumerate(("lora", "dora", "adalora", "lora+"))}
    spots = placed(points, [], (0, 0, 460, 250))
    assert len({(round(y / 12), anchor) for _, y, anchor in spots.values()}) == 4


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0.0, 1.0, False), (3.1, 3.2, False), (14e3, 5e6, True), (90, 300, True)]
)
def test_axes_have_a_few_round_numbers_within(low: float, high: float, log: bool) -> None:
    found = ticks(low, high, log=log)
    assert 2 <= len(found) <= 7
    assert all(low <= value <= high for value in found)


SMALL = {"lora": 100, "dora": 120, "tiny": 10}


def sentence(**values: list[float]) -> str:
    by_seed = {label: dict(enumerate(scores)) for label, scores in values.items()}
    return recommend(by_seed, SMALL, "lora", "exact match", failed=set(), base=0.1, larger=True)


def test_the_recommendation_tells_a_difference_from_noise() -> None:
    assert "within noise" in sentence(lora=[0.70, 0.72, 0.71], dora=[0.73, 0.69, 0.74])
    clear = sentence(lora=[0.50, 0.51, 0.52], dora=[0.70, 0.71, 0.72])
    assert clear.startswith("Take dora")
    assert "0.200 ± 0.000 better than lora" in clear
    assert "one seed" in sentence(lora=[0.5], dora=[0.9])
    assert sentence(lora=[0.9, 0.91, 0.92], dora=[0.5, 0.51, 0.52]).startswith("Take lora: no other is within noise")
    assert sentence(lora=[], dora=[]).startswith("There is nothing to compare yet")


def test_of_those_within_noise_of_the_best_the_smallest_is_taken() -> None:
    found = sentence(lora=[0.2, 0.21, 0.22], dora=[0.80, 0.81, 0.80], tiny=[0.79, 0.81, 0.80])
    assert found.startswith("Take tiny")
    assert "smallest of the 2" in found


def test_who_failed_once_is_not_recommended() -> None:
    values = {"lora": {0: 0.5, 1: 0.51}, "dora": {0: 0.9}}
    assert "dora" not in recommend(values, SMALL, "lora", "exact match", failed={"dora"}, base=None, larger=True)


def test_nobody_is_recommended_where_nothing_beats_the_base() -> None:
    assert sentence(lora=[0.1, 0.1], dora=[0.1, 0.0]).startswith("No contestant is better than the base")
    worse = {"lora": {0: 2.0, 1: 2.1}, "dora": {0: 2.5, 1: 2.4}}
    found = recommend(worse, SMALL, "lora", "loss per token", failed=set(), base=1.9, larger=False)
    assert "loss per token 1.900; the best is lora, 2.050" in found
