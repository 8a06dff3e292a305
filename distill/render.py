"""One conversation as the token ids a model is trained on, for any chat template.

The prompt is rendered with its generation prompt, exactly as an engine renders it before sampling; the trained part is
the last assistant turn's own text plus the end-of-turn token. The template never sees the trained text, because many
templates rewrite past turns (R1 and Qwen3 drop `<think>...</think>`), and the reasoning would silently go untrained.

Only the last assistant turn is trained. A completion's own tokens, as they were sampled, may stand in for those of its
text (`render_sampled`), because numbers that a teacher gave belong to tokens. Nothing is truncated here, and torch is
not imported.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jinja2 import TemplateError

from distill.errors import UserError
from distill.records import Message

SENTINEL = "distill-sentinel-4c1f"
OPENED = re.compile(r"<think>\s*(?:</think>\s*)?\Z")  # reasoning that a generation prompt opens (or opens and closes)
CLOSE = "</think>"


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence.

    Attributes:
        input_ids: (T,) int32.
        weights: (T,) float32, the weight of predicting each token, 0 on the prompt.
        begin: tokens of the prompt, which is where the completion begins.
        uid: the trace whose stored signal speaks of the completion's tokens, in order from the first; None for none.
            With `other` it speaks of that one's tokens.
        other: what a teacher of another tokenizer reads in its place; None where both read the same ids.
    """

    input_ids: np.ndarray
    weights: np.ndarray
    begin: int = 0
    uid: str | None = None
    other: Other | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Other:
    """A sequence as a teacher of another tokenizer reads it, and where the two meet.

    Attributes:
        input_ids: (U,) int32 the teacher's prompt and its tokens of the completion; the completion alone where stored
            numbers speak in its place.
        begin: tokens of the prompt.
        spans: (S, 4) int32 student begin, end, teacher begin, end: positions in the two sequences. Each span is the
            same bytes on both sides and cannot be split; they ascend, cover trained tokens only, and may have gaps.
    """

    input_ids: np.ndarray
    begin: int
    spans: np.ndarray

    def cut(self, *, student: int | None = None, teacher: int | None = None) -> Other:
        """Return what is left when the student's or the teacher's sequence is cut to so many tokens."""
        kept = np.ones(len(self.spans), bool)
        if student is not None:
            kept &= self.spans[:, 1] <= student
        if teacher is not None:
            kept &= self.spans[:, 3] <= teacher
        spans = self.spans[kept]
        end = self.begin if len(spans) == 0 else int(spans[-1, 3])
        return Other(self.input_ids[:end].copy(), self.begin, spans)


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, str]:
    """Return the text an engine completes, and `prefill`, the assistant's text that the template already opened.

    A completion's full text is ``prefill + generated``. `prefill` is a suffix of the prompt text, usually empty, and
    ``"<think>\\n"`` for templates that force reasoning.

    Raises:
        UserError: the tokenizer has no chat template, or its template refuses these messages.
    """
    text = _apply(tokenizer, messages, add_generation_prompt=True)
    opened = OPENED.search(text)
    return text, opened.group() if opened else ""


def render(
    tokenizer: Any, messages: Sequence[Message], *, stop_ids: Collection[int] | None = None, ended: bool = True
) -> Example:
    """Tokenise a conversation that ends in an assistant turn; that turn and its end token have weight 1.

    Args:
        stop_ids: token ids that end generation; default: the tokenizer's eos. When the template closes a turn with
            none of them, eos is appended, so that the model learns to stop.
        ended: whether the turn came to its end; one that was cut off gets no end token.

    Raises:
        UserError: no assistant turn at the end, no chat template, or a tokenizer without eos.
    """
    prompt_ids, content, end = _turn(tokenizer, messages, stop_ids)
    return _example(prompt_ids, _encode_continuation(tokenizer, content + (end if ended else "")))


def render_sampled(
    tokenizer: Any,
    messages: Sequence[Message],
    sampled: np.ndarray,
    *,
    uid: str,
    stop_ids: Collection[int] | None = None,
    ended: bool = True,
) -> Example | None:
    """Tokenise a conversation whose completion's own tokens are known; return None where they are not its own.

    They are when they read as what a student would be trained on without them; another way to split the text is fine,
    and so is any token that ends a turn at its end. An answer whose reasoning another template opened, or which stops
    by a token that ends nothing here, is not the same text.

    Args:
        sampled: (T,) the completion's token ids, without what the template wrote, with the end token.
        uid: the trace whose tokens these are.
        stop_ids, ended: as in `render`; the end token of a turn that was cut off (one that was scored) is left out.

    Raises:
        UserError: as in `render`.
    """
    prompt_ids, content, end = _turn(tokenizer, messages, stop_ids)
    if not prompt_ids:  # nothing predicts the first token, so its numbers would have no place
        return None
    own = [int(token) for token in sampled]
    if not ended or not _same_text(tokenizer, own, _encode_continuation(tokenizer, content + end)):
        special = tokenizer.added_tokens_decoder
        stops = {tokenizer.eos_token_id, *(stop_ids or ()), *(i for i in _encode(tokenizer, end) if i in special)}
        stopped = bool(own) and own[-1] in stops
        body = own[:-1] if stopped else own
        if (ended and not stopped) or not _same_text(tokenizer, body, _encode_continuation(tokenizer, content)):
            return None
        own = own if ended else body
    return replace(_example(prompt_ids, own), uid=uid)


