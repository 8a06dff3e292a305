"""What runs inside the cells of the sandbox: the code under test in one, the tests in another. Standard library only.

The two processes share a socket and nothing else. The tests call the code's functions through it and get plain data
back, so the code cannot print, exit, patch what the tests rely on, or return an object that claims to equal everything
into a passed test: it can only answer. What passes is reported on a second socket, which the code never holds.

An object that is no plain data stays where it is and goes by a number: it can be handed back, called, iterated, and
asked for attributes and items, and equals only itself.
"""

from __future__ import annotations

import atexit
import builtins
import itertools
import json
import socket
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from plain_data import pack, unpack  # jail.py sees to it that the two are found

LINE_BYTES = 64 << 20  # the longest message taken from the other side
ITEMS = 1_000_000  # the most that is read of an iterator


class CodeError(Exception):
    """The code under test ended, answered with nonsense, or raised what is no built-in exception."""


class Line:
    """JSON messages over a socket, one on each line."""

    def __init__(self, descriptor: int) -> None:
        self.socket = socket.socket(fileno=descriptor)
        self.stream = self.socket.makefile("rb")

    def send(self, message: Any) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Any:
        """Return the next message.

        Raises:
            EOFError: the other side is gone.
            ValueError, RecursionError: what came is no message.
        """
        line = self.stream.readline(LINE_BYTES)
        if not line:
            raise EOFError("it has ended")
        return json.loads(line)


def program(wire: int, _: int) -> int:
    """Run a whole program on its own input and output; return its exit code."""
    line = Line(wire)
    code = line.receive()["code"]
    _standard_streams()
    try:
        _execute(code, "__main__")
        threading._shutdown()  # type: ignore[attr-defined]  # its threads may still print
        atexit._run_exitfuncs()
    except SystemExit as stop:
        sys.stdout.flush()
        return 0 if stop.code in (None, 0) else 1
    except BaseException as error:
        sys.stdout.flush()
        line.send({"error": told(error)})
        return 1
    sys.stdout.flush()
    return 0


def answer(wire: int, peer: int) -> int:
    """Run the code under test, then answer the calls from `peer` to what it defines until nobody calls any more."""
    line = Line(peer)
    kept: list[Any] = []
    _standard_streams()

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    try:
        names = _execute(Line(wire).receive()["code"], "solution")
    except BaseException as error:
        line.send({"error": told(error)})
        return 1
    line.send({"names": [name for name in names if isinstance(name, str)]})
    while True:
        try:
            request = line.receive()
        except EOFError:
            return 0
        try:
            arguments = [unpack(item, kept.__getitem__) for item in request["arguments"]]
            named = {key: unpack(item, kept.__getitem__) for key, item in request["named"].items()}
            on = request["on"]
            target = kept[on] if isinstance(on, int) else _named(on, names)
            result = DO[request["do"]](target, arguments, named)
            reply = {"value": pack(result, keep), "after": [pack(item, keep) for item in arguments]}
        except BaseException as error:
            reply = {"error": told(error)}
        line.send(reply)


DO: dict[str, Callable[[Any, list[Any], dict[str, Any]], Any]] = {
    "call": lambda target, arguments, named: target(*arguments, **named),
    "attribute": lambda target, arguments, _: getattr(target, arguments[0]),
    "item": lambda target, arguments, _: target[arguments[0]],
    "length": lambda target, *_: len(target),
    "items": lambda target, *_: list(itertools.islice(target, ITEMS)),
}


def _named(name: str, names: Mapping[str, Any]) -> Any:
    if name not in names and hasattr(names.get("Solution"), name):
        return getattr(names["Solution"](), name)
    return names[name]


def _execute(code: str, name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(code, f"<{name}>", "exec"), module.__dict__)
    return module.__dict__


def _standard_streams() -> None:
    sys.set_int_max_str_digits(0)
    sys.argv = ["solution.py"]
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    for name in ("exit", "quit"):  # the module `site` would have put them there
        setattr(builtins, name, sys.exit)


def told(error: BaseException) -> list[str]:
    """Return an exception's type and text; it may be hostile too, and not willing to say."""
    try:
        return [type(error).__name__, " ".join(str(error).split())[:200]]
    except BaseException:
        return ["Exception", ""]


