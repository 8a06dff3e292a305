"""The page: it holds what the comparison found, loads nothing, and model text stays text."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import open_page
from hypothesis import given
from hypothesis import strategies as st
from test_compare import bits, write_evaluation
from test_matched import write_run

from distill.compare import compare
from distill.errors import UserError
from distill.evaluate import load_evaluation
from distill.report import nice_step, write_report
from distill.report.answers import SHOWN_CHARACTERS
from distill.report.curves import panels
from distill.report.numbers import count, duration, flops, powers
from distill.report.published import PUBLISHED
from distill.report.questions import win_loss

HOSTILE = (
    '<script>alert(1)</script><img src="http://x.invalid/a" onerror=alert(2)>"\'&{{ 7*7 }}{% raw %}\u202e\x00\ud800'
)
VOID = {"meta", "br", "hr", "input"}
LENGTHS = {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "rx", "width", "height"}


class Page(HTMLParser):
    """The elements, texts (white space of any kind as one blank) and nesting of a page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def report(
    tmp_path: Path, folders: list[Path], *, match: str = "flops", **options: Any
) -> tuple[Page, dict[str, Any], str]:
    result = compare(folders, tmp_path / "out", match=match)
    path = write_report(result, tmp_path / "out", eval_dirs=folders, **options)
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    return page, result, html


def store(folder: Path, **manifest: Any) -> Path:
    folder.mkdir()
    funnel = {"samples": 1200, "kept": 1100, "rejected": {"wrong": 60, "duplicate": 40}}
    (folder / "funnel.json").write_text(json.dumps(funnel))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def arms(tmp_path: Path) -> list[Path]:
    shares = [("base", None, 0.0), ("answers", 0, 0.3), ("hard", 0, 0.9), ("hard", 1, 0.8), ("soft", 0, 1.0)]
    return [
        write_evaluation(
            tmp_path / f"{name}-{seed}",
            bits(share, 40, samples=2, seed=i),
            cut=lambda q, k, name=name: name == "base" and q % 2 == 0,
            arm=name,
            train_seed=seed,
            bits_per_byte=2.0 - i / 4,
        )
        for i, (name, seed, share) in enumerate(shares)
    ]


def test_the_page_holds_what_was_found(tmp_path: Path, arms: list[Path]) -> None:
    stores = [store(tmp_path / "traces", teacher="nano", ledger={"flops": 2e13, "seconds": 130.0, "tokens": 5000})]
    page, result, _ = report(tmp_path, arms, stores=stores, title="A title")
    assert "A title" in page.text
    for finding in result["findings"]:
        assert finding[1:] in page.text
    for arm in result["arms"]:
        assert page.text.count(arm["name"]) >= 5
        assert f"{100 * arm['accuracy']:.1f} %" in page.text
    for pair in result["pairs"]:
        assert f"{100 * pair['difference']:+.1f}".replace("-", "−") in page.text
    headings = (
        "Accuracy by level",
        "Completion lengths",
        "Traces kept",
        "Cost",
        "Side by side",
        "Won and lost",
        "Published",
    )
    assert all(heading in page.text for heading in headings)
    assert "written 1 200 100.0 %" in page.text
    assert "2.0 × 10¹³ 2 min 10 s 5 000" in page.text
    assert "✗ truncated" in page.text


def test_text_of_others_stays_text(tmp_path: Path) -> None:
    folders = [
        write_evaluation(
            tmp_path / "one",
            bits(0.2, 6),
            arm=HOSTILE[:60],
            gold=HOSTILE,
            completion=lambda q, k: HOSTILE,
            model=HOSTILE,
        ),
        write_evaluation(tmp_path / "two", bits(0.8, 6), arm="two", gold=HOSTILE, completion=lambda q, k: HOSTILE),
    ]
    page, _, html = report(tmp_path, folders, stores=[store(tmp_path / "<b>", teacher=HOSTILE)], title=HOSTILE)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "link", "object", "embed", "base", "form", "foreignobject", "b<"}
    assert "<script" not in html
    assert "alert(1)</script>" not in html
    assert page.text.count("<script>alert(1)</script>") >= 10
    assert "{{ 7*7 }}" in page.text
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)


