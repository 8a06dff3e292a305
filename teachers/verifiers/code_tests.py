"""`code_tests`: does the answer's Python program pass the prompt's tests? All of them score 1, anything less 0.

The program is the answer's last ```python block (an unlabelled one, or the whole answer, where it parses); where the
prompt gave the head of a function, the rest of that function will do. It runs in sandbox.py with the standard library
alone. Tests are of three kinds, as teachers/row_meta.py takes them from rows: Python code with assertions (HumanEval,
MBPP), calls with an expected value, and whole programs fed on standard input. Outputs are compared whole: a missing or
an extra line fails; spaces at the end of a line and one newline at the end of all do not count.

Not caught: a program that guesses the expected values, and tests that a wrong program passes.
"""

from __future__ import annotations

import ast
import builtins
import json
import platform
import re
import socket
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from distill.records import Trace, Verdict, content_hash
from teachers.verifiers.sandbox import Cell, Limits, granted, sandbox

NAME = "code_tests"
RULES = 1
PARSE_ERRORS = (SyntaxError, ValueError, RecursionError, MemoryError)
REPORT_BYTES = 4 << 20


@dataclass(slots=True)
class _Tally:
    """How many tests passed, of how many, and why the first that did not."""

    total: int
    passed: int = 0
    fault: str | None = None

    def fail(self, why: str) -> None:
        if self.fault is None:
            self.fault = why


def code_tests(trace: Trace, *, seconds: float = 8.0, memory_mib: int = 1024) -> Verdict:
    """Run the trace's code against `meta["tests"]`.

    Args:
        seconds: wall clock for all tests of one trace; what is not done by then has failed.
        memory_mib: address space of each process of the code.
    """
    tests = trace.meta.get("tests")
    if not isinstance(tests, Mapping) or not tests.get("cases"):
        return Verdict(verifier=NAME, version=_version(), score=None, reason="no tests")
    code = program_of(trace.answer, head=tests.get("head", ""), entry_point=tests.get("entry_point"))
    if code is None:
        return Verdict(verifier=NAME, version=_version(), score=0.0, reason="no code found")
    limits = Limits(seconds=seconds, memory_bytes=memory_mib << 20)
    tally = run_tests(code, tests, limits)
    reason = f"{tally.passed} of {tally.total} tests"
    if tally.fault == "timeout":
        reason = f"timeout: {reason}"
    elif tally.fault is not None:
        reason = f"{reason}: {_printable(tally.fault)}"
    return Verdict(
        verifier=NAME,
        version=_version(),
        score=float(tally.passed == tally.total),
        reason=reason,
        predicted=f"code {content_hash(code)[:12]}",
    )


def _version() -> str:
    return f"rules {RULES}, python {platform.python_version()}, sandbox: {' '.join(granted()) or 'limits only'}"


def _printable(text: str) -> str:
    """Return an error's text on one line, without memory addresses, which differ from run to run."""
    return re.sub(r"0x[0-9a-f]{6,}", "0x...", " ".join(text.encode("utf-8", "replace").decode().split()))[:200]


def program_of(answer: str, *, head: str = "", entry_point: str | None = None) -> str | None:
    """Return the program in an answer, or None.

    Args:
        head: the beginning of a function that the prompt gave; it is put before the code, for its imports too.
        entry_point: the function that the program must define, where it is known.
    """
    blocks = list(_blocks(answer))
    labelled = [text for label, text in blocks if label in ("python", "py", "python3")]
    unlabelled = [text for label, text in blocks if not label]
    for text in (labelled or unlabelled or ([] if blocks else [answer]))[-1:]:
        for candidate in _completed(text, head) if head else (text,):
            tree = _parse(candidate)
            if tree is not None and tree.body and (not head or _defines(tree, entry_point)):
                return candidate
    return labelled[-1] if labelled else None  # given as the program, though it does not parse


def _blocks(answer: str) -> Iterator[tuple[str, str]]:
    """Yield label and text of the fenced blocks; one that is not closed reaches to the end."""
    fence, label = "", ""
    lines: list[str] = []
    for line in answer.split("\n"):
        text = line.strip()
        mark = text[: len(text) - len(text.lstrip(text[:1]))] if text[:1] in ("`", "~") else ""
        info = text[len(mark) :].strip()
        if fence and len(mark) >= len(fence) and mark[0] == fence[0] and not info:
            yield label, textwrap.dedent("\n".join(lines))
            fence = ""
        elif fence:
            lines.append(line)
        elif len(mark) >= 3 and "`" not in info:
            fence, label, lines = mark, info.partition(" ")[0].lower(), []
    if fence:
        yield label, textwrap.dedent("\n".join(lines))


def _completed(text: str, head: str) -> Iterator[str]:
    """Yield the ways in which a text may go on from the head of a function, a whole function first."""
    if _parse(text) is not None:
        yield f"{head}\n{text}"
        yield text
    yield head + text
    yield f"{head}    {text}"  # the first line's indentation was stripped
    yield head + textwrap.indent(text, "    ")


