"""Two tokenizers side by side, in numbers: what a person wants to know before spending an hour of GPU on distilling.

No model is needed. What the two share is counted byte for byte over the vocabularies, how they split a text over that
text. One side alone is `align.audit.traits`, the judgement of methods `align.audit.perfect_student`; the words around
the numbers are `align.audit.table`, the picture is `align.audit.page`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from align.audit.perfect_student import Outcomes, entropy, judged
from align.audit.traits import DigitPolicy, Template, changes, digit_policy, template_of
from align.byte_view import ByteView, Tokens, alteration, byte_view, tokenise
from align.engine.opening import open_alignment
from align.identity import same_vocabulary
from align.spans import spans_of
from align.specials import roles, special_pairs
from distill.token_signal import SignalSpec

SHOWN_SPANS = 12
SHOWN_REASONS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two tokenizers.

    Attributes:
        name: what the user called it.
        tokens: size of the vocabulary.
        special: how many of these are special, so that they stand for no text.
        kind: "byte-level" or "sentencepiece".
        shared: tokens whose bytes the other side has as one token, too.
        shared_share: the share of these among the tokens that stand for text.
        digits, changes, template: see `align.audit.traits`.
        missing_bytes: those of the 256 bytes that no token stands for alone.
        leading_space: whether it puts a space before a text that begins a sequence.
        roles: role (`align.specials`) -> spellings of the special tokens that play it, () for none.
        text_tokens: tokens of the text.
        coverage: the share of these that are one token on the other side as well.
    """

    name: str
    tokens: int
    special: int
    kind: str
    shared: int
    shared_share: float
    digits: DigitPolicy
    missing_bytes: tuple[int, ...]
    changes: tuple[str, ...]
    leading_space: bool
    roles: dict[str, tuple[str, ...]]
    template: Template | None
    text_tokens: int
    coverage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ManySpan:
    """A span that is more than one token on a side, and how often the text has it."""

    student: tuple[bytes, ...]
    teacher: tuple[bytes, ...]
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Everything `distill align` finds out.

    Attributes:
        student, teacher: the two sides.
        vocabulary: "same" (every id means the same), "permuted" (the same byte strings, other ids) or "different".
        shared: byte strings that are one token on both sides.
        texts, bytes: what was compared.
        skipped: how many texts could not be compared, because a side changes them.
        reasons: of the first of these, which text it is and why.
        special_pairs: (student's, teacher's) spelling of the special tokens that mean the same.
        spans: S, the smallest stretches at whose ends both sides can be cut.
        token_bits: entropy of the student's tokens that begin a span.
        outcomes: method -> what it would do to a perfect student on this text; empty without text.
        by_kind: kind of text -> share of the student's tokens that are one token of the teacher's.
        many: the most frequent spans that are not one token on both sides.
        many_spans: how many such spans there are.
        method: what `--align auto` takes of a teacher that runs; "hard-labels" where no text could be compared.
        drawn_method: what it takes of stored numbers that are random draws.
        why: what decided for `method`, in one line.
    """

    student: Side
    teacher: Side
    vocabulary: str
    shared: int
    texts: int
    bytes: int
    skipped: int
    reasons: tuple[str, ...]
    special_pairs: tuple[tuple[str, str], ...]
    spans: int
    token_bits: float
    outcomes: dict[str, Outcomes]
    by_kind: dict[str, float]
    many: tuple[ManySpan, ...]
    many_spans: int
    method: str
    drawn_method: str
    why: str


def audit(
    student: Any,
    teacher: Any,
    texts: Iterable[tuple[str, str]],
    *,
    names: tuple[str, str] = ("student", "teacher"),
    configs: tuple[Any, Any] = (None, None),
) -> Audit:
    """Compare two tokenizers.

    Args:
        student, teacher: transformers tokenizers.
        texts: (kind, text) pairs, each encoded by itself as what follows a prompt.
        names: what to call the two.
        configs: what may name further end tokens of each side (`align.specials.stop_ids`).

    Raises:
        UserError: a tokenizer that cannot be read as bytes or has no end token, or a chat template that cannot be
            rendered.
    """
    tokenizers, views = (student, teacher), (byte_view(student), byte_view(teacher))
    strings = [frozenset(filter(None, view.tokens)) for view in views]
    count = _Count()
    for number, (kind, text) in enumerate(texts, 1):
        own, other = (tokenise(t, view, text, continued=True) for t, view in zip(tokenizers, views, strict=True))
        if own is not None and other is not None:
            count.take(kind, own, other)
        else:
            side, who = (0, "student") if own is None else (1, "teacher")
            change = alteration(tokenizers[side], views[side], text, continued=True)
            count.skip(f"text {number}: the {who}'s tokenizer {change}")
    roots = np.concatenate(count.roots)
    described = [
        _side(tokenizers[i], views[i], strings[1 - i], names[i], configs[i], count.tokens[i], count.one) for i in (0, 1)
    ]
    pairs = special_pairs(student, teacher, student_config=configs[0], teacher_config=configs[1])
    outcomes = judged(student, teacher, roots, configs=configs)
    method, drawn, why = _recommended(student, teacher, outcomes)
    return Audit(
        student=described[0],
        teacher=described[1],
        vocabulary=_vocabulary(student, teacher, views),
        shared=len(strings[0] & strings[1]),
        texts=count.texts,
        bytes=count.bytes,
        skipped=count.skipped,
        reasons=tuple(count.reasons),
        special_pairs=tuple(
            (student.convert_ids_to_tokens(a), teacher.convert_ids_to_tokens(b)) for a, b in sorted(pairs.items())
        ),
        spans=len(roots),
        token_bits=entropy(roots[:, 0]),
        outcomes=outcomes,
        by_kind={kind: one / tokens for kind, (one, tokens) in count.kinds.items() if tokens},
        many=tuple(ManySpan(student=a, teacher=b, count=n) for (a, b), n in count.many.most_common(SHOWN_SPANS)),
        many_spans=count.many.total(),
        method=method,
        drawn_method=drawn,
        why=why,
    )


def percent(share: float) -> str:
    """Return `99.87 %`, or `100 %`; never a rounded `100.00 %` for something that is not all."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.99):.2f} %"


