"""How right a model is: from judged samples to `eval.json` and back, and bits per byte on given conversations.

The question is the unit of every mean and error; samples of one question are averaged first. A sample that did not end
by itself gave no answer, whatever stands in it: no score, no vote. Sampling and verifying are the teachers' room's
work; nothing is drawn here.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import UserError
from distill.progress import Meter
from distill.records import Message, Trace, content_hash
from distill.statistics import accuracy_interval, mean_and_stderr, pass_at_k

WHOLE = "stop"  # how a sample ends that gave its answer; the others were cut, ran in circles or failed
LOOP, MIXED = "loop", "language_mix"  # flags of the filters that were put to every sample when it was drawn
COUNTS = ("questions", "samples_per_question")
TOLERANCE = 1e-3  # how far `pass@1` of eval.json may be from the samples: rounding, not another scoring


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation folder, checked to be whole.

    `samples` maps each question's uid, in file order, to its K samples in order of `sample_index`.
    """

    folder: Path
    summary: Mapping[str, Any]  # eval.json
    samples: Mapping[str, tuple[Trace, ...]]

    @property
    def traces(self) -> list[Trace]:
        """All samples, question by question."""
        return [trace for group in self.samples.values() for trace in group]


def sample_score(trace: Trace) -> float:
    """Return what a sample counts for: its verdict's score, and 0 where it was cut, failed or could not be judged."""
    return 0.0 if trace.finish_reason != WHOLE or trace.score is None else float(trace.score)


def is_right(trace: Trace) -> bool:
    """Return whether a sample is right and not only in part: what `pass@k` and `maj@k` count."""
    return sample_score(trace) == 1.0


def gave_answer(trace: Trace) -> bool:
    """Return whether a sample answered at all: it ended by itself and an answer was read, or it was found right."""
    return trace.finish_reason == WHOLE and (bool(trace.predicted) or sample_score(trace) > 0)


