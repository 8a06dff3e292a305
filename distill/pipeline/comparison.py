"""A comparison's recipe to the stages of a pipeline: arms x seeds, one budget for all, scores along the way.

    match: flops                # what every arm may spend in training, and how much of it
    budget: 2e11
    seeds: [0, 1, 2]
    milestones: 4               # evaluations of each training, the last at its end
    stages: {traces: ..., base: ...}             # made before, as in any pipeline
    train: {student: "${base}", data: "${traces}"}    # of every arm
    evaluation: {prompts: nano, temperature: 0}
    arms:
      base: {model: "${base}"}                        # not trained here
      hard: {mode: hard-labels}
      both: [{mode: hard-labels, share: 0.3}, {mode: grpo, share: 0.7}]    # one after the other

Everything here is said in stages, which `distill run RECIPE --dry-run` shows. What the numbers mean is
`distill.compare`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distill.config import key_values
from distill.errors import UserError
from distill.pipeline.document import parse_document
from distill.pipeline.expansion import expand
from distill.pipeline.references import ONLY, Reference, references
from distill.tables import suggest

LIMITS = {"flops": "max_flops", "seconds": "max_seconds", "tokens": "max_tokens", "prompts": "limit"}
SETTINGS = ("match", "budget", "seeds", "milestones", "train", "evaluation", "compare", "arms")
# The stages made here: the last training of every arm, its scores, models that are not trained here, the comparison.
STUDENTS, SCORES, GIVEN, GIVEN_ONCE, VERDICT = "students", "scores", "given", "given-once", "verdict"
Phase = tuple[dict[str, Any], dict[str, Any]]  # a training's budget, and its options


def comparison_stages(content: Mapping[str, Any], variables: list[str]) -> dict[str, Any]:
    """Return the pipeline that a comparison's recipe means.

    Args:
        content: the recipe's mapping.
        variables: NAME=VALUE in place of the recipe's `vars`, `seeds` and `budget`.

    Raises:
        UserError: a setting that is missing, unknown or of the wrong kind; the arm is named.
    """
    known = [*SETTINGS, "out", "vars", "rewards", "stages"]
    for key in content:
        if key not in known:
            raise UserError(f"a comparison has no {key!r}: allowed are {', '.join(known)}{suggest(str(key), known)}")
    values = {**_mapping(content, "vars"), "seeds": content.get("seeds", [0, 1, 2]), "budget": content.get("budget")}
    values |= key_values(variables, "--var", values)
    match, milestones = content.get("match", "flops"), content.get("milestones", 4)
    _check_budget(match, values["budget"])
    if isinstance(milestones, bool) or not isinstance(milestones, int) or milestones < 1:
        raise UserError(f"milestones must be a number from 1, not {milestones!r}")
    arms, before = _mapping(content, "arms"), _mapping(content, "stages")
    if not arms:
        raise UserError("a comparison needs arms: name: {mode: ...}")
    for name in before:
        if name in (STUDENTS, SCORES, GIVEN, GIVEN_ONCE, VERDICT) or str(name).startswith(_phase("")):
            raise UserError(f"stages: {name} is a stage that the comparison makes itself: give yours another name")
    trained = {
        name: _phases(name, arm, match, float(values["budget"]))
        for name, arm in arms.items()
        if not _is_given(name, arm)
    }
    given = {name: arm for name, arm in arms.items() if name not in trained}
    train = {"command": "train", "seed": "${seed}", **_mapping(content, "train")}
    evaluation = {"command": "eval", "arm": "${arm}", **_mapping(content, "evaluation")}
    seeded = _seeded({"vars": values, "rewards": content.get("rewards"), "stages": before})
    stages = {
        **before,
        **_trainings(trained, train, milestones),
        **_scores(trained, evaluation, milestones),
        **_given(given, evaluation, seeded),
    }
    learnt = [train, *(options for phases in trained.values() for _, options in phases)]
    stores = list(dict.fromkeys(f"${{{name}[*]}}" for name in _stores(learnt, before)))
    stages[VERDICT] = {
        "command": "compare",
        "match": match,
        "evaluations": [f"${{{name}[*]}}" for name in (SCORES, GIVEN, GIVEN_ONCE) if name in stages],
        **({"store": stores} if stores else {}),
        **_mapping(content, "compare"),
    }
    top = {key: content[key] for key in ("out", "rewards") if content.get(key)}
    return {**top, "vars": values, "stages": stages}


def _trainings(trained: Mapping[str, list[Phase]], train: Mapping[str, Any], milestones: int) -> dict[str, Any]:
    """Return the stages that train: a stage for every phase but an arm's last, and one with the last of every arm."""
    stages: dict[str, Any] = {}
    for name, phases in trained.items():
        for number, (budget, options) in enumerate(phases, 1):
            started = {"student": _of(name, number - 1)} if number > 1 else {}
            stage = STUDENTS if number == len(phases) else _phase(number)
            axes = {"arm": {}, "seed": "${vars.seeds}"}
            arms = stages.setdefault(stage, {**train, "for": axes})["for"]["arm"]
            arms[name] = {**started, **budget, **options}
    if STUDENTS in stages and milestones > 1:
        stages[STUDENTS]["milestones"] = milestones
    return stages