def test_the_page_loads_nothing(tmp_path: Path, arms: list[Path]) -> None:
    page, _, html = report(tmp_path, arms)
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "background"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    style = re.search(r"<style>(.*?)</style>", html, re.S)
    assert style is not None
    assert not re.search(r"url\(|@import|@font-face", style.group(1))
    assert "default-src 'none'; style-src 'unsafe-inline'" in html
    anchors = {a["href"] for tag, a in page.elements if tag == "a"}
    assert anchors <= {"#" + (a.get("id") or "") for _, a in page.elements}


def test_charts_are_made_of_numbers(tmp_path: Path, arms: list[Path]) -> None:
    page, _, html = report(tmp_path, arms)
    drawn = 0
    for tag, attributes in page.elements:
        if tag not in ("svg", "line", "rect", "circle", "text"):
            continue
        for name in LENGTHS & attributes.keys():
            value = float((attributes[name] or "").removesuffix("%"))
            assert math.isfinite(value)
            assert -15 <= value <= 1000
            if (attributes[name] or "").endswith("%"):
                assert 0 <= value <= 100
            assert name not in ("width", "height") or value >= 0
            drawn += 1
    assert drawn > 300
    assert "nan" not in html.lower().replace("nano", "")
    labelled = [a for tag, a in page.elements if tag == "svg" and a.get("role") == "img"]
    assert labelled
    assert all(a.get("aria-label") for a in labelled)


def test_bars_add_up_to_all_samples(tmp_path: Path, arms: list[Path]) -> None:
    """Within one arm bar heights are in proportion to counts: base has 40 truncated of 80, all in one bar."""
    page, _, _ = report(tmp_path, arms)
    cut = [a for tag, a in page.elements if tag == "rect" and a.get("class") == "bar cut"]
    assert len(cut) == 1
    assert float(cut[0]["height"] or 0) == pytest.approx(42.0)


def test_levels_and_costs_are_left_out_where_unknown(tmp_path: Path) -> None:
    folders = [write_evaluation(tmp_path / n, bits(0.5, 8), levels=1, ledger=None) for n in "ab"]
    page, _, _ = report(tmp_path, folders)
    assert "Accuracy by level" not in page.text
    assert not any(a.get("href") in ("#levels", "#costs", "#funnel") for _, a in page.elements)


def test_questions_shown_are_those_that_part_the_arms(tmp_path: Path) -> None:
    one, two = np.ones((30, 1), int), np.ones((30, 1), int)
    one[[5, 17]] = 0
    two[9] = 0
    folders = [write_evaluation(tmp_path / n, right) for n, right in (("a", one), ("b", two))]
    page, _, html = report(tmp_path, folders)
    shown = [int(m) for m in re.findall(r"Question (\d+): how many", page.text)]
    assert shown == [5, 9, 17, 0]
    again = write_report(
        json.loads((tmp_path / "out" / "compare.json").read_text()), tmp_path / "again.html", eval_dirs=folders
    )
    assert again.read_text(encoding="utf-8") == html


def test_long_completions_say_what_is_hidden(tmp_path: Path) -> None:
    text = "word " * 2000
    folders = [write_evaluation(tmp_path / n, bits(0.5, 4), completion=lambda q, k: text) for n in "ab"]
    page, _, _ = report(tmp_path, folders)
    assert SHOWN_CHARACTERS == 6000
    assert "4 000 more characters are in samples.jsonl" in page.text


def test_foreign_folders_and_broken_stores_are_refused(tmp_path: Path, arms: list[Path]) -> None:
    result = compare(arms, tmp_path / "out")
    with pytest.raises(UserError, match="an evaluation of arm 'soft' in the comparison"):
        write_report(result, tmp_path / "out", eval_dirs=arms[:-1])
    with pytest.raises(UserError, match=r"cannot read .*funnel\.json"):
        write_report(result, tmp_path / "out", eval_dirs=arms, stores=[tmp_path])
    (tmp_path / "funnel.json").write_text("{}")
    with pytest.raises(UserError, match="lacks samples, kept or rejected"):
        write_report(result, tmp_path / "out", eval_dirs=arms, stores=[tmp_path])
    assert not (tmp_path / "out" / "report.html").exists()


def test_numbers_are_written_for_people() -> None:
    assert [flops(v) for v in (None, 0, 1.24e15, 3e-2)] == ["–", "0", "1.2 × 10¹⁵", "3.0 × 10⁻²"]
    assert [duration(s) for s in (None, 2.34, 41, 260, 7500)] == ["–", "2.3 s", "41 s", "4 min 20 s", "2 h 5 min"]
    assert count(1234567) == "1\u202f234\u202f567"


