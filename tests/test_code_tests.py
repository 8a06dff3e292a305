"""Code: what passes its tests scores 1, nothing fakes a pass, and no program does anything to the machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_verifiers import trace

from distill.records import Verdict
from teachers.prompts import prompt_of
from teachers.verifiers import sandbox as sandbox_module
from teachers.verifiers.code_tests import code_tests, program_of
from teachers.verifiers.gold import gold_as_answer
from teachers.verifiers.sandbox import PROTECTIONS, Limits, Sandbox, granted, isolation

DATA = Path(__file__).parents[2] / "shared" / "data" / "humaneval" / "HumanEval.jsonl"
FENCE = "```python\n{}\n```"


def judged(code: str, *cases: str | dict[str, Any], seconds: float = 20.0, **tests: Any) -> Verdict:
    """Return the verdict on a program; a text among the cases is Python code with assertions."""
    listed = [{"type": "code", "code": case} if isinstance(case, str) else case for case in cases]
    one = replace(trace(None, FENCE.format(code)), meta={"tests": {"cases": listed, **tests}})
    return code_tests(one, seconds=seconds)


def io(given: str, expected: str) -> dict[str, str]:
    return {"type": "stdin_stdout", "input": given, "output": expected}


def call(name: str, given: list[Any], expected: Any) -> dict[str, Any]:
    return {"type": "function_call", "name": name, "input": given, "output": expected}


SORT = "def order(xs):\n    xs.sort()\n    return xs"
RIGHT = [
    ("def inc(x):\n    return x + 1", ["assert inc(1) == 2", "assert inc(-1) == 0"], {}),
    ("def sum(a, b):\n    return a + b", ["assert sum(1, 2) == 3"], {}),
    (SORT, ["xs = [2, 1]\nassert order(xs) == [1, 2]\nassert xs == [1, 2]"], {}),
    ("def up(n):\n    yield from range(n)", ["assert list(up(3)) == [0, 1, 2]"], {}),
    ("def bad():\n    raise ValueError('no')", ["try:\n    bad()\n    assert False\nexcept ValueError: pass"], {}),
    (
        "class Pair:\n    def __init__(self, a): self.a = a\ndef total(ps): return sum(p.a for p in ps)",
        ["assert total([Pair(1), Pair(2)]) == 3", "assert Pair(4).a == 4"],
        {},
    ),
    (
        "def same(x): return x",
        [
            "v = (1, 2.5, None, {3: [4]}, {5}, frozenset([6]), b'7', 8j, 'é\\ud800', 10 ** 5000, range(9))\n"
            "assert same(v) == v and type(same(v)[3]) is dict and same(True) is True"
        ],
        {},
    ),
    (
        "import math\ndef root(x): return math.sqrt(x)",
        ["assert math.isclose(root(2) ** 2, 2)"],
        {"setup": "import math"},
    ),
    ("class Solution:\n    def two(self, a, b): return (a, b)", [call("two", [1, 2], [1, 2])], {}),
    ("def f(a): return {'k': (a,)}", [call("f", [1], {"k": [1]}), call("f", [1], [{"k": [1]}])], {}),
    ("n = int(input())\nprint(n * 2)", [io("3\n", "6\n"), io("4", "8"), io("5\n", "10  \n")], {}),
    ("import sys\nfor line in sys.stdin: print(line.upper(), end='')\nexit()", [io("a\nb\n", "A\nB\n")], {}),
    ("if __name__ == '__main__':\n    print(open(0).read()[::-1])", [io("abc", "cba")], {}),
    ("def inc(x): return x + 1\nif __name__ == '__main__':\n    print(inc(int(input())))", ["assert inc(1) == 2"], {}),
    ("import threading\nthreading.Timer(0.05, lambda: print('late')).start()", [io("", "late\n")], {}),
]
WRONG = [
    ("def inc(x):\n    return 2", ["assert inc(1) == 2", "assert inc(2) == 3"], "1 of 2 tests: AssertionError"),
    ("def inc(x):\n    return y", ["assert inc(1) == 2"], "0 of 1 tests: NameError: name 'y' is not defined"),
    ("def inc(x)", ["assert inc(1) == 2"], "0 of 1 tests: SyntaxError"),
    ("def inc(x): return 1", [call("inc", [1], 2)], "0 of 1 tests: AssertionError: returned 1, expected 2"),
    ("print(1)", [io("", "1\n2\n")], "0 of 1 tests: wrong output"),
    ("print(1)\nprint(2)", [io("", "1\n")], "0 of 1 tests: wrong output"),
    ("print(1)\nprint()", [io("", "1\n")], "0 of 1 tests: wrong output"),
    ("print()\nprint(1)", [io("", "1\n")], "0 of 1 tests: wrong output"),
    ("print(' 1')", [io("", "1\n")], "0 of 1 tests: wrong output"),
    ("print(int(input()))", [io("7", "7"), io("x", "7")], "1 of 2 tests: ValueError: invalid literal"),
    ("print(1)\nraise SystemExit(3)", [io("", "1\n")], "0 of 1 tests: exit code 1"),
    ("while True: pass", [io("", ""), io("", "")], "timeout: 0 of 2 tests"),
    ("def f(x):\n    while x: pass\n    return x", ["assert f(0) == 0", "assert f(1) == 1"], "timeout: 1 of 2 tests"),
    ("print('x' * 10**6 * 20)", [io("", "")], "0 of 1 tests: more than 8388608 bytes of output"),
]


@pytest.mark.parametrize(("code", "cases", "tests"), RIGHT)
def test_right_programs_pass(code: str, cases: list[Any], tests: dict[str, Any]) -> None:
    verdict = judged(code, *cases, **tests)
    assert (verdict.score, verdict.reason) == (1.0, f"{len(cases)} of {len(cases)} tests")
    assert verdict.predicted


@pytest.mark.parametrize(("code", "cases", "reason"), WRONG)
def test_wrong_programs_fail_and_say_how_far_they_came(code: str, cases: list[Any], reason: str) -> None:
    verdict = judged(code, *cases, seconds=2.0 if "timeout" in reason else 20.0)
    assert verdict.score == 0.0
    assert verdict.reason.startswith(reason), verdict


# Each of these would pass where the tests run beside the code, or where a printed word or an exit code is believed.
CHEATS = {
    "exits at once": "import sys\nsys.exit(0)",
    "exits hard": "import os\nos._exit(0)",
    "exits when called": "import os\ndef f(x): os._exit(0)",
    "stops when called": "def f(x): raise SystemExit(0)",
    "equals everything": "class E:\n    def __eq__(self, other): return True\ndef f(x): return E()",
    "a number that equals": "class E(int):\n    def __eq__(self, other): return True\ndef f(x): return E(7)",
    "a list that equals": "class E(list):\n    def __eq__(self, other): return True\ndef f(x): return E([7])",
    "patches the built-ins": "import builtins\nbuiltins.AssertionError = builtins.print = exit\ndef f(x): return 0",
    "patches the exam": "import sys\nfor m in [*sys.modules.values()]: m.told = lambda e: 1\ndef f(x): return 1 / 0",
    "prints a verdict": "print('{\"passed\": true}')\ndef f(x): return 0",
    "writes to every descriptor": (
        "import os\nfor d in range(64):\n    try: os.write(d, b'{\"passed\": true}\\n')\n    except OSError: pass\n"
        "def f(x): return 0"
    ),
    "answers nonsense": "import os\ndef f(x):\n    os.write(4, b'[' * 100000 + b'\\n')\n    os._exit(0)",
    "answers too much": (
        "import os\ndef f(x):\n    os.write(4, b'{\"value\": \"')\n    while True: os.write(4, b'x' * 65536)"
    ),
    "looks for the tests": (
        "import gc\nfound = [o for o in gc.get_objects() if isinstance(o, dict) and 'cases' in o]\n"
        "def f(x): return 42 if found else 0"
    ),
    "walks the stack": (
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        if 'reply' in frame.f_locals: frame.f_locals['reply'] = 42\n        frame = frame.f_back\n    return 0"
    ),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_nothing_but_right_answers_passes(cheat: str) -> None:
    verdict = judged(CHEATS[cheat], "assert f(1) == 42", "assert f(1) == 42 and f(2) == 43", seconds=5.0)
    assert (verdict.score, verdict.reason[:11]) in ((0.0, "0 of 2 test"), (0.0, "timeout: 0 ")), verdict


class Cells:
    """A sandbox to attack, and how much of it the OS is made to withhold."""

    def __init__(self, server: Sandbox) -> None:
        self.server = server

    def run(self, code: str, **limits: Any) -> tuple[bytes, Any, bool]:
        """Return what the code printed, how it ended, and whether a process of it is left."""
        cell = self.server.start("program", Limits(**{"seconds": 15.0, **limits}), output=True)
        assert cell.output is not None
        watched = os.dup(cell.output)
        cell.send({"code": code})
        printed = cell.read_output(1 << 16)
        ending = cell.end(now=len(printed) > 1 << 16)
        os.set_blocking(watched, False)
        left = False
        try:
            while os.read(watched, 1 << 16):
                pass
        except BlockingIOError:
            left = True  # somebody still holds the other end
        os.close(watched)
        return printed, ending, left


WEAK = """
import sys
sys.path.insert(0, {folder!r})
import rights
rights.NAMESPACES.clear()
rights.separate = lambda root: []
rights.landlock = lambda folder, library: []
import jail
jail.serve()
"""


@pytest.fixture(scope="module", params=["all that the OS grants", "nothing granted"])
def cells(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cells]:
    """The sandbox as it is here, and as it is where the OS knows neither namespaces nor Landlock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILL_TEST_SECRET", "s3cr3t-value")
        if request.param == "nothing granted":
            weak = tmp_path_factory.mktemp("weak") / "weak.py"
            weak.write_text(WEAK.format(folder=str(sandbox_module.JAIL.parent)))
            patch.setattr(sandbox_module, "JAIL", weak)
        server = Sandbox()
    yield Cells(server)
    server.close()


ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", {"seconds": 1.5}),
    "fork bomb on the run": ("import os\nwhile True:\n    if os.fork(): os._exit(7)", {"seconds": 1.5}),
    "endless loop": ("while True: pass", {"seconds": 1.0}),
    "sleeps": ("import time\ntime.sleep(1000)", {"seconds": 1.0}),
    "ignores signals": (
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except OSError: pass\nwhile True: pass",
        {"seconds": 1.0},
    ),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(1 << 24))", {"memory_bytes": 1 << 28}),
    "one huge number": ("x = 9 ** 9 ** 9", {"seconds": 1.5}),
    "prints without end": ("while True: print('x' * 100000)", {}),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)\nwhile True: pass", {"seconds": 1.5}),
    "kills everybody": ("import os\nos.kill(0, 9)\nos.killpg(0, 9)", {}),
    "daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1000)\n"
        "    os._exit(0)\nprint('gone')",
        {},
    ),
    "crashes": ("import ctypes\nctypes.string_at(0)", {}),
    "threads": ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()", {}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_ends_and_leaves_no_process(cells: Cells, attack: str) -> None:
    code, limits = ATTACKS[attack]
    if attack == "fork bomb on the run" and not {"pid", "nobody"} & set(cells.run("")[1].granted):
        pytest.skip("this OS grants neither a PID namespace nor another user: such a one may outrun us")
    _, ending, left = cells.run(code, **limits)
    assert not left
    assert attack == "daemon" or ending.code != 0
    printed, ending, left = cells.run("print('the next one is served')")
    assert (printed, ending.code, left) == (b"the next one is served\n", 0, False)


