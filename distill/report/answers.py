"""Answers side by side: which questions are shown, and each answer's text, coloured where a teacher has looked at it.

A token's colour is one of `STEPS` classes of how far apart teacher and student are there, in nats; what both would have
said stands in its attributes, which the page's style sheet shows when a token is pointed at.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.compare import score_matrix
from distill.evaluate import Evaluation, gave_answer, load_evaluation, sample_score
from distill.records import Trace

SHOWN_QUESTIONS = 4
SHOWN_CHARACTERS = 6000  # of one completion; the page says how many more there are
SHOWN_TOKENS = 3000
STEPS = (0.02, 0.1, 0.3, 1.0, 3.0)  # nats from which a token's colour is the next
MARKS = str.maketrans({" ": "·", "\n": "⏎", "\t": "→", "\r": "␍"})


def chosen(members: Sequence[Sequence[Evaluation]], number: int = SHOWN_QUESTIONS) -> tuple[list[str], bool]:
    """Return the uids of the questions on which arms disagree most, and whether they do at all.

    By the variance of the arms' scores; the earlier question on a tie.
    """
    uids = list(members[0][0].samples)
    disagreement = np.array([score_matrix(arm, uids).mean(0) for arm in members]).var(0)
    first = np.argsort(-disagreement, kind="stable")[:number]
    return [uids[i] for i in first], bool(disagreement[first].any())


def shown_traces(result: Mapping[str, Any], number: int = SHOWN_QUESTIONS) -> list[tuple[str, Trace]]:
    """Return (arm, trace) of every answer that the page of a comparison shows."""
    members = [[load_evaluation(Path(folder)) for folder in arm["evals"]] for arm in result["arms"]]
    uids, _ = chosen(members, number)
    return [
        (arm["name"], evaluations[0].samples[uid][0])
        for uid in uids
        for arm, evaluations in zip(result["arms"], members, strict=True)
    ]


def side_by_side(
    arms: Sequence[Mapping[str, Any]],
    members: Sequence[Sequence[Evaluation]],
    *,
    number: int = SHOWN_QUESTIONS,
    tokens: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the shown questions with every arm's answer, and the teacher's where it gave one.

    Args:
        arms: of compare.json, each with an `index`.
        members: the evaluations of each arm's seeds.
        number: how many questions.
        tokens: what `distill.token_view.view_tokens` returned.
    """
    uids, disagree = chosen(members, number)
    view: Mapping[str, Any] = tokens or {"texts": {}, "answers": {}, "missing": {}, "teacher": "", "reader": ""}
    questions: list[dict[str, Any]] = []
    coloured: set[str] = set()
    for uid in uids:
        answers = [_teacher(view, uid)] if uid in view["answers"] else []
        for arm, evaluations in zip(arms, members, strict=True):
            trace = evaluations[0].samples[uid][0]
            answers.append(_answer(arm, trace, view["texts"].get(arm["name"], {}).get(uid)))
        coloured |= {answer["tokens"]["kind"] for answer in answers if answer["tokens"]}
        first = members[0][0].samples[uid][0]
        questions.append(
            {
                "text": "\n\n".join(m["content"] for m in first.messages if m["role"] != "system"),
                "gold": first.gold,
                "level": first.meta.get("level"),
                "answers": answers,
            }
        )
    return {
        "questions": questions,
        "disagree": disagree,
        "teacher": view["teacher"],
        "reader": view["reader"],
        "kinds": sorted(coloured),
        "missing": view["missing"],
        "steps": _legend(),
    }


def _answer(arm: Mapping[str, Any], trace: Trace, looked: Mapping[str, Any] | None) -> dict[str, Any]:
    # The raw text is shown; the part of it that is reasoning, where it can be found, is drawn softer.
    text = trace.completion[:SHOWN_CHARACTERS]
    start = trace.completion.find(trace.reasoning) if trace.reasoning else -1
    cut = start + len(trace.reasoning) if start >= 0 else 0
    if cut and text[cut:].lstrip().startswith("</think>"):
        cut = text.index("</think>", cut) + len("</think>")
    return {
        "name": arm["name"],
        "index": arm["index"],
        "right": sample_score(trace) >= 1,
        "said": _said(trace),
        "thought": text[:cut],
        "text": text[cut:],
        "count": trace.num_completion_tokens,
        "hidden": max(0, len(trace.completion) - SHOWN_CHARACTERS),
        "tokens": _coloured(looked),
    }


def _teacher(view: Mapping[str, Any], uid: str) -> dict[str, Any]:
    answer = view["answers"][uid]
    return {
        "name": "teacher",
        "index": None,
        "right": None,
        "said": "" if answer["ended"] else "not ended",
        "thought": "",
        "text": answer["text"][:SHOWN_CHARACTERS],
        "count": len(answer["tokens"]) if "tokens" in answer else None,
        "hidden": max(0, len(answer["text"]) - SHOWN_CHARACTERS),
        "tokens": _coloured(answer if "tokens" in answer else None),
    }


def _said(trace: Trace) -> str:
    if trace.finish_reason == "length":
        return "✗ truncated"
    if not gave_answer(trace):
        return "✗ no answer"
    return ("✓ " if sample_score(trace) >= 1 else "✗ ") + str(trace.predicted)


def _coloured(looked: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return tokens ready to be drawn, None where nobody looked."""
    if looked is None:
        return None
    rows = looked["tokens"]
    unit = "KL" if looked["kind"] == "kl" else "log-probability apart"
    return {
        "kind": looked["kind"],
        "mean": looked["mean"],
        "hidden": max(0, len(rows) - SHOWN_TOKENS),
        "rows": [
            {
                "text": row["text"],
                "step": None if row["nats"] is None else bisect_right(STEPS, abs(row["nats"])),
                "student": _likeliest("student", row["student"]),
                "teacher": _likeliest(
                    "teacher" if row["nats"] is None else f"teacher, {unit} {row['nats']:.2f}", row["teacher"]
                ),
            }
            for row in rows[:SHOWN_TOKENS]
        ],
    }


def _likeliest(who: str, said: Sequence[Sequence[Any]]) -> str:
    lines = [f"{100 * p:5.1f} %  {text.translate(MARKS)[:24]}" for text, p in said]
    return "\n".join([who, *lines])


def _legend() -> list[str]:
    return [f"under {STEPS[0]}", *(f"from {low}" for low in STEPS)]
