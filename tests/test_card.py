"""The card: true to the store, readable by the hub, and no text written by others has an effect in it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_export import HOSTILE, export, fill, trace

from distill.card import CONTAMINATION, SHOWN_HITS, card_of, fenced, inert
from distill.config import ExportConfig, build
from distill.errors import UserError
from distill.store import read_manifest, write_json

EVIL = [
    *HOSTILE,
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "a `b` ``c`` | `d` \\| e \\\\| <b>f</b>",
    "](http://x.invalid) ![](http://x.invalid/a.png) [a]: http://x.invalid @someone #1 www.x.invalid",
    "\n\n# heading\n\n---\n\n```\nfence\n```\n",
    "{{ 7*7 }} {% raw %} {# #}",
    "half \ud800 pair",
    "--> ]]> &lt; &#60;",
]


class Html(HTMLParser):
    """The elements and the text of a page, white space of any kind as one blank."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[str] = []
        self.attributes: list[str] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [f"{name}={value}" for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.pieces).split())


def html(markdown: str) -> Html:
    from markdown_it import MarkdownIt

    return Html(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))


def shown(text: str) -> str:
    """What a reader must see of a text: white space as blanks, the invisible escaped, the long cut."""
    text = " ".join(text.split())
    text = text if len(text) <= 300 else text[:300] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) or "(empty)"


texts = st.one_of(st.text(st.sampled_from("`|<>&*_[]()#\\~$:/!- \nab\u2028\ud800")), st.text(), st.sampled_from(EVIL))


@given(texts)
def test_a_text_is_seen_as_it_is_and_does_nothing(text: str) -> None:
    page = html(f"before {inert(text)} after\n\n| a | b |\n|---|---|\n| {inert(text)} | {inert(text)} |\n| c | d |\n")
    assert page.text == " ".join(f"before {shown(text)} after a b {shown(text)} {shown(text)} c d".split())
    assert set(page.elements) <= {"p", "code", "table", "thead", "tbody", "tr", "th", "td"}
    assert page.elements.count("td") == 4
    assert not page.attributes