class Code:
    """The code under test, as the tests' process knows it.

    Raises:
        CodeError: it is gone or answers with nonsense.
        Exception: a built-in one that it raised.
    """

    def __init__(self, line: Line) -> None:
        self.line = line
        found = self.receive()
        self.failed = ": ".join(map(str, found["error"])) if "error" in found else None
        self.names = {str(name) for name in found.get("names", ())}

    def receive(self) -> dict[str, Any]:
        try:
            message = self.line.receive()
        except (EOFError, OSError, ValueError, RecursionError) as error:
            raise CodeError(f"the code's process does not answer: {error}") from error
        if not isinstance(message, dict):
            raise CodeError("the code's process answers with nonsense")
        return message

    def ask(self, do: str, on: str | int, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        request = {
            "do": do,
            "on": on,
            "arguments": [pack(item, _number) for item in arguments],
            "named": {key: pack(item, _number) for key, item in named.items()},
        }
        try:
            self.line.send(request)
        except OSError as error:
            raise CodeError("the code's process has ended") from error
        reply = self.receive()
        if "error" in reply:
            raise _raised(reply["error"])
        try:
            for given, after in zip(arguments, reply["after"], strict=True):
                _renew(given, unpack(after, self.object))
            return unpack(reply["value"], self.object)
        except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
            raise CodeError(f"the code's process answers with nonsense: {error}") from error

    def object(self, number: str | int) -> Remote:
        return Remote(self, number)


class Remote:
    """A name or an object of the code under test, in the tests' process. Equal to nothing but itself."""

    def __init__(self, code: Code, on: str | int) -> None:
        self._code, self._on = code, on

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._code.ask("call", self._on, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._code.ask("attribute", self._on, (name,), {})

    def __getitem__(self, key: Any) -> Any:
        return self._code.ask("item", self._on, (key,), {})

    def __len__(self) -> int:
        return int(self._code.ask("length", self._on, (), {}))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._code.ask("items", self._on, (), {}))

    def __bool__(self) -> bool:
        return True


def _number(value: Any) -> int:
    if isinstance(value, Remote) and isinstance(value._on, int):
        return value._on
    raise CodeError(f"the tests cannot hand a {type(value).__name__} to the code")


def _raised(error: Any) -> Exception:
    """Return the exception that the code raised: a test may expect it. No other than a built-in one can be had."""
    name, text = map(str, error) if isinstance(error, list) and len(error) == 2 else ("", "")
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # a UnicodeDecodeError wants five arguments
            pass
    return CodeError(f"{name}: {text}")


def _renew(given: Any, after: Any) -> None:
    """Let an argument that the code changed in place be changed here too."""
    if type(given) is not type(after):
        return
    if isinstance(given, (list, bytearray)):
        given[:] = after
    elif isinstance(given, (dict, set)):
        given.clear()
        given.update(after)


def examine(wire: int, peer: int) -> int:
    """Run the tests against the code behind `peer`, and report each one's result on `wire`."""
    report = Line(wire)
    order = report.receive()
    _standard_streams()
    code = Code(Line(peer))
    if code.failed is not None:
        report.send({"failed": code.failed})
        return 0
    scope: dict[str, Any] = {"__name__": "tests"}
    exec(compile(order["setup"], "<setup>", "exec"), scope)
    for name in order["proxies"]:
        if name in code.names or "Solution" in code.names:
            scope[name] = Remote(code, name)
    for case in order["cases"]:
        try:
            _one(case, scope, code)
            report.send({"passed": True})
        except BaseException as error:
            report.send({"passed": False, "why": ": ".join(told(error)).removesuffix(": ")})
    return 0


def _one(case: Mapping[str, Any], scope: dict[str, Any], code: Code) -> None:
    if case["type"] == "code":
        exec(compile(case["code"], "<test>", "exec"), scope)
        return
    result = _listed(code.ask("call", case["name"], tuple(case["input"]), {}))
    expected = _listed(case["output"])
    # APPS and its descendants put the one expected value into a list, or do not.
    if result != expected and not (isinstance(expected, list) and len(expected) == 1 and result == expected[0]):
        raise AssertionError(f"returned {repr(result)[:80]}, expected {repr(expected)[:80]}")


def _listed(value: Any) -> Any:
    """Return a value as JSON would hold it: the tests' file knows no tuples."""
    if isinstance(value, (list, tuple)):
        return [_listed(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _listed(item) for key, item in value.items()}
    return value


ROLES = {"program": program, "answer": answer, "examine": examine}