def test_a_file_of_a_gigabyte_is_not_written(cells: Cells) -> None:
    code = "import os\nf = open('f', 'wb', buffering=0)\ntry:\n    for _ in range(1 << 10): f.write(bytes(1 << 20))\n"
    printed, ending, _ = cells.run(code + "finally: print(os.stat('f').st_size)")
    assert ending.code == 1
    assert 0 < int(printed) <= Limits().file_bytes


def test_many_files_fill_no_disk(cells: Cells) -> None:
    code = (
        "import os\ntry:\n    for n in range(20): open(f'f{n}', 'wb').write(bytes(10 << 20))\n"
        "except OSError: pass\nprint(sum(os.stat(f).st_size for f in os.listdir()))"
    )
    printed, ending, _ = cells.run(code)
    if "disk" in ending.granted:
        assert 0 < int(printed) <= Limits().disk_bytes


def test_the_folder_is_new_empty_and_gone_afterwards(cells: Cells) -> None:
    code = "import os\nprint(os.getcwd(), os.listdir('.'), os.environ['HOME'], sep='\\n')\nopen('left', 'w').write('x')"
    folders = set()
    for _ in range(2):
        folder, listed, home = cells.run(code)[0].decode().splitlines()
        assert (listed, home) == ("[]", folder)
        assert not Path(folder).exists()
        folders.add(folder)
    assert len(folders) == 2


