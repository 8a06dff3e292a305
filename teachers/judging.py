"""A store that exists, judged anew: every trace gets one more verdict, and the journal is written whole or not at all.

Three kinds of verifiers: of one trace and of all samples of a prompt, both in a pool of killable processes, and those
that ask a model (`JUDGES`). What a model is asked is a sample like any other: it has a uid, and a line in a trace store
inside the judged one, named after the judge, its template and its sampling. So a judging that was killed goes on where
it was, what was asked once is never asked again, and its cost is in that store's manifest.

Memory does not grow with the texts: of each trace its uid and place are held, and its verdict waits on disk.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from distill.errors import UserError
from distill.ledger import Ledger
from distill.progress import Meter
from distill.records import Trace, Verdict, content_hash
from distill.store import TraceStore, dump_line, full_disk, latest, read_traces
from distill.tables import bind, lookup
from teachers.backend import Backend, Request
from teachers.plan import Author, request_of
from teachers.sampling import fill
from teachers.verifiers import JUDGES, PROMPT_UNIT, VERIFIERS
from teachers.verifiers.judge import FAILED, JudgeSpec, unreadable
from teachers.verifiers.pool import VerifierPool

GREEDY = MappingProxyType({"temperature": 0.0, "top_p": 1.0, "max_completion_length": 2048})
Units = Callable[[], Iterator[tuple[Trace, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeModel:
    """The model that judges, and how it is asked."""

    author: Author
    open_backend: Callable[[], Backend]  # called only when something is left to ask
    sampling: Mapping[str, Any] = field(default_factory=lambda: dict(GREEDY))


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a pass did."""

    traces: int  # that got a verdict
    ledger: Ledger  # of the judge's model


def judge_store(
    store: TraceStore,
    verifier: str,
    *,
    options: Mapping[str, Any],
    judge: JudgeModel | None = None,
    only_unjudged: bool = False,
    workers: int = 1,
    limit_seconds: float = 10.0,
) -> Judged:
    """Append a verdict to every trace of a store, or to those that have none, and write its journal anew.

    Failed samples pass unjudged, and of a sample that was repeated the last stays. Old verdicts stay before the new.

    Args:
        verifier: a name in `VERIFIERS` or `pkg.mod:function`.
        options: the verifier's keyword-only arguments.
        judge: the model to ask; needed by the verifiers in `JUDGES` and refused by the others.
        only_unjudged: leave out what this verifier has judged. Where it judges all samples of a prompt together, one
            that is new has the whole prompt judged again.
        workers, limit_seconds: of the pool.

    Raises:
        UserError: no such verifier or option, or a judge is missing; nothing is changed.
        RunError: the verifier does not start, the judge's engine failed, or the disk is full; the journal stays as it
            was, and what the judge has answered is kept.
    """
    spec = check_judge(verifier, options, judge)
    places = _places(store.path, verifier, spec.unit if spec else unit_of(verifier), only_unjudged)
    if not places:
        return Judged(traces=0, ledger=Ledger())

    def units() -> Iterator[tuple[Trace, ...]]:
        with store.path.open("rb") as journal:
            for group in places:
                traces = (_read(journal, place) for place in group)
                yield tuple(sorted(traces, key=lambda trace: (trace.sample_index, trace.uid)))

    with ExitStack() as stack:
        notes = stack.enter_context(_Notes(store.folder))
        ledger = Ledger()
        if spec is not None and judge is not None:
            ledger = _ask(store.folder, spec, judge, units, notes)
        else:
            pool = VerifierPool(verifier, options=options, workers=workers, limit_seconds=limit_seconds)
            meter = stack.enter_context(Meter("verify", len(places)))
            for _, traces, verdicts in stack.enter_context(pool).judge_groups(enumerate(units())):
                notes.write(traces, verdicts)
                meter.advance()
        store.replace_journal(_with_verdicts(store.path, notes))
        return Judged(traces=len(notes.places), ledger=ledger)


def check_judge(verifier: str, options: Mapping[str, Any], judge: JudgeModel | None) -> JudgeSpec | None:
    """Return what a verifier asks its model, None where it asks none; to be called before any teacher time is spent.

    Raises:
        UserError: no such verifier, a judge too few or too many, or an option is refused.
    """
    if judge is not None and verifier not in JUDGES:
        raise UserError(f"the verifier {verifier} asks no model: --judge is for {' and '.join(sorted(JUDGES))}")
    if judge is None and verifier in JUDGES:
        raise UserError(f"the verifier {verifier} asks a model: name it with --judge MODEL")
    if not judged_after(verifier):
        return None  # its pool starts before the teacher does, and refuses
    function = bind(lookup(VERIFIERS, verifier, "verifier"), options, f"verifier {verifier!r}")
    if verifier in PROMPT_UNIT:
        function(())
    return function() if verifier in JUDGES else None


def judged_after(verifier: str) -> bool:
    """Return whether a verifier judges only what was drawn already: it asks a model, or compares samples."""
    return verifier in JUDGES or unit_of(verifier) == "prompt"


def unit_of(verifier: str) -> str:
    """Return what a verifier judges at a time: `trace`, or `prompt` for all samples of one.

    Raises:
        UserError: no such verifier.
    """
    if verifier in VERIFIERS:
        return "prompt" if verifier in PROMPT_UNIT else "trace"
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where the pool's workers find a user's module, too
    return str(getattr(lookup(VERIFIERS, verifier, "verifier"), "unit", "trace"))


