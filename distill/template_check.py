"""Would a trainer that uses the student's chat template train the reasoning, and the token that stops it?

`distill train` never shows the trained text to the template (distill/render.py), so it is safe under any template. An
exported file is read by trainers that are not: they render the whole conversation with `apply_chat_template` and train
what it says. Templates of reasoning models rewrite the assistant's turn (R1-Distill's drop everything up to `</think>`
and open a new `<think>` in the generation prompt), others end a turn with a token at which the student does not stop;
nothing fails then, the loss looks healthy, and the student comes out without reasoning, or never ends.

So real rows are tokenised both ways and the trained tokens read back. A *fault* is something that a trainer would
silently not train, or that would train something else; a *note* is worth knowing and harms no trained token. Trainers
with templates of their own (LLaMA-Factory) are not covered.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from distill.errors import UserError
from distill.hub import locate, one_line
from distill.records import Message
from distill.render import CLOSE, SENTINEL, render, render_prompt

PER_KIND = 16  # rows tokenised of each kind of conversation: a template treats all of a kind alike
OPEN = "<think>"
MARKS = re.compile(r"\{%-?\s*generation\b")  # what apply_chat_template makes the mask of assistant tokens from
SYNTHETIC: tuple[tuple[str, list[Message]], ...] = (
    (
        "a row with reasoning",
        [
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": f"{OPEN}\ntwo and two make four\n{CLOSE}\n\n\\boxed{{4}}"},
        ],
    ),
)


@dataclass(frozen=True, slots=True)
class TemplateReport:
    """What a chat template does to conversations.

    `rows` were looked through for special tokens, `rendered` of them tokenised. `trained_here`: `distill train` trains
    reasoning, answer and stop token of all of these; `trained_elsewhere`: trainers that use `apply_chat_template` do,
    in each of `ways`. `dropped` says what they lose: reasoning, tags, answer, stop token. `special_rows` is how many
    rows have a special token of the student's tokenizer in a text.
    """

    rows: int
    rendered: int
    ways: tuple[str, ...]
    trained_here: bool
    trained_elsewhere: bool
    dropped: tuple[str, ...]
    special_rows: int
    faults: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the conversations may be given to any trainer that uses this template."""
        return not self.faults


