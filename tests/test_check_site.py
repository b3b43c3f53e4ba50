"""docs/check_site.py, on small sites with and without faults. Skipped without the extra `docs` and Chromium."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("axe_playwright_python")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("Chromium is not installed", allow_module_level=True)
sys.path.append(str(Path(__file__).parents[1] / "docs"))

import check_site  # noqa: E402

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>A page</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root {{ color-scheme: light dark }}
body {{ background: light-dark(white, black); color: light-dark(black, white) }}</style>
</head><body><main><h1 id="top">A page</h1>{}</main></body></html>"""
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=check_site.FLAGS)
        yield browser
        browser.close()


def check(browser: object, site: Path, body: str) -> list[str]:
    (site / "index.html").write_text(PAGE.format(body))
    return check_site.check(site, browser)


def test_a_good_page_has_no_fault(browser: object, tmp_path: Path) -> None:
    (tmp_path / "other.html").write_text(PAGE.format('<p><a href="index.html#top">back</a></p>'))
    body = f"""<p><a href="other.html#top">there</a></p><img src="{PIXEL}" alt="a pixel">
    <div style="overflow-x: auto" tabindex="0"><div style="width: 3000px">wide, and scrolls by itself</div></div>"""
    assert check(browser, tmp_path, body) == []


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<script>console.error("oh")</script>', "console: oh"),
        ("<script>missing()</script>", "script: missing is not defined"),
        ('<div style="width: 1000px">wide</div>', "phone, light: wider than the window: 1"),
        (f"<pre style='overflow: auto' tabindex=0>{'x' * 500}</pre>", "desktop, light: code does not fit: xxx"),
        (f'<img src="{PIXEL}">', "no alternative text: data:"),
        ('<img src="none.png" alt="nothing">', "image does not load: http"),
        ('<svg role="img" id="drawing"></svg>', "no alternative text: drawing"),
        ('<script src="https://example.org/x.js"></script>', "asks for https://example.org/x.js"),
        ('<p><a href="none.html">there</a></p>', "no such page: none.html"),
        ('<p><a href="#none">there</a></p>', "no such anchor: index.html#none"),
        ("<style>body { background: white !important }</style>", "phone, dark: is not dark: brightness 255"),
        ('<p style="color: #999; background: #aaa">pale</p>', "color-contrast: "),
        ("<h3>too deep</h3>", "heading-order: "),
    ],
)
def test_each_fault_is_found(body: str, fault: str, browser: object, tmp_path: Path) -> None:
    faults = check(browser, tmp_path, body)
    assert any(fault in line for line in faults), faults