def short_names(student: str, teacher: str) -> tuple[str, str]:
    """Return the last parts of two models' names, or the whole names where these are alike."""
    last = [name.rstrip("/").rpartition("/")[2] for name in (student, teacher)]
    return (last[0], last[1]) if last[0] != last[1] and all(last) else (student, teacher)


def as_json(found: Audit) -> dict[str, Any]:
    """Return an audit as plain values: bytes as text, with `\\xHH` for those that are none by themselves."""

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.decode("utf-8", "backslashreplace")
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    return plain(asdict(found))


class _Count:
    """What the texts add up to, so that none of them has to be kept."""

    def __init__(self) -> None:
        self.texts = self.bytes = self.one = self.skipped = 0
        self.tokens = [0, 0]
        self.roots: list[np.ndarray] = [np.zeros((0, 2), np.int64)]
        self.kinds: dict[str, tuple[int, int]] = {}
        self.many: Counter[tuple[tuple[bytes, ...], tuple[bytes, ...]]] = Counter()
        self.reasons: list[str] = []

    def take(self, kind: str, own: Tokens, other: Tokens) -> None:
        """Count a text in the student's and in the teacher's tokens."""
        spans = spans_of(own.pieces, other.pieces)
        if len(spans):
            firsts = np.take(own.ids, spans.student[:, 0]), np.take(other.ids, spans.teacher[:, 0])
            self.roots.append(np.stack(firsts, 1))
        many = (np.diff(spans.student) != 1) | (np.diff(spans.teacher) != 1)
        for place in many[:, 0].nonzero()[0]:
            (a, b), (c, d) = spans.student[place], spans.teacher[place]
            self.many[tuple(own.pieces[a:b]), tuple(other.pieces[c:d])] += 1
        one = len(spans) - int(many.sum())
        self.texts, self.one = self.texts + 1, self.one + one
        self.bytes += sum(map(len, own.pieces))
        self.tokens = [self.tokens[0] + len(own.ids), self.tokens[1] + len(other.ids)]
        before = self.kinds.get(kind, (0, 0))
        self.kinds[kind] = before[0] + one, before[1] + len(own.ids)

    def skip(self, reason: str) -> None:
        """Count a text that is not compared."""
        self.skipped += 1
        if len(self.reasons) < SHOWN_REASONS:
            self.reasons.append(reason)


def _side(
    tokenizer: Any, view: ByteView, others: frozenset[bytes], name: str, config: Any, tokens: int, one: int
) -> Side:
    ordinary = [token for token in view.tokens if token]
    shared = sum(token in others for token in ordinary)
    played = roles(tokenizer, config)
    return Side(
        name=name,
        tokens=len(view),
        special=len(view.special),
        kind=view.kind,
        shared=shared,
        shared_share=shared / max(1, len(ordinary)),
        digits=digit_policy(tokenizer, view),
        missing_bytes=view.missing_bytes(),
        changes=changes(tokenizer, view),
        leading_space=view.leading_space,
        roles={
            role: tuple(tokenizer.convert_ids_to_tokens(list(ids))) for role, ids in roles(tokenizer, config).items()
        },
        template=template_of(tokenizer, stop_ids=played["stop"]),
        text_tokens=tokens,
        coverage=one / max(1, tokens),
    )


def _recommended(student: Any, teacher: Any, outcomes: Mapping[str, Outcomes]) -> tuple[str, str, str]:
    method, comparison = open_alignment("auto", student, teacher)
    if method == "identity":
        return method, method, comparison.why
    if not outcomes:
        return "hard-labels", "hard-labels", "no text could be compared byte for byte, so only text can be learnt"
    drawn, _ = open_alignment("auto", student, teacher, teaching=SignalSpec("sampled", 1))
    shares = ", ".join(f"{name} {percent(each.agreement)}" for name, each in outcomes.items())
    return method, drawn, f"{comparison.why}; a perfect student's outcomes agree: {shares}"


def _vocabulary(student: Any, teacher: Any, views: tuple[ByteView, ByteView]) -> str:
    if same_vocabulary(student, teacher).same:
        return "same"
    own, other = (Counter(filter(None, view.tokens)) for view in views)
    return "permuted" if own == other else "different"
