"""Looks at every page of the built site as readers do: in Chromium, on a desktop and a phone, light and dark.

sphinx-build -W --keep-going docs site
python docs/check_site.py site                      # lists what is wrong, and exits with 1 if anything is
python docs/check_site.py site --pictures pictures  # keeps a picture of each page, too

On each page: nothing in the console, no request that leaves the site or fails, no page wider than the window, code that
fits on a desktop, images that load and have an alternative text, links and anchors that lead somewhere, a dark page where
dark is asked for, and what axe-core checks (contrast, headings, names, landmarks).
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urldefrag

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, sync_playwright

VIEWS = {"desktop": (1440, 900), "phone": (390, 844)}
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
WITH_AXE = {("desktop", "light"), ("phone", "dark")}  # what it checks is of the layout or of the colours
AXE = {"rules": {"definition-list": {"enabled": False}}}  # autodoc's lists are the theme's to mend
THEIRS = ("search.html",)  # written by the theme alone
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SEEN = """() => {
    const wide = element => element && element.scrollWidth > element.clientWidth + 1;
    const all = selector => [...document.querySelectorAll(selector)];
    const [red, green, blue] = getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number);
    return {
        overflow: [document.documentElement, document.querySelector(".content")].filter(wide)
            .map(element => `${element.scrollWidth} of ${element.clientWidth} pixels`),
        code: all("pre").filter(wide).map(element => element.textContent.trim().split("\\n")[0]),
        unnamed: all("img").filter(image => !image.alt.trim()).map(image => image.src)
            .concat(all("svg[role=img]").filter(svg => !svg.querySelector("title")?.textContent.trim()).map(svg => svg.id)),
        broken: all("img").filter(image => !image.complete || !image.naturalWidth).map(image => image.src),
        brightness: (red + green + blue) / 3,
    };
}"""

LINKS = """() => ({
    links: [...new Set([...document.querySelectorAll("a[href]")].map(link => link.href))],
    ids: [...document.querySelectorAll("[id]")].map(element => element.id),
})"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The address at which the site is served meanwhile."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


def pages_of(site: Path) -> list[str]:
    """Every page by its path in the site, without those of the theme."""
    found = [path.relative_to(site) for path in sorted(site.rglob("*.html"))]
    return [path.as_posix() for path in found if not path.parts[0].startswith("_")]


def watch(page: Page, origin: str, faults: list[str]) -> None:
    """Notes what the page says in the console and asks for, from now on; what is not the site's own is refused."""

    def ask(route: Route) -> None:
        if route.request.url.startswith((origin, "data:")):
            route.continue_()
        else:
            faults.append(f"asks for {route.request.url}")
            route.abort()

    page.route("**/*", ask)
    page.on("console", lambda message: faults.append(f"console: {message.text}") if message.type != "log" else None)
    page.on("pageerror", lambda error: faults.append(f"script: {error}"))
    page.on("response", lambda answer: faults.append(f"{answer.status}: {answer.url}") if answer.status >= 400 else None)


def look(page: Page, view: str, scheme: str) -> list[str]:
    """What is wrong with the page as it is shown."""
    seen = page.evaluate(SEEN)
    faults = [f"wider than the window: {width}" for width in seen["overflow"]]
    faults += [f"no alternative text: {source}" for source in seen["unnamed"]]
    faults += [f"image does not load: {source}" for source in seen["broken"]]
    if view == "desktop":
        faults += [f"code does not fit: {line}" for line in seen["code"]]
    if (seen["brightness"] < 128) != (scheme == "dark"):
        faults.append(f"is not {scheme}: brightness {seen['brightness']:.0f} of 255")
    if (view, scheme) in WITH_AXE and not page.url.endswith(THEIRS):
        for rule in Axe().run(page, options=AXE).response["violations"]:
            faults += [f"{rule['id']}: {rule['help']}: {node['target'][0]}" for node in rule["nodes"]]
    return faults


def dead_links(site: Path, origin: str, links: dict[str, Any]) -> list[str]:
    """Links within the site to a page, a file or an anchor that is not there."""
    faults = []
    for name, found in links.items():
        for target in found["links"]:
            if target.startswith(origin):
                place, anchor = (unquote(part) for part in urldefrag(target.removeprefix(origin)))
                place = place + "index.html" if place.endswith("/") or not place else place
                if not (site / place).exists():
                    faults.append(f"{name}: no such page: {place}")
                elif anchor and anchor not in links.get(place, {"ids": ()})["ids"]:
                    faults.append(f"{name}: no such anchor: {place}#{anchor}")
    return faults


def check(site: Path, browser: Browser, pictures: Path | None = None) -> list[str]:
    """What is wrong with the site, a line each."""
    faults: list[str] = []
    links: dict[str, Any] = {}
    with served(site) as origin:
        for name in pages_of(site):
            page, asked = browser.new_page(), list[str]()
            watch(page, origin, asked)
            page.goto(origin + name, wait_until="load")
            for (view, (width, height)), scheme in product(VIEWS.items(), SCHEMES):
                page.set_viewport_size({"width": width, "height": height})
                page.emulate_media(color_scheme=scheme)
                faults += [f"{name}, {view}, {scheme}: {fault}" for fault in look(page, view, scheme)]
                if pictures is not None:
                    target = pictures / f"{name.removesuffix('.html')}-{view}-{scheme}.png"
                    page.screenshot(path=target, full_page=True)
            faults += [f"{name}: {fault}" for fault in asked]
            links[name] = page.evaluate(LINKS)
            page.close()
        faults += dead_links(site, origin, links)
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--pictures", type=Path, help="a folder for a picture of each page")
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=FLAGS)
        faults = check(arguments.site, browser, arguments.pictures)
        browser.close()
    print("\n".join(faults) or f"{len(pages_of(arguments.site))} pages, nothing wrong")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
