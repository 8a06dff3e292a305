"""Rendering for training: what is a prompt, what is trained, for templates that behave differently."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from distill.render import answer_only, end_of_turn, render, render_plain, render_prompt, render_sampled

ASK = {"role": "user", "content": "2+2?"}
THOUGHT = "<think>\ntwo and two\n</think>\n\n\\boxed{4}"
TURNS = "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}"
END = "{% endif %}{% endfor %}"
# R1-Distill: past reasoning is dropped, the generation prompt opens a new one.
R1 = (
    TURNS
    + "<A>{{ m.content.split('</think>')[-1] }}<|im_end|>"
    + END
    + "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
# Qwen3: past reasoning is dropped, an empty block is put before an answer, the turn ends in a newline.
QWEN3 = (
    TURNS
    + "<A>{{ '<think>\n\n</think>\n\n' + m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n"
    + END
    + "{% if add_generation_prompt %}<A>{% endif %}"
)
PLAIN = TURNS + " {{ m.content }}\n\n" + END  # closes a turn with no token at all
NO_THINK = (
    TURNS + "<A>{{ m.content }}<|im_end|>" + END + "{% if add_generation_prompt %}<A><think>\n\n</think>\n\n{% endif %}"
)


def parts(tokenizer, example) -> tuple[str, str]:
    """Return the untrained and the trained text of an example."""
    cut = int((example.weights == 0).sum())
    assert (example.weights[:cut] == 0).all()
    assert (example.weights[cut:] == 1).all()
    return tokenizer.decode(example.input_ids[:cut]), tokenizer.decode(example.input_ids[cut:])


def test_chatml_trains_the_answer_and_its_end_token_only(tokenizer):
    prompt, trained = parts(tokenizer, render(tokenizer, [ASK, {"role": "assistant", "content": "four"}]))
    assert prompt == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert trained == "four<|im_end|>"


@pytest.mark.parametrize(
    ("template", "prompt", "trained"),
    [
        (R1, "<|im_start|>2+2?<A><think>\n", "two and two\n</think>\n\n\\boxed{4}<|im_end|>"),
        (QWEN3, "<|im_start|>2+2?<A>", THOUGHT + "<|im_end|>"),
        (PLAIN, "<|im_start|>2+2?", THOUGHT + "<|im_end|>"),
    ],
    ids=["r1", "qwen3", "plain"],
)
def test_reasoning_is_trained_whatever_the_template_does_to_past_turns(make_tokenizer, template, prompt, trained):
    tokenizer = make_tokenizer(template)
    assert parts(tokenizer, render(tokenizer, [ASK, {"role": "assistant", "content": THOUGHT}])) == (prompt, trained)


def test_an_answer_without_reasoning_closes_the_block_that_the_template_opened(make_tokenizer):
    tokenizer = make_tokenizer(R1)
    _, trained = parts(tokenizer, render(tokenizer, [ASK, {"role": "assistant", "content": "\\boxed{4}"}]))
    assert trained == "\n</think>\n\n\\boxed{4}<|im_end|>"


def test_a_closed_block_in_the_prompt_needs_no_closing(make_tokenizer):
    tokenizer = make_tokenizer(NO_THINK)
    _, trained = parts(tokenizer, render(tokenizer, [ASK, {"role": "assistant", "content": "\\boxed{4}"}]))
    assert trained == "\\boxed{4}<|im_end|>"


@pytest.mark.parametrize(
    ("template", "prefill"), [(R1, "<think>\n"), (QWEN3, ""), (NO_THINK, "<think>\n\n</think>\n\n")]
)
def test_prefill_is_what_the_prompt_already_says_for_the_assistant(make_tokenizer, template, prefill):
    text, found = render_prompt(make_tokenizer(template), [{"role": "user", "content": "why <think>\n now?"}])
    assert found == prefill
    assert text.endswith("<A>" + prefill)


def test_only_the_last_turn_is_trained(tokenizer):
    talk = [ASK, {"role": "assistant", "content": "three"}, {"role": "user", "content": "no"}]
    prompt, trained = parts(tokenizer, render(tokenizer, [*talk, {"role": "assistant", "content": "four"}]))
    assert "three" in prompt
    assert trained == "four<|im_end|>"


def test_the_trained_ids_continue_the_ids_an_engine_is_given(tokenizer):
    example = render(tokenizer, [ASK, {"role": "assistant", "content": "4"}])
    given_ids = tokenizer.apply_chat_template([ASK], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert example.input_ids[: len(given_ids)].tolist() == list(given_ids)


def test_a_turn_closed_by_another_stop_token_of_the_model_gets_no_second_one(make_tokenizer):
    tokenizer = make_tokenizer(TURNS + "<A>{{ m.content }}<|endoftext|>\n" + END)
    messages = [ASK, {"role": "assistant", "content": "4"}]
    stop = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert end_of_turn(tokenizer, messages, {stop, tokenizer.eos_token_id}) == "<|endoftext|>"
    assert end_of_turn(tokenizer, messages) == "<|endoftext|><|im_end|>"


def test_a_turn_that_was_cut_off_is_not_taught_to_stop(tokenizer):
    messages = [ASK, {"role": "assistant", "content": "four"}]
    whole, cut = render(tokenizer, messages), render(tokenizer, messages, ended=False)
    assert whole.input_ids.tolist() == [*cut.input_ids.tolist(), tokenizer.eos_token_id]
    assert whole.begin == cut.begin == int((cut.weights == 0).sum())


@given(st.text(alphabet="fourive<|>\n", min_size=1, max_size=6), st.booleans())
def test_sampled_tokens_of_the_text_give_the_rendered_example(tokenizer, content, ended):
    messages = [ASK, {"role": "assistant", "content": content}]
    expected = render(tokenizer, messages, ended=ended)
    found = render_sampled(tokenizer, messages, expected.input_ids[expected.begin :], uid="it", ended=ended)
    assert found is not None
    assert found.uid == "it"
    assert found.begin == expected.begin
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    assert found.weights.tolist() == expected.weights.tolist()
    other = render(tokenizer, [ASK, {"role": "assistant", "content": content + "!"}], ended=ended)
    assert render_sampled(tokenizer, messages, other.input_ids[other.begin :], uid="it", ended=ended) is None


def test_plain_text_pairs_are_joined_and_stopped(tokenizer):
    assert parts(tokenizer, render_plain(tokenizer, "2+2=", "4")) == ("2+2=", "4<|im_end|>")
    without_prompt = render_plain(tokenizer, "", "4")
    assert without_prompt.weights.tolist() == [0, 1]  # nothing predicts the first token


def test_sentencepiece_style_tokenizers_get_no_invented_space_in_the_completion():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {token: index for index, token in enumerate(["</s>", "▁", "\n", *"abcdefgh:"])}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    example = render_plain(tokenizer, "abc:", "def")
    assert "".join(tokenizer.convert_ids_to_tokens(example.input_ids)) == "▁abc:def</s>"


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (None, [ASK, {"role": "assistant", "content": "4"}], "no chat template.*--chat-template"),
        (R1, [ASK], "must end with the assistant turn"),
        ("{{ raise_exception('only users here') }}", [ASK, {"role": "assistant", "content": "4"}], "only users here"),
        ("{{ messages[0].content }}", [ASK, {"role": "assistant", "content": "4"}], "does not print the assistant"),
    ],
)
def test_what_cannot_be_rendered_is_refused(make_tokenizer, template, messages, said):
    with pytest.raises(UserError, match=said):
        render(make_tokenizer(template), messages)


def test_a_tokenizer_without_eos_is_refused(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no eos token"):
        render(tokenizer, [ASK, {"role": "assistant", "content": "4"}])


@given(reasoning=st.text(), answer=st.text(min_size=1).filter(lambda text: text.strip() and "</think>" not in text))
def test_the_answer_is_what_follows_the_reasoning(reasoning, answer):
    assert answer_only(f"<think>{reasoning}</think>\n{answer}") == answer.strip()


@pytest.mark.parametrize(
    ("content", "known", "answer"),
    [
        ("so \\boxed{1} no, \\boxed{\\frac{1}{2}} it is", {}, "\\boxed{\\frac{1}{2}}"),
        ("it is 4", {"predicted": "4", "gold": "5"}, "\\boxed{4}"),
        ("it is 4", {"predicted": "", "gold": "5"}, "\\boxed{5}"),
        ("<think>endless", {"gold": "5"}, "\\boxed{5}"),
        ("open \\boxed{4", {"gold": "5"}, "\\boxed{5}"),
    ],
)
def test_answers_without_a_reasoning_block(content, known, answer):
    assert answer_only(content, **known) == answer


def test_a_trace_without_any_answer_is_refused():
    with pytest.raises(UserError, match="no final answer"):
        answer_only("it is 4")


def test_importing_it_does_not_import_torch():
    code = "import sys, distill.render, distill.dataset, distill.run_folder; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
