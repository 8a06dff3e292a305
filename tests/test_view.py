"""The trace viewer: its counts are the store's, its data cannot end early, and in a browser it filters, finds and keeps
hostile text as text."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import PATIENCE, Opened, open_page
from hypothesis import given
from hypothesis import strategies as st
from test_compare import write_evaluation

from distill.config.view import ViewConfig
from distill.errors import UserError
from distill.reasoning import split_reasoning
from distill.records import Judgement, Trace, Verdict
from distill.store import FUNNEL, JOURNAL, KEPT, REJECTED, dump_line, write_json, write_views
from distill.viewer import write_view
from distill.viewer.census import current, take_census
from distill.viewer.folder import open_folder, read_entries, verdict_of
from distill.viewer.rows import choose, embedded, halves, trace_row

ROOT = Path(__file__).resolve().parents[1]
# Not st.text: of an alphabet so large it hardly ever draws the characters that matter here.
ANY_TEXT = st.lists(st.characters() | st.sampled_from("<>&\u2028\u2029\ud83d\0"), max_size=20).map("".join)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
)
Values = dict[str, list[str]]
WORDS = re.findall(
    r"\w+", "so we add the two and check that it is even wait let me think again therefore because Müller hence"
)
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<!-- <script> never closed",
    "<img src=x onerror=alert(3)>",
    "]]></textarea></pre><svg onload=alert(4)>",
    "مرحبا بالعالم 42 \u202e gnihton \u202c",
    "line\u2028separators\u2029and\x00nul",
    "half a pair \ud83d alone",
)


def trace(number: int, completion: str, *, right: bool | None = True, samples: int = 8, **changes: Any) -> Trace:
    """Return trace `number`: sample number % samples of question number // samples."""
    question, sample = divmod(number, samples)
    parts = split_reasoning(completion, required=False)
    verdicts = () if right is None else (Verdict(verifier="math", version="1", score=float(right)),)
    made = Trace(
        uid=f"uid{number:06}",
        prompt_uid=f"question{question:05}",
        messages=({"role": "user", "content": f"Question {question}: how many pears?"},),
        completion=completion,
        reasoning=parts.reasoning,
        answer=parts.answer,
        finish_reason="stop",
        num_prompt_tokens=5,
        num_completion_tokens=len(completion.split()),
        sample_index=sample,
        seed=number,
        teacher="teacher",
        backend="replay",
        gold="42",
        predicted="42" if right else "7",
        verdicts=verdicts,
        meta={"level": question % 5},
    )
    return replace(made, **changes)


def mixed(count: int, *, length: int = 30) -> list[Trace]:
    """Return traces of all kinds in about the shares of a real store."""
    draw = random.Random(0)
    made = []
    for number in range(count):
        roll = draw.random()
        thought = " ".join(draw.choices(WORDS, k=draw.randint(5, length)))
        cut = roll < 0.1
        completion = f"<think>\n{thought} n{number}" + ("" if cut else "\n</think>\n\nThe answer is \\boxed{42}.")
        right = None if 0.1 <= roll < 0.15 else not cut and roll < 0.6
        flags = ("malformed: unclosed <think>",) if cut else ("code_block",) if roll > 0.9 else ()
        made.append(
            trace(
                number, completion, right=right, finish_reason="length" if cut else "stop", flags=flags, source="made"
            )
        )
    return made


def judge(each: Trace) -> Judgement:
    """Keep what is right, short and no loop: like `teachers.filters`, with several reasons for some."""
    found = {
        "truncated": each.finish_reason == "length",
        "malformed": any(flag.startswith("malformed") for flag in each.flags),
        "wrong": each.score == 0,
        "unverified": each.score is None,
    }
    return Judgement(reasons=tuple(name for name, true in found.items() if true), flags=each.flags)


