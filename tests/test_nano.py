"""The embedded world: problems that check, splits that never meet, a lossless tokenizer, a teacher that can do them."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from distill.errors import UserError
from teachers.nano import model_path, parse_levels, problems
from teachers.nano.problems import ADDING, LEVELS, SPLITS, TAKING, solved, split_of, stream
from teachers.nano.rebuild import collate, examples, rebuild_teacher
from teachers.nano.tokenizer import build_tokenizer

levels_of = st.sets(st.sampled_from(LEVELS), min_size=1).map(sorted)
seeds = st.integers(0, 2**32)
questions = st.builds(
    lambda levels, split, seed, index: next(itertools.islice(stream(levels, split, seed), index, None)),
    levels_of,
    st.sampled_from(SPLITS),
    seeds,
    st.integers(0, 20),
)


def read_and_compute(question: str) -> list[Fraction]:
    """An independent reading of a question: every quantity on the way, by rational arithmetic."""
    start, *sentences = re.fullmatch(r"(.*) Total\?", question)[1].rstrip(".").split(". ")
    values = [Fraction(re.fullmatch(r"[A-Z][a-z]+ has (\d+) [a-z]+", start)[1])]
    for day, sentence in zip(["Mon", "Tue", "Wed", "Thu"], sentences, strict=False):
        label, verb, *amount = sentence.split(" ")
        assert label == day
        number = int(amount[0]) if amount else None
        effects = {"doubles": values[-1] * 2, "triples": values[-1] * 3, "halves": values[-1] / 2}
        effects |= {verb: values[-1] + number for verb in ADDING if number}
        effects |= {verb: values[-1] - number for verb in TAKING if number}
        values.append(effects[verb])
    return values


@given(questions)
@settings(deadline=None)
def test_every_quantity_is_a_whole_number_up_to_49_and_the_gold_is_the_last(problem):
    values = read_and_compute(problem.question)
    assert [Fraction(value) for value in problem.values] == values
    assert all(value.denominator == 1 and 0 <= value <= 49 for value in values)
    assert problem.gold == str(values[-1])
    assert problem.level == len(values) - 1


@given(questions)
@settings(deadline=None)
def test_every_equation_of_the_worked_trace_holds_and_starts_where_the_last_ended(problem):
    think, boxed = re.fullmatch(r"<think>(.*)</think>\\boxed\{(\d+)\}", problem.solution).groups()
    reached = int(re.match(r"Start (\d+)\.", think)[1])
    equations = re.findall(r" (?:Mon|Tue|Wed|Thu), (\d+)([-+*/])(\d+)=(\d+)\.", think)
    assert len(equations) == problem.level
    for left, sign, right, result in equations:
        assert int(left) == reached
        reached = int(result)
        number = Fraction(right) if sign in "+*" else {"-": -Fraction(right), "/": 1 / Fraction(right)}[sign]
        assert reached == (int(left) + number if sign in "+-" else int(left) * number)
    assert boxed == problem.gold == str(reached)


@given(levels_of, seeds, seeds)
@settings(max_examples=30, deadline=None)
def test_train_and_heldout_never_share_a_question_whatever_the_seeds(levels, seed, other_seed):
    train = {prompt.messages[0]["content"] for prompt in problems(levels, "train", seed, 100)}
    heldout = {prompt.messages[0]["content"] for prompt in problems(levels, "heldout", other_seed, 100)}
    assert len(train) == len(heldout) == 100, "a question came twice"
    assert not train & heldout
    assert {split_of(question) for question in train} == {"train"}
    assert {split_of(question) for question in heldout} == {"heldout"}


def test_one_question_in_eight_is_held_out():
    share = sum(split_of(f"question {index}") == "heldout" for index in range(8000)) / 8000
    assert share == pytest.approx(1 / 8, abs=0.012)  # more than three standard errors


@given(levels_of, st.sampled_from(SPLITS), seeds, st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_a_shorter_stream_is_the_beginning_of_a_longer_one(levels, split, seed, first, second):
    short, long = sorted((first, second))
    assert list(problems(levels, split, seed, short)) == list(problems(levels, split, seed, long))[:short]
    unlimited = itertools.islice(problems(levels, split, seed), long)
    assert list(unlimited) == list(problems(levels, split, seed, long))


def test_the_stream_is_the_same_on_every_machine_and_version():
    text = "\n".join(prompt.messages[0]["content"] for prompt in problems(limit=100))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "c6337636e481d46d"


def test_prompts_say_where_they_come_from_and_how_hard_they_are():
    rows = list(problems((3, 4), "train", 0, 200))
    assert rows[17].source == "nano:3-4:train#17"
    assert {prompt.meta["level"] for prompt in rows} == {3, 4}
    assert len({prompt.uid for prompt in rows}) == 200
    assert list(problems((3, 4), "train", 1, 200)) != rows
    assert [prompt for prompt, _ in solved((4, 3), "train", 0, 200)] == rows


@pytest.mark.parametrize(("text", "levels"), [("", (3, 4)), ("3", (3,)), ("1-2", (1, 2)), ("1-4", (1, 2, 3, 4))])
def test_levels_are_read(text, levels):
    assert parse_levels(text) == levels


@pytest.mark.parametrize("text", ["0", "5", "2-1", "1-", "-2", "easy", "1-2-3", "1-99999999999", "²", " 3"])
def test_wrong_levels_are_refused_with_what_is_allowed(text):
    with pytest.raises(UserError, match="allowed are 1 to 4"):
        parse_levels(text)


def test_wrong_arguments_are_refused_at_the_call():
    with pytest.raises(UserError, match="did you mean 'heldout'"):
        problems(split="held-out")
    with pytest.raises(UserError, match="allowed are 1 to 4"):
        problems((3, 9))
    with pytest.raises(UserError, match="at least one"):
        problems(())


def test_a_stream_that_is_used_up_says_so_instead_of_searching_for_ever(monkeypatch):
    module = importlib.import_module("teachers.nano.problems")
    monkeypatch.setattr(module, "NAMES", ("Ana",))
    monkeypatch.setattr(module, "ITEMS", ("nuts",))
    monkeypatch.setattr(module, "GIVE_UP", 3000)
    with pytest.raises(UserError, match=r"nano:1 has no more heldout problems after \d+: ask for fewer"):
        list(problems((1,), "heldout", limit=100_000))


def test_the_package_loads_no_torch():
    code = "import sys, teachers.nano as nano; list(nano.problems(limit=1)); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def tokenizer(request, tmp_path_factory):
    """The tokenizer after a round through a folder, beside the config of either architecture it is used with."""
    if request.param == "qwen3":
        return AutoTokenizer.from_pretrained(model_path())
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(text=st.text() | st.text("Ana has 15,.?<|>/\\{}\n im_end think"))
@example("héllo 👩‍👩‍👧 中文\r\n\t  015 x49y <think>7</think> <|im_end|>\n")
@settings(max_examples=300, deadline=None)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    if "<|" not in text:
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert build_tokenizer()(text).input_ids == ids


@given(before=st.text().filter(lambda text: not text[-1:].isdigit()), number=st.integers(0, 49), after=st.text())
@settings(max_examples=300, deadline=None)
def test_a_number_is_one_token_with_one_id_in_every_context(tokenizer, before, number, after):
    if after[:1].isdigit():
        after = "." + after
    (alone,) = tokenizer(str(number)).input_ids
    encoded = tokenizer(f"{before}{number}{after}", return_offsets_mapping=True)
    spans = [
        i
        for i, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
        if start >= len(before) and end <= len(before) + len(str(number)) and end > start
    ]
    assert spans == [alone]


def test_problems_cost_few_tokens_and_one_word_is_one_token(tokenizer):
    problem = next(stream((4,)))
    pieces = [tokenizer.decode([i]) for i in tokenizer(problem.solution).input_ids]
    assert pieces[:2] == ["<think>", "Start "]
    assert pieces[-4:] == ["</think>", "\\boxed{", problem.gold, "}"]
    assert len(pieces) == 4 + 4 * 8 + 4
    for problem in itertools.islice(stream(LEVELS), 300):
        longest = max(tokenizer(problem.question + problem.solution).input_ids)
        assert longest < tokenizer.convert_tokens_to_ids("<|reserved_0|>")
        assert len(tokenizer(problem.question).input_ids) <= 7 + 4 * 4


def test_the_vocabulary_fills_the_models_table(tokenizer):
    assert len(tokenizer) % 64 == 0
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(model_path()).config.vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_the_chat_template_is_chatml_and_marks_a_reasoning_model(tokenizer):
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "<think>1.</think>\\boxed{1}"}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n"
    assert rendered == asked + "<think>1.</think>\\boxed{1}<|im_end|>\n"
    assert "<think>" in tokenizer.chat_template
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|pad|>"


def test_the_training_text_is_what_the_chat_template_renders():
    tokenizer = build_tokenizer()
    for (ids, prompt_length), (prompt, solution) in zip(
        itertools.islice(examples(tokenizer, 3), 20), solved(LEVELS, "train", 3), strict=False
    ):
        turns = [*prompt.messages, {"role": "assistant", "content": solution}]
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
        assert [*ids, tokenizer("\n").input_ids[0]] == whole
        assert tokenizer.decode(ids[prompt_length:]) == solution + "<|im_end|>"


def test_targets_are_the_trace_and_its_end_shifted_by_one():
    ids, targets = collate([([5, 6, 7, 8], 2), ([5, 6, 9], 2)], pad=0)
    assert ids.tolist() == [[5, 6, 7], [5, 6, 0]]
    assert targets.tolist() == [[-100, 7, 8], [-100, 9, -100]]


def test_the_same_seed_rebuilds_the_same_teacher(tmp_path):
    weights = [
        (rebuild_teacher(tmp_path / name, steps=3, seed=seed) / "model.safetensors").read_bytes()
        for name, seed in [("a", 1), ("b", 1), ("c", 2)]
    ]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]
    shipped = {path.name for path in model_path().iterdir()}
    assert {path.name for path in (tmp_path / "a").iterdir()} == shipped


def test_the_shipped_folder_is_small_and_holds_this_tokenizer():
    folder = Path(model_path())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == build_tokenizer().get_vocab()
    assert AutoTokenizer.from_pretrained(folder).chat_template == build_tokenizer().chat_template


def test_the_shipped_teacher_solves_heldout_problems():
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path()).eval()
    assert model.dtype == torch.float32
    rows = list(problems((3, 4), "heldout", 0, 200))
    asked = [list(prompt.messages) for prompt in rows]
    inputs = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [text.endswith(f"</think>\\boxed{{{prompt.gold}}}") for text, prompt in zip(texts, rows, strict=True)]
    assert sum(right) / len(right) >= 0.95