def _places(path: Path, verifier: str, unit: str, only_unjudged: bool) -> list[array[int]]:
    """Return where the lines begin that are to be judged, those that are judged together in one array."""
    last = {trace.uid: place for place, trace in _located(path)}
    groups: dict[str, array[int]] = {}
    wanted: set[str] = set()
    for place, trace in _located(path):
        if last[trace.uid] != place or trace.error is not None:
            continue
        key = trace.prompt_uid if unit == "prompt" else trace.uid
        groups.setdefault(key, array("q")).append(place)
        if not (only_unjudged and _judged(trace, verifier)):
            wanted.add(key)
    return [group for key, group in groups.items() if key in wanted]


def _judged(trace: Trace, verifier: str) -> bool:
    # A user's function may call itself what it likes; a judge that could not be reached is asked again.
    own = [verdict for verdict in trace.verdicts if ":" in verifier or verdict.verifier == verifier]
    return bool(own) and not own[-1].reason.startswith(FAILED)


def _located(path: Path) -> Iterator[tuple[int, Trace]]:
    """Yield every trace of a journal with the byte its line begins at."""
    place = 0
    with path.open("rb") as lines:
        for trace, line in zip(read_traces(path), lines, strict=False):  # a torn last line is no trace
            yield place, trace
            place += len(line)


def _read(journal: IO[bytes], place: int) -> Trace:
    journal.seek(place)
    return Trace.from_json(json.loads(journal.readline()))


def _ask(folder: Path, spec: JudgeSpec, judge: JudgeModel, units: Units, notes: _Notes) -> Ledger:
    """Have the model answer what it has not been asked yet, and note the verdicts its answers make."""
    who, sampling = judge.author.identity, dict(judge.sampling)
    recipe = {"verifier": spec.name, "template": spec.template, "judge": who, "sampling": sampling}
    identity = content_hash(recipe)[:12]

    def requests(traces: tuple[Trace, ...]) -> list[Request]:
        return [request_of(prompt, 0, who, sampling, 0) for prompt in spec.ask(traces)]

    with TraceStore(folder / f"judge-{identity}") as answers:
        answers.claim(recipe)
        plan = _Judgements(lambda: (request for traces in units() for request in requests(traces)))
        ledger = fill(
            answers,
            plan,
            judge.open_backend,
            None,
            author=judge.author,
            sampling=sampling,
            verifier=None,
            title=spec.name,
            reason=lambda trace: "unreadable" if unreadable(trace) else None,
        )
        places = {trace.uid: place for place, trace in _located(answers.path)}
        with answers.path.open("rb") as journal:
            for traces in units():
                answered = [_read(journal, places[request.uid]) for request in requests(traces)]
                notes.write(traces, spec.read(traces, answered, f"{who} {identity}"))
    return ledger


class _Judgements:
    """A plan (see teachers/plan.py): each question once, made when it is needed."""

    unit = "questions"

    def __init__(self, requests: Callable[[], Iterator[Request]]) -> None:
        self.requests = requests
        self.pending = requests()
        self.missing: set[str] = set()
        self.finished = self.total = 0

    def resume(self, journal: Iterable[Trace]) -> int:
        """Leave out what was answered."""
        self.missing = {request.uid for request in self.requests()}
        self.total = len(self.missing)
        for trace in journal:
            self.missing.discard(trace.uid)
        self.finished = self.total - len(self.missing)
        return self.finished

    def next(self) -> Request | None:
        """Return the next question, None at the end."""
        for request in self.pending:
            if request.uid in self.missing:
                self.missing.remove(request.uid)
                return request
        return None

    def settle(self, trace: Trace) -> None:
        """Count it."""
        self.finished += 1

    @property
    def waiting(self) -> bool:
        """No question depends on the answer to another."""
        return False

    @property
    def progress(self) -> tuple[int, int]:
        """Questions."""
        return self.finished, self.total


class _Notes:
    """Verdicts in a file without a name until the journal is written; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, int] = {}

    def __enter__(self) -> _Notes:
        try:
            self.file = tempfile.TemporaryFile(dir=self.folder)
        except OSError as error:
            raise full_disk(error, self.folder) from error
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, traces: Iterable[Trace], verdicts: Iterable[Verdict]) -> None:
        """Note each trace's verdict."""
        try:
            for trace, verdict in zip(traces, verdicts, strict=True):
                self.places[trace.uid] = self.file.seek(0, os.SEEK_END)
                self.file.write(dump_line(asdict(verdict)).encode())
        except OSError as error:
            raise full_disk(error, self.folder) from error

    def read(self, uid: str) -> Verdict | None:
        """Return a trace's verdict, None where it was not judged."""
        if uid not in self.places:
            return None
        self.file.seek(self.places[uid])
        return Verdict(**json.loads(self.file.readline()))


def _with_verdicts(path: Path, notes: _Notes) -> Iterator[Trace]:
    for trace in latest(path):
        verdict = notes.read(trace.uid)
        if verdict is not None:
            trace = replace(trace, verdicts=(*trace.verdicts, verdict), predicted=verdict.predicted)
        yield trace
