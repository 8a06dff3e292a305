"""`--mde POINTS`: as many samples per question as it takes to see a difference of that size, or a plain no.

The formula is in distill/power.py. Its variances are rough figures that fit published scores, said whenever they are
used, or estimated from one or two evaluations that exist (`--mde-from`). What is planned so is a comparison of two
models that are both sampled so often; the interval of one model alone is another matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill.config import EvalConfig
from distill.errors import UserError
from distill.evaluate import Evaluation, load_evaluation, sample_score
from distill.power import CORRELATION, Variances, detectable_effect, samples_needed, smallest_effect, variances_of
from distill.progress import say
from teachers.exams.catalogue import MIDDLING, exam_of

WITHIN = 0.12  # sigma^2 of one sample, a rough figure that fits published scores; a fair coin has 0.25
ASSUMED = "rough figures that fit published scores"
MANY = 64  # samples of a question, the most that is usual


def samples_per_question(config: EvalConfig, questions: int) -> tuple[int, dict[str, Any] | None]:
    """Return how often to sample each question, and the plan behind it, None where `-n` says it.

    Raises:
        UserError: settings of both, an evaluation that shows no variances, or a difference that no number of samples
            shows with so few questions.
    """
    if config.mde is None:
        if config.mde_from:
            raise UserError("--mde-from is for --mde, which is not given")
        return config.n, None
    if "n" in config.model_fields_set:
        raise UserError("-n gives the samples per question, --mde finds their number: give one of them")
    variances, known = _variances(config)
    assumed = f"omega^2 {variances.between:.3g} between questions, sigma^2 {variances.within:.3g} within: {known}"
    assumed += "; --mde-from takes your own" if known == ASSUMED else ""
    samples = samples_needed(config.mde / 100, variances, questions)
    if samples is None:
        most, least = detectable_effect(variances, questions, MANY), smallest_effect(variances, questions)
        raise UserError(
            f"--mde {config.mde:g} cannot be reached with {questions} questions: {MANY} samples of each would show a "
            f"difference of {100 * most:.1f} points, and no number of samples one below {100 * least:.1f} ({assumed}). "
            "Ask more questions, or for a larger difference"
        )
    reached = detectable_effect(variances, questions, samples)
    say(f"--mde {config.mde:g}: {questions} questions x {samples} samples show {100 * reached:.1f} points ({assumed})")
    plan = {"between_variance": variances.between, "within_variance": variances.within, "known_from": known}
    return samples, {"target": config.mde / 100, "reached": reached, **plan}


def _variances(config: EvalConfig) -> tuple[Variances, str]:
    """Return the variances to plan with, and in words where they are from."""
    if not config.mde_from:
        exam = exam_of(config.prompts)
        between = exam.between if exam else MIDDLING
        return Variances(between=between, within=WITHIN), ASSUMED
    if len(config.mde_from) > 2:
        raise UserError(f"--mde-from takes one evaluation, or those of two models, not {len(config.mde_from)}")
    earlier = [load_evaluation(folder) for folder in config.mde_from]
    for evaluation in earlier:
        if min(len(evaluation.samples), *map(len, evaluation.samples.values())) < 2:
            raise UserError(
                f"--mde-from {evaluation.folder}: what varies within a question and between questions cannot be told "
                "from one sample, or one question: it takes two or more of each"
            )
    first = earlier[0]
    if any(other.samples.keys() != first.samples.keys() for other in earlier[1:]):
        raise UserError(f"--mde-from: {first.folder} and {earlier[1].folder} asked different questions")
    scores = [_scores(evaluation, list(first.samples)) for evaluation in earlier]
    variances = variances_of(*scores)
    if variances.between == variances.within == 0:
        raise UserError(f"--mde-from {first.folder}: all its scores are alike, which says nothing about other models")
    known = "from " + " and ".join(map(str, config.mde_from))
    if len(scores) == 1:
        known += f", with a correlation of {CORRELATION:g} between models"
    return variances, known


def _scores(evaluation: Evaluation, questions: Sequence[str]) -> list[list[float]]:
    return [[sample_score(trace) for trace in evaluation.samples[uid]] for uid in questions]
