"""The audit of two tokenizers: nothing differs from itself, what differs is found by trying, and its page is safe."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align import open_alignment
from align.audit.comparison import Audit, as_json, audit, percent, short_names
from align.audit.page import SHOWN_BYTES, parts, write_page
from align.audit.perfect_student import entropy, judge
from align.audit.sample_text import SAMPLE
from align.audit.table import advice, remarks, render, rows, visible
from align.audit.texts import read_texts
from align.audit.traits import changes, digit_policy, template_of
from align.byte_view import byte_view

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizers"
HOSTILE = (
    '</span><script>alert(1)</script><img src="http://x.invalid/a" onerror=alert(2)>"\'&{{ 7*7 }}{% raw %}'
    "\u202e\x00\x1b[31m"
)
WORDS = "the answer is one two three and four so five times six is thirty 1 12 123 1234 def f(x):\n    return x\n"
OTHERS = (
    "\\boxed{30} <think> then there are three pencils, she gives some of them away so the others are hers\n        x"
)
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def trained(size: int = 300, *, text: str = WORDS, digits: str | None = None, normaliser: Any = None) -> Any:
    """Return a byte-level BPE tokenizer trained on a text; `digits` is a regex of how numbers are cut first."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    stages: list[Any] = [pre_tokenizers.Split(Regex(digits), "isolated")] if digits else []
    core.pre_tokenizer = pre_tokenizers.Sequence([*stages, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    if normaliser is not None:
        core.normalizer = normaliser
    numbers = "\n".join(f"{number}\n{number:02d}" for number in range(100)) * 4 + " 7" * 50
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([text * 3, numbers], trainer)
    core.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>", "<|pad|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TURNS + ASK
    return tokenizer


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A student that writes digits one by one, and a teacher that puts up to three in a token; merges of two texts."""
    return trained(340, text=OTHERS, digits=r"\d"), trained(900, digits=r"\d{1,3}")


@pytest.fixture(scope="module")
def found(pair: tuple[Any, Any]) -> Audit:
    return audit(*pair, SAMPLE.items(), names=("small", "large"))


@cache
def real(name: str) -> Any:
    from distill.models import load_tokenizer

    if not (SHARED / name).is_dir():
        pytest.skip("no shared/data beside the repository")
    return load_tokenizer(str(SHARED / name))


def permuted(tokenizer: Any) -> Any:
    """Return a tokenizer with the same tokens and merges under other ids."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    size = len(vocabulary)
    state["model"]["vocab"] = {token: (index * 7 + 3) % size for token, index in vocabulary.items()}
    assert len(set(state["model"]["vocab"].values())) == size
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    made.chat_template = tokenizer.chat_template
    return made


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=4))
def test_a_tokenizer_beside_itself_differs_in_nothing(byte_pair: Any, texts: list[str]) -> None:
    result = audit(byte_pair, byte_pair, [("any", text) for text in texts])
    assert result.vocabulary == "same"
    assert result.skipped == result.many_spans == 0
    assert result.bytes == sum(len(text.encode()) for text in texts)
    assert result.spans == result.student.text_tokens == result.teacher.text_tokens
    for outcomes in result.outcomes.values():
        assert (outcomes.agreement, outcomes.moved) == (1.0, 0.0)
        assert outcomes.bits == pytest.approx(result.token_bits)
    assert bool(result.outcomes) == (result.spans > 0)
    assert result.student == result.teacher or result.student.name != result.teacher.name
    assert result.student.shared_share == result.teacher.shared_share == 1.0
    assert result.method == "identity"
    assert remarks(result) == []


@pytest.fixture(scope="module")
def byte_pair() -> Any:
    return trained(320)


def test_a_permuted_vocabulary_is_exact(pair: tuple[Any, Any]) -> None:
    result = audit(pair[1], permuted(pair[1]), SAMPLE.items())
    assert result.vocabulary == "permuted"
    assert result.many_spans == 0
    assert all((each.agreement, each.moved) == (1.0, 0.0) for each in result.outcomes.values())
    assert result.method == "shared_kl"


