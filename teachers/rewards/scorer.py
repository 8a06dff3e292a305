"""Reward functions with weights, applied to what a student wrote: the `Scorer` of `distill.reinforce.rewards`.

`accuracy` asks the run's verifier in its killable processes, as for traces: a gold answer that is missing or unreadable
gives no reward rather than 1 or 0, and a completion that was cut has no answer, so it is worth 0. The other functions
run here: they look at text and compute nothing from it that could run away.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from distill.config import key_values
from distill.errors import UserError
from distill.records import Trace
from distill.reinforce.rewards import Answer, Reward, trace_of
from distill.tables import bind, lookup
from teachers.rewards import ACCURACY, REWARDS
from teachers.verifiers.gold import missing
from teachers.verifiers.pool import VerifierPool


def read_weights(pairs: Iterable[str]) -> dict[str, float]:
    """Return reward -> weight of `name=weight` pairs; a name alone counts 1.

    Raises:
        UserError: an unknown reward, one named twice, or a weight that is no number other than 0.
    """
    weights: dict[str, float] = {}
    for pair in pairs:
        name, _, word = pair.rpartition("=") if "=" in pair else (pair, "", "1")
        name = name.strip()
        if name != ACCURACY and ":" not in name:
            lookup({ACCURACY: "", **REWARDS}, name, "reward")
        try:
            weight = float(word)
        except ValueError:
            weight = 0.0
        if name in weights or not weight or weight != weight or abs(weight) == float("inf"):
            why = "is named twice" if name in weights else f"needs a weight that is a number other than 0, not {word!r}"
            raise UserError(f"--reward: {name} {why}")
        weights[name] = weight
    return weights


class RewardScorer:
    """Scores answers by several functions.

    Args:
        weights: reward -> weight.
        options: REWARD.NAME=VALUE, the functions' keyword-only arguments.
        limit: most tokens of a completion, for the rewards that ask.
        pool: judges for `accuracy`; needed where that or a group's reward is among the weights.

    Attributes:
        calls: verdicts asked of the pool so far.

    Raises:
        UserError: unknown rewards or options.
    """

    def __init__(
        self, weights: Mapping[str, float], *, options: Iterable[str] = (), limit: int, pool: VerifierPool | None
    ) -> None:
        self.weights, self.pool, self.calls = dict(weights), pool, 0
        sections: dict[str, dict[str, Any]] = {}
        for key, value in key_values(options, "--reward-option").items():
            reward, dot, name = key.rpartition(".")
            if not dot or reward not in self.weights or reward == ACCURACY:
                known = ", ".join(each for each in self.weights if each != ACCURACY) or "none that takes any"
                raise UserError(f"--reward-option takes REWARD.NAME=VALUE with a reward of {known}, not {key!r}")
            sections.setdefault(reward, {})[name] = value
        self.functions: dict[str, Callable[..., Any]] = {}
        for name in self.weights:
            if name == ACCURACY:
                continue
            function = lookup(REWARDS, name, "reward")
            chosen = sections.get(name, {})
            if "limit" in inspect.signature(function).parameters and name in REWARDS:
                chosen = {"limit": limit, **chosen}
            self.functions[name] = bind(function, chosen, f"reward {name!r}") if name in REWARDS or chosen else function
        self.grouped = {n for n, f in self.functions.items() if getattr(_plain(f), "unit", "") == "group"}
        if (ACCURACY in self.weights or self.grouped) and pool is None:
            raise UserError(
                "a reward asks whether answers are right, and there is no verifier: do not say --verifier none"
            )

    def __call__(self, answers: Sequence[Answer], *, group: int) -> list[list[Reward]]:
        """Return a row per answer, a reward per function."""
        traces = [trace_of(answer, author="student") for answer in answers]
        right = self._accuracy(answers, traces) if self.pool is not None else []
        columns = [self._column(name, answers, traces, right, group) for name in self.weights]
        return [list(row) for row in zip(*columns, strict=True)]

    def _accuracy(self, answers: Sequence[Answer], traces: Sequence[Trace]) -> list[Reward]:
        assert self.pool is not None
        found: dict[int, Reward] = {}
        judged = []
        for place, (answer, trace) in enumerate(zip(answers, traces, strict=True)):
            if why := missing(answer.question, self.pool.name):
                found[place] = Reward(None, why)
            elif not answer.ended:
                found[place] = Reward(0.0, "truncated")
            else:
                judged.append((place, trace))
        self.calls += len(judged)
        for place, _, verdict in self.pool.judge_all(judged):
            found[place] = Reward(verdict.score, verdict.reason)
        return [found[place] for place in range(len(traces))]

    def _column(
        self, name: str, answers: Sequence[Answer], traces: Sequence[Trace], right: Sequence[Reward], group: int
    ) -> list[Reward]:
        if name == ACCURACY:
            return list(right)
        function = self.functions[name]
        if name in self.grouped:
            column: list[Reward] = []
            for start in range(0, len(traces), group):
                piece = slice(start, start + group)
                column += function(traces[piece], [reward.value for reward in right[piece]])
            return column
        if name in REWARDS:
            return [function(trace) for trace in traces]
        return _users(name, function, answers)


def _users(name: str, function: Callable[..., Any], answers: Sequence[Answer]) -> list[Reward]:
    """Call a user's function as TRL does: lists of prompts, completions, their tokens, and columns of the questions.

    Columns are `solution` (the gold answer) and what the questions bring along (`level`, ...). None is no opinion.

    Raises:
        UserError: it returns something else than one number or None per answer.
    """
    keys = sorted({key for answer in answers for key in answer.question.meta})
    columns = {key: [answer.question.meta.get(key) for answer in answers] for key in keys}
    values = function(
        prompts=[list(answer.question.messages) for answer in answers],
        completions=[[{"role": "assistant", "content": answer.text}] for answer in answers],
        completion_ids=[list(answer.ids) for answer in answers],
        solution=[answer.question.gold for answer in answers],
        **columns,
    )
    wrong = not isinstance(values, (list, tuple)) or len(values) != len(answers)
    if wrong or any(not isinstance(value, (int, float, type(None))) for value in values):
        raise UserError(
            f"the reward {name} must return a number or None for each of the {len(answers)} completions, "
            f"not {str(values)[:80]!r}"
        )
    return [Reward(None if value is None else float(value), "") for value in values]


def _plain(function: Any) -> Any:
    return getattr(function, "func", function)