def render_plain(tokenizer: Any, prompt: str, completion: str) -> Example:
    """Tokenise a prompt and completion that are plain strings: no template, the tokenizer's own BOS, eos at the end."""
    ids = list(tokenizer.encode(prompt)) if prompt else []
    return _example(ids, _encode_continuation(tokenizer, completion + _eos(tokenizer)))


def end_of_turn(tokenizer: Any, messages: Sequence[Message], stop_ids: Collection[int] | None = None) -> str:
    """Return what closes an assistant turn, up to and including the token that stops generation.

    Found by rendering the conversation with a known word as the answer. What the template puts behind the stop token
    (often a newline) is never generated and is left out.
    """
    answered = [*messages[:-1], {"role": "assistant", "content": SENTINEL}]
    _, found, closing = _apply(tokenizer, answered, add_generation_prompt=False).rpartition(SENTINEL)
    if not found:
        raise UserError("the chat template does not print the assistant's content, so it cannot be trained on")
    eos = _eos(tokenizer)
    stops = [eos, *tokenizer.convert_ids_to_tokens([i for i in stop_ids or () if i is not None])]
    ends = [closing.index(stop) + len(stop) for stop in stops if stop and stop in closing]
    return closing[: min(ends)] if ends else closing.rstrip() + eos


def answer_only(content: str, *, predicted: str | None = None, gold: str | None = None) -> str:
    """Return the final answer of a reasoning trace, for the answers-only baseline.

    That is what follows the reasoning; without a reasoning block the last ``\\boxed{...}``; without one, the answer
    that the verifier read, or the gold, in a box.

    Raises:
        UserError: none of these exists.
    """
    if CLOSE in content and (answer := content.rpartition(CLOSE)[2].strip()):
        return answer
    if boxed := _last_boxed(content):
        return boxed
    if known := predicted or gold:
        return f"\\boxed{{{known}}}"
    raise UserError("no final answer: no text after </think>, no \\boxed{...}, and neither 'predicted' nor 'gold'")


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of generated ids without special tokens, unless the reasoning tags themselves are special."""
    keep_special = {"<think>", "</think>"} & set(tokenizer.all_special_tokens)
    return str(tokenizer.decode(ids, skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False))


def continuation(prefill: str, content: str) -> str:
    """Return the part of the assistant's `content` that comes after what the template already wrote."""
    if not prefill:
        return content
    if content.startswith(prefill):
        return content[len(prefill) :]
    if content.startswith("<think>"):
        return content.removeprefix("<think>").removeprefix("\n")
    if CLOSE in prefill or CLOSE in content:
        return content
    # The template opened a reasoning block that this answer does not have: close it, as such a model would.
    return f"\n{CLOSE}\n\n{content}"


def _apply(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("the tokenizer has no chat template: give one with --chat-template FILE.jinja")
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise UserError(f"the chat template refuses messages with the roles [{roles}]: {error}") from error


def _turn(tokenizer: Any, messages: Sequence[Message], stop_ids: Collection[int] | None) -> tuple[list[int], str, str]:
    """Return the ids of the prompt, the text that the model is to write, and what then closes the turn."""
    if not messages or messages[-1].get("role") != "assistant":
        raise UserError("messages must end with the assistant turn to train on")
    prompt, prefill = render_prompt(tokenizer, messages[:-1])
    content = continuation(prefill, messages[-1]["content"])
    return _encode(tokenizer, prompt), content, end_of_turn(tokenizer, messages, stop_ids)


def _example(prompt_ids: list[int], completion_ids: list[int]) -> Example:
    # Prompt and completion are tokenised apart: at generation time the model is given exactly the prompt's tokens and
    # continues from there, so a token that merges across the boundary could never occur. Special tokens are already
    # in the texts (the template writes BOS itself), hence none is added.
    ids = np.array(prompt_ids + completion_ids, dtype=np.int32)
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[max(1, len(prompt_ids)) :] = 1.0  # nothing predicts the very first token
    if not weights.any():
        raise UserError("nothing to train on: the completion is empty")
    return Example(ids, weights, begin=len(prompt_ids))


def _same_text(tokenizer: Any, one: list[int], other: list[int]) -> bool:
    if one == other:
        return True
    texts = {tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (one, other)}
    return len(texts) == 1


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _encode_continuation(tokenizer: Any, text: str) -> list[int]:
    """Encode a text that continues another, without the space SentencePiece tokenizers put before a beginning."""
    first = tokenizer.convert_ids_to_tokens(_encode(tokenizer, "a")[:1])
    if not first or first[0][0] not in "▁Ġ":
        return _encode(tokenizer, text)
    anchor, anchored = _encode(tokenizer, "\n"), _encode(tokenizer, "\n" + text)
    # A text that begins with a newline may have merged with the anchor; then the added space never showed either.
    return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else _encode(tokenizer, text)


def _eos(tokenizer: Any) -> str:
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no eos token, so the student could not learn to stop: set eos_token")
    return tokenizer.eos_token


def _last_boxed(text: str) -> str:
    """Return the last ``\\boxed{...}`` with balanced braces, or an empty string."""
    start = text.rfind("\\boxed{")
    depth = 0
    for end in range(start, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0 and text[end] == "}":
            return text[start : end + 1]
    return ""
