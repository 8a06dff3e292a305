"""Two models reading one text: every number against the models' own logits, and results that survive being stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from two_tokenizers import merged

from align import open_training
from distill import token_view
from distill.errors import UserError
from distill.token_reading import LIKELIEST, Shown, compared, greedy_answer, open_speaker, pieces
from distill.token_view import view_tokens

MESSAGES = ({"role": "user", "content": "How many?"},)
TEXT = "<think>\nTwo and two.\n</think>\nvier, 四 😀"


def same(student: Any, teacher: Any) -> None:
    """One vocabulary: nothing to be aligned."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A teacher and two students with one tokenizer, as folders."""
    folders = {}
    for seed, name in enumerate(("teacher", "one", "two")):
        folder = tmp_path_factory.mktemp(name)
        tiny_model(seed=seed).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        folders[name] = str(folder)
    return folders


def shown(arm: str = "one", completion: str = TEXT, *, ended: bool = True, uid: str = "q") -> Shown:
    return Shown(arm, uid, MESSAGES, completion, ended)


def log_probs(speaker: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return speaker.model(torch.tensor([ids])).logits[0, :, : len(speaker.tokenizer)].float().log_softmax(-1)


@pytest.mark.parametrize("ended", [True, False])
def test_tokens_have_the_forward_kl_of_the_models_logits(models: dict[str, str], ended: bool) -> None:
    student, teacher = open_speaker(models["one"], "student"), open_speaker(models["teacher"], "teacher")
    got = compared(student, teacher, shown(ended=ended), same)
    tokenizer = student.tokenizer
    prompt = tokenizer.apply_chat_template(list(MESSAGES), add_generation_prompt=True, tokenize=False)
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(prompt + TEXT + ("<|im_end|>" if ended else ""))
    own, theirs = (log_probs(speaker, ids)[len(prompt_ids) - 1 : -1] for speaker in (student, teacher))
    expected = (theirs.exp() * (theirs - own)).sum(-1)
    assert got["kind"] == "kl"
    assert [token["nats"] for token in got["tokens"]] == pytest.approx(expected.tolist(), abs=1e-4)
    assert got["mean"] == pytest.approx(float(expected.mean()), abs=1e-4)
    assert "".join(token["text"] for token in got["tokens"]) == TEXT + ("<|im_end|>" if ended else "")
    for row, token in enumerate(got["tokens"]):
        for side, logp in (("student", own), ("teacher", theirs)):
            best = logp[row].exp().topk(LIKELIEST).values.tolist()
            assert [p for _, p in token[side]] == pytest.approx(best, abs=1e-4)


def test_a_model_beside_itself_is_nowhere_apart(models: dict[str, str]) -> None:
    student = open_speaker(models["one"], "student")
    got = compared(student, student, shown(), same)
    assert all(token["nats"] == 0 and token["student"] == token["teacher"] for token in got["tokens"])


def test_across_vocabularies_spans_have_the_difference_of_their_likelihoods(tmp_path: Path) -> None:
    """The sum over spans is what the two models make of the whole text, each in its own tokens."""
    speakers = []
    for seed, (name, tokenizer) in enumerate((("student", byte_tokenizer()), ("teacher", merged()))):
        folder = tmp_path / name
        tiny_model(seed=seed, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        speakers.append(open_speaker(str(folder), name))
    student, teacher = speakers
    got = compared(
        student, teacher, shown(completion="the cat sat on the mat"), lambda a, b: open_training("auto", a[1], b[1])
    )
    assert got["kind"] == "spans"
    totals = []
    for speaker in speakers:
        tokenizer = speaker.tokenizer
        prompt = tokenizer.apply_chat_template(list(MESSAGES), add_generation_prompt=True, tokenize=False)
        begin = tokenizer.encode(prompt, add_special_tokens=False)
        ids = begin + tokenizer.encode("the cat sat on the mat", add_special_tokens=False) + [tokenizer.eos_token_id]
        logp = log_probs(speaker, ids)
        totals.append(sum(float(logp[i - 1, ids[i]]) for i in range(len(begin), len(ids))))
    compared_spans = [token for token in got["tokens"] if token["nats"] is not None]
    assert len(compared_spans) > 3
    assert sum(token["nats"] for token in compared_spans) == pytest.approx(totals[1] - totals[0], abs=0.01)
    assert "".join(token["text"] for token in got["tokens"]).startswith("the cat sat on the mat")


def test_a_text_beyond_the_context_is_refused(models: dict[str, str]) -> None:
    student = open_speaker(models["one"], "student")
    with pytest.raises(UserError, match="longer than the 512"):
        compared(student, student, shown(completion="a" * 600), same)


def test_the_teachers_answer_is_its_likeliest(models: dict[str, str]) -> None:
    teacher = open_speaker(models["teacher"], "teacher")
    answer = greedy_answer(teacher, MESSAGES, 8)
    prompt = teacher.tokenizer.apply_chat_template(list(MESSAGES), add_generation_prompt=True, tokenize=False)
    ids = teacher.tokenizer.encode(prompt)
    begin = len(ids)
    for _ in range(8):
        ids.append(int(log_probs(teacher, ids)[-1].argmax()))
        if ids[-1] in (256, 258):
            break
    ended = ids[-1] == 258
    assert answer == {"text": teacher.tokenizer.decode(ids[begin : -1 if ended else None]), "ended": ended}


@given(st.text(max_size=30))
def test_pieces_are_the_text(text: str) -> None:
    """Any text comes back whole, whatever characters are made of several tokens."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("x" + text)
    assert "".join(pieces(tokenizer, ids, 1)) == tokenizer.decode(ids)[1:]


def view(models: dict[str, str], cache: Path, texts: list[Shown], **options: Any) -> dict[str, Any]:
    students = {name: models[name] for name in ("one", "two")}
    settings: dict[str, Any] = {"reader": "two", "align": same, "max_completion_length": 6, **options}
    return view_tokens(texts, students, models["teacher"], cache, **settings)


def test_what_was_looked_at_is_kept_and_no_model_is_loaded_again(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [shown("one"), shown("two", "other"), shown("one", uid="r"), shown("two", uid="r")]
    first = view(models, tmp_path / "tokens.json", texts)
    assert set(first["texts"]) == {"one", "two"}
    assert set(first["texts"]["one"]) == set(first["answers"]) == {"q", "r"}
    assert all("tokens" in answer for answer in first["answers"].values())
    assert first["missing"] == {}
    loaded: list[str] = []
    opened = token_view.open_speaker
    monkeypatch.setattr(token_view, "open_speaker", lambda *a, **k: (loaded.append(a[0]), opened(*a, **k))[1])
    assert view(models, tmp_path / "tokens.json", texts) == first
    assert loaded == []
    kept = json.loads((tmp_path / "tokens.json").read_text())
    kept.popitem()  # as if stopped before the last was written
    (tmp_path / "tokens.json").write_text(json.dumps(kept))
    assert view(models, tmp_path / "tokens.json", texts) == first
    assert sorted(loaded) == sorted([models["teacher"], models["two"]])


def test_an_arm_without_its_model_is_named_and_the_others_are_shown(models: dict[str, str], tmp_path: Path) -> None:
    students = {"one": models["one"], "gone": str(tmp_path / "gone")}
    texts = [shown("one"), shown("gone")]
    got = view_tokens(texts, students, models["teacher"], tmp_path / "t.json", reader="one", align=same, answers=False)
    assert got["answers"] == {}
    assert set(got["texts"]["one"]) == {"q"}
    assert set(got["missing"]) == {"gone"}
    assert "gone" in got["missing"]["gone"]


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_a_damaged_cache_is_refused(models: dict[str, str], tmp_path: Path, content: str) -> None:
    (tmp_path / "tokens.json").write_text(content)
    with pytest.raises(UserError, match="delete it to have it made again"):
        view(models, tmp_path / "tokens.json", [shown()])