def check_template(
    tokenizer: Any, conversations: Iterable[tuple[str, Sequence[Message]]], *, stop_ids: Collection[int] | None = None
) -> TemplateReport:
    """Tokenise conversations as `distill train` and as trainers on `apply_chat_template` do, and say what gets lost.

    The second way is the difference between the prompt's tokens and the whole conversation's, as TRL takes it; where
    the template marks the assistant's text with `{% generation %}`, the mask made from the marks is read as well.

    Args:
        conversations: (name, messages) pairs, the assistant's turn last; a name says in a fault which row is meant.
            They are read once, in order; of each kind (roles, tags) the first few are tokenised.
        stop_ids: token ids at which the student ends (`stop_token_ids`); default: the tokenizer's eos.

    Raises:
        UserError: the tokenizer has no chat template or no eos, or there is no conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("the student's tokenizer has no chat template: give one with --chat-template FILE.jinja")
    stops = {tokenizer.eos_token_id} if stop_ids is None else set(stop_ids)
    stops.discard(None)
    if not stops:
        raise UserError("the student has no end token, neither in its tokenizer nor in its generation config")
    check = _Check(tokenizer, frozenset(stops))
    for name, messages in conversations:
        check.look(name, messages)
    if not check.rows:
        raise UserError("there is no conversation to check the chat template with")
    return check.report()


def require_template(
    student: str,
    conversations: Iterable[tuple[str, Sequence[Message]]] = SYNTHETIC,
    *,
    chat_template: Path | None = None,
    trust_remote_code: bool = False,
) -> TemplateReport:
    """Check a student's template by its model's name: with rows that exist, or with one made up before there are any.

    Raises:
        UserError: no such model, or its template has a fault; all are named, each with the first row that shows it.
    """
    from distill.models import load_tokenizer

    tokenizer = load_tokenizer(student, chat_template=chat_template, trust_remote_code=trust_remote_code)
    stops = stop_token_ids(student, tokenizer, trust_remote_code=trust_remote_code)
    report = check_template(tokenizer, conversations, stop_ids=stops)
    if not report.ok:
        safe = "; distill train renders the turns itself and trains all of it" if report.trained_here else ""
        raise UserError(f"--check-template {student}: {'; '.join(report.faults)}{safe}")
    return report


def stop_token_ids(student: str, tokenizer: Any, *, trust_remote_code: bool = False) -> set[int]:
    """Return the ids at which engines end this student's completions: its generation config's and its tokenizer's.

    Unlike `distill.models.end_token_ids`, what the chat template writes after a turn does not count by itself: whether
    that token stops the student is the question here.
    """
    folder = locate(student, trust_remote_code=trust_remote_code)
    ids = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            try:
                given = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            except (OSError, ValueError, AttributeError) as error:
                raise UserError(f"cannot read {folder / name}: {error}") from error
            if given is not None:
                ids.update(given if isinstance(given, list) else [given])
                break
    return {index for index in ids if index is not None}


class _Check:
    """The findings so far: the first row of each, and how many; never the rows."""

    def __init__(self, tokenizer: Any, stops: frozenset[int]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        template = tokenizer.chat_template
        self.marked = any(map(MARKS.search, template.values() if isinstance(template, Mapping) else [template]))
        self.special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids |= set(tokenizer.all_special_ids)
        names = set(tokenizer.convert_ids_to_tokens(sorted(self.special_ids))) - {OPEN, CLOSE, "", None}
        self.special = re.compile("|".join(sorted(map(re.escape, names), key=len, reverse=True)) or r"(?!)")
        self.rows = self.rendered = self.special_rows = 0
        self.here = self.elsewhere = True
        self.kinds: Counter[tuple[Any, ...]] = Counter()
        self.dropped: dict[str, None] = {}
        self.faults: dict[str, tuple[str, int]] = {}
        self.notes: dict[str, tuple[str, int]] = {}

    def report(self) -> TemplateReport:
        return TemplateReport(
            rows=self.rows,
            rendered=self.rendered,
            ways=("prompt taken off", "assistant mask") if self.marked else ("prompt taken off",),
            trained_here=self.here,
            trained_elsewhere=self.elsewhere,
            dropped=tuple(self.dropped),
            special_rows=self.special_rows,
            faults=_lines(self.faults),
            notes=_lines(self.notes),
        )

    def look(self, name: str, messages: Sequence[Message]) -> None:
        """Take one conversation in."""
        self.rows += 1
        self._look_for_special_tokens(name, messages)
        text = messages[-1]["content"]
        earlier = any(CLOSE in message["content"] for message in messages[:-1])
        kind = (*(message["role"] for message in messages), text.count(OPEN), text.count(CLOSE), earlier)
        self.kinds[kind] += 1
        if self.kinds[kind] > PER_KIND:
            return
        self.rendered += 1
        try:
            self._tokenise(name, messages)
        except UserError as error:
            self.here = self.elsewhere = False
            _note(self.faults, str(error), name)

    def _look_for_special_tokens(self, name: str, messages: Sequence[Message]) -> None:
        """A text that spells a special token becomes that token: a turn that ends in its middle, or a forged one."""
        found = [self.special.search(message["content"]) for message in messages]
        self.special_rows += any(found)
        if found[-1]:
            _note(self.faults, f"the assistant's text spells the special token {found[-1].group()}", name)
        elif first := next(filter(None, found), None):
            _note(self.notes, f"the prompt spells the special token {first.group()}", name)

    def _tokenise(self, name: str, messages: Sequence[Message]) -> None:
        turn = _Turn.of(messages[-1]["content"], self._decoded)
        _, prefill = render_prompt(self.tokenizer, messages[:-1])
        example = render(self.tokenizer, messages, stop_ids=self.stops)
        lost = self._lost(turn, example.input_ids[example.weights > 0].tolist(), prefill)
        if lost:
            self.here = False
            _note(self.faults, f"distill train would not train the {_listed(lost)}", name)

        prompt, whole, mask = self._apply(messages)
        start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        lost = self._lost(turn, whole[start:], prefill)
        if lost:
            self._elsewhere(lost, name, f"the chat template {self._why(lost, messages, prefill)}")
        elif start < len(prompt):
            left = self._decoded(prompt[start:])
            _note(self.notes, f"the prompt's end {left!r} is not what stands before the answer in training", name)
        if self.marked:
            marked = [token for token, bit in zip(whole, mask, strict=True) if bit]
            unmarked = [part for part in self._lost(turn, marked, prefill) if part not in lost]
            if unmarked:
                self._elsewhere(unmarked, name, "the template's generation marks leave something out")
        text = self._decoded(whole)
        if turn.reasoning is None and CLOSE in self._decoded(whole[start:]):
            _note(self.notes, "the chat template puts an empty reasoning block before answers without one", name)
        for message in messages[:-1]:  # context here, never trained: a template may shorten it, as it does in serving
            past = _Turn.of(message["content"], self._decoded) if message["role"] == "assistant" else None
            if past and past.reasoning and past.reasoning not in text:
                _note(self.notes, "the chat template drops the reasoning of earlier turns", name)

    def _elsewhere(self, lost: list[str], name: str, why: str) -> None:
        self.elsewhere = False
        self.dropped.update(dict.fromkeys(lost))
        _note(self.faults, f"{why}: the {_listed(lost)} would go untrained", name)

    def _apply(self, messages: Sequence[Message]) -> tuple[list[int], list[int], list[int]]:
        """Return the prompt's ids, the conversation's, and which of those are marked as the assistant's."""
        apply = self.tokenizer.apply_chat_template
        try:
            prompt = apply(list(messages[:-1]), tokenize=True, return_dict=True, add_generation_prompt=True)
            whole = apply(list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=self.marked)
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"the chat template refuses the conversation: {one_line(error)}") from error
        return list(prompt["input_ids"]), list(whole["input_ids"]), list(whole.get("assistant_masks", []))

    def _lost(self, turn: _Turn, trained: list[int], prefill: str) -> list[str]:
        """Return what of the assistant's turn is not among the trained tokens."""
        text = self._decoded(trained)
        inside, closing, after = text.rpartition(CLOSE) if turn.closed else (text, "", text)
        lost = []
        if turn.reasoning is not None and turn.closed and not closing:
            # A short reasoning may occur in the answer too: only one that stands before the answer was kept.
            _, found, rest = after.partition(turn.reasoning or OPEN)
            lost.append("<think> tags" if found and turn.answer in rest else "reasoning")
        elif turn.reasoning is not None and turn.reasoning not in inside:
            lost.append("reasoning")
        elif turn.reasoning is not None and OPEN not in inside + prefill:
            lost.append("<think> tags")
        if turn.answer not in after:
            lost.append("answer")
        if not self._stops(trained):
            lost.append("stop token")
        return lost

    def _stops(self, trained: list[int]) -> bool:
        """Whether a stop token is among what closes the trained text: special tokens and white space."""
        for token in reversed(trained):
            if token in self.stops:
                return True
            if token not in self.special_ids and self._decoded([token]).strip():
                return False
        return False

    def _why(self, lost: list[str], messages: Sequence[Message], prefill: str) -> str:
        """Name the template's fault."""
        reopened = ", and opens a new one in the generation prompt" if OPEN in prefill else ""
        reasons = {
            "reasoning": f"drops the assistant's text up to </think>{reopened}",
            "<think> tags": "takes the <think> tags off the reasoning",
            "answer": "does not print the assistant's answer as it is",
            "stop token": "",
        }
        if "stop token" in lost:
            answered = [*messages[:-1], {"role": "assistant", "content": SENTINEL}]
            _, _, closing = self.tokenizer.apply_chat_template(answered, tokenize=False).rpartition(SENTINEL)
            ends = ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(self.stops)))
            what = f"with {closing.strip()!r}" if closing.strip() else "with no token"
            reasons["stop token"] = f"ends the turn {what}, while the student stops at {ends}"
        return _listed([reasons[part] for part in lost])

    def _decoded(self, ids: Sequence[int] | str) -> str:
        """Return the text of ids, or what a text comes back as: tokenizers fold letters and lack words."""
        if isinstance(ids, str):
            ids = self.tokenizer.encode(ids, add_special_tokens=False, verbose=False)
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@dataclass(frozen=True, slots=True)
class _Turn:
    """An assistant's turn as it must be trained; `reasoning` is None where there is none.

    Without outer white space, which templates may trim, and as the tokenizer gives it back: what a tokenizer loses is
    not the template's fault.
    """

    reasoning: str | None
    answer: str
    closed: bool

    @classmethod
    def of(cls, content: str, decoded: Callable[[str], str]) -> _Turn:
        before, closing, after = content.rpartition(CLOSE)
        if not closing and OPEN in content:
            before, after = content, ""
        inside = decoded(before.strip().removeprefix(OPEN).strip()).strip() if closing or before else None
        return cls(inside, decoded(after.strip()).strip(), bool(closing))


def _note(findings: dict[str, tuple[str, int]], what: str, name: str) -> None:
    first, count = findings.get(what, (name, 0))
    findings[what] = (first, count + 1)


def _lines(findings: Mapping[str, tuple[str, int]]) -> tuple[str, ...]:
    return tuple(
        f"{what} ({name}{f' and {count - 1} more' if count > 1 else ''})" for what, (name, count) in findings.items()
    )


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(parts)
