"""The page in a real Chromium: it draws, fits a phone, prints, follows the theme, asks for nothing, runs no names."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PROGRAM, Browser, Page
from reckoning_cases import reckoned
from report_cases import HOSTILE, finished, plots

from distill_jobs.report import html, live
from distill_jobs.report.blocks import Part, Row, Section, made

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium on this machine")

LIVE = "document.querySelectorAll('figure.live')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("chromium") / "profile")
    yield started
    started.close()


@pytest.fixture(scope="module")
def explorable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with one plot of each kind, live."""
    section = Section(HOSTILE, "plots", [Part("a.json", lambda: [Row([live.chart(plot) for plot in plots()])])])
    values = {"name": HOSTILE, "title": HOSTILE, "data": HOSTILE, "tiles": [("1", HOSTILE)], "ended": None}
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html.lay_out(values, [], made([section], []), []))
    return path


def draw_all(page: Page) -> None:
    for number in range(page.value(f"{LIVE}.length")):
        page.value(f"{LIVE}[{number}].scrollIntoView()")
        page.wait(f"{LIVE}[{number}].matches('.drawn:has(.main-svg), .kept')")


def asked(page: Page) -> list[str]:
    """What was asked for beside the file itself; ``data:`` and ``blob:`` are inside the page."""
    return [url for url in page.requests[1:] if not url.startswith(("data:", "blob:"))]


def fits(page: Page) -> bool:
    return bool(page.value("document.documentElement.scrollWidth <= innerWidth"))


def test_live_figures_draw_and_follow_the_theme(browser: Browser, explorable: Path) -> None:
    with browser.page() as page:
        page.open(explorable)
        draw_all(page)
        assert page.value(f"{LIVE}.length") == len(plots())
        assert page.value("[...document.querySelectorAll('.still')].every((each) => each.offsetHeight == 0)")
        colour = "getComputedStyle(document.querySelector('.plot .ytick text')).fill"
        before = page.value(colour)
        page.look(dark=True)
        page.wait(f"{colour} != '{before}'")
        assert page.value("document.querySelectorAll('.plot a').length") == 0, "a name has become a link"
        assert fits(page) and not page.problems and not asked(page)
        page.look(dark=False, printed=True)
        assert page.value("[...document.querySelectorAll('.still')].every((each) => each.offsetHeight > 0)")
        assert page.value("[...document.querySelectorAll('.plot, nav')].every((each) => each.offsetHeight == 0)")
        assert page.pdf().startswith(b"%PDF-")


def test_a_finished_run_on_a_phone(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(
        html.render(reckoned(finished(tmp_path, name=HOSTILE, slices={HOSTILE: {HOSTILE: (10, 0.1)}}), HOSTILE))
    )
    with browser.page(width=390, height=844, dark=True) as page:
        page.open(path)
        draw_all(page)
        assert fits(page) and not page.problems and not asked(page)
        words = "[...document.querySelectorAll('p, td, li, dd')]"
        assert page.value(f"{words}.every((each) => parseFloat(getComputedStyle(each).fontSize) >= 12)")
        assert page.value("document.title").startswith("<script>")


def test_without_scripts_the_still_pictures_stand(browser: Browser, explorable: Path) -> None:
    with browser.page(scripts=False) as page:
        page.open(explorable)
        assert b"PNG" in page.picture(whole=False) and not asked(page)


def test_a_script_that_got_in_would_not_run(browser: Browser, explorable: Path, tmp_path: Path) -> None:
    broken = tmp_path / "report.html"
    told = "<h2><img src='http://evil.test/x.png' onerror='window.evil=1'><script>window.evil=1</script>"
    broken.write_text(explorable.read_text().replace("<h2>", told))
    with browser.page() as page:
        page.open(broken)
        assert page.value("window.evil === undefined")
        assert any("Content Security Policy" in problem for problem in page.problems)


def test_the_harness_sees_what_it_is_there_to_see(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text("<script>console.error('bad'); fetch('http://127.0.0.1:9/x').catch(() => 1); nowhere()</script>")
    with browser.page() as page:
        page.open(path)
        page.wait("true")
        assert asked(page) == ["http://127.0.0.1:9/x"]
        assert any("bad" in problem for problem in page.problems)
        assert any("nowhere" in problem for problem in page.problems)
