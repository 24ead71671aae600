"""Plots: still and live show the same, and hostile names stay text in both."""

import gzip
import json
import re
from base64 import b64decode, b64encode
from hashlib import sha256
from xml.etree import ElementTree

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs
from report_cases import HOSTILE, plots

from distill_jobs.report import live
from distill_jobs.report.blocks import Part, Section, Text, made
from distill_jobs.report.drawn import draw, offsets
from distill_jobs.report.html import lay_out
from distill_jobs.report.plot import Plot

ALL = {plot.name: plot for plot in plots()}


@pytest.mark.parametrize("plot", ALL.values(), ids=ALL)
def test_plotly_takes_every_figure(plot: Plot) -> None:
    text = json.dumps(live.figure(plot))
    go.Figure(json.loads(re.sub(r"var\(--[a-z]+\)", "#123456", text)))
    assert "currentColor" not in text


@pytest.mark.parametrize("plot", ALL.values(), ids=ALL)
def test_the_still_picture_is_whole(plot: Plot) -> None:
    svg = draw(plot)
    ElementTree.fromstring(svg)
    assert "<script" not in svg and not re.findall(r"#[0-9a-f]{6}\b", svg), "colours are the style sheet's"


def test_json_in_the_page_can_not_end_its_element() -> None:
    for plot in ALL.values():
        text = live.embedded(live.figure(plot))
        assert "<" not in text and ">" not in text and "&" not in text and "\u2028" not in text
        assert json.loads(text) == live.figure(plot)


def test_plotly_is_given_no_tags() -> None:
    figure = live.figure(ALL["gaps"])
    named = figure["layout"]["yaxis"]["ticktext"][1]
    assert named.startswith("&lt;") and "<" not in named
    assert all("<" not in told for trace in figure["data"] for told in trace["hovertext"])
    assert all(trace["hovertemplate"] == "%{hovertext}<extra></extra>" for trace in figure["data"])


def test_series_of_one_category_stand_apart() -> None:
    assert sorted(offsets(ALL["gaps"]).values()) == pytest.approx([-0.62 / 3, 0, 0.62 / 3])
    assert offsets(ALL["curves"]) == {}
    heights = [trace["y"][0] for trace in live.figure(ALL["gaps"])["data"]]
    assert len(set(heights)) == 3


def test_a_words_place_on_a_logarithmic_axis_is_its_logarithm() -> None:
    layout = live.figure(ALL["curves"])["layout"]
    assert layout["annotations"][0]["x"] == pytest.approx(1.0) and layout["shapes"][0]["x0"] == 10.0


def test_only_the_pages_own_scripts_may_run() -> None:
    scripts = live.scripts()
    assert gzip.decompress(b64decode(scripts.plotly)).decode() == get_plotlyjs()
    for text in (get_plotlyjs(), str(scripts.own)):
        assert b64encode(sha256(text.encode()).digest()).decode() in scripts.policy
    assert "default-src 'none'" in scripts.policy and "unsafe-inline' 'unsafe" not in scripts.policy
    assert "script-src 'none'" in live.policy()


def test_the_script_travels_only_with_live_figures() -> None:
    values = {"name": HOSTILE, "title": HOSTILE, "data": None, "tiles": [], "ended": None}
    still = lay_out(values, [], made([Section("A", "a", [Part("a.json", lambda: [Text("words")])])], []), [])
    assert "<script" not in still and len(still) < 20_000
    parts = [Part("a.json", lambda: [live.chart(ALL["curves"])])]
    page = lay_out(values, [], made([Section("A", "a", parts)], []), [])
    assert page.count("<script") == 3 and page.count('id="plotly"') == 1
    assert 1_500_000 < len(page) < 2_500_000, "plotly is inlined once, compressed"


def test_a_part_that_fails_costs_only_itself() -> None:
    def broken() -> list[Text]:
        raise KeyError("gone")

    damaged: list[str] = []
    parts = [Part("a.json", broken), Part("b.json", lambda: [Text("words"), None])]
    sections = [Section("A", "a", parts), Section("B", "b", [Part("b.json", lambda: [None])])]
    [section] = made(sections, damaged)
    assert section.blocks == [Text("words")] and damaged == ["a.json"]
