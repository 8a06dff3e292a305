"""An audit in words: the rows of its table, sentences about what differs, and both on a terminal.

The rows and the sentences are those of the page as well (`align.audit.page`). Names, templates and tokens were written
by others: what is not printable is spelled out before it reaches a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from align.audit.comparison import Audit, Side, percent
from align.audit.traits import UTF8_BYTES, Template

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

DASH = "–"
ROLE_WORDS = {
    "stop": "stops at",
    "bos": "BOS",
    "pad": "padding",
    "unk": "unknown",
    "think_open": "opens reasoning",
    "think_close": "closes reasoning",
}


def visible(text: str | bytes) -> str:
    """Return a text on one line, with `\\n`, `\\x1b` and `\\xe5` for what cannot be seen or is half a character."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def rows(found: Audit) -> list[tuple[str, str, str]]:
    """Return (what, the student's, the teacher's) for everything that either side has by itself."""
    return [(name, value(found.student), value(found.teacher)) for name, value in _ROWS.items()]


def _bytes(side: Side) -> str:
    if not side.missing_bytes:
        return "none"
    listed = " ".join(f"{byte:02X}" for byte in side.missing_bytes)
    return f"{len(side.missing_bytes)}: {listed}"


def _template(side: Side, text: str, *, none: str = "none") -> str:
    return "no chat template" if side.template is None else visible(text) or none


def _field(side: Side, name: str) -> str:
    return str(getattr(side.template, name, ""))


def _role(role: str, side: Side) -> str:
    return visible(", ".join(side.roles[role])) or ("ordinary text" if role.startswith("think") else "none")


_ROWS: dict[str, Callable[[Side], str]] = {
    "vocabulary": lambda s: f"{s.tokens:,} tokens, {s.kind}",
    "shared, byte for byte": lambda s: f"{s.shared:,} ({percent(s.shared_share)})",
    "tokens of the text": lambda s: f"{s.text_tokens:,}",
    "one token on both sides": lambda s: percent(s.coverage) if s.text_tokens else DASH,
    "digits in a token": lambda s: str(s.digits),
    "number takes its space": lambda s: "yes" if s.digits.after_space else "no",
    "space before a text": lambda s: "added" if s.leading_space else "none",
    "missing single bytes": _bytes,
    "text it changes": lambda s: ", ".join(s.changes) or "none",
    **{what: partial(_role, role) for role, what in ROLE_WORDS.items()},
    "a prompt begins with": lambda s: _template(s, _field(s, "opens"), none="no special token"),
    "default system prompt": lambda s: _template(s, _field(s, "default_system")),
    "always written first": lambda s: _template(s, _field(s, "header"), none="nothing"),
    "answer opened with": lambda s: _template(s, _field(s, "prefill"), none="nothing"),
    "answer closed with": lambda s: _template(s, _field(s, "end"), none="nothing"),
}


def remarks(found: Audit) -> list[str]:
    """Return what a person should know before training, a sentence or two each; empty where nothing differs."""
    return [*_about_text(found), *_about_templates(found.student, found.teacher)]


def _both(found: Audit) -> tuple[tuple[str, Side], tuple[str, Side]]:
    return ("student", found.student), ("teacher", found.teacher)


def _about_text(found: Audit) -> Iterator[str]:
    own, other = found.student.digits, found.teacher.digits
    if (own.most, own.fixed, own.first_short) != (other.most, other.fixed, other.first_short):
        yield (
            f"Numbers are cut differently: digits in a token, student: {own}; teacher: {other}. A method that compares "
            'only tokens which both sides have is wrong on numbers: where 201 can be one token, "2" says that no digit '
            "follows."
        )
    elif own.after_space != other.after_space:
        yield "Only one side puts the space before a number into its first token."
    for who, side in _both(found):
        if side.missing_bytes:
            never = sum(byte not in UTF8_BYTES for byte in side.missing_bytes)
            some = f" ({never} of them occur in no UTF-8 text)" if never else ""
            count = len(side.missing_bytes)
            yield f"The {who} has no token for {count} single bytes{some}: texts with one are left out."
        if side.changes:
            yield f"The {who}'s tokenizer changes text: {', '.join(side.changes)}. Such texts are left out and counted."
    if found.skipped:
        total, reasons = found.skipped + found.texts, "; ".join(found.reasons)
        yield f"{found.skipped} of {total} texts are left out. {visible(reasons)}."


