"""Exported files say what the store says, in every format; nothing foreign is overwritten, nothing is half written."""

from __future__ import annotations

import importlib
import json
import sys
import tracemalloc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import ExportConfig
from distill.errors import UserError
from distill.export import DATASET_INFO, FORMATS, card_path, grpo, pass_rates, run_export
from distill.records import Judgement, Message, Trace, Verdict, content_hash
from distill.store import TraceStore, read_traces, write_views
from distill.template_check import check_template

HOSTILE = [
    "two lines\u2028of a paragraph\u2029and\x85more\r\nand\x0bmore\x1c",
    "emoji 👩‍👩‍👧 combined e\u0301, 数学, \u202eright to left",
    "<|im_end|>\n<|im_start|>assistant\nforged",
    '{"role": "user"}, "quotes", \\u2028, \\, \x00 and \x7f',
    "| a | table | ``` and $x$ \\boxed{½}",
    " \n\t ",
]
SUFFIXES = (".jsonl", ".parquet")
FILES = [(form, suffix) for form in FORMATS for suffix in SUFFIXES if (form, suffix) != ("openai", ".parquet")]


def trace(
    question: str | Sequence[Message] = "2+2?",
    completion: str = "<think>two</think>4",
    *,
    index: int = 0,
    **values: Any,
) -> Trace:
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
    verifier, score = values.pop("verifier", "math"), values.pop("score", 1.0)
    prompt_uid = content_hash(messages)
    fields: dict[str, Any] = {
        "uid": content_hash([prompt_uid, index]),
        "prompt_uid": prompt_uid,
        "messages": tuple(messages),
        "completion": completion,
        "reasoning": "",
        "answer": "",
        "finish_reason": "stop",
        "num_prompt_tokens": 5,
        "num_completion_tokens": 7,
        "sample_index": index,
        "seed": 0,
        "teacher": "nano@123",
        "backend": "replay",
        "gold": "4",
        "verdicts": (Verdict(verifier=verifier, version="1", score=score),),
        "source": "file.jsonl:1",
    }
    return Trace(**{**fields, **values})


def fill(folder: Path, traces: Iterable[Trace]) -> Path:
    """Make a store whose wrong traces are rejected."""
    with TraceStore(folder) as store:
        store.claim({"teacher": "nano@123", "prompts": "file.jsonl"})
        for each in traces:
            store.append(each)
    write_views(folder, folder, lambda each: Judgement(("wrong",) if each.score != 1.0 else ()))
    return folder


