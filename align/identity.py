"""The identity alignment: student and teacher have one vocabulary, so their logits are compared column by column.

Two tokenizers have one vocabulary when every id means the same token on both sides. How they split text may differ:
the trace is tokenised once, by the student's. Rows of logits beyond the tokenizer (Qwen2.5: 151665 tokens, 151936 or
152064 logits) mean nothing and do not count; whoever compares logits must leave them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distill.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two vocabularies side by side, in numbers of tokens.

    `shared` counts tokens with the same spelling and the same id; `student_only` and `teacher_only` the others of each
    side. `why` says in one line what decided.
    """

    same: bool
    shared: int
    student_only: int
    teacher_only: int
    why: str


def same_vocabulary(student_tokenizer: Any, teacher_tokenizer: Any) -> Comparison:
    """Return whether every id of either tokenizer means the same token in the other, and how many do.

    A token is its spelling in the vocabulary; spellings are compared only between tokenizers that write bytes alike:
    byte-level `Ġ` and sentencepiece `▁` are different tokens here.
    """
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    shared = sum(teacher.get(token) == index for token, index in student.items())
    counts = {"shared": shared, "student_only": len(student) - shared, "teacher_only": len(teacher) - shared}
    if shared == len(student) == len(teacher):
        # The same spelling stands for other bytes when only one side reads it byte-level: compare what they say.
        odd = _decoded_otherwise(student_tokenizer, teacher_tokenizer, student)
        if odd is None:
            return Comparison(same=True, why=f"all {shared} tokens have the same id on both sides", **counts)
        return Comparison(same=False, why=f"token {odd!r} stands for different text on the two sides", **counts)
    moved = next(
        (t for t in sorted(student, key=student.__getitem__) if t in teacher and teacher[t] != student[t]), None
    )
    if moved is not None:
        detail = f"token {moved!r} is {student[moved]} for the student and {teacher[moved]} for the teacher"
    else:
        alone = min((t for t in student if t not in teacher), key=student.__getitem__, default=None)
        side = "the teacher" if alone is not None else "the student"
        token = alone if alone is not None else min((t for t in teacher if t not in student), key=teacher.__getitem__)
        detail = f"token {token!r} is unknown to {side}"
    numbers = f"{shared} of {len(student)} student and {len(teacher)} teacher tokens have the same id"
    return Comparison(same=False, why=f"{numbers}; {detail}", **counts)


def _decoded_otherwise(student_tokenizer: Any, teacher_tokenizer: Any, vocabulary: dict[str, int]) -> str | None:
    """Return a token that the two decode to different text, or None; a spread of 256 tokens is looked at."""
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    for token in tokens[:: max(1, len(tokens) // 256)]:
        ids = [vocabulary[token]]
        student_text = student_tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if student_text != teacher_tokenizer.decode(ids, clean_up_tokenization_spaces=False):
            return token
    return None


def identity(student_tokenizer: Any, teacher_tokenizer: Any) -> Comparison:
    """Return the comparison of one vocabulary with itself.

    Raises:
        UserError: the vocabularies differ.
    """
    comparison = same_vocabulary(student_tokenizer, teacher_tokenizer)
    if not comparison.same:
        raise UserError(
            f"student and teacher have different vocabularies: {comparison.why}; --align auto compares across them, "
            "and --mode hard-labels needs no alignment"
        )
    return comparison