def test_counts_agree_with_a_count_by_hand(pair: tuple[Any, Any], found: Audit) -> None:
    own, other = ([t.encode(text, add_special_tokens=False) for text in SAMPLE.values()] for t in pair)
    assert found.student.text_tokens == sum(map(len, own))
    assert found.teacher.text_tokens == sum(map(len, other))
    assert (found.texts, found.skipped) == (len(SAMPLE), 0)
    views = [{token for token in byte_view(t).tokens if token} for t in pair]
    assert found.shared == len(views[0] & views[1])
    assert found.student.shared_share == pytest.approx(found.shared / len(views[0]))
    many = sum(max(len(span.student), len(span.teacher)) > 1 for span in found.many)
    assert many == len(found.many)
    one_to_one = found.spans - found.many_spans
    assert found.student.coverage == pytest.approx(one_to_one / found.student.text_tokens)
    assert found.teacher.coverage == pytest.approx(one_to_one / found.teacher.text_tokens)
    for span in found.many:
        assert b"".join(span.student) == b"".join(span.teacher)


def test_consistent_cells_agree_most_and_none_moves_more_than_it_disagrees(found: Audit) -> None:
    assert set(found.outcomes) == {"shared_kl", "bpm", "cspc"}
    for outcomes in found.outcomes.values():
        assert 0 <= outcomes.moved <= 1 - outcomes.agreement + 1e-12
        assert 0 <= outcomes.bits <= found.token_bits + 1e-9
    assert max(found.outcomes, key=lambda name: found.outcomes[name].agreement) == "cspc"


def test_what_is_recommended_is_what_a_run_takes(pair: tuple[Any, Any], found: Audit) -> None:
    assert found.method == open_alignment("auto", *pair)[0]
    assert found.drawn_method == "alm"
    assert f"--align {found.method} (--align alm where" in advice(found)


CELLS = st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 4)), min_size=1, max_size=30)


@given(CELLS)
def test_what_a_perfect_student_would_be_told(cells: list[tuple[int, int]]) -> None:
    own, other = np.array(cells).T
    outcomes = judge(own, other)
    assert outcomes.agreement == pytest.approx(sum(a == b >= 0 for a, b in cells) / len(cells))
    names = range(-1, 5)
    moved = sum(abs((own == name).mean() - (other == name).mean()) for name in names) / 2
    assert outcomes.moved == pytest.approx(moved)


def test_entropy_of_a_fair_coin_and_of_nothing() -> None:
    assert entropy(np.array([0, 1, 1, 0])) == pytest.approx(1.0)
    assert entropy(np.array([5, 5])) == entropy(np.array([])) == 0.0


@pytest.mark.parametrize(
    ("digits", "said"),
    [
        (r"\d", "1"),
        (r"\d{1,2}(?=(\d{2})*(?!\d))", "up to 2, counted from the right"),
        (r"\d{1,2}", "up to 2, counted from the left"),
        (None, "any number"),
    ],
)
def test_how_numbers_are_cut_is_found_by_trying(digits: str | None, said: str) -> None:
    tokenizer = trained(800, digits=digits)
    policy = digit_policy(tokenizer, byte_view(tokenizer))
    assert str(policy).startswith(said)
    assert policy.fixed == (digits is not None)
    assert policy.after_space == (digits is None)


@pytest.mark.parametrize(
    ("name", "most", "fixed", "after_space"),
    [
        ("qwen2.5", 1, True, False),
        ("smollm2", 1, True, False),
        ("llama-2", 1, True, False),
        ("llama-3.2", 3, True, False),
        ("deepseek-v3", 3, True, False),
        ("gpt2", None, False, True),
    ],
)
def test_digits_of_real_tokenizers(name: str, most: int | None, fixed: bool, after_space: bool) -> None:
    tokenizer = real(name)
    policy = digit_policy(tokenizer, byte_view(tokenizer))
    assert (policy.fixed, policy.after_space) == (fixed, after_space)
    assert policy.most == most if most else policy.most > 3