def _about_templates(student: Side, teacher: Side) -> Iterator[str]:
    one, two = student.template, teacher.template
    for who, template in (("student", one), ("teacher", two)):
        if template is None:
            yield f"The {who} has no chat template: conversations need one, prompts and completions as strings do not."
            continue
        if template.dated:
            yield f"The {who}'s template writes the date into the prompt: the same conversation changes daily."
        if not template.takes_system:
            yield f"The {who}'s template does not take a system message."
        if template.drops_reasoning:
            yield f"The {who}'s template drops the reasoning of earlier answers."
    if one is None or two is None:
        return
    if one.default_system != two.default_system:
        yield f"Without a system message the templates put in different ones: {_quoted(one, two, 'default_system')}."
    if one.header != two.header:
        yield f"Before the first message the templates write different words: {_quoted(one, two, 'header')}."
    if one.prefill != two.prefill:
        yield f"The templates open the answer differently: {_quoted(one, two, 'prefill')}."
    if one.end != two.end:
        yield f"An answer is closed differently: {_quoted(one, two, 'end')}. The two are compared as one outcome, stop."


def _quoted(one: Template, two: Template, name: str) -> str:
    said = [visible(getattr(template, name)) for template in (one, two)]
    own, other = (f"“{text}”" if text else "nothing" for text in said)
    return f"student {own}, teacher {other}"


def outcome_rows(found: Audit) -> list[tuple[str, str, str, str]]:
    """Return (method, agreement, mass moved, bits kept) for every method that was judged."""
    return [
        (name, percent(each.agreement), percent(each.moved) if each.moved else "0 %", f"{each.bits:.2f}")
        for name, each in found.outcomes.items()
    ]


def span_rows(found: Audit) -> list[tuple[str, str, int]]:
    """Return (student's tokens, teacher's tokens, how often) of the most frequent spans that are not one to one."""
    return [(joined(span.student), joined(span.teacher), span.count) for span in found.many]


def joined(tokens: tuple[bytes, ...]) -> str:
    """Return tokens with a bar between them, spaces as `·`."""
    return "|".join(visible(token).replace(" ", "·") for token in tokens)


def summary(found: Audit) -> str:
    """Return what was compared, in one line."""
    what = {
        "same": "one vocabulary: every id means the same token",
        "permuted": "the same byte strings under other ids",
        "different": f"{found.shared:,} tokens in common",
    }[found.vocabulary]
    texts = f"{found.texts} text{'s' * (found.texts != 1)}"
    pairs = f"{len(found.special_pairs)} special token{'s' * (len(found.special_pairs) != 1)} paired"
    return (
        f"{what}, {pairs}; {texts}, {found.bytes:,} bytes, {found.spans:,} spans, {found.many_spans:,} not one to one"
    )


def advice(found: Audit) -> str:
    """Return the recommended method, and why, in one line."""
    if found.method == "hard-labels":
        return f"recommended: --mode hard-labels: {found.why}"
    drawn = f" (--align {found.drawn_method} where random draws are stored)"
    return f"recommended: --align {found.method}{drawn if found.drawn_method != found.method else ''}: {found.why}"


def render(found: Audit) -> Group:
    """Return the audit for a terminal of 80 columns."""
    from rich.console import Group
    from rich.text import Text

    names = visible(found.student.name), visible(found.teacher.name)
    parts: list[Any] = [
        Text(f"{names[0]} (student) learns from {names[1]} (teacher)", style="bold"),
        _table(["", "student", "teacher"], rows(found)),
        Text(f"{summary(found)}\n"),
    ]
    if len(found.by_kind) > 1:
        kinds = ", ".join(f"{visible(kind)} {percent(share)}" for kind, share in found.by_kind.items())
        parts.append(Text(f"one token on both sides, of the student's: {kinds}\n"))
    if found.outcomes:
        columns = ["a perfect student", "agrees", "mass moved", f"bits kept of {found.token_bits:.2f}"]
        parts += [_table(columns, outcome_rows(found), numbers=True), Text()]
    if found.many:
        parts += [_table(["other spans: student", "teacher", "times"], span_rows(found)[:6]), Text()]
    parts += [Text(f"- {remark}") for remark in remarks(found)]
    parts.append(Text(advice(found), style="bold"))
    return Group(*parts)


def _table(columns: list[str], lines: Sequence[tuple[object, ...]], *, numbers: bool = False) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for place, column in enumerate(columns):
        table.add_column(Text(column), overflow="fold", justify="right" if numbers and place else "left")
    for line in lines:
        table.add_row(*(Text(str(cell)) for cell in line))
    return table