@given(st.floats(1e-6, 1e9), st.integers(1, 12))
def test_steps_are_round_and_few(width: float, pieces: int) -> None:
    step = nice_step(width, pieces)
    assert width / step <= pieces * (1 + 1e-6)
    assert width / step > pieces / 5.1
    assert float(f"{step:.0e}") == pytest.approx(step)
    assert f"{step:.0e}"[0] in "125"


@pytest.fixture
def curves(tmp_path: Path) -> list[Path]:
    """Two arms with curves over two seeds, and a model nobody knows the cost of."""
    folders = [write_evaluation(tmp_path / "base", bits(0.1, 40), arm="base")]
    for seed in (0, 1):
        shares = enumerate((0.2, 0.4, 0.6, 0.8))
        folders += write_run(tmp_path, "hard", {1e10 * 4**i: bits(p, 40, seed=seed + 10 * i) for i, p in shares}, seed)
        shares = enumerate((0.1, 0.3, 0.5, 0.6))
        folders += write_run(tmp_path, "rl", {4e10 * 4**i: bits(p, 40, seed=seed + 99 * i) for i, p in shares}, seed)
    return folders


@pytest.mark.parametrize("match", ["flops", "seconds"])
def test_curves_are_drawn_for_every_quantity_and_the_matched_one_first(
    tmp_path: Path, curves: list[Path], match: str
) -> None:
    page, result, _ = report(tmp_path, curves, match=match)
    assert "Accuracy against compute" in page.text
    chosen = [a["id"] for tag, a in page.elements if tag == "input"]
    assert chosen[0] == f"by-{match}"
    assert set(chosen) == {"by-flops", "by-seconds", "by-tokens"}
    assert [a["id"] for tag, a in page.elements if tag == "input" and "checked" in a] == [f"by-{match}"]
    assert sum(tag == "polyline" for tag, _ in page.elements) == 6
    for finding in result["matched"]["findings"]:
        assert powers(finding)[1:] in page.text
    for row in result["matched"]["to_target"]:
        assert row["verdict"][1:] in page.text
    assert "base is not in it" in page.text


def test_points_stand_where_their_numbers_say(tmp_path: Path, curves: list[Path]) -> None:
    """Costs that grow by one factor are evenly spaced, and twice the accuracy is twice as high."""
    result = compare(curves, tmp_path / "out")
    arms = [{**arm, "index": i} for i, arm in enumerate(result["arms"])]
    panel = panels(arms, result["matched"])[0]
    base, hard, _ = panel["series"]
    assert (base["points"], base["band"]) == ([], "")
    assert np.diff([p["x"] for p in hard["points"]]) == pytest.approx(
        np.full(3, np.diff([p["x"] for p in hard["points"]])[0]), abs=0.01
    )
    accuracies = [point["accuracy"] for point in arms[1]["curve"]]
    heights = [p["y"] for p in hard["points"]]
    slope = np.diff(heights) / np.diff(accuracies)
    assert slope == pytest.approx(np.full(3, slope[0]), rel=0.01)
    assert (slope < 0).all()
    for point in hard["points"]:
        assert 0 <= point["high_y"] <= point["y"] <= point["low_y"] <= 300
        assert 0 <= point["x"] <= 100
    low, high = (next(p["x"] for p in hard["points"] if p["said"].startswith(f"hard, step {s}00")) for s in (3, 4))
    assert low <= panel["budget"]["at"] <= high + 0.01


def test_every_question_is_won_lost_or_alike(tmp_path: Path, curves: list[Path]) -> None:
    result = compare(curves, tmp_path / "out")
    members = {arm["name"]: [load_evaluation(Path(f)) for f in arm["evals"]] for arm in result["arms"]}
    for levels in ([{"name": level} for level in (1, 2, 3, 4)], []):
        wins = win_loss(result["pairs"], members, levels)
        for strip in wins["strips"]:
            width = {won: sum(b["width"] for b in strip["bars"] if b["won"] == won) for won in (True, False)}
            assert width[True] == pytest.approx(100 * strip["wins"] / 40, abs=0.1)
            assert width[False] == pytest.approx(100 * strip["losses"] / 40, abs=0.1)
            assert strip["wins"] + strip["losses"] + strip["ties"] == 40
            for key in ("wins", "losses"):
                assert sum(group[key] for group in strip["groups"]) == strip[key]
        assert sum(group["questions"] for group in wins["groups"]) == 40
        for arm, cells in zip(result["arms"], wins["matrix"], strict=True):
            ink = sum(cell["width"] * cell["score"] for cell in cells) / 100
            assert ink == pytest.approx(arm["accuracy"], abs=0.002)