def test_no_secret_of_ours_is_in_reach(cells: Cells) -> None:
    code = (
        "import os, glob\nprint(dict(os.environ))\nfor path in glob.glob('/proc/[0-9]*/environ'):\n"
        "    try: print(open(path, 'rb').read())\n    except OSError: pass"
    )
    environment = {"DISTILL_TEST_SECRET": "s3cr3t-value"}  # of a process beside the sandbox, as of us
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, env=environment) as other:
        printed, ending, _ = cells.run(code)
        other.communicate(b"\n")
    assert b"PYTHONHASHSEED" in printed
    if {"files", "nobody"} & set(ending.granted):
        assert b"s3cr3t-value" not in printed


def test_no_file_of_ours_is_read_or_deleted(cells: Cells, tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    victim.chmod(0o600)
    code = (
        f"import os, shutil\nfolder = {str(tmp_path)!r}\nvictim = folder + '/victim.txt'\n"
        "for act in (lambda: print(open(victim).read()), lambda: os.remove(victim), lambda: shutil.rmtree(folder),\n"
        "        lambda: open(folder + '/new', 'w')):\n"
        "    try: act()\n    except OSError: print('refused')"
    )
    printed, ending, _ = cells.run(code)
    if not {"files", "nobody"} & set(ending.granted):
        pytest.skip("this OS grants neither Landlock nor another user")
    assert printed == b"refused\n" * 4
    assert victim.read_text() == "mine"
    assert os.listdir(tmp_path) == ["victim.txt"]


def test_no_network_where_the_os_allows(cells: Cells) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 3)\nprint('connected')"
        printed, ending, _ = cells.run(code)
    closed = bool({"net", "tcp"} & set(ending.granted))
    assert printed == (b"" if closed else b"connected\n")