def test_real_pair_has_the_measured_numbers() -> None:
    """Measured independently, in plain Python, before any of this was written."""
    student, teacher = real("smollm2"), real("qwen2.5")
    result = audit(student, teacher, SAMPLE.items(), names=("smollm2", "qwen2.5"))
    assert result.shared == 39_234
    assert result.student.shared_share == pytest.approx(0.798, abs=5e-4)
    assert result.teacher.shared_share == pytest.approx(0.259, abs=5e-4)
    assert len(result.student.missing_bytes) == 21
    assert result.outcomes["cspc"].agreement > result.outcomes["bpm"].agreement > result.outcomes["shared_kl"].agreement
    assert "You are Qwen" in " ".join(remarks(result))
    assert result.teacher.changes == changes(teacher, byte_view(teacher))
    assert len(result.teacher.changes) == 1


def test_a_text_that_a_side_changes_is_left_out_and_said(pair: tuple[Any, Any]) -> None:
    from tokenizers import normalizers

    composing = trained(300, normaliser=normalizers.NFC())
    texts = [("a", "plain"), ("b", "cafe\u0301"), ("c", "half \ud800")]
    result = audit(pair[0], composing, texts)
    assert (result.texts, result.skipped) == (1, 2)
    assert "text 2: the teacher's tokenizer" in result.reasons[0]
    assert "text 3: the student's tokenizer" in result.reasons[1]
    said = " ".join(remarks(result))
    assert "2 of 3 texts are left out" in said
    assert "two code points" in said


def test_without_a_text_that_both_read_only_hard_labels_are_left(pair: tuple[Any, Any]) -> None:
    result = audit(*pair, [("a", "half \ud800")])
    assert (result.spans, result.outcomes) == (0, {})
    assert result.method == "hard-labels"
    assert "–" in {own for _, own, _ in rows(result)}


TEMPLATES = {
    "plain": (TURNS + ASK, {}),
    "default system": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + TURNS + ASK,
        {"default_system": "Be kind."},
    ),
    "header and date": (
        "<|im_start|>system\nCutting date {{ strftime_now('%Y') }}<|im_end|>\n" + TURNS + ASK,
        {"dated": True},
    ),
    "prefill": (
        TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        {"prefill": "<think>\n"},
    ),
    "no system": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TURNS + ASK,
        {"takes_system": False},
    ),
    "drops reasoning": (
        TURNS.replace("m.content", "m.content.split('</think>')[-1]") + ASK,
        {"drops_reasoning": True},
    ),
    "other end": (TURNS.replace("<|im_end|>\n", "<|im_end|>"), {"end": "<|im_end|>"}),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_writes(name: str, byte_pair: Any, make_tokenizer: Callable[..., Any]) -> None:
    text, wanted = TEMPLATES[name]
    template = template_of(make_tokenizer(text))
    assert template is not None
    plain = {
        "default_system": "",
        "dated": False,
        "takes_system": True,
        "opens": "<|im_start|>",
        "prefill": "",
        "end": "<|im_end|>",
        "drops_reasoning": False,
    }
    assert {field: getattr(template, field) for field in plain} == plain | wanted
    assert template.header.startswith("Cutting date 2") == (name == "header and date")


def test_differences_of_templates_are_said(make_tokenizer: Callable[..., Any]) -> None:
    for name, (text, wanted) in TEMPLATES.items():
        result = audit(make_tokenizer(TURNS + ASK), make_tokenizer(text), [("a", "b")])
        assert bool(remarks(result)) == bool(set(wanted) - {"end"}), name
    result = audit(make_tokenizer(None), make_tokenizer(TURNS), [("a", "b")])
    assert "student has no chat template" in " ".join(remarks(result))


def test_json_holds_every_number_and_is_json(found: Audit) -> None:
    plain = as_json(found)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert set(plain) == set(Audit.__dataclass_fields__)
    assert plain["method"] == "cspc"
    assert plain["student"]["digits"] == {"most": 1, "fixed": True, "first_short": None, "after_space": False}
    assert plain["many"][0].keys() == {"student", "teacher", "count"}
    assert set(plain["outcomes"]["bpm"]) == {"agreement", "moved", "bits"}


def terminal(found: Audit, width: int = 80) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=StringIO())
    console.print(render(found))
    return console.export_text()