def token(text: str, nats: float | None = 0.5) -> dict[str, Any]:
    return {"text": text, "nats": nats, "student": [[HOSTILE, 0.9], ["\n", 0.1]], "teacher": [['"', 1.0]]}


def looked(*texts: str) -> dict[str, Any]:
    return {"kind": "kl", "mean": 0.5, "tokens": [token(text) for text in texts]}


def test_tokens_are_coloured_and_stay_text(tmp_path: Path, arms: list[Path]) -> None:
    result = compare(arms, tmp_path / "out")
    uid = next(iter(load_evaluation(arms[0]).samples))
    everywhere = {u: looked("a", HOSTILE) for u in load_evaluation(arms[0]).samples}
    view = {
        "teacher": "some teacher",
        "reader": "hard",
        "texts": {"hard": everywhere},
        "answers": {u: {"text": "yes", "ended": True, **looked("yes")} for u in everywhere},
        "missing": {"soft": "it is gone"},
    }
    assert uid in everywhere
    path = write_report(result, tmp_path / "out", eval_dirs=arms, tokens=view, show_questions=2)
    page = Page(path.read_text(encoding="utf-8"))
    coloured = [a for tag, a in page.elements if tag == "span" and (a.get("class") or "").startswith("t h")]
    assert len(coloured) == 2 * (2 + 1)
    assert {a["class"] for a in coloured} == {"t h3"}
    assert all((a["data-s"] or "").startswith("student\n 90.0 %  <script>") for a in coloured)
    assert all((a["data-t"] or "").startswith("teacher, KL 0.50\n100.0 %") for a in coloured)
    assert page.text.count("<script>alert(1)</script>") == 2
    assert "soft has no colours: it is gone" in page.text
    assert "teacher (some teacher)" in page.text
    assert not any(tag == "script" for tag, _ in page.elements)


def test_published_rows_are_whole_and_have_their_source(tmp_path: Path, arms: list[Path]) -> None:
    for table in PUBLISHED:
        assert "arXiv" in table["source"]
        assert all(len(values) == len(table["columns"]) for _, values in table["rows"])
    page, _, _ = report(tmp_path, arms)
    assert "DeepSeek-R1-Distill-Qwen-32B: distilled 72.6" in page.text


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_browser_finds_nothing_wrong(tmp_path: Path, curves: list[Path], width: int, dark: bool) -> None:
    """Hostile answers, coloured tokens and curves: no message, no request, no script, no sideways scroll."""
    for folder in curves:
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        for row in rows:
            row["completion"] = HOSTILE + row["completion"]
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = compare(curves, tmp_path / "out")
    uids = load_evaluation(curves[0]).samples
    view = {"teacher": HOSTILE, "reader": "rl", "answers": {}, "missing": {"base": HOSTILE}}
    tokens = {**view, "texts": {"rl": {u: looked("first", HOSTILE, " last") for u in uids}}}
    path = write_report(result, tmp_path / "out", eval_dirs=curves, tokens=tokens)
    with open_page(path, width=width, height=900, dark=dark) as opened:
        page = opened.page
        shown = page.locator("#compute .panel:visible")
        assert shown.count() == 1
        before = shown.inner_html()
        press = "tap" if width < 600 else "click"
        getattr(page.locator("label[for=by-tokens]"), press)()
        assert shown.count() == 1
        assert shown.inner_html() != before
        first = page.locator(".t").first
        first.scroll_into_view_if_needed()
        getattr(first, press)()
        said = "(el) => getComputedStyle(el, '::before').content + getComputedStyle(el, '::after').content"
        page.wait_for_function(f"document.querySelector('.t') && ({said})(document.querySelector('.t')).length > 20")
        assert "student" in first.evaluate(said)
        assert "teacher, KL 0.50" in first.evaluate(said)
        assert "student" not in page.locator(".t").nth(1).evaluate(said)
        assert page.get_by_text("<script>alert(1)</script>").count() > 4
        assert page.locator("script, img").count() == 0
        opened.assert_quiet()
