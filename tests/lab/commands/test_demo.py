"""`pumer demo`: what it prints and writes, and its page in a browser."""

import contextlib
import csv
import io
import shutil

import pytest

from pumer.lab.commands.demo import demo
from pumer.lab.commands.demo_page import Cells, demo_page

PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """`(folder, what was printed)` of a demo of few questions."""
    folder = tmp_path_factory.mktemp("demo")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        demo(
            out=str(folder / "demo"),
            questions=12,
            batch_size=4,
            photographs=False,
            record=str(folder / "rows.csv"),
        )
    return folder, printed.getvalue()


def test_the_demo_draws_and_counts(ran):
    folder, printed = ran
    for text in ("ToMe", "no vision", "the speed", "tokens.png", "tokens.html"):
        assert text in printed
    assert (folder / "demo/tokens.png").stat().st_size > 10_000
    with (folder / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    page = (folder / "demo/tokens.html").read_text()
    assert page.count("data:image/png") == 6
    for row in rows:  # the page has the numbers that were recorded
        assert f"{float(row['accuracy']):.1f} ({float(row['accuracy_low']):.1f}-" in page
    assert "http" not in page


def test_a_page_quotes_what_it_is_given():
    cells = Cells("a <title>", ("", "n & m"), (("PuMer", "<1>"), ("base", "2")))
    page = demo_page([("1x", "<b>")], cells, cells, ["<figure></figure>"])
    assert "a &lt;title&gt;" in page
    assert 'data-name="n &amp; m">&lt;1&gt;' in page
    assert page.count('class="lead"') == 1
    assert "&lt;b&gt;" in page


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium (Debian package `chromium`)")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, ran):
    """Opens the demo's page; no error may show up in its console."""
    contexts, errors = [], []

    def visit(viewport, scheme="light"):
        contexts.append(browser.new_context(viewport=viewport, color_scheme=scheme))
        tab = contexts[-1].new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda line: line.type == "error" and errors.append(line.text))
        tab.on(
            "request", lambda sent: sent.url[:5] in ("file:", "data:") or errors.append(sent.url)
        )
        tab.goto((ran[0] / "demo" / "tokens.html").as_uri())
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert not errors


def brightness(tab, property):
    """Mean of red, green and blue of a colour of the page's body."""
    script = f"getComputedStyle(document.body).{property}.match(/\\d+/g).slice(0, 3).map(Number)"
    return sum(tab.evaluate(script)) / 3


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_the_page_fits_its_screen(visit, viewport, tmp_path):
    tab = visit(viewport)
    tab.screenshot(path=tmp_path / "page.png", full_page=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert tab.locator(".token-map").count() == 6


def test_the_page_is_dark_in_dark_mode(visit, tmp_path):
    light, dark = visit(DESKTOP), visit(DESKTOP, "dark")
    dark.screenshot(path=tmp_path / "dark.png")
    assert brightness(dark, "backgroundColor") < 60 < 200 < brightness(light, "backgroundColor")
    assert brightness(light, "color") < 60 < 200 < brightness(dark, "color")


def test_hovering_follows_a_token_through_the_layers(visit, tmp_path):
    tab = visit(DESKTOP)
    figure = tab.locator(".token-map").first
    token = figure.locator(".panel:last-child .token.merged").first
    patches = token.get_attribute("data-patches").split()
    panel = figure.locator(".panel:last-child svg")
    panel.scroll_into_view_if_needed()
    svg = panel.bounding_box()
    square = svg["width"] / 12
    row, column = divmod(int(patches[0]), 12)
    before = tab.screenshot()
    tab.mouse.move(svg["x"] + (column + 0.5) * square, svg["y"] + (row + 0.5) * square)
    after = tab.screenshot(path=tmp_path / "hover.png")
    assert before != after
    said = figure.locator(".trace").text_content()
    assert said.startswith(f"These {len(patches)} patches – layer 1: ")
    assert said.endswith(f"layer 3: one token of {len(patches)} patches.")
    # In the input the token's patches are marked, each by itself.
    marked = figure.locator(".panel:first-child .token.on")
    assert [node.get_attribute("data-patches") for node in marked.all()] == patches
    tab.mouse.move(1, 1)
    assert figure.locator(".on").count() == 0


def test_pointing_at_a_word_follows_it(visit):
    tab = visit(PHONE)
    figure = tab.locator(".token-map").first
    figure.locator(".panel:last-child .word").first.hover()
    assert figure.locator(".trace").text_content().startswith("This word – layer 1: kept")
    assert figure.locator(".word.on").count() == 4