def test_the_whole_standard_library_is_there(cells: Cells) -> None:
    code = (
        "import ssl, sqlite3, decimal, hashlib, importlib.metadata, json.tool, numbers, unittest.mock, zoneinfo\n"
        "print('é'.encode('cp1252'), zoneinfo.ZoneInfo, 'x'.encode('idna'))"
    )
    printed, ending, _ = cells.run(code)
    assert (printed[:9], ending.code) == (b"b'\\xe9' <", 0)


def test_no_process_but_its_own_is_seen_or_signalled(cells: Cells) -> None:
    code = f"import os\ntry:\n    os.kill({os.getpid()}, 0)\n    print('signalled')\nexcept OSError: print('refused')"
    printed, ending, _ = cells.run(code)
    if {"pid", "nobody", "signals"} & set(ending.granted):
        assert printed == b"refused\n"


def test_no_descriptor_but_its_own(cells: Cells) -> None:
    code = (
        "import os\nopen_ = []\nfor d in range(4096):\n    try: os.fstat(d)\n    except OSError: continue\n"
        "    open_.append(d)\nprint(open_)"
    )
    printed, _, _ = cells.run(code)
    assert json.loads(printed) in ([0, 1, 2, 4, 5], [0, 1, 2, 3, 4, 5])


def test_what_is_not_isolated_is_said() -> None:
    words = isolation()
    assert words.keys() == PROTECTIONS.keys()
    for name, (held, lacking) in PROTECTIONS.items():
        assert words[name] == (held if name in granted() else lacking)
    version = judged("def f(): return 1", "assert f() == 1").version
    assert version.endswith("sandbox: " + (" ".join(granted()) or "limits only"))
    assert f"python {sys.version.split()[0]}" in version