def _parse(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
            compile(tree, "<code>", "exec", dont_inherit=True)  # `return` outside of a function parses
        return tree
    except PARSE_ERRORS:
        return None


def _defines(tree: ast.Module, name: str | None) -> bool:
    """Return whether the last definition of `name` is more than a docstring: the head alone is no answer."""
    found = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    found = [node for node in found if name in (None, node.name)]
    if not found:
        return name is not None and name in _top_names(tree)
    body = found[-1].body
    return len(body) > 1 or not (isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant))


def _top_names(tree: ast.Module) -> set[str]:
    """Return what a module's own statements define, blocks of `if` and `try` included."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                names.add(inner.id)
            elif isinstance(inner, ast.alias):
                names.add((inner.asname or inner.name).partition(".")[0])
    return names


def run_tests(code: str, tests: Mapping[str, Any], limits: Limits) -> _Tally:
    """Run every test within the limits' seconds."""
    deadline = time.monotonic() + limits.seconds
    cases = tests["cases"]
    tally = _Tally(total=len(cases))
    called = [case for case in cases if case["type"] != "stdin_stdout"]
    if called:
        _run_calls(code, tests, called, limits, tally)
    for case in cases:
        if case["type"] != "stdin_stdout":
            continue
        left = deadline - time.monotonic()
        if left <= 0:
            tally.fail("timeout")
            break
        _run_program(code, case, replace(limits, seconds=left), tally)
    return tally


def _run_program(code: str, case: Mapping[str, Any], limits: Limits, tally: _Tally) -> None:
    cell = sandbox().start("program", limits, text=case["input"].encode("utf-8", "surrogatepass"), output=True)
    cell.send({"code": code})
    output = cell.read_output(limits.output_bytes)
    too_long = len(output) > limits.output_bytes
    error = b"" if too_long else cell.read_wire(REPORT_BYTES)
    ending = cell.end(now=too_long)
    if too_long:
        tally.fail(f"more than {limits.output_bytes} bytes of output")
    elif ending.why == "timeout":
        tally.fail("timeout")
    elif ending.code != 0:
        tally.fail(_error_in(error) or f"exit code {ending.code}")
    elif _lines(output) == _lines(case["output"].encode("utf-8", "surrogatepass")):
        tally.passed += 1
    else:
        tally.fail("wrong output")


def _error_in(words: bytes) -> str | None:
    """Return the exception that the code's process told of, if it told the truth and not just anything."""
    try:
        name, text = json.loads(words.splitlines()[0])["error"]
        return f"{name}: {text}"
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return None


def _lines(output: bytes) -> list[bytes]:
    return [line.rstrip() for line in output.removesuffix(b"\n").split(b"\n")]


def _run_calls(
    code: str, tests: Mapping[str, Any], cases: list[Mapping[str, Any]], limits: Limits, tally: _Tally
) -> None:
    deadline = time.monotonic() + limits.seconds
    ours, theirs = socket.socketpair()
    answering = sandbox().start("answer", limits, peer=theirs)
    try:
        answering.send({"code": code})
        examining = sandbox().start("examine", limits, peer=ours)
        _examine(examining, tests, cases, tally)
    finally:
        answering.end(now=True)
    if time.monotonic() >= deadline and tally.passed < len(cases):
        tally.fault = "timeout"  # whichever of the two cells was ended first, and whatever the other made of it


def _examine(cell: Cell, tests: Mapping[str, Any], cases: list[Mapping[str, Any]], tally: _Tally) -> None:
    order = {"setup": _setup(tests), "proxies": sorted(_proxies(tests, cases)), "cases": cases}
    cell.send(order)
    words = cell.read_wire(REPORT_BYTES)
    cell.end(now=False)
    reports = [json.loads(line) for line in words.splitlines()[: len(cases)] if line]
    for report in reports:
        if report.get("passed"):
            tally.passed += 1
        else:
            tally.fail(report.get("failed") or report["why"])
    if len(reports) < len(cases):
        tally.fail("the tests ended early")


def _setup(tests: Mapping[str, Any]) -> str:
    """Return what stands before the tests: their own set-up, and what the head of the function defines."""
    head = tests.get("head", "")
    return f"{head if _parse(head) else ''}\n{tests.get('setup', '')}"


def _proxies(tests: Mapping[str, Any], cases: list[Mapping[str, Any]]) -> set[str]:
    """Return the names in the tests that mean the code under test: never a built-in, which it could have replaced,

    unless the tests name nothing else that is not theirs (MBPP asks for a function `sum`).
    """
    setup = _parse(_setup(tests))
    trees = [tree for case in cases if case["type"] == "code" and (tree := _parse(case["code"])) is not None]
    used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    own = (_top_names(setup) if setup else set()).union(*map(_top_names, trees))
    foreign = used - own
    solution = _parse(tests.get("solution") or "")
    wanted = {name for name in foreign if not hasattr(builtins, name)}
    if solution is not None:
        wanted |= foreign & _top_names(solution)
    wanted |= {tests["entry_point"]} if tests.get("entry_point") else set()
    return wanted or foreign