@given(texts)
def test_a_code_block_ends_where_it_should(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    page = html(f"{fenced(text, 'bash')}\n\nafter")
    assert page.elements == ["pre", "code", "p"]
    assert page.text.endswith("after")


def card(folder: Path, kept: list[Any], form: str = "messages", **options: Any) -> str:
    store = folder / "store" if (folder / "store").exists() else fill(folder / "store", kept)
    return Path(export(store, folder / "new" / "data.jsonl", form, **options)["card"]).read_text(encoding="utf-8")


def tables(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the tables under a heading, without Markdown."""
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|") and not line.startswith("|-")]
    rows = [[html(cell).text for cell in line.strip("| ").split(" | ")] for line in lines]
    return [row for row in rows if len(row) > 1]


def test_hostile_names_everywhere_leave_the_card_whole(tmp_path: Path) -> None:
    kept = [
        trace(f"{text}", "a", teacher=text, backend=text, verifier=text.encode("utf-8", "replace").decode(), index=i)
        for i, text in enumerate(EVIL)
        if "\ud800" not in text
    ]
    store = fill(tmp_path / "store", kept)
    manifest = read_manifest(store)
    manifest["teacher_model"] = EVIL[7]
    manifest["recipe"].update({f"key {i} {text}": text for i, text in enumerate(EVIL)}, sampling={EVIL[6]: EVIL[9]})
    manifest["runs"] = [{"versions": {text: text for text in EVIL}, "verifier": EVIL[9]}]
    write_json(store / "manifest.json", manifest)
    funnel = json.loads((store / "funnel.json").read_text())
    funnel |= {"rejected": dict.fromkeys(EVIL, 1), "samples": funnel["kept"] + len(EVIL), EVIL[8]: {"why": EVIL}}
    (store / "funnel.json").write_text(json.dumps(funnel))
    names = ("source", "prompt_uid", "file", "item", "kind", "level", "text")
    (store / CONTAMINATION).write_text(json.dumps([dict.fromkeys(names, text) for text in EVIL]))
    text = card(tmp_path, [], licence=EVIL[9])
    page = html(text.partition("\n---\n")[2])
    assert not {"script", "img", "a", "b", "em", "strong", "s"} & set(page.elements)
    assert set(page.attributes) <= {"class=language-python", "class=language-yaml", "class=language-json",
                                    "class=language-bash", "style=text-align:right"}  # fmt: skip
    assert page.elements.count("h1") == 1
    assert page.elements.count("h2") == 8
    assert page.text.count("{{ 7*7 }} {% raw %} {# #}") > 5
    assert front_matter(text)["license"] == EVIL[9]


def front_matter(text: str) -> dict[str, Any]:
    """Read the card as the hub's own client does."""
    from huggingface_hub import DatasetCard

    return DatasetCard(text).data.to_dict()


def test_the_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    front = front_matter(card(tmp_path, [trace("a"), trace("b")], licence="mit"))
    assert front["license"] == "mit"
    assert front["task_categories"] == ["text-generation"]
    assert front["size_categories"] == ["n<1K"]
    assert front["configs"] == [{"config_name": "default", "data_files": "data.jsonl"}]
    assert card_of(tmp_path / "new" / "README.md") == "data.jsonl"


@given(st.binary(max_size=60))
def test_no_other_file_is_taken_for_a_card(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "not-a-card.md"
    for before in (b"", b"---\n", b"---\ndistill:"):
        path.write_bytes(before + content)
        assert card_of(path) is None
    assert card_of(path.with_name("nowhere.md")) is None


def test_the_counts_add_up(tmp_path: Path) -> None:
    drawn = [trace(question, index=i, score=float(i > 1), num_completion_tokens=10 * i + 3)
             for question in "abc" for i in range(5)]  # fmt: skip
    text = card(tmp_path, drawn)
    funnel = {row[0]: row[1] for row in tables(text, "What was kept") if row[0] != "traces"}
    assert funnel == {"written": "15", "rejected: wrong": "6", "kept": "9"}
    tokens = tables(text, "Tokens")
    assert tokens[0] == ["least", "5 %", "25 %", "median", "75 %", "95 %", "most"]
    assert (tokens[1][0], tokens[1][3], tokens[1][6]) == ("23", "33", "43")
    bins = [row for row in tokens if " to " in row[0]]
    assert sum(int(row[1]) for row in bins) == 9
    for low, high in (row[0].split(" to ") for row in bins):
        assert int(low) <= int(high)
    counted = {row[0]: int(row[1]) for row in bins}
    assert [count for name, count in counted.items() if int(name.split(" to ")[0]) in (22, 23)] == [3]


def test_what_the_store_does_not_know_is_called_unknown(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", [trace("a", teacher="")])
    for name in ("manifest.json", "funnel.json"):
        (store / name).unlink()
    text = card(tmp_path, [])
    origin = {row[0]: row[1] for row in tables(text, "Where it comes from")}
    assert origin["teacher"] == "unknown (1 traces)"
    assert origin["teacher, as it was named"] == origin["prompts and sampling"] == "unknown"
    assert "Unknown: the folder has no `funnel.json`" in text
    assert "Not checked: no evaluation file was given" in text
    licences = {row[0]: row[1] for row in tables(text, "Licences")}
    assert licences["this data"] == "unknown"
    assert all(value.startswith("unknown") for value in licences.values())
    assert text.split("## Cost")[1].strip().startswith("Unknown.")
    assert front_matter(text)["license"] == "unknown"


def test_the_contamination_report_is_summed_up(tmp_path: Path) -> None:
    kept = [trace("a"), trace("b")]
    store = fill(tmp_path / "store", kept)
    (store / CONTAMINATION).write_text("[]")
    assert "Checked; no overlap" in card(tmp_path, [])
    hit = {
        "source": "p.jsonl:1",
        "file": "aime.jsonl",
        "item": "3",
        "kind": "ngram",
        "level": "flag",
        "text": "one two",
    }
    uids = [kept[0].prompt_uid, "dropped", *(["dropped"] * SHOWN_HITS)]
    hits = [{**hit, "prompt_uid": uid, "level": "flag" if i else "drop"} for i, uid in enumerate(uids)]
    (store / CONTAMINATION).write_text(json.dumps(hits))
    text = card(tmp_path, [])
    assert "12 overlaps with evaluation files were found among all prompts; 1 of the exported prompts have one" in text
    cells = tables(text, "Contamination")
    assert ["aime.jsonl", "flag", "ngram", "11"] in cells
    assert ["aime.jsonl", "drop", "ngram", "1"] in cells
    assert cells.count(["p.jsonl:1", "3", "one two"]) == SHOWN_HITS
    assert "2 more are in the store" in text
    (store / CONTAMINATION).write_text("{}")
    with pytest.raises(UserError, match="must hold a JSON list"):
        card(tmp_path, [])


def test_the_cost_counts_rejected_traces_too(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", [trace("a"), trace("b"), trace("c", score=0.0)])
    ledger = {"flops": None, "seconds": 7300.0, "tokens": 5000}
    write_json(store / "manifest.json", {**read_manifest(store), "ledger": ledger})
    cost = {row[0]: row[1] for row in tables(card(tmp_path, []), "Cost")}
    assert cost["FLOPs"] == "–"
    assert cost["time"] == "2 h 1 min"
    assert cost["tokens written for each kept trace"].split() == ["2", "500"]


def test_the_commands_are_the_stores_own(tmp_path: Path) -> None:
    from distill.config import GenerateConfig

    store = fill(tmp_path / "store", [trace("a", index=0), trace("a", index=3, score=0.0)])
    recipe = {
        "prompts": "my prompts.jsonl",
        "teacher": "x@1",
        "seed": 5,
        "system_prompt": "it's `x`",
        "reasoning": "think",
    }
    recipe["sampling"] = {"temperature": 0.7, "top_p": 1.0, "max_completion_length": None, "loop_stop": [64, 8]}
    manifest = {"recipe": recipe, "teacher_model": "./models/x", "runs": [{"verifier": "math"}]}
    write_json(store / "manifest.json", manifest)
    text = card(tmp_path, [], "prompt-completion", licence="mit")
    block = re.search(r"^(`{3,})bash\n(.*?)\n\1$", text, re.DOTALL | re.MULTILINE)
    assert block
    generate, again = (shlex.split(line) for line in block[2].splitlines())
    assert generate[:2] == ["distill", "generate"]
    flags = dict(zip(generate[2::2], generate[3::2], strict=True))
    settings = build(GenerateConfig, None, {flag.strip("-").replace("-", "_"): flags[flag] for flag in flags})
    assert settings.n == 4
    assert settings.teacher == "./models/x"
    assert {**settings.sampling(), "seed": settings.seed} == {**recipe["sampling"], "seed": 5}
    assert (settings.prompts, settings.system_prompt) == ("my prompts.jsonl", "it's `x`")
    assert again[:3] == ["distill", "export", str(store)]
    flags = dict(zip(again[3::2], again[4::2], strict=True))
    names = {flag[2:]: value for flag, value in flags.items()}
    assert build(ExportConfig, None, {"store": store, **names}) == ExportConfig(
        store=store, out=tmp_path / "new" / "data.jsonl", format="prompt-completion", licence="mit"
    )


def snippet(text: str, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


@pytest.fixture
def student(tmp_path: Path, make_tokenizer: Callable[..., Any], make_model: Callable[..., Any]) -> Path:
    folder = tmp_path / "student"
    make_tokenizer().save_pretrained(folder)
    make_model().save_pretrained(folder)
    return folder


def run_snippet(
    code: str, folder: Path, student: Path, monkeypatch: pytest.MonkeyPatch, further: str
) -> dict[str, Any]:
    """Run a card's own Python in the folder of the file, on the tiny student, for one step."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    code = code.replace('"STUDENT"', repr(str(student))).replace(
        "Config(", f"Config(max_steps=1, report_to=[], {further}, "
    )
    lines = code.splitlines()
    assert lines[-1].endswith(".train()")
    lines[-1] = f"trainer = {lines[-1].removesuffix('.train()')}\ntrainer.train()"
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    return names


@pytest.mark.parametrize("form", ["messages", "prompt-completion"])
def test_trl_trains_on_the_file_as_the_card_says(
    form: str, tmp_path: Path, student: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [trace(f"{i}+1?", f"<think>\ncount {i}\n</think>\n\n{i + 1}") for i in range(4)]
    text = card(tmp_path, kept, form)
    names = run_snippet(snippet(text, "python"), tmp_path / "new", student, monkeypatch, "use_cpu=True, bf16=False")
    prepared = names["trainer"].train_dataset
    for row, each in zip(prepared, kept, strict=True):
        trained = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert trained.endswith(each.completion + "<|im_end|>\n")
        assert trained.startswith(each.completion) == (form == "prompt-completion")
    assert names["trainer"].state.global_step == 1


def test_trl_grpo_rewards_from_the_file_as_the_card_says(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = card(tmp_path, [trace("2+2?"), trace("3+3?", gold="\\frac{12}{2}")], "grpo")
    code = snippet(text, "python").replace("16384", "8")
    further = "use_cpu=True, bf16=False, num_generations=2, per_device_train_batch_size=2"
    names = run_snippet(code, tmp_path / "new", student, monkeypatch, further)
    log = names["trainer"].state.log_history[0]
    assert log["rewards/accuracy_reward/mean"] == 0.0  # read, and random text is wrong; an unread gold gives no number


def test_an_axolotl_and_a_llama_factory_entry_parse(tmp_path: Path) -> None:
    import yaml

    text = card(tmp_path, [trace("a")], "messages")
    (entry,) = yaml.safe_load(snippet(text, "yaml"))["datasets"]
    assert (entry["path"], entry["field_messages"]) == ("data.jsonl", "messages")
    listed = json.loads(f"{{{snippet(text, 'json')}}}")
    assert listed["data"]["file_name"] == "data.jsonl"
    row = json.loads((tmp_path / "new" / "data.jsonl").read_text())
    tags = listed["data"]["tags"]
    said = [turn[tags["role_tag"]] for turn in row[listed["data"]["columns"]["messages"]]]
    assert said == [tags["user_tag"], tags["assistant_tag"]]
