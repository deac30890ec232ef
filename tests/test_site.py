"""The site that `make docs` builds: strictly, in both languages, and used in a real browser."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

import msquant
from msquant import api
from msquant.cli.app import app
from tests.fixtures.browser import Open, OpenedPage

pytest.importorskip("mkdocs", reason="mkdocs is in the docs extra")

ROOT = Path(msquant.__file__).parents[1]
CONFIGS = {"": "mkdocs.yml", "zh-CN": "mkdocs.zh-CN.yml"}
BUILD_SECONDS = 300
"""For a build, which takes ten on a quiet machine."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` lays it out; the languages are built at once, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    targets = {language: folder / (language or "en") for language in CONFIGS}
    builds = {
        language: subprocess.Popen(
            [
                # --quiet would hide warnings from --strict too.
                *(sys.executable, "-m", "mkdocs", "build", "--strict"),
                *("--config-file", CONFIGS[language], "--site-dir", target),
            ],
            cwd=ROOT,
            env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "TMPDIR": str(folder)},
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for language, target in targets.items()
    }
    for language, build in builds.items():
        said, _ = build.communicate(timeout=BUILD_SECONDS)
        assert build.returncode == 0, f"{CONFIGS[language]}:\n{said}"
    return targets["zh-CN"].rename(targets[""] / "zh-CN").parent


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_QuietHandler, directory=str(site))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


Show = Callable[..., Any]


@pytest.fixture
def open_page(open_page: Open, address: str) -> Iterator[Show]:
    """Opens a page of the site; at the end, it has asked nobody else and said nothing to the console."""
    opened: list[OpenedPage] = []

    def show(path: str, scheme: str = "light", width: int = 1300) -> Any:
        opened.append(open_page(address + path, scheme, width))
        return opened[-1].page

    yield show
    assert [line for page in opened for line in page.said] == []
    requested = {urlsplit(url).netloc for page in opened for url in page.requested}
    assert requested == {urlsplit(address).netloc}


def _nav(config: str) -> list[list[str]]:
    # A tag of MkDocs in the rest of the file is none that YAML itself knows.
    nav = (ROOT / config).read_text(encoding="utf-8").partition("\nnav:\n")[2]
    return [pages for part in yaml.safe_load(nav) for pages in part.values()]


def test_both_languages_have_the_same_pages_in_the_same_four_parts() -> None:
    english, chinese = map(_nav, CONFIGS.values())
    assert english == chinese
    assert len(english) == 4


def test_the_reference_has_every_command_and_every_function(site: Path) -> None:
    for language in CONFIGS:
        commands = (site / language / "reference" / "cli.html").read_text(encoding="utf-8")
        for command in app.registered_commands:
            assert command.callback is not None
            assert f'id="msquant-{command.name or command.callback.__name__}"' in commands
        functions = (site / language / "reference" / "api.html").read_text(encoding="utf-8")
        for name in api.__all__:
            whole = f"{getattr(api, name).__module__}.{name}"
            assert f'id="{whole}"' in functions, whole
        # A docstring's "Example:" in place of "Examples:" would be prose.
        assert 'class="example"' not in functions


def test_a_page_leads_to_itself_in_the_other_language(open_page: Show, address: str) -> None:
    page = open_page("guides/accuracy.html")
    page.locator(".md-header .md-select button").hover()
    page.get_by_role("link", name="简体中文").click()
    page.wait_for_url(f"{address}zh-CN/guides/accuracy.html")
    assert page.locator("h1").inner_text().startswith("精度不够")
    page.locator(".md-header .md-select button").hover()
    page.get_by_role("link", name="English").click()
    page.wait_for_url(f"{address}guides/accuracy.html")


@pytest.mark.parametrize(
    ("start", "query", "found"),
    [
        ("index.html", "tensor parallel", "servers.html"),
        ("index.html", "holds a result already", "troubleshooting.html"),
        ("zh-CN/index.html", "困惑度", "zh-CN/evaluating.html"),
        ("zh-CN/index.html", "对话模板", "zh-CN/calibration.html"),
    ],
)
def test_the_search_finds(open_page: Show, address: str, start: str, query: str, found: str) -> None:
    page = open_page(start)
    page.locator("input.md-search__input").click()
    page.keyboard.type(query)
    results = page.locator("a.md-search-result__link")
    results.first.wait_for(timeout=240_000)
    links = results.evaluate_all("links => links.map(link => link.href)")
    inside = start.removesuffix("index.html")
    assert all(link.startswith(address + inside) for link in links)
    pages = {urlsplit(link).path.removeprefix("/") for link in links}
    assert found in pages
    assert bool(inside) or not any(path.startswith("zh-CN/") for path in pages)


@pytest.mark.parametrize("path", ["reference/api.html", "zh-CN/troubleshooting.html", "zh-CN/recipes.html"])
def test_a_phone_scrolls_no_page_sideways(open_page: Show, path: str) -> None:
    page = open_page(path, scheme="dark", width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
