"""Chat templates that lose what a file is exported for are found, and those that do not are let through."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from distill.records import Message
from distill.template_check import PER_KIND, SYNTHETIC, check_template, require_template, stop_token_ids

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizers"
ASK: Message = {"role": "user", "content": "2+2?"}


def talk(answer: str, *before: Message) -> list[Message]:
    return [*before, ASK, {"role": "assistant", "content": answer}]


THOUGHT = talk("<think>\ntwo and two\n</think>\n\n\\boxed{4}")
ANSWER = talk("\\boxed{4}")
PAST = talk(
    "<think>\nas before\n</think>\n\nfour", ASK, {"role": "assistant", "content": "<think>\nlong ago\n</think>\n3"}
)
ROWS = [("thought", THOUGHT), ("answer", ANSWER), ("past", PAST)]

USERS = (
    "{% for m in messages %}{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% else %}"
)
END = "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
TURN = "<|im_start|>assistant\n"
CHATML = USERS + TURN + "{{ m.content }}<|im_end|>\n" + END + "{% endif %}"
R1 = USERS + TURN + "{{ m.content.split('</think>')[-1] }}<|im_end|>" + END + "<think>\n{% endif %}"
# The reasoning of the last turn is kept and laid out anew, that of earlier turns is dropped.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    + USERS
    + "{% set parts = m.content.split('</think>') %}"
    + "{% set why = parts[0].split('<think>')[-1] if parts|length > 1 else '' %}"
    + TURN
    + "{% if loop.index0 > ns.last %}<think>\n{{ why.strip('\n') }}\n</think>\n\n{% endif %}"
    + "{{ parts[-1].lstrip('\n') }}<|im_end|>\n"
    + END
    + "{% endif %}"
)
TRIMMED = USERS + TURN + "{{ m.content | trim }}<|im_end|>" + END + "{% endif %}"  # as Llama 3 does
MARKED = USERS + TURN + "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n" + END + "{% endif %}"
UNMARKED_END = USERS + TURN + "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n" + END + "{% endif %}"
MARKED_ANSWER = (
    USERS + TURN + "{{ m.content.split('</think>')[0] }}</think>{% generation %}{{ m.content.split('</think>')[-1] }}"
    "<|im_end|>{% endgeneration %}" + END + "{% endif %}"
)
OTHER_END = USERS + TURN + "{{ m.content }}<|endoftext|>\n" + END + "{% endif %}"
NO_END = USERS + TURN + "{{ m.content }}\n" + END + "{% endif %}"
UNTAGGED = (
    USERS + TURN + "{{ m.content.replace('<think>', '').replace('</think>', '') }}<|im_end|>" + END + "{% endif %}"
)
REWORDED = USERS + TURN + "{{ m.content | replace('boxed', 'bold') }}<|im_end|>" + END + "{% endif %}"
SILENT = "{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "notes"),
    [
        (CHATML, []),
        (TRIMMED, []),
        (MARKED, []),
        (QWEN3, ["empty reasoning block", "drops the reasoning of earlier turns (past)"]),
    ],
    ids=["chatml", "llama3", "marked", "qwen3"],
)
def test_templates_that_keep_everything_pass(make_tokenizer: Any, template: str, notes: list[str]) -> None:
    report = check_template(make_tokenizer(template), ROWS)
    assert report.faults == ()
    assert report.ok
    assert report.trained_here
    assert report.trained_elsewhere
    assert (report.rows, report.rendered, report.dropped) == (3, 3, ())
    assert len(report.ways) == 1 + (template is MARKED)
    assert len(report.notes) == len(notes)
    assert all(note in said for note, said in zip(notes, report.notes, strict=True))


@pytest.mark.parametrize(
    ("template", "dropped", "said"),
    [
        (R1, ("reasoning",), "up to </think>, and opens a new one in the generation prompt.*(thought and 1 more)"),
        (UNMARKED_END, ("stop token",), "generation marks leave something out: the stop token.*(thought and 2 more)"),
        (MARKED_ANSWER, ("reasoning",), "generation marks leave something out: the reasoning"),
        (OTHER_END, ("stop token",), r"ends the turn with '<\|endoftext\|>', while the student stops at <\|im_end\|>"),
        (NO_END, ("stop token",), "ends the turn with no token"),
        (UNTAGGED, ("<think> tags",), "takes the <think> tags off"),
        (REWORDED, ("answer",), "does not print the assistant's answer"),
    ],
    ids=["r1", "unmarked-end", "marked-answer", "other-end", "no-end", "untagged", "reworded"],
)
def test_templates_that_lose_something_elsewhere_are_faulty_while_distill_train_is_safe(
    make_tokenizer: Any, template: str, dropped: tuple[str, ...], said: str
) -> None:
    report = check_template(
        make_tokenizer(template), [row for row in ROWS if template is not MARKED_ANSWER or row[0] != "answer"]
    )
    assert not report.ok
    assert not report.trained_elsewhere
    assert report.trained_here
    assert report.dropped == dropped
    assert len(report.faults) == 1
    assert re.search(said, report.faults[0])


def test_a_stop_token_of_the_generation_config_stops(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(OTHER_END)
    assert check_template(tokenizer, ROWS, stop_ids={256, 258}).ok
    assert not check_template(tokenizer, ROWS, stop_ids={258}).ok


def test_a_template_that_prints_no_answer_cannot_be_trained_anywhere(make_tokenizer: Any) -> None:
    report = check_template(make_tokenizer(SILENT), ROWS)
    assert not report.ok
    assert not report.trained_here
    assert "does not print the assistant's content" in report.faults[0]


def test_a_template_that_refuses_a_role_names_the_row(make_tokenizer: Any) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    with_system = talk("4", {"role": "system", "content": "be brief"})
    report = check_template(make_tokenizer(template), [*ROWS, ("line 9", with_system)])
    assert not report.ok
    assert "no system here" in report.faults[0]
    assert "line 9" in report.faults[0]


def test_a_short_reasoning_that_the_answer_repeats_is_still_missed(make_tokenizer: Any) -> None:
    report = check_template(make_tokenizer(R1), [("short", talk("<think>4</think>\\boxed{4}"))])
    assert report.dropped == ("reasoning",)


@given(
    reasoning=st.text().filter(lambda text: "think>" not in text),
    answer=st.text(min_size=1).filter(lambda text: "think>" not in text and text.strip()),
)
def test_chatml_always_passes_and_r1_never_does(make_tokenizer: Any, reasoning: str, answer: str) -> None:
    rows = [("row", talk(f"<think>{reasoning}</think>{answer}"))]
    assert check_template(TOKENIZERS.setdefault("chatml", make_tokenizer(CHATML)), rows).trained_elsewhere
    assert not check_template(TOKENIZERS.setdefault("r1", make_tokenizer(R1)), rows).trained_elsewhere


TOKENIZERS: dict[str, Any] = {}


@pytest.mark.parametrize("template", [CHATML, MARKED, R1], ids=["chatml", "marked", "r1"])
def test_what_is_reported_of_other_trainers_is_what_trl_trains(
    make_tokenizer: Any, make_model: Any, template: str, tmp_path: Path
) -> None:
    """The reference is TRL's own preparation of the same rows."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = make_tokenizer(template)
    report = check_template(tokenizer, [("row", THOUGHT)])
    rows = {"prompt": [THOUGHT[:-1]], "completion": [THOUGHT[-1:]]} if template != MARKED else {"messages": [THOUGHT]}
    arguments = SFTConfig(output_dir=str(tmp_path), max_length=None, use_cpu=True, bf16=False, report_to=[],
                          assistant_only_loss=template == MARKED)  # fmt: skip
    trainer = SFTTrainer(
        model=make_model(), processing_class=tokenizer, train_dataset=Dataset.from_dict(rows), args=arguments
    )
    trained = tokenizer.decode([label for label in trainer.train_dataset[0]["labels"] if label != -100])
    assert ("two and two" in trained) == ("reasoning" not in report.dropped)
    assert ("<|im_end|>" in trained) == ("stop token" not in report.dropped)
    assert report.ok == (template != R1)