def load_evaluation(folder: Path) -> Evaluation:
    """Read `eval.json` and `samples.jsonl` of one folder.

    Raises:
        UserError: a file is missing or unreadable, samples are missing or doubled, or the two files disagree.
    """
    summary_path, samples_path = folder / "eval.json", folder / "samples.jsonl"
    _require(summary_path)
    try:
        summary = json.loads(summary_path.read_text(encoding="utf-8"))
        harness = summary.get("harness")
        questions, per_question = (0, 0) if harness else (int(summary[key]) for key in COUNTS)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{summary_path} is unreadable ({error!r}); evaluate again") from error
    if harness:
        raise UserError(
            f"{folder} holds scores made by {harness}: means without the samples behind them cannot be compared "
            "question by question; evaluate with --prompts instead of --harness"
        )
    _require(samples_path)

    groups: dict[str, list[Trace]] = {}
    with samples_path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                trace = Trace.from_json(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(f"{samples_path}:{number} is no sample ({error!r}); evaluate again") from error
            groups.setdefault(trace.prompt_uid, []).append(trace)
    found = sum(map(len, groups.values()))
    if found != questions * per_question or questions < 1:
        raise UserError(
            f"{samples_path} holds {found} samples, eval.json promises {questions} questions x {per_question} samples "
            f"= {questions * per_question}; run the evaluation again, it resumes"
        )
    samples = {uid: tuple(sorted(group, key=lambda t: t.sample_index)) for uid, group in groups.items()}
    for uid, group in samples.items():
        if len({t.sample_index for t in group}) != per_question or len(group) != per_question:
            given = sorted(t.sample_index for t in group)
            raise UserError(
                f"{samples_path}: question {uid} has samples {given}, not {per_question} different ones "
                "(the same question twice in --prompts?)"
            )
    evaluation = Evaluation(folder, summary, samples)
    claimed, counted = summary.get("pass@1"), float(np.mean([sample_score(t) for t in evaluation.traces]))
    if claimed is not None and abs(float(claimed) - counted) > TOLERANCE:
        raise UserError(f"{folder}: eval.json says pass@1 {claimed:.4f}, its samples say {counted:.4f}; evaluate again")
    return evaluation


def _require(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path.parent} is no evaluation: {path.name} is missing; make it with `distill eval --out`")


def summarise(
    samples: Iterable[Trace], *, samples_per_question: int, classes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the scores of an evaluation as they stand in `eval.json`.

    Args:
        samples: every sample of every question, judged, in any order.
        samples_per_question: K; each question must have exactly K.
        classes: of wrong answers, see `majority_score`.

    Raises:
        ValueError: no question, or one with more or fewer than K samples.
    """
    groups: dict[str, list[Trace]] = {}
    for trace in samples:
        groups.setdefault(trace.prompt_uid, []).append(trace)
    if not groups or any(len(group) != samples_per_question for group in groups.values()):
        raise ValueError(f"every question needs {samples_per_question} samples")
    groups = dict(sorted(groups.items()))  # the order of completion must not reach the last digit of a mean
    scores = {uid: [sample_score(trace) for trace in group] for uid, group in groups.items()}
    per_question = [math.fsum(values) / samples_per_question for values in scores.values()]
    accuracy, stderr = mean_and_stderr(per_question)
    right = [sum(map(is_right, group)) for group in groups.values()]
    by_k = {k: _mean(pass_at_k(samples_per_question, c, k) for c in right) for k in doublings(samples_per_question)}
    everything = [trace for group in groups.values() for trace in group]
    return {
        "pass@1": accuracy,
        "pass@k": by_k[samples_per_question],
        "pass@k_by_k": {str(k): share for k, share in by_k.items()},
        "maj@k": _mean(majority_score(group, classes) for group in groups.values()),
        "stderr": stderr if math.isfinite(stderr) else None,  # one question has none, and nan is not JSON
        "ci95": list(accuracy_interval(per_question, samples_per_question=samples_per_question)),
        "truncated": _mean(trace.finish_reason == "length" for trace in everything),
        "no_answer": _mean(not gave_answer(trace) for trace in everything),
        "repetition": _mean(LOOP in trace.flags for trace in everything),
        "language_mixed": _mean(MIXED in trace.flags for trace in everything),
        "mean_completion_tokens": _mean(trace.num_completion_tokens for trace in everything),
        "questions": len(groups),
        "samples_per_question": samples_per_question,
        "prompts_hash": content_hash(sorted(groups)),
    }


def doublings(most: int) -> list[int]:
    """Return 1, 2, 4, ... up to `most`, and `most` itself."""
    return [*(1 << power for power in range((most - 1).bit_length())), most]


def majority_score(group: Sequence[Trace], classes: Mapping[str, str] | None = None) -> float:
    """Return the chance that a majority vote over one question's samples is right; ties are drawn by lot.

    All answers the verifier found equal to the gold are one class, since they equal each other. A sample without an
    answer does not vote.

    Args:
        group: all samples of one question.
        classes: uid to class of wrong answers, where some are equal and written differently; the others are classed
            by their text.
    """
    known = classes or {}
    votes = Counter(True if is_right(t) else known.get(t.uid, t.predicted) for t in group if gave_answer(t))
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    return (True in winners) / len(winners)


def _mean(values: Iterable[float]) -> float:
    listed = [float(value) for value in values]
    return math.fsum(listed) / len(listed)


def bits_per_byte(
    model: Any, tokenizer: Any, conversations: Sequence[Sequence[Message]], *, batch_size: int = 8
) -> dict[str, float]:
    """Return how many bits the model needs per UTF-8 byte of the assistant's last turns, their end token included.

    Comparable between models of any tokenizer, since bytes are counted and not tokens; it moves where accuracy is
    still at its floor. The end token's bits are charged to the text's bytes.

    Args:
        conversations: message lists ending in an assistant turn, each within the model's context.

    Returns:
        `bits_per_byte`, and the `bytes`, `tokens` and `conversations` it was measured on.

    Raises:
        UserError: a conversation cannot be rendered.
        ValueError: none given.
    """
    import torch

    from distill.batch import collate
    from distill.forward import read_head, run
    from distill.losses import hard_labels
    from distill.render import render

    if not conversations:
        raise ValueError("bits per byte needs at least one conversation")
    examples = [render(tokenizer, messages) for messages in conversations]
    num_bytes = sum(len(messages[-1]["content"].encode("utf-8", "surrogatepass")) for messages in conversations)
    head = read_head(model, "the model")
    nats = tokens = 0.0
    with torch.inference_mode(), Meter("bits per byte", len(examples)) as meter:
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            batch = collate(part, pad_id=tokenizer.pad_token_id).to(model.device)
            output = hard_labels(run(model, head, batch), None, batch)
            nats += float(output.total)
            tokens += float(output.weight)
            for _ in part:
                meter.advance()
    return {
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "bytes": num_bytes,
        "tokens": tokens,
        "conversations": len(examples),
    }


def strata(samples: Iterable[Trace], key: str) -> Mapping[str, float]:
    """Return the accuracy within each value of `meta[key]`, such as the level of a problem."""
    groups: dict[str, list[float]] = {}
    for trace in samples:
        if key in trace.meta:
            groups.setdefault(str(trace.meta[key]), []).append(sample_score(trace))
    return {value: _mean(scores) for value, scores in sorted(groups.items())}