def test_the_table_fits_a_terminal_and_says_what_the_rows_say(found: Audit) -> None:
    text = terminal(found)
    assert max(map(len, text.splitlines())) <= 80
    joined = " ".join(text.split())
    assert "recommended: --align cspc" in joined
    for what, _, _ in rows(found):
        assert what in joined
    for outcomes in found.outcomes.values():
        assert percent(outcomes.agreement) in joined


def test_names_and_templates_cannot_write_to_the_terminal(make_tokenizer: Callable[..., Any]) -> None:
    system = "{{ '<|im_start|>system\nred \x1b[31m [bold]<|im_end|>\n' }}" + TURNS + ASK
    result = audit(make_tokenizer(system), make_tokenizer(system), [("a", HOSTILE)], names=("a\x1b[2J", "[red]b"))
    text = terminal(result, 200)
    assert "\x1b" not in text
    assert "a\\x1b[2J" in text
    assert "[red]b" in text


@given(st.binary(max_size=12) | st.text(max_size=12))
def test_what_is_shown_can_be_seen(text: str | bytes) -> None:
    assert visible(text).isprintable()


@given(st.text(max_size=8))
def test_parts_keep_printable_text(text: str) -> None:
    shown = "".join(part for _, part in parts(text.encode("utf-8", "replace")))
    assert shown.isprintable()
    if text.isprintable() and " " not in text:
        assert shown == text


def test_half_characters_are_their_hex_digits() -> None:
    assert parts("é a\n".encode()[1:]) == [("hex", "A9"), ("mark", "·"), ("", "a"), ("mark", "⏎")]
    assert parts("\u200d".encode()) == [("hex", "U+200D")]


@given(st.floats(0, 1))
def test_only_everything_is_a_hundred_percent(share: float) -> None:
    assert (percent(share) == "100 %") == (share == 1)
    assert abs(float(percent(share)[:-2]) - 100 * share) <= 0.0101


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: dict[str, list[str]] = {"student": [], "teacher": []}
        self.side, self.open = "", list[str]()
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.elements.append((tag, given))
        classes = (given.get("class") or "").split()
        if "row" in classes:
            self.side = classes[1]
        elif "tok" in classes:
            self.tokens[self.side].append("")
            self.open.append("tok")

    def handle_data(self, data: str) -> None:
        if self.open:
            self.tokens[self.side][-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "span" and self.open:
            self.open.pop()


def page_of(pair: tuple[Any, Any], texts: list[tuple[str, str]], folder: Path, **names: Any) -> Page:
    result = audit(*pair, texts, **names)
    return Page(write_page(result, *pair, texts, folder / "page.html").read_text(encoding="utf-8"))


def drawn(pieces: Iterator[bytes]) -> list[str]:
    return ["".join(text for _, text in parts(piece)) for piece in pieces]


@pytest.mark.parametrize("text", [HOSTILE, *SAMPLE.values()], ids=["hostile", *SAMPLE])
def test_the_page_draws_every_token_of_both_sides_as_text(pair: tuple[Any, Any], text: str, tmp_path: Path) -> None:
    page = page_of(pair, [(HOSTILE, text)], tmp_path, names=(HOSTILE, HOSTILE))
    for side, tokenizer in zip(("student", "teacher"), pair, strict=True):
        view = byte_view(tokenizer)
        wanted = view.of(tokenizer.encode(text, add_special_tokens=False))
        assert page.tokens[side] == drawn(iter(wanted))
    kinds = {tag for tag, _ in page.elements}
    assert not kinds & {"script", "img", "link", "iframe", "object", "form", "svg"}
    assert all(not name.startswith("on") for _, given in page.elements for name in given)
    assert all("href" not in given and "src" not in given for _, given in page.elements)


def test_the_page_loads_nothing(found: Audit, pair: tuple[Any, Any], tmp_path: Path) -> None:
    html = write_page(found, *pair, SAMPLE.items(), tmp_path).read_text(encoding="utf-8")
    assert (tmp_path / "align.html").is_file()
    assert "default-src 'none'" in html
    assert not re.search(r"https?:|url\(|@import|<script", html)
    assert "prefers-color-scheme: dark" in html
    for what, own, other in rows(found):
        assert what in html
        for value in (own, other):
            assert value.replace("<", "&lt;").replace(">", "&gt;").replace(" %", "\u00a0%") in html


def test_a_long_text_is_drawn_in_part_and_the_page_says_so(pair: tuple[Any, Any], tmp_path: Path) -> None:
    texts = [("long", "one two three " * 2000), ("more", "four five " * 100)]
    texts = [("left out", "half \ud800"), *texts]
    result = audit(*pair, texts)
    html = write_page(result, *pair, texts, tmp_path / "p.html").read_text(encoding="utf-8")
    assert "left out</h3>" not in html
    shown = "".join(Page(html).tokens["student"])
    assert SHOWN_BYTES <= len(shown) < SHOWN_BYTES + 20
    assert f"{result.bytes - len(shown):,} more bytes" in html


def test_short_names_stay_apart() -> None:
    assert short_names("models/a", "org/b/") == ("a", "b")
    assert short_names("x/tok", "y/tok") == ("x/tok", "y/tok")


def test_texts_of_every_kind_of_row(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    rows_ = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "said"}]},
        {"prompt": "q", "completion": "done"},
        {"prompt": [], "completion": [{"role": "assistant", "content": "turn"}]},
        {"question": "q", "answer": "42"},
        {"text": "plain"},
        {"text": ""},
    ]
    found = read_texts(write_jsonl("rows.jsonl", rows_))
    assert [text for _, text in found] == ["said", "done", "turn", "42", "plain"]
    plain = tmp_path / "a.txt"
    plain.write_bytes(b"one\r\n\n\ntwo\n\n  three")
    texts = [text for _, text in read_texts(plain)]
    assert "".join(texts) == "one\r\n\n\ntwo\n\n  three"
    assert len(texts) == 2
    assert read_texts(None) == list(SAMPLE.items())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, pair: tuple[Any, Any]) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in zip(("small", "large"), pair, strict=True):
        tokenizer.save_pretrained(root / name)
    return str(root / "small"), str(root / "large")


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    from cli import app

    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        app(["align", *arguments])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_the_command_prints_one_json_object(folders: Any, found: Audit, capsys: Any, tmp_path: Path) -> None:
    code, out, _ = run([*folders, "--json", "--page", str(tmp_path / "p.html")], capsys)
    assert code == 0
    assert json.loads(out) == json.loads(json.dumps(as_json(found)))
    assert (tmp_path / "p.html").is_file()