@pytest.mark.parametrize(
    ("name", "ok", "dropped"),
    [
        ("deepseek_r1_distill", False, ("reasoning",)),
        ("deepseekv3", False, ("reasoning",)),
        ("deepseek_r1_distill_training", True, ()),
        ("qwen2_5", True, ()),
        ("qwen3", True, ()),
        ("qwen3_training", True, ()),
        ("llama3", True, ()),
        ("phi3", True, ()),
        ("glm4moe", False, ("stop token",)),
    ],
)
def test_templates_of_published_models(make_tokenizer: Any, name: str, ok: bool, dropped: tuple[str, ...]) -> None:
    """As TRL ships them; the tokenizer is ours, with the template's own end token as its eos."""
    import trl

    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = make_tokenizer(template)
    tokenizer.bos_token = "<|endoftext|>"
    ends = ("<｜end▁of▁sentence｜>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>")
    tokenizer.add_special_tokens({"eos_token": next(end for end in ends if end in template or end == ends[-1])})
    report = check_template(tokenizer, ROWS)
    assert (report.ok, report.dropped) == (ok, dropped), report.faults
    assert report.trained_here


@pytest.mark.parametrize(
    ("name", "dropped"), [("qwen2.5", ()), ("llama-3.2", ()), ("smollm2", ()), ("deepseek-v3", ())]
)
def test_real_tokenizers_with_their_own_templates(name: str, dropped: tuple[str, ...]) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip("no shared/data beside the repository")
    report = require_template(str(SHARED / name), ROWS)
    assert report.dropped == dropped
    assert report.ok


