"""Which alignment a run takes: one vocabulary on both sides, or a method across two, by what the teacher can say.

`open_alignment` decides by name, tokenizers and teacher, and reads no model; `open_training` makes of it what the
trainer asks (`distill.alignment.Alignment`), None where nothing is to be aligned.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Literal

from align.byte_view import byte_view
from align.engine.token_alignment import TokenAlignment, token_alignment
from align.identity import Comparison, identity, same_vocabulary
from align.methods import METHODS, Method
from align.specials import stop_ids
from distill.errors import UserError
from distill.tables import lookup
from distill.token_signal import SignalSpec

IDENTITY = "identity"
# What a running teacher says, or the kind of numbers that were stored of one.
Teaching = Literal["logits"] | SignalSpec


def open_alignment(
    name: str, student_tokenizer: Any, teacher_tokenizer: Any, *, teaching: Teaching = "logits"
) -> tuple[str, Comparison]:
    """Return the alignment that `name` asks for, and how the two vocabularies compare.

    Args:
        name: "identity", a name in `METHODS`, or "auto": identity where it fits, else the method that does best with
            what the teacher says.
        teaching: what the teacher says.

    Returns:
        The method's name (never "auto") and the comparison; its `why` says what decided, in one line.

    Raises:
        UserError: an unknown name; identity for two vocabularies; a tokenizer that cannot be read as bytes; a method
            that needs more than the teacher says.
    """
    if name not in ("auto", IDENTITY):
        _method(name)
    comparison = same_vocabulary(student_tokenizer, teacher_tokenizer)
    if name == IDENTITY or (name == "auto" and comparison.same):
        return IDENTITY, identity(student_tokenizer, teacher_tokenizer)
    for tokenizer in (student_tokenizer, teacher_tokenizer):
        try:
            byte_view(tokenizer)
        except UserError as error:
            raise UserError(
                f"student and teacher have different vocabularies: {comparison.why}; {error}; --mode hard-labels works "
                "with any two"
            ) from error
    chosen, why = _choose(student_tokenizer, teacher_tokenizer, teaching) if name == "auto" else (name, comparison.why)
    _check(chosen, _method(chosen), teaching)
    return chosen, Comparison(
        same=comparison.same,
        shared=comparison.shared,
        student_only=comparison.student_only,
        teacher_only=comparison.teacher_only,
        why=why,
    )


def open_training(
    name: str,
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    teaching: Teaching = "logits",
    student_stops: Collection[int] = (),
    teacher_stops: Collection[int] = (),
) -> TokenAlignment | None:
    """Return the alignment that training takes, None where both sides have one vocabulary.

    Args:
        student_stops, teacher_stops: ids that end an answer, beside those that the tokenizers name.

    Raises:
        UserError: see `open_alignment`.
    """
    chosen, comparison = open_alignment(name, student_tokenizer, teacher_tokenizer, teaching=teaching)
    if chosen == IDENTITY:
        return None
    return token_alignment(
        chosen,
        comparison.why,
        student_tokenizer=student_tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        student_stops=[*dict.fromkeys([*stop_ids(student_tokenizer), *sorted(student_stops)])],
        teacher_stops=[*dict.fromkeys([*stop_ids(teacher_tokenizer), *sorted(teacher_stops)])],
    )


def _method(name: str) -> Method:
    if name not in METHODS and ":" not in name:
        lookup({IDENTITY: None, **METHODS}, name, "alignment")
    method = lookup(METHODS, name, "alignment")
    if not isinstance(method, Method):
        raise UserError(f"{name} must name an align.methods.Method, not a {type(method).__name__}")
    return method


def _choose(student_tokenizer: Any, teacher_tokenizer: Any, teaching: Teaching) -> tuple[str, str]:
    if isinstance(teaching, SignalSpec):
        if teaching.kind == "sampled":
            return "alm", "the teacher's numbers are random draws: only the likelihood of its text can be compared"
        known = f"the teacher's {teaching.size} likeliest tokens are known"
    else:
        known = "the teacher's whole distribution is known"
    if _split_alike(student_tokenizer, teacher_tokenizer):
        return "shared_kl", f"both split text alike, under other ids; {known}"
    return "cspc", f"the tokenizers split text differently; {known}"


def _split_alike(student_tokenizer: Any, teacher_tokenizer: Any) -> bool:
    """Whether two tokenizers cut every text alike: the same merges in the same order, of equally spelled pieces."""
    rules = [json.loads(each.backend_tokenizer.to_str()) for each in (student_tokenizer, teacher_tokenizer)]
    student, teacher = rules
    same = all(student[stage] == teacher[stage] for stage in ("normalizer", "pre_tokenizer", "decoder"))
    models = [{key: value for key, value in each["model"].items() if key != "vocab"} for each in rules]
    return (
        same and models[0] == models[1] and student_tokenizer.get_vocab().keys() == teacher_tokenizer.get_vocab().keys()
    )


def _check(name: str, method: Method, teaching: Teaching) -> None:
    if not isinstance(teaching, SignalSpec) or (method.needs == "realised" and teaching.logprobs):
        return
    if method.needs == "realised":
        raise UserError(f"--align {name} reads log-probabilities, and only counts of draws were stored: score anew")
    if method.needs == "logits":
        raise UserError(f"--align {name} needs a teacher that runs (--teacher): it reads whole distributions")
    if teaching.kind == "sampled":
        raise UserError(
            f"--align {name} needs the teacher's likeliest tokens (--top-logprobs K), and random draws were stored: "
            "take --align alm, or score the traces anew"
        )