def write_store(folder: Path, traces: Iterable[Trace], *, views: bool = True) -> Path:
    """Write a trace store; without views it is one whose run has not finished."""
    folder.mkdir(parents=True)
    (folder / JOURNAL).write_text("".join(dump_line(each.to_json()) for each in traces), encoding="utf-8")
    write_json(folder / "manifest.json", {"recipe": {"teacher": "teacher", "sampling": {"temperature": 0.6}}})
    if views:
        write_views(folder, folder, judge, {"keep": "correct", "drop": "truncated,malformed"})
    return folder


def view(folder: Path, **options: Any) -> Path:
    """Return the page of a folder."""
    return Path(write_view(ViewConfig(dir=folder, **options))["page"])


def rows_of(page: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the questions and the traces in a page's data, read by a reader of one's own."""
    html = page.read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" class="rows">(.*?)</script>', html, re.DOTALL)
    rows = [row for block in found for row in json.loads(block)]
    return [row for row in rows if "messages" in row], [row for row in rows if "messages" not in row]


def number(count: int) -> str:
    """Return a count as the page writes it."""
    return f"{count:,}".replace(",", "\u202f")


# What stands in the page


@given(ANY_JSON)
def test_no_text_can_end_the_data(value: Any) -> None:
    text = embedded(value)
    text.encode("utf-8")
    assert not set("<\u2028\u2029") & set(text)
    assert json.loads(text) == value


@given(st.lists(st.sampled_from(["<think>", "</think>", " ", "\n", "1+1", "so", "\\boxed{2}", "\u3000"]), max_size=9))
def test_a_completion_is_shown_whole_in_two_halves(pieces: list[str]) -> None:
    completion = "".join(pieces)
    parts = split_reasoning(completion, required=False)
    thought, text = halves(trace(0, completion))
    assert thought + text == completion
    assert parts.reasoning in thought
    if parts.reasoning:
        assert text.strip() == parts.answer


@given(st.lists(st.text("ab0", min_size=1, max_size=6), unique=True), st.integers(1, 20), st.randoms())
def test_a_sample_of_questions_does_not_depend_on_their_order(uids: list[str], size: int, shuffler: Any) -> None:
    drawn = choose(uids, sample=size)
    assert len(drawn) == min(size, len(uids))
    assert drawn == [uid for uid in uids if uid in set(drawn)]
    again = list(uids)
    shuffler.shuffle(again)
    assert set(choose(again, sample=size)) == set(drawn)
    assert choose(uids, limit=size) == uids[:size]


@given(
    st.lists(st.tuples(st.integers(0, 11), st.sampled_from(["right", "wrong", "none", "cut", "failed"])), min_size=1)
)
def test_the_counts_are_those_of_the_funnel(tmp_path_factory: Any, drawn: Sequence[tuple[int, str]]) -> None:
    """Whatever is in a store, and however often a sample was drawn again, page and funnel.json agree."""
    journal = []
    for place, kind in drawn:
        made = trace(place, "<think>1</think>2", right={"right": True, "none": None}.get(kind, False), samples=3)
        ended = {"cut": "length", "failed": "error"}.get(kind, "stop")
        journal.append(replace(made, finish_reason=ended, error="no answer" if kind == "failed" else None))
    folder = write_store(tmp_path_factory.mktemp("counted") / "store", journal)
    funnel = json.loads((folder / FUNNEL).read_text())
    opened = open_folder(folder)
    census = take_census(read_entries(opened), path=folder)
    assert (census.traces, census.kept, census.pending) == (funnel["samples"], funnel["kept"], 0)
    assert dict(census.rejected) == funnel["rejected"]
    shown = [trace_row(entry, question=0) for entry in current(read_entries(opened), census)]
    assert Counter(reason for row in shown for reason in row.get("reasons", ())) == funnel["reasons"]
    assert len({row["uid"] for row in shown}) == len(shown) == len({place for place, _ in drawn})
    last = {f"uid{place:06}": kind for place, kind in drawn}
    verdicts = {"right": "right", "none": "unjudged", "failed": "unjudged"}
    assert {row["uid"]: row["verdict"] for row in shown} == {u: verdicts.get(kind, "wrong") for u, kind in last.items()}


def test_a_folder_of_views_alone_shows_the_same(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", mixed(60))
    alone = tmp_path / "filtered"
    alone.mkdir()
    for name in (KEPT, REJECTED, FUNNEL):
        (alone / name).write_bytes((folder / name).read_bytes())

    def keyed(page: Path) -> list[dict[str, Any]]:
        questions, traces = rows_of(page)
        return sorted(({**row, "q": questions[row["q"]]} for row in traces), key=lambda row: row["uid"])

    assert keyed(view(folder)) == keyed(view(alone))


def test_what_came_after_the_views_is_pending(tmp_path: Path) -> None:
    """A run goes on: one sample that had failed is drawn again, two are new."""
    made = mixed(20)
    failed = replace(made[3], error="timeout", finish_reason="error", verdicts=())
    folder = write_store(tmp_path / "store", [*made[:3], failed, *made[4:18]])
    with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
        journal.writelines(dump_line(each.to_json()) for each in (made[3], *made[18:]))
    page = view(folder)
    status = {row["uid"]: row["status"] for row in rows_of(page)[1]}
    pending = {uid for uid, each in status.items() if each == "pending"}
    assert pending == {made[3].uid, made[18].uid, made[19].uid}
    assert len(status) == 20
    assert "3 traces not filtered yet" in page.read_text(encoding="utf-8")


def test_lines_that_a_run_adds_meanwhile_are_for_the_next_page(tmp_path: Path) -> None:
    made = mixed(20)
    folder = write_store(tmp_path / "store", made[:12], views=False)
    opened = open_folder(folder)
    census = take_census(read_entries(opened), path=folder)
    before = list(current(read_entries(opened), census))
    with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
        journal.writelines(dump_line(each.to_json()) for each in (made[0], *made[12:]))
        journal.write('{"uid": "torn')
    assert list(current(read_entries(opened), census)) == before
    assert [entry.trace.uid for entry in before] == [each.uid for each in made[:12]]
    assert take_census(read_entries(opened), path=folder).traces == 20


def test_a_part_of_a_store_says_so(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", mixed(80))
    questions, traces = rows_of(view(folder, limit=3))
    assert [row["uid"] for row in questions] == ["question00000", "question00001", "question00002"]
    assert Counter(row["q"] for row in traces) == {0: 8, 1: 8, 2: 8}
    page = view(folder, sample=4, out=tmp_path / "some.html")
    assert len(rows_of(page)[0]) == 4
    assert "This page has 4 of 10 questions, drawn at random" in page.read_text(encoding="utf-8")
    assert "This page has" not in view(folder, sample=10).read_text(encoding="utf-8")


def test_counts_that_disagree_are_told(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", mixed(40))
    told = "funnel.json has other counts than these files"
    assert told not in view(folder).read_text(encoding="utf-8")
    funnel = json.loads((folder / FUNNEL).read_text())
    write_json(folder / FUNNEL, {**funnel, "kept": funnel["kept"] + 1})
    assert told in view(folder).read_text(encoding="utf-8")


def test_an_evaluation_counts_as_its_scores_do(tmp_path: Path) -> None:
    right = np.random.default_rng(0).integers(0, 2, (30, 4))
    folder = write_evaluation(tmp_path / "eval", right, cut=lambda question, sample: (question + sample) % 7 == 0)
    scores = json.loads((folder / "eval.json").read_text())
    opened = open_folder(folder)
    verdicts = Counter(verdict_of(entry) for entry in read_entries(opened))
    assert verdicts["right"] / verdicts.total() == pytest.approx(scores["pass@1"])
    page = view(folder)
    headline = f"<h1>{100 * scores['pass@1']:.1f} % right on 30 questions</h1>"
    assert headline in page.read_text(encoding="utf-8")
    with open_page(page, fragment="group=1") as opened:
        counts = facet_counts(ready(opened))
        assert {value: shown for (facet, value), shown in counts.items() if facet == "verdict"} == {
            verdict: number(count) for verdict, count in verdicts.items()
        }
        assert "truncated" in opened.page.inner_text("#list .item:nth-child(2)")  # sample 0 of question 0
        opened.assert_quiet()


@pytest.mark.parametrize(
    ("break_it", "options", "said"),
    [
        (lambda store: (store / JOURNAL).unlink() or [(store / n).unlink() for n in (KEPT, REJECTED)], {}, "neither"),
        (lambda store: None, {"limit": 1, "sample": 1}, "both given"),
        (lambda store: None, {"out": Path("page.txt")}, r"must end in \.html"),
        (lambda store: (store / FUNNEL).write_text("{"), {}, "cannot read .*funnel.json"),
        (lambda store: (store / FUNNEL).write_text("[]"), {}, "must be a JSON object"),
        (lambda store: (store / JOURNAL).write_text("{}\n"), {}, "traces.jsonl line 1 is not a trace"),
        (lambda store: (store / KEPT).write_text('{"uid": "a"}\n'), {}, "kept.jsonl line 1 is not a trace"),
        (lambda store: [(store / n).write_text("") for n in (JOURNAL, KEPT, REJECTED)], {}, "holds no trace yet"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    tmp_path: Path, break_it: Callable[[Path], Any], options: dict[str, Any], said: str
) -> None:
    folder = write_store(tmp_path / "store", mixed(4))
    page = view(folder)
    before = page.read_bytes()
    break_it(folder)
    with pytest.raises(UserError, match=said):
        write_view(ViewConfig(dir=folder, **options))
    assert page.read_bytes() == before


def test_the_command(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", mixed(16))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), "view", *arguments], capture_output=True, text=True, check=False
        )

    done = run(str(folder), "--limit", "1", "--out", str(tmp_path / "new" / "page.html"), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["traces"], result["questions"], result["of_traces"]) == (8, 1, 16)
    assert Path(result["page"]).stat().st_size == result["bytes"]
    refused = run(str(tmp_path))
    assert refused.returncode == 2
    assert re.fullmatch(r"error: .* is neither a trace store nor an evaluation: .*\n", refused.stderr)


# In a browser


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Trace], Path, dict[str, Any]]:
    """Return 10 000 traces, the page that shows them, and their funnel."""
    traces = mixed(10_000)
    folder = write_store(tmp_path_factory.mktemp("large") / "store", traces)
    return traces, view(folder), json.loads((folder / FUNNEL).read_text())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Trace], Path]:
    """Return 400 traces and the page that shows them."""
    traces = mixed(400)
    return traces, view(write_store(tmp_path_factory.mktemp("small") / "store", traces))


def ready(opened: Opened) -> Any:
    """Return the page once its data is read."""
    opened.page.wait_for_selector("body[data-ready]")
    return opened.page


def expect_shown(page: Any, count: int) -> None:
    """Wait until the page says that so many traces are left."""
    from playwright.sync_api import expect

    expect(page.locator("#tally b")).to_have_text(number(count), timeout=PATIENCE)
    # While a search runs, the number is not there at all.
    expect(page.locator("#list .item, #list .empty").first).to_be_visible()


def facet_counts(page: Any) -> dict[tuple[str, str], str]:
    """Return the number beside every value that can be filtered by."""
    read = "all => all.map(each => [each.dataset.facet, each.dataset.value, each.lastChild.textContent])"
    return {(facet, value): shown for facet, value, shown in page.eval_on_selector_all("#facets [data-facet]", read)}


def values_of(each: Trace) -> Values:
    """Return what the page should be able to filter a trace by, worked out apart from it."""
    judged = judge(each)
    return {
        "verdict": ["unjudged" if each.score is None else "right" if each.score == 1 else "wrong"],
        "status": ["rejected" if judged.reasons else "kept"],
        "first": list(judged.reasons[:1]),
        "reason": list(judged.reasons),
        "finish": [each.finish_reason],
        "flag": [flag.partition(":")[0] for flag in each.flags],
        "level": [str(each.meta["level"])],
    }


def passing(values: Iterable[Values], **wanted: set[str]) -> list[Values]:
    """Return those that have one of the wanted values of each facet."""
    return [each for each in values if all(wanted[key].intersection(each[key]) for key in wanted)]


def test_filters_count_as_python_does(large: tuple[list[Trace], Path, dict[str, Any]]) -> None:
    traces, path, funnel = large
    values = [values_of(each) for each in traces]
    with open_page(path) as opened:
        page = ready(opened)
        expect_shown(page, len(traces))

        parts = page.eval_on_selector_all(
            ".legend button", "all => all.map(each => [each.dataset.value, each.querySelector('b').textContent])"
        )
        expected = {"kept": funnel["kept"], **funnel["rejected"]}
        assert dict(parts) == {name: number(count) for name, count in expected.items()}
        for name, count in expected.items():
            page.click(f".legend [data-value={name}]")
            expect_shown(page, count)
            page.click(f".legend [data-value={name}]")

        def counted(**wanted: set[str]) -> dict[tuple[str, str], int]:
            """Count each value among what passes all facets but the value's own."""
            tally: Counter[tuple[str, str]] = Counter()
            for key in ("verdict", "status", "reason", "finish", "flag", "level"):
                others = {facet: chosen for facet, chosen in wanted.items() if facet != key}
                tally.update((key, value) for each in passing(values, **others) for value in each[key])
            return tally

        wanted: dict[str, set[str]] = {}
        choices = [
            ("verdict", "wrong"),
            ("reason", "truncated"),
            ("reason", "wrong"),
            ("level", "3"),
            ("flag", "code_block"),
        ]
        for key, value in choices:
            page.click(f"#facets [data-facet={key}][data-value='{value}']")
            wanted.setdefault(key, set()).add(value)
            expect_shown(page, len(passing(values, **wanted)))
            tally = counted(**wanted)
            for name, shown in facet_counts(page).items():
                assert shown == number(tally[name]), name
        page.click("#clear")

        page.focus("#facets .least")
        for _ in range(9):
            page.keyboard.press("ArrowRight")
        assert page.evaluate("location.hash") == "#tokens=9-"
        page.click("#clear")
        page.locator("#facets .between").scroll_into_view_if_needed()
        box = page.locator("#facets .between").bounding_box()
        for start, stop in ((8, 70), (box["width"] - 8, box["width"] - 60)):  # both thumbs, each in several moves
            page.mouse.move(box["x"] + start, box["y"] + 8)
            page.mouse.down()
            page.mouse.move(box["x"] + stop, box["y"] + 8, steps=6)
            page.mouse.up()
        least, most = map(int, re.fullmatch(r"#tokens=(\d+)-(\d+)", page.evaluate("location.hash")).groups())
        assert 0 < least < most < max(each.num_completion_tokens for each in traces)
        expect_shown(page, sum(least <= each.num_completion_tokens <= most for each in traces))
        opened.assert_quiet()


def test_ten_thousand_rows_are_a_few_elements(large: tuple[list[Trace], Path, dict[str, Any]]) -> None:
    traces, path, _ = large
    with open_page(path) as opened:
        page = ready(opened)
        top = page.evaluate("document.getElementById('list').scrollHeight")
        for place in (0, 0.2, 0.5, 0.99, 1, 0.3):
            page.evaluate(
                "share => { const list = document.getElementById('list'); list.scrollTop = share * list.scrollHeight }",
                place,
            )
            page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            assert 5 < page.locator("#list .item").count() < 200
            assert page.evaluate("document.getElementById('list').scrollHeight") == top
            box = page.locator("#list").bounding_box()
            for height in (5, box["height"] / 2, box["height"] - 5):  # a row stands wherever one looks
                there = "([x, y]) => Boolean(document.elementFromPoint(x, y).closest('.item'))"
                assert page.evaluate(there, [box["x"] + 40, box["y"] + height])

        page.select_option("#sort", "longest")
        tokens = page.eval_on_selector_all("#list .item .side", "all => all.map(each => each.textContent)")
        longest = sorted((each.num_completion_tokens for each in traces), reverse=True)
        assert [int(shown.split()[0]) for shown in tokens if "token" in shown] == longest[: len(tokens) // 2]
        opened.assert_quiet()


def test_search_finds_what_python_finds(large: tuple[list[Trace], Path, dict[str, Any]]) -> None:
    traces, path, _ = large
    with open_page(path) as opened:
        page = ready(opened)
        page.keyboard.press("/")
        # The longer query narrows the shorter one; then another one, with the letters in the other case.
        for query in (
            "wait",
            "wait let",
            "WAIT LET ME",
            "n77",
            "müller hence",
            "\\boxed{42}.",
            "QUESTION 12:",
            "uid009999",
        ):
            page.fill("#search", query)
            where = (
                f"{each.messages[0]['content']}\0{each.completion}\0{each.gold}\0{each.predicted}\0{each.uid}".lower()
                for each in traces
            )
            expect_shown(page, sum(query.lower() in text for text in where))
        page.fill("#search", "")
        page.type("#search", "therefore")  # typed faster than each search ends
        expect_shown(page, sum("therefore" in each.completion for each in traces))
        assert page.input_value("#search") == "therefore"
        assert "therefore" in page.inner_text("#list .item:first-child mark")
        opened.assert_quiet()


def test_an_address_shows_the_same_again(small: tuple[list[Trace], Path]) -> None:
    traces, path = small
    chosen = [each for each in traces if each.score != 1 and each.meta["level"] == 2]
    asked = "verdict=wrong&verdict=unjudged&level=2&tokens=10-25&q=wait&sort=shortest&group=1"
    with open_page(path, fragment=asked) as opened:
        page = ready(opened)
        left = [each for each in chosen if "wait" in each.completion and 10 <= each.num_completion_tokens <= 25]
        expect_shown(page, len(left))
        assert page.is_checked("#group")
        page.keyboard.press("j")
        address = page.evaluate("location.hash")
        assert re.fullmatch(f"#{asked}" + r"&trace=uid\d{6}", address)
        page.goto("about:blank")
        page.goto(path.as_uri() + address)
        ready(opened)
        expect_shown(page, len(left))
        assert page.evaluate("location.hash") == address
        assert page.inner_text("#reader dl").split("uid\n")[1].split("\n")[0] == address[-9:]
        page.evaluate("location.hash = 'verdict=right&trace=nobody'")
        expect_shown(page, sum(each.score == 1 for each in traces))
        assert page.inner_text("#reader") == "The trace nobody is not on this page."
        opened.assert_quiet()


def test_all_samples_of_a_question_stand_together(small: tuple[list[Trace], Path]) -> None:
    traces, path = small
    right = Counter(each.prompt_uid for each in traces if each.score == 1)
    hardest = min(range(50), key=lambda question: (right[f"question{question:05}"], question))
    with open_page(path, fragment="group=1&sort=hardest") as opened:
        page = ready(opened)
        lines = page.locator("#list .item").all_inner_texts()
        assert lines[0].startswith(f"Question {hardest}: how many pears?")
        assert f"{right[f'question{hardest:05}']} of 8 right, 8 samples" in lines[0]
        assert lines[9].startswith("Question ")
        assert page.locator("#reader .samples button").count() == 8
        page.click("#reader .samples button:nth-child(4)")
        assert page.evaluate("location.hash").endswith(f"trace=uid{8 * hardest + 3:06}")
        opened.assert_quiet()


def test_keys_walk_through_the_list(small: tuple[list[Trace], Path]) -> None:
    traces, path = small
    with open_page(path) as opened:
        page = ready(opened)

        def uid() -> str:
            return re.search(r"\buid\n(uid\d+)", page.inner_text("#reader dl"))[1]  # type: ignore[index]

        assert uid() == traces[0].uid
        for key, expected in [("j", 1), ("j", 2), ("k", 1), ("k", 0), ("k", 0)]:
            page.keyboard.press(key)
            assert uid() == traces[expected].uid
        page.keyboard.press("/")
        page.keyboard.type("jk/n99")  # in the search they are letters
        expect_shown(page, 0)
        assert page.input_value("#search") == "jk/n99"
        page.keyboard.press("Escape")
        page.click("#clear")
        for _ in range(30):
            page.keyboard.press("j")
        row = page.locator("#list .item.open").bounding_box()
        frame = page.locator("#list").bounding_box()
        assert frame["y"] <= row["y"]
        assert row["y"] + row["height"] <= frame["y"] + frame["height"]
        opened.assert_quiet()


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    """In question, completion, answer, gold, flag, reason, error and names: nothing runs, and all can be read."""
    made = []
    for place, text in enumerate(HOSTILE):
        made.append(
            trace(
                place,
                f"<think>{text}</think>{text}",
                samples=1,
                messages=({"role": "system", "content": text}, {"role": "user", "content": text}),
                gold=text,
                predicted=text,
                source=text,
                flags=(text,),
                verdicts=(Verdict(verifier=text, version=text, score=0.0, reason=text),),
                meta={"level": text, text: text},
            )
        )
    folder = write_store(tmp_path / "<b onclick=alert(5)>store", made)
    write_views(folder, folder, lambda each: Judgement(reasons=each.flags, flags=each.flags))
    write_json(folder / "manifest.json", {"recipe": {"teacher": HOSTILE[1], "prompts": HOSTILE[3]}})
    with open_page(view(folder, out=tmp_path / "page.html")) as opened:
        page = ready(opened)
        for place, text in enumerate(HOSTILE):
            # Half a surrogate pair and NUL have no picture: a browser's own text shows them as U+FFFD, or drops them.
            page.evaluate("uid => { location.hash = `trace=${uid}` }", made[place].uid)
            page.locator("#reader dd", has_text=made[place].uid).first.wait_for()
            whole = page.locator("#reader").evaluate("all => all.textContent")
            assert whole.count(text) >= 8, text
            assert page.locator("#reader pre.thought").evaluate("all => all.textContent") == f"<think>{text}</think>"
        assert page.locator("#reader pre").last.evaluate("all => getComputedStyle(all).unicodeBidi") == "plaintext"
        assert page.locator("img, svg, b[onclick], textarea, script:not(:last-of-type)").count() == 0
        page.fill("#search", "<script>alert(1)")
        expect_shown(page, 1)
        opened.assert_quiet()
        # Were some text to become markup all the same, the page's policy would not let it run.
        smuggled = (
            "code => { const made = document.createElement('script'); made.text = code; document.body.append(made) }"
        )
        page.evaluate(smuggled, "window.hit = 1")
        assert page.evaluate("window.hit") is None


def test_on_a_telephone_the_reader_lies_over_the_list(small: tuple[list[Trace], Path]) -> None:
    traces, path = small
    with open_page(path, width=360, height=740, dark=True) as opened:
        page = ready(opened)
        assert not page.is_visible("#reader")
        opened.assert_quiet()
        page.locator("#list").evaluate("list => { list.scrollTop = 2000 }")
        entries = page.evaluate("history.length")
        for leave in (lambda: page.tap("#back"), lambda: page.tap("#back"), page.go_back):
            page.locator("#list .item", has_text="Question 4:").first.tap()
            assert page.is_visible("#reader pre")
            assert page.evaluate("location.hash").startswith("#trace=uid0000")
            opened.assert_quiet()
            leave()
            page.wait_for_selector("#reader", state="hidden")
            assert page.evaluate("location.hash") == ""
            assert page.locator("#list").evaluate("list => list.scrollTop") == 2000
            assert page.evaluate("history.length") == entries + 1  # "back" on the page and the browser's are one
        page.tap("#filters")
        page.tap("#facets [data-value=unjudged]")
        expect_shown(page, sum(each.score is None for each in traces))
        page.tap("#facets .done button")
        assert not page.is_visible("#facets")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
        opened.assert_quiet()