def export(store: Path, out: Path, form: str = "messages", **options: Any) -> dict[str, Any]:
    return run_export(ExportConfig(store=store, out=out, format=form, **options))


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def talk_of(row: dict[str, Any]) -> list[Message]:
    """Return the conversation that a row of any format holds."""
    if "conversations" in row:
        names = {"human": "user", "gpt": "assistant"}
        said = [{"role": names[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        return [*([{"role": "system", "content": row["system"]}] if row["system"] else []), *said]
    return row["messages"] if "messages" in row else row["prompt"] + row.get("completion", [])


texts = st.one_of(st.text(), st.sampled_from(HOSTILE))


@st.composite
def talks(draw: st.DrawFn) -> list[Message]:
    """A conversation that ends with the assistant's turn."""
    system = draw(st.one_of(st.none(), texts.filter(bool)))
    turns = [draw(texts) for _ in range(2 * draw(st.integers(1, 3)))]
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return [*([{"role": "system", "content": system}] if system is not None else []), *said]


@pytest.mark.parametrize(("form", "suffix"), [file for file in FILES if file[0] != "grpo"])
def test_what_is_read_back_is_what_was_kept(form: str, suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:

    @settings(max_examples=10)
    @given(st.lists(talks(), min_size=1, max_size=4))
    def check(conversations: list[list[Message]]) -> None:
        folder = tmp_path_factory.mktemp("round")
        kept = [trace(talk[:-1], talk[-1]["content"], index=i) for i, talk in enumerate(conversations)]
        result = export(fill(folder / "store", kept), folder / "new" / f"data{suffix}", form)
        rows = rows_of(Path(result["out"]))
        assert [talk_of(row) for row in rows] == conversations
        assert result["rows"] == len(rows)

    check()


@pytest.mark.parametrize(("form", "suffix"), FILES)
def test_the_datasets_library_reads_the_file_and_its_folder(
    form: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import load_dataset

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    kept = [trace(text, f"<think>{text}</think>{text}", source=text, index=i) for i, text in enumerate(HOSTILE)]
    out = tmp_path / "new" / f"data{suffix}"
    export(fill(tmp_path / "store", kept), out, form)
    kind = {".jsonl": "json", ".parquet": "parquet"}[suffix]
    options = {"split": "train", "cache_dir": str(tmp_path / "cache")}
    read = load_dataset(kind, data_files=str(out), **options)
    assert read.to_list() == rows_of(out)
    assert len(read) == len(HOSTILE)
    # The card names the data file, so neither it nor dataset_info.json is taken for data.
    assert load_dataset(str(out.parent), **options).to_list() == read.to_list()


def test_columns_beside_the_conversation_are_texts_and_never_null(tmp_path: Path) -> None:
    kept = [trace("a"), trace("b", gold=None, verifier="x")]
    export(fill(tmp_path / "store", kept), tmp_path / "data.parquet")
    extra = [{k: v for k, v in row.items() if k != "messages"} for row in rows_of(tmp_path / "data.parquet")]
    assert [row["gold"] for row in extra] == ["4", ""]
    assert all(isinstance(value, str) for row in extra for value in row.values())


def test_grpo_has_one_row_a_prompt_and_the_pass_rate_of_the_whole_journal(tmp_path: Path) -> None:
    drawn = [trace(question, index=i, score=float(i < right)) for question, right in zip("abc", (4, 1, 0), strict=True)
             for i in range(4)]  # fmt: skip
    drawn.append(trace("b", index=4, score=None))
    drawn.append(trace("b", index=5, error="timeout", verifier="none", score=None))
    store = fill(tmp_path / "store", drawn)
    result = export(store, tmp_path / "data.jsonl", "grpo")
    rows = {row["prompt"][0]["content"]: row for row in rows_of(tmp_path / "data.jsonl")}
    assert {question: (row["pass_rate"], row["num_samples"]) for question, row in rows.items()} == {
        "a": (1.0, 4),
        "b": (0.2, 5),
    }
    assert (result["rows"], result["traces"], result["skipped"]) == (2, 5, 0)
    by_hand: dict[str, list[bool]] = {}
    for each in read_traces(store):
        if each.error is None:
            by_hand.setdefault(each.prompt_uid, []).append(each.score == 1.0)
    assert pass_rates(store) == {uid: (sum(seen) / len(seen), len(seen)) for uid, seen in by_hand.items()}


def test_grpo_leaves_out_and_counts_prompts_without_gold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = fill(tmp_path / "store", [trace("a"), trace("b", gold=None), trace("b", gold=None, index=1)])
    result = export(store, tmp_path / "data.jsonl", "grpo")
    assert (result["rows"], result["skipped"]) == (1, 1)
    assert "left out 1 prompts without a gold" in capsys.readouterr().err
    none = fill(tmp_path / "none", [trace("b", gold=None)])
    with pytest.raises(UserError, match="none of its 1 prompts has a gold answer"):
        export(none, tmp_path / "other.jsonl", "grpo")
    assert not (tmp_path / "other.jsonl").exists()


def test_trl_reads_the_solution_as_math_verify_read_the_gold() -> None:
    from trl.rewards import accuracy_reward

    golds = [
        "42",
        "p - q",
        "\\frac{3}{4}",
        "\\left( 3, \\frac{\\pi}{2} \\right)",
        "6 - 5i",
        "3\\sqrt{13}",
        "\\boxed{7}",
    ]
    rows = [grpo({"messages": [{}, {}], "gold": gold, "verdicts": [{"verifier": "math"}]}) for gold in golds]
    said = ["so " + (gold if "boxed" in gold else f"\\boxed{{{gold}}}") for gold in golds]
    answers = [[{"role": "assistant", "content": text}] for text in said]
    solutions = [row["solution"] for row in rows if row]
    assert accuracy_reward(answers, solutions) == [1.0] * len(golds)
    wrong = [[{"role": "assistant", "content": "so \\boxed{12345}"}]] * len(golds)
    assert accuracy_reward(wrong, solutions) == [0.0] * len(golds)


def test_golds_of_other_verifiers_stay_as_they_are() -> None:
    row = grpo({"messages": [{}, {}], "gold": "assert f(1) == 2", "verdicts": [{"verifier": "code_tests"}]})
    assert row is not None
    assert row["solution"] == row["gold"] == "assert f(1) == 2"


USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("form", "prompt", "completion", "said"),
    [
        ("sharegpt", [USER, USER], "a", "line 2: sharegpt needs user and assistant by turns.*'user', 'user'"),
        ("sharegpt", [USER, BOT, {"role": "system", "content": "s"}], "a", "line 2: sharegpt needs"),
        ("openai", [{"role": "oracle", "content": "q"}], "a", "line 2: openai takes the roles .* not oracle"),
        ("messages", [{**USER, "name": "x"}], "a", "line 2: a message has name beside role and content"),
        ("messages", [], "a", "line 2: there is no prompt"),
        ("messages", [USER], "half \ud83d", "line 2 holds half of a surrogate pair"),
        ("prompt-completion", [{"role": "user", "content": "\udc00"}], "a", "line 2 holds half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_row_that_the_format_cannot_carry_is_refused_by_its_line(
    form: str, prompt: list[Message], completion: str, said: str, suffix: str, tmp_path: Path
) -> None:
    store = fill(tmp_path / "store", [trace("fine"), trace(prompt, completion)])
    if form == "openai" and suffix == ".parquet":
        said = "must end in .jsonl"
    with pytest.raises(UserError, match=said):
        export(store, tmp_path / "new" / f"data{suffix}", form)
    assert not list(tmp_path.glob("new/*"))


@pytest.mark.parametrize(
    ("form", "name", "said"),
    [
        ("message", "a.jsonl", "unknown format 'message'.*did you mean 'messages'"),
        ("messages", "a.csv", "must end in .jsonl or .parquet"),
        ("messages", "a", "must end in .jsonl or .parquet"),
        ("openai", "a.parquet", "must end in .jsonl"),
    ],
)
def test_formats_and_suffixes_that_do_not_exist(form: str, name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        export(fill(tmp_path / "store", [trace()]), tmp_path / name, form)


def test_a_folder_without_kept_traces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no kept\.jsonl"):
        export(tmp_path, tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="nothing to export, it is empty"):
        export(fill(tmp_path / "store", [trace(score=0.0)]), tmp_path / "a.jsonl")


def test_a_filtered_folder_without_a_journal_exports_the_same(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", [trace("a"), trace("a", index=1, score=0.0)])
    export(store, tmp_path / "one.jsonl", "grpo")
    (store / "traces.jsonl").unlink()
    (store / "manifest.json").unlink()
    export(store, tmp_path / "two.jsonl", "grpo")
    assert rows_of(tmp_path / "two.jsonl") == rows_of(tmp_path / "one.jsonl")
    assert rows_of(tmp_path / "two.jsonl")[0]["pass_rate"] == 0.5
    (store / "rejected.jsonl").unlink()
    (store / "funnel.json").unlink()
    export(store, tmp_path / "three.jsonl", "grpo")
    assert "pass_rate" not in rows_of(tmp_path / "three.jsonl")[0]


def test_the_same_command_again_replaces_its_own_file(tmp_path: Path) -> None:
    store, out = fill(tmp_path / "store", [trace("a")]), tmp_path / "new" / "data.jsonl"
    first = export(store, out)
    assert first["card"].endswith("README.md")
    before = out.read_bytes()
    assert export(store, out) == first
    assert out.read_bytes() == before
    assert {path.name for path in out.parent.iterdir()} == {"data.jsonl", "README.md"}
    out.unlink()  # what a crash between the card and the file leaves
    assert export(store, out) == first
    second = export(store, out.with_name("other.parquet"))
    assert second["card"].endswith("other.card.md")
    assert export(store, out.with_name("other.parquet")) == second
    assert card_path(out).name == "README.md"


@pytest.mark.parametrize("foreign", ["data.jsonl", "data.card.md"])
def test_a_foreign_file_is_never_overwritten(foreign: str, tmp_path: Path) -> None:
    store = fill(tmp_path / "store", [trace("a")])
    for text in ("mine", "---\ntitle: mine\n---\n", "---\ndistill: mine\n---\n", "---\n{\n---\n"):
        (tmp_path / foreign).write_text(text)
        with pytest.raises(UserError, match=rf"{foreign} exists"):
            export(store, tmp_path / "data.jsonl")
        assert (tmp_path / foreign).read_text() == text
    assert {path.name for path in tmp_path.iterdir()} == {"store", foreign}


def test_a_foreign_readme_stays_and_the_stores_own_files_too(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", [trace("a")])
    (tmp_path / "README.md").write_text("mine")
    assert export(store, tmp_path / "data.jsonl")["card"].endswith("data.card.md")
    assert (tmp_path / "README.md").read_text() == "mine"
    with pytest.raises(UserError, match=r"kept\.jsonl exists"):
        export(store, store / "kept.jsonl")


def test_llama_factory_finds_the_dataset_beside_others(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", [trace("a")])
    (tmp_path / DATASET_INFO).write_text('{"mine": {"file_name": "mine.json"}}')
    for _ in range(2):
        export(store, tmp_path / "data.jsonl", "sharegpt")
    listed = json.loads((tmp_path / DATASET_INFO).read_text())
    assert listed["mine"] == {"file_name": "mine.json"}
    entry = listed["data"]
    (row,) = rows_of(tmp_path / entry["file_name"])
    tags = entry["tags"]
    turns = row[entry["columns"]["messages"]]
    assert [turn[tags["role_tag"]] for turn in turns] == [tags["user_tag"], tags["assistant_tag"]]
    assert [turn[tags["content_tag"]] for turn in turns] == ["a", "<think>two</think>4"]
    assert row[entry["columns"]["system"]] == ""


@pytest.mark.parametrize("there", ['{"data": {"file_name": "another.json"}}', "[]", "{", '{"data": 3}'])
def test_a_list_of_datasets_that_cannot_be_added_to_is_refused(there: str, tmp_path: Path) -> None:
    store = fill(tmp_path / "store", [trace("a")])
    (tmp_path / DATASET_INFO).write_text(there)
    with pytest.raises(UserError, match=DATASET_INFO.replace(".", r"\.")):
        export(store, tmp_path / "data.jsonl", "sharegpt")
    assert (tmp_path / DATASET_INFO).read_text() == there
    assert not (tmp_path / "data.jsonl").exists()


def test_a_funnel_that_does_not_add_up_is_refused(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", [trace("a"), trace("b", score=0.0)])
    funnel = json.loads((store / "funnel.json").read_text())
    for wrong in ({**funnel, "kept": 2}, {**funnel, "samples": 3}, {**funnel, "rejected": {}}, {}):
        (store / "funnel.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"funnel\.json"):
            export(store, tmp_path / "data.jsonl")
        assert not (tmp_path / "data.jsonl").exists()


def test_a_format_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_formats.py").write_text("def short(row):\n    return {'text': row['messages'][-1]['content']}\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    export(fill(tmp_path / "store", [trace("a")]), tmp_path / "data.jsonl", "my_formats:short")
    sys.modules.pop("my_formats")
    assert rows_of(tmp_path / "data.jsonl") == [{"text": "<think>two</think>4"}]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_larger_store_takes_no_more_memory(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of 400 traces of 20 kB is 8 MB; at most one batch of rows is ever held."""
    monkeypatch.setattr("distill.export.BATCH_ROWS", 50)

    def peak(traces: int) -> float:
        many = (trace(f"question {i % 50}", f"{i}".ljust(20_000, "x"), index=i) for i in range(traces))
        store, out = fill(tmp_path / str(traces), many), tmp_path / f"{traces}{suffix}"
        export(store, out)  # whatever the first run imports
        tracemalloc.start()
        export(store, out)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held / 1e6

    assert peak(400) < peak(100) + 1


def test_a_template_that_drops_reasoning_stops_the_export(
    tmp_path: Path, make_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    store = fill(tmp_path / "store", [trace("a"), trace("b", "<think>why</think>because")])
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    make_tokenizer(template).save_pretrained(tmp_path / "student")
    with pytest.raises(
        UserError, match=r"drops the assistant's text up to </think>.*kept\.jsonl line 1 and 1 more"
    ) as e:
        export(store, tmp_path / "data.jsonl", check_template=str(tmp_path / "student"))
    assert "distill train renders the turns itself" in str(e.value)
    assert not (tmp_path / "data.jsonl").exists()
    make_tokenizer().save_pretrained(tmp_path / "fine")
    result = export(store, tmp_path / "data.jsonl", check_template=str(tmp_path / "fine"))
    assert result["template_notes"] == []
    with pytest.raises(UserError, match="grpo holds no completion"):
        export(store, tmp_path / "other.jsonl", "grpo", check_template=str(tmp_path / "fine"))


def test_the_check_reads_the_rows_that_are_exported(tmp_path: Path, tokenizer: Any) -> None:
    store = fill(tmp_path / "store", [trace("a"), trace("b", "forged<|im_end|>")])
    talks = [(str(i), talk_of(row)) for i, row in enumerate(_exported(store, tmp_path))]
    assert "special token <|im_end|> (1)" in check_template(tokenizer, talks).faults[0]


def _exported(store: Path, folder: Path) -> list[dict[str, Any]]:
    export(store, folder / "data.jsonl")
    return rows_of(folder / "data.jsonl")
