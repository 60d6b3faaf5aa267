"""The page at / in a headless browser."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import http_server
import pytest
from http_server import Served, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

KEY = "a-key-of-this-test-0123"


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with http_server.serving(folder) as running:
        yield running


def wait(page: Page, true: str) -> None:
    """Wait until JavaScript is true. playwright's own way is forbidden by the page's policy."""
    until(lambda: page.evaluate(true), seconds=60)


class Opened:
    """A page, with what the browser said and asked."""

    def __init__(self, browser: Browser, url: str, **settings: Any) -> None:
        self.page: Page = browser.new_page(**settings)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)

    def ready(self) -> Page:
        wait(self.page, "document.querySelector('#about').textContent.includes('adapter')")
        return self.page

    def answers(self) -> dict[str, str]:
        cards = self.page.locator("#answers article").all()
        return {str(card.get_attribute("data-model")): card.locator("pre").inner_text() for card in cards}


def test_models_answer_side_by_side_by_keyboard_alone(browser: Browser, served: Served) -> None:
    opened = Opened(browser, served.url)
    page = opened.ready()
    assert page.locator("#about").inner_text() == "tiny with 3 adapters"
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("def area(")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")  # continue the text
    page.keyboard.press("Tab")
    page.keyboard.type("12")  # what has the focus is selected
    page.keyboard.press("Control+Enter")
    wait(page, "document.querySelectorAll('footer code').length === 3")
    wait(page, "!document.querySelector('#ask').disabled")
    found = opened.answers()
    client = served.client()
    made = {
        name: client.completions.create(model=name, prompt="def area(", max_tokens=12, temperature=0)
        for name in ("tiny", "a", "b", "dora")
    }
    assert found == {name: one.choices[0].text for name, one in made.items()}
    for name, one in made.items():
        footer = page.locator(f"article[data-model={name}] footer")
        assert re.match(r"12 tokens, \d+\.\d tokens/s · cut at the number of tokens", footer.inner_text())
        if name == "tiny":
            assert "the base model" in footer.inner_text()
        else:
            assert footer.locator("code").get_attribute("title") == one.system_fingerprint
    assert opened.said == []
    assert all(url.startswith((served.url, "data:")) for url in opened.asked)
    page.close()


def test_text_appears_while_it_is_computed_and_escape_stops_it(browser: Browser, served: Served) -> None:
    import time

    opened = Opened(browser, served.url)
    page = opened.ready()
    page.fill("#prompt", "def area(")
    page.fill("#tokens", "200")
    page.uncheck("#with-base")
    for place in (1, 2):
        page.locator("select.adapter").nth(place).select_option("")
    hook = served.engine.model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    try:
        page.keyboard.press("Control+Enter")
        wait(page, "document.querySelector('pre').textContent.length > 3")
        assert page.locator("#ask").is_disabled()
        page.keyboard.press("Escape")
        wait(page, "document.querySelector('footer').textContent === 'stopped'")
    finally:
        hook.remove()
    until(lambda: not len(served.engine._loop))
    assert list(opened.answers()) == ["a"]
    assert not page.locator("#ask").is_disabled()
    page.close()


def test_mistakes_are_told_in_words(browser: Browser, served: Served) -> None:
    opened = Opened(browser, served.url)
    page = opened.ready()
    page.click("#ask")
    assert page.locator("#wrong").inner_text() == "Write a prompt."
    page.fill("#prompt", "x")
    page.uncheck("#with-base")
    for place in range(3):
        page.locator("select.adapter").nth(place).select_option("")
    page.click("#ask")
    assert page.locator("#wrong").inner_text() == "Choose the base or an adapter."
    page.check("#with-base")
    page.fill("#tokens", "5000")
    page.click("#ask")
    page.wait_for_selector("footer.bad")
    assert "at most 4,096" in page.locator("footer.bad").inner_text()
    page.close()


def test_a_key_is_asked_for(browser: Browser, folder: Path) -> None:
    with http_server.serving(folder, keys=(KEY,)) as running:
        opened = Opened(browser, running.url)
        page = opened.page
        page.wait_for_selector("#key-row:not([hidden])")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#wrong:not([hidden])")
        assert "key is not right" in page.locator("#wrong").inner_text()
        page.fill("#key", KEY)
        page.click("#use-key")
        opened.ready()
        page.fill("#prompt", "x")
        page.fill("#tokens", "2")
        page.click("#ask")
        wait(page, "document.querySelectorAll('footer code').length === 3")
        assert page.evaluate("Object.keys(localStorage).length + Object.keys(sessionStorage).length") == 0
        page.close()


def test_its_policy_lets_nothing_else_run(browser: Browser, served: Served) -> None:
    opened = Opened(browser, served.url)
    page = opened.ready()
    page.evaluate(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.bad=1\">"
        '<p id=styled style="color: rgb(1, 2, 3)">x</p>\');'
        "const script = document.createElement('script'); script.textContent = 'window.bad = 2';"
        "document.body.append(script)"
    )
    page.wait_for_timeout(100)
    assert page.evaluate("window.bad") is None
    assert page.evaluate("getComputedStyle(document.querySelector('#styled')).color") != "rgb(1, 2, 3)"
    assert any("Content Security Policy" in text for text in opened.said)
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_its_window_in_light_and_dark(browser: Browser, served: Served, scheme: Any, width: int) -> None:
    opened = Opened(browser, served.url, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = opened.ready()
    page.fill("#prompt", "def area(")
    page.fill("#tokens", "30")
    page.click("#ask")
    wait(page, "document.querySelectorAll('footer code').length === 3")
    wait(page, "!document.querySelector('#ask').disabled")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [card.bounding_box() for card in page.locator("article").all()]
    rows = {round(box["y"]) for box in boxes if box}
    assert len(rows) == (4 if width == 390 else 1)
    for control in page.locator("button:visible, select, textarea, input:not([type=radio]):visible").all():
        box = control.bounding_box()
        assert box is None or (box["x"] >= 0 and box["x"] + box["width"] <= width)
    ink, paper = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    dark = [sum(map(int, re.findall(r"\d+", color)[:3])) < 384 for color in (ink, paper)]
    assert dark == [scheme == "light", scheme == "dark"]
    if folder_of := os.environ.get("REPARAM_SCREENSHOTS"):
        page.screenshot(path=f"{folder_of}/page-{scheme}-{width}.png", full_page=True)
    page.close()


def test_it_is_one_file_without_addresses(served: Served) -> None:
    from reparam.serve.http import page

    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"// .*", "", page.HTML))
    assert "unsafe" not in page.POLICY
    assert page.POLICY.count("sha256-") == 2
