"""Two models reading one text: what each would have said at every token of it.

With one vocabulary each token gets the forward KL divergence between the models, in nats. Across vocabularies there is
no such number for a token: there each *span* of the same bytes gets the difference of the log-probabilities that the
two give it. Either way the likeliest tokens of both stand beside it, as text.

Logits are held a block of rows at a time. Nothing is kept on disk here (`distill.token_view`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.alignment import Alignment
from distill.batch import Batch
from distill.divergences import forward_kl
from distill.errors import UserError
from distill.forward import read_head, run
from distill.head import Head
from distill.models import context_length, end_token_ids, load_model, load_tokenizer
from distill.records import Message, Trace
from distill.render import Example, render, render_prompt

LIKELIEST = 5
ROWS = 256  # of logits held at once
ANSWER_TOKENS = 2048  # most that a model writes where no limit is given
CONTEXT = 6  # tokens before one that decide how a tokenizer writes it
# (where the model is, its tokenizer) of the student and of the teacher -> None for one vocabulary
Aligner = Callable[[tuple[str, Any], tuple[str, Any]], Alignment | None]


@dataclass(frozen=True, slots=True)
class Shown:
    """One text to be looked at: who wrote it, for which question, and whether it came to its end."""

    arm: str
    prompt_uid: str
    messages: tuple[Message, ...]
    completion: str
    ended: bool

    @classmethod
    def of(cls, arm: str, trace: Trace) -> Shown:
        """Return the text of a trace."""
        return cls(arm, trace.prompt_uid, trace.messages, trace.completion, trace.finish_reason == "stop")

    @property
    def turns(self) -> list[Message]:
        """The conversation with the answer as its last turn."""
        return [*self.messages, {"role": "assistant", "content": self.completion}]


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model that reads texts."""

    location: str
    model: Any
    head: Head
    tokenizer: Any

    @property
    def width(self) -> int:
        """How many outcomes its logits have that mean a token."""
        return min(len(self.tokenizer), int(self.model.get_output_embeddings().weight.shape[0]))


def open_speaker(location: str, who: str, *, trust_remote_code: bool = False) -> Speaker:
    """Load a model to read with.

    Args:
        who: "student" or "teacher", for messages.

    Raises:
        UserError: no such model or tokenizer, or a model whose logits cannot be read.
    """
    model = load_model(location, trust_remote_code=trust_remote_code).eval()
    tokenizer = load_tokenizer(location, trust_remote_code=trust_remote_code)
    return Speaker(location, model, read_head(model, who), tokenizer)


@torch.inference_mode()
def greedy_answer(speaker: Speaker, messages: Sequence[Message], limit: int | None) -> dict[str, Any]:
    """Return a model's most likely answer, token by token, as {"text", "ended"}."""
    prompt, prefill = render_prompt(speaker.tokenizer, messages)
    ids = speaker.tokenizer.encode(prompt, add_special_tokens=False, return_tensors="pt").to(speaker.model.device)
    ends = sorted(end_token_ids(speaker.model, speaker.tokenizer))
    room = context_length(speaker.model.config)
    most = min(limit or ANSWER_TOKENS, (room or ids.shape[1] + ANSWER_TOKENS) - ids.shape[1])
    out = speaker.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=most,
        eos_token_id=ends,
        pad_token_id=speaker.tokenizer.pad_token_id,
    )[0, ids.shape[1] :].tolist()
    ended = bool(out) and out[-1] in ends
    written = speaker.tokenizer.decode(out[:-1] if ended else out, clean_up_tokenization_spaces=False)
    return {"text": prefill + written, "ended": ended}


@torch.inference_mode()
def compared(student: Speaker, teacher: Speaker, text: Shown, align: Aligner) -> dict[str, Any]:
    """Return what two models would have said at every token of a text: see `view_tokens`.

    Raises:
        UserError: the text cannot be rendered for a model, is longer than its context, or is not the same bytes in the
            teacher's tokens.
    """
    alignment = align((student.location, student.tokenizer), (teacher.location, teacher.tokenizer))
    example = render(
        student.tokenizer, text.turns, stop_ids=end_token_ids(student.model, student.tokenizer), ended=text.ended
    )
    if alignment is None:
        return _by_token(student, teacher, example)
    paired = alignment.pair(example, text.turns)
    if paired is None:
        raise UserError("the teacher's tokenizer changes its text")
    return _by_span(student, teacher, paired)