HEAD = 'from typing import List\n\n\ndef add(xs: List[int]) -> int:\n    """Add them.\n    """\n'


@pytest.mark.parametrize(
    ("answer", "head", "code"),
    [
        ("```python\na = 1\n```\nor\n```python\nb = 2\n```\nDone.", "", "b = 2"),
        ("```python\na = 1\n```\n```\n>>> output\n```", "", "a = 1"),
        ("```py\na = 1\n```\n```bash\nls\n```", "", "a = 1"),
        ("```\na = 1\n```", "", "a = 1"),
        ("~~~python\na = '```'\n~~~", "", "a = '```'"),
        ("````python\na = '''\n```\n'''\n````", "", "a = '''\n```\n'''"),
        ("1. So:\n   ```python\n   if 1:\n       a = 1\n   ```", "", "if 1:\n    a = 1"),
        ("```python\na = 1", "", "a = 1"),
        ("a = 1\nb = 2", "", "a = 1\nb = 2"),
        ("Use a loop, then print.", "", None),
        ("```json\n{}\n```", "", None),
        ("", "", None),
        ("```python\ndef f(:\n```", "", "def f(:"),
        ("return sum(xs)", HEAD, HEAD + "    return sum(xs)"),
        ("```python\n    return sum(xs)\n```", HEAD, None),
        ("```python\ndef add(xs):\n    return sum(xs)\n```", HEAD, HEAD + "\ndef add(xs):\n    return sum(xs)"),
        ("I do not know.", HEAD, None),
    ],
)
def test_the_program_in_an_answer(answer: str, head: str, code: str | None) -> None:
    found = program_of(answer, head=head, entry_point="add" if head else None)
    if "    return sum(xs)\n```" in answer and head and "def add" not in answer:
        assert found is not None
        assert found.startswith(HEAD)
    else:
        assert found == code


@given(
    text=st.text(st.characters(codec=None, categories=None)) | st.text("`~ py\nthondef:()"),
    head=st.sampled_from(["", HEAD]),
)
def test_any_text_is_searched_for_a_program(text: str, head: str) -> None:
    found = program_of(text, head=head, entry_point="add" if head else None)
    assert found is None or isinstance(found, str)


def test_a_definition_without_a_body_is_not_the_answer() -> None:
    """The head alone would run, and return None."""
    assert program_of(HEAD, head=HEAD, entry_point="subtract") is None
    assert judged(HEAD, "assert add([1]) == 1", head=HEAD, entry_point="add").score == 0.0


@pytest.mark.skipif(not DATA.is_file(), reason="HumanEval is not here")
def test_humaneval_solutions_pass_and_mutants_fail() -> None:
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 164
    low, high = [], []
    for number, row in enumerate(rows):
        prompt = prompt_of(row, "HumanEval")
        solution, name = prompt.meta["tests"]["solution"], row["entry_point"]
        # As a whole function, or as the rest of the one that the prompt begins.
        whole = gold_as_answer(prompt, "code_tests") if number % 2 else row["canonical_solution"].strip()
        mutant = f"{solution}\n\n_right = {name}\n\ndef {name}(*xs):\n    return [_right(*xs)]"
        answers = [(whole, 1.0, low), *([(FENCE.format(mutant), 0.0, high)] if number % 4 == 0 else [])]
        for answer, score, wrong in answers:
            one = replace(trace(None, str(answer)), meta=prompt.meta)
            verdict = code_tests(one, seconds=30.0)
            if verdict.score != score:
                wrong.append((row["task_id"], verdict))
    assert (low, high) == ([], [])
