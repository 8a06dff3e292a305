"""Traces looked at through a teacher and their students: what colours the tokens of the comparison's page.

Each text is read by the student that wrote it and by the teacher (`distill.token_reading`), and the teacher answers the
questions itself. Results are kept in a file and written after each text, so that an interrupted run goes on, and a page
made again loads no model.

Nothing is sampled here but the teacher's own answers, greedily. Which traces are shown is the report's choice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.models import model_identity
from distill.progress import Meter, say
from distill.records import content_hash
from distill.store import write_json
from distill.token_reading import Aligner, Shown, Speaker, compared, greedy_answer, open_speaker


def view_tokens(
    shown: Sequence[Shown],
    students: Mapping[str, str],
    teacher: str,
    cache: Path,
    *,
    reader: str,
    align: Aligner,
    answers: bool = True,
    max_completion_length: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Look at texts through a teacher and a student; have the teacher answer the questions, too.

    Args:
        shown: the texts, of any arms and questions.
        students: arm -> where the model is that reads its texts beside the teacher.
        teacher: where the teacher is.
        cache: the .json file that results are kept in.
        reader: the arm whose student reads what the teacher wrote.
        align: opens an alignment of two models' tokenizers, None for one vocabulary.
        answers: whether the teacher answers.
        max_completion_length: most tokens of a teacher's answer.

    Returns:
        `texts`: arm -> prompt uid -> {"kind": "kl" or "spans", "mean", "tokens"}, a token being {"text", "nats" (None:
        not compared), "student", "teacher": (text, probability) of the likeliest}; `answers`: prompt uid -> the same
        of the teacher's own answer, with "text" and "ended"; `missing`: arm -> why its texts have no numbers; `teacher`
        and `reader`, who.

    Raises:
        UserError: the teacher cannot be loaded, or the cache not be read.
    """
    desk = _Desk(cache, teacher, align, trust_remote_code)
    written: dict[str, dict[str, Any]] = {}
    texts: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    questions = {text.prompt_uid: text for text in shown} if answers else {}
    with Meter("token view", len(shown) + len(questions)) as meter:
        for uid, text in questions.items():
            written[uid] = desk.answer(text, max_completion_length)
        for arm, location in students.items():
            mine = [(texts.setdefault(arm, {}), text) for text in shown if text.arm == arm]
            if arm == reader:
                mine += [
                    (written, replace(questions[uid], completion=answer["text"], ended=answer["ended"]))
                    for uid, answer in written.items()
                ]
            try:
                for table, text in mine:
                    table[text.prompt_uid] = {**table.get(text.prompt_uid, {}), **desk.look(location, text)}
                    meter.advance()
            except UserError as error:
                missing[arm] = str(error)
                say(f"{arm} is shown without colours: {error}")
    return {"teacher": desk.identity, "reader": reader, "texts": texts, "answers": written, "missing": missing}


class _Desk:
    """The results of one file, and the models that are open to make those it lacks: the teacher and one student."""

    def __init__(self, cache: Path, teacher: str, align: Aligner, trust_remote_code: bool) -> None:
        self.cache, self.align, self.trust = cache, align, trust_remote_code
        self.location, self.identity = teacher, model_identity(teacher)
        self.results: dict[str, Any] = _read(cache)
        self._identities: dict[str, str] = {}
        self._speakers: dict[str, Speaker] = {}

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return a result of the file, made and written where it is not there."""
        name = content_hash(key)
        if name not in self.results:
            self.results[name] = make()
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.cache, self.results)
        return self.results[name]

    def look(self, student: str, text: Shown) -> dict[str, Any]:
        if student not in self._identities:
            self._identities[student] = model_identity(student)
        key = ["tokens", self._identities[student], self.identity, text.messages, text.completion, text.ended]
        return self.kept(key, lambda: compared(self._open("student", student), self.teacher, text, self.align))

    @property
    def teacher(self) -> Speaker:
        return self._open("teacher", self.location)

    def _open(self, who: str, location: str) -> Speaker:
        held = self._speakers.get(who)
        if held is None or held.location != location:
            self._speakers[who] = open_speaker(location, who, trust_remote_code=self.trust)
        return self._speakers[who]

    def answer(self, text: Shown, limit: int | None) -> dict[str, Any]:
        key = ["answer", self.identity, text.messages, limit]
        return self.kept(key, lambda: greedy_answer(self.teacher, text.messages, limit))


def _read(cache: Path) -> dict[str, Any]:
    if not cache.exists():
        return {}
    try:
        loaded = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{cache} cannot be read ({error}): delete it to have it made again") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{cache} holds no token view: delete it to have it made again")
    return loaded