def test_the_command_prints_the_table(folders: Any, capsys: Any) -> None:
    code, out, _ = run([*folders], capsys)
    assert code == 0
    assert "small (student) learns from large (teacher)" in out
    assert "recommended: --align cspc" in out


BAD_ROWS = {
    "no such folder": (["{a}x", "{b}"], "no model at"),
    "one tokenizer": (["{a}"], "TOKENIZER_B is required"),
    "no such text": (["{a}", "{b}", "--text", "{t}/none.txt"], "cannot read"),
    "empty text": (["{a}", "{b}", "--text", "{t}/empty.txt"], "there is no text in"),
    "not UTF-8": (["{a}", "{b}", "--text", "{t}/bad.txt"], "is not UTF-8 text (byte 1)"),
    "a row without text": (["{a}", "{b}", "--text", "{t}/rows.jsonl"], "line 2 has none of messages"),
    "a row of numbers": (["{a}", "{b}", "--text", "{t}/numbers.jsonl"], "line 1: 'answer' holds no text"),
    "not JSON": (["{a}", "{b}", "--text", "{t}/broken.jsonl"], "line 1 is not JSON"),
    "an unwritable page": (["{a}", "{b}", "--page", "{t}/empty.txt/p.html"], "--page: cannot write"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_input_is_one_line(name: str, folders: Any, capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    (tmp_path / "rows.jsonl").write_text('{"answer": "1"}\n{"question": "2"}\n')
    (tmp_path / "numbers.jsonl").write_text('{"answer": 1}\n')
    (tmp_path / "broken.jsonl").write_text("{\n")
    given, said = BAD_ROWS[name]
    arguments = [part.format(a=folders[0], b=folders[1], t=tmp_path) for part in given]
    code, out, err = run(arguments, capsys)
    assert (code, out) == (2, "")
    assert err.count("error: ") == 1
    assert err.startswith("error: ")
    assert said in err