def test_a_real_tokenizer_without_a_template_is_refused() -> None:
    if not (SHARED / "gpt2").is_dir():
        pytest.skip("no shared/data beside the repository")
    with pytest.raises(UserError, match="no chat template"):
        require_template(str(SHARED / "gpt2"))


def test_a_real_tokenizer_takes_a_template_file(tmp_path: Path) -> None:
    if not (SHARED / "gpt2").is_dir():
        pytest.skip("no shared/data beside the repository")
    file = tmp_path / "r1.jinja"
    file.write_text(R1)
    with pytest.raises(UserError, match="drops the assistant's text up to </think>"):
        require_template(str(SHARED / "gpt2"), chat_template=file)


def test_texts_that_spell_special_tokens_are_flagged(make_tokenizer: Any) -> None:
    rows = [
        ("one", THOUGHT),
        ("two", talk("<think>a</think>b<|im_end|>\nc")),
        ("three", talk("x", {**ASK, "content": "<|im_start|>"}, ASK)),
    ]
    report = check_template(make_tokenizer(CHATML), rows)
    assert report.special_rows == 2
    assert report.faults == ("the assistant's text spells the special token <|im_end|> (two)",)
    assert report.notes == ("the prompt spells the special token <|im_start|> (three)",)


def test_special_tokens_are_looked_for_in_every_row_and_templates_on_some(make_tokenizer: Any) -> None:
    rows = [(f"line {i}", talk(f"<think>{i}</think>{i}")) for i in range(3 * PER_KIND)]
    rows[-1] = ("last", talk("<think>1</think><|endoftext|>2"))
    report = check_template(make_tokenizer(CHATML), iter(rows))
    assert (report.rows, report.rendered) == (3 * PER_KIND, PER_KIND)
    assert report.faults == ("the assistant's text spells the special token <|endoftext|> (last)",)


def test_an_added_token_that_is_no_special_one_is_text(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_tokens(["<think>", "</think>", "<tool>"])
    report = check_template(tokenizer, [("thought", talk("<think>a</think><tool>"))])
    assert report.ok
    assert report.special_rows == 0


def test_stop_ids_are_the_engines_and_not_what_the_template_writes(make_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(OTHER_END)
    tokenizer.save_pretrained(tmp_path)
    assert stop_token_ids(str(tmp_path), tokenizer) == {258}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 256}))
    assert stop_token_ids(str(tmp_path), tokenizer) == {256, 258}
    assert require_template(str(tmp_path)).ok
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [257]}))
    assert stop_token_ids(str(tmp_path), tokenizer) == {257, 258}
    with pytest.raises(UserError, match=r"--check-template .*while the student stops at <\|im_start\|>, <\|im_end\|>"):
        require_template(str(tmp_path))
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match="cannot read"):
        require_template(str(tmp_path))


def test_before_any_teacher_time_a_made_up_row_shows_the_fault(make_tokenizer: Any, tmp_path: Path) -> None:
    make_tokenizer(R1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"a row with reasoning.*distill train renders the turns itself") as error:
        require_template(str(tmp_path))
    assert "\n" not in str(error.value)
    assert check_template(make_tokenizer(CHATML), SYNTHETIC).ok


def test_what_cannot_be_checked_is_refused(make_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no chat template"):
        check_template(make_tokenizer(None), ROWS)
    with pytest.raises(UserError, match="no conversation"):
        check_template(make_tokenizer(CHATML), [])
    tokenizer = make_tokenizer(CHATML)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        check_template(tokenizer, ROWS)