def _by_token(student: Speaker, teacher: Speaker, example: Example) -> dict[str, Any]:
    ids, begin = example.input_ids.tolist(), example.begin
    width = min(student.width, teacher.width)
    tokens = []
    rows = zip(_log_probs(student, ids, begin, width), _log_probs(teacher, ids, begin, width), strict=True)
    place = max(begin, 1)
    for own, theirs in rows:
        nats = forward_kl(own, theirs).tolist()
        best = [logp.topk(min(LIKELIEST, width)) for logp in (own, theirs)]
        for row, value in enumerate(nats):
            said = [_likeliest(student.tokenizer, ids[:place], b.indices[row], b.values[row]) for b in best]
            tokens.append({"nats": round(value, 4), "student": said[0], "teacher": said[1]})
            place += 1
    texts = pieces(student.tokenizer, ids, max(begin, 1))
    mean = sum(token["nats"] for token in tokens) / len(tokens)
    return {
        "kind": "kl",
        "mean": mean,
        "tokens": [{"text": piece, **token} for piece, token in zip(texts, tokens, strict=True)],
    }


def _by_span(student: Speaker, teacher: Speaker, example: Example) -> dict[str, Any]:
    assert example.other is not None, "paired before"
    ids, other = example.input_ids.tolist(), example.other
    sides = []
    for speaker, tokens, begin in ((student, ids, example.begin), (teacher, other.input_ids.tolist(), other.begin)):
        first = max(begin, 1)
        realised: dict[int, float] = {}
        likeliest: dict[int, list[list[Any]]] = {}
        place = first
        for block in _log_probs(speaker, tokens, begin, speaker.width):
            best = block.topk(min(LIKELIEST, speaker.width))
            for row in range(len(block)):
                realised[place] = float(block[row, tokens[place]])
                likeliest[place] = _likeliest(speaker.tokenizer, tokens[:place], best.indices[row], best.values[row])
                place += 1
        sides.append((realised, likeliest))
    (own, own_best), (theirs, their_best) = sides
    first = max(example.begin, 1)
    texts = dict(enumerate(pieces(student.tokenizer, ids, first), first))
    tokens, gaps, place = [], [], first
    for a, b, c, d in other.spans.tolist():
        tokens += [{"text": texts[i], "nats": None, "student": [], "teacher": []} for i in range(place, a)]
        difference = sum(theirs[i] for i in range(c, d)) - sum(own[i] for i in range(a, b))
        gaps.append(abs(difference))
        said = {"student": own_best[a], "teacher": their_best[c]}
        tokens.append({"text": "".join(texts[i] for i in range(a, b)), "nats": round(difference, 4), **said})
        place = b
    tokens += [{"text": texts[i], "nats": None, "student": [], "teacher": []} for i in range(place, len(ids))]
    return {"kind": "spans", "mean": sum(gaps) / max(1, len(gaps)), "tokens": tokens}


def _log_probs(speaker: Speaker, ids: Sequence[int], begin: int, width: int) -> Iterator[Tensor]:
    """Yield (rows, width) log-probabilities of the tokens from `begin` on (nothing predicts the very first one)."""
    room = context_length(speaker.model.config)
    if room is not None and len(ids) > room:
        raise UserError(f"a text of {len(ids)} tokens is longer than the {room} that {speaker.location} can read")
    row = torch.tensor([list(ids)], device=speaker.model.device)
    batch = Batch(row, torch.ones_like(row), torch.zeros(row.shape, device=row.device))
    hidden = run(speaker.model, speaker.head, batch).hidden[0, max(begin, 1) - 1 : -1]
    for start in range(0, len(hidden), ROWS):
        yield speaker.head(hidden[start : start + ROWS])[:, :width].float().log_softmax(-1).cpu()


def _likeliest(tokenizer: Any, before: Sequence[int], ids: Tensor, logps: Tensor) -> list[list[Any]]:
    said = [_piece(tokenizer, before, index) for index in ids.tolist()]
    return [[text, round(p, 4)] for text, p in zip(said, logps.exp().tolist(), strict=True)]


def _piece(tokenizer: Any, before: Sequence[int], index: int) -> str:
    """Return the text that a token adds: many tokenizers write the space between words only where both are there."""
    context = list(before[-CONTEXT:])
    whole, part = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in ([*context, index], context))
    return whole[len(part) :] if whole.startswith(part) else tokenizer.decode([index])


def pieces(tokenizer: Any, ids: Sequence[int], begin: int) -> list[str]:
    """Return the text of each token from `begin` on; a character of several tokens stands with its last."""
    found, start = [], begin
    for place in range(begin, len(ids)):
        context = list(ids[max(0, start - CONTEXT) : start])
        part = tokenizer.decode(context, clean_up_tokenization_spaces=False)
        whole = tokenizer.decode([*context, *ids[start : place + 1]], clean_up_tokenization_spaces=False)
        text = whole[len(part) :] if whole.startswith(part) else tokenizer.decode(ids[start : place + 1])
        if text.endswith("\ufffd") and place + 1 < len(ids) and place - start < 4:
            found.append("")
        else:
            found.append(text)
            start = place + 1
    return found