def _scores(trained: Mapping[str, list[Phase]], evaluation: Mapping[str, Any], milestones: int) -> dict[str, Any]:
    """Return the stage that scores every training at its milestones and at its end."""
    if not trained:
        return {}
    # What a model cost is what all its trainings did.
    arms = {
        name: {"trained_before": [_of(name, number) for number in range(1, len(phases))]} if len(phases) > 1 else {}
        for name, phases in trained.items()
    }
    points = {str(k): {"model": f"${{{STUDENTS}}}/milestones/{k}"} for k in range(1, milestones)}
    points[str(milestones)] = {"model": f"${{{STUDENTS}}}"}
    return {SCORES: {**evaluation, "train_seed": "${seed}", "for": {"arm": arms, "point": points}}}


def _given(given: Mapping[str, Any], evaluation: Mapping[str, Any], seeded: set[str]) -> dict[str, Any]:
    """Return the stages that score models which are there already: one for every seed, or one."""

    def follows(reference: Reference) -> bool:
        return reference.name in seeded and not {"seed", ONLY} & (reference.index or {}).keys()

    by_seed = {name: arm for name, arm in given.items() if any(map(follows, references(arm)))}
    once = {name: arm for name, arm in given.items() if name not in by_seed}
    stages = {}
    if by_seed:
        stages[GIVEN] = {**evaluation, "train_seed": "${seed}", "for": {"arm": by_seed}}
    if once:
        stages[GIVEN_ONCE] = {**evaluation, "for": {"arm": once}}
    return stages


def _phase(number: int | str) -> str:
    return f"phase-{number}"


def _of(arm: str, number: int) -> str:
    """Return the reference to one phase of an arm, of the seed at hand."""
    return f"${{{_phase(number)}[arm={arm}]}}"


def _check_budget(match: Any, budget: Any) -> None:
    if match not in LIMITS:
        raise UserError(f"match {match!r} is unknown: allowed are {', '.join(LIMITS)}{suggest(str(match), LIMITS)}")
    try:
        number = math.nan if isinstance(budget, bool) else float(budget)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"budget must be a number of {match} above 0, for every arm the same, not {budget!r}")


def _is_given(name: str, arm: Any) -> bool:
    """Return whether an arm is a model that is there, not one to train."""
    if not isinstance(arm, (Mapping, list)) or not arm:
        raise UserError(f"arms: {name} must be options of a training, a list of several, or model: MODEL; not {arm!r}")
    return isinstance(arm, Mapping) and "model" in arm


def _phases(name: str, arm: Any, match: str, budget: float) -> list[Phase]:
    """Return the trainings of an arm, in order, with what each may spend."""
    phases = arm if isinstance(arm, list) else [arm]
    found, total = [], 0.0
    for phase in phases:
        if not isinstance(phase, Mapping):
            raise UserError(f"arms: {name} has {phase!r} where the options of a training belong")
        options = dict(phase)
        share = options.pop("share", 1 / len(phases))
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise UserError(f"arms: {name}: share must be above 0 and at most 1, not {share!r}")
        total += share
        part = budget if match == "prompts" else budget * share  # every training may read all the prompts
        found.append(({LIMITS[match]: round(part) if match in ("tokens", "prompts") else part}, options))
    if not math.isclose(total, 1.0):
        raise UserError(f"arms: {name}: the shares of its trainings add up to {total:g}, not to 1")
    return found


def _seeded(before: dict[str, Any]) -> set[str]:
    """Return the stages made before that there is one of for every seed."""
    if not before["stages"]:
        return set()
    return {stage.name for stage in expand(parse_document(before)) if "seed" in stage.labels}


def _stores(trainings: list[dict[str, Any]], before: Mapping[str, Any]) -> list[str]:
    """Return the stages whose traces are learnt from."""
    read = [reference.name for training in trainings for reference in references(training.get("data", ""))]
    return [
        name for name in read if isinstance(before.get(name), Mapping) and before[name].get("command") == "generate"
    ]


def _mapping(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, Mapping):
        raise UserError(f"{key} must be a mapping, not {value!r}")
    return dict(value)
