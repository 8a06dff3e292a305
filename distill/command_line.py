"""From a pydantic model to a command: flags, YAML keys and `--help` come from one place, the model's fields.

Bad input ends as one `error: ...` line on stderr and exit code 2; a run that failed as exit code 1; Ctrl-C as 130.
`DISTILL_DEBUG=1` adds the traceback.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from distill.config import Section, build
from distill.errors import RunError, UserError

C = TypeVar("C", bound=Section)
# Typer brings its own copy of click in some versions and the real one in others: this is whichever it raises.
UsageError: Any = typer.BadParameter.__bases__[0]


class App(typer.Typer):
    """A typer app whose errors are one line, as `docs/` promises."""

    def __call__(self, arguments: Sequence[str] | None = None) -> Any:
        """Run the command line (default: this process's) and exit with its code; without arguments, print the help."""
        given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop ends a run as Ctrl-C does
        try:
            code = super().__call__(given, standalone_mode=False)
            if code == 130:  # typer's own answer to Ctrl-C
                raise KeyboardInterrupt
        except UsageError as error:
            fail(error.format_message(), 2)
        except (UserError, RunError) as error:
            fail(str(error), error.exit_code)
        except (KeyboardInterrupt, typer.Abort):
            fail("interrupted; what was finished is on the disk, the same command goes on", 130)
        except OSError as error:
            if error.errno is None:
                raise
            fail(f"{error.strerror}: {error.filename}" if error.filename else str(error), 1)
        sys.exit(code if isinstance(code, int) else 0)


def fail(message: str, code: int) -> None:
    """Print one `error:` line (the traceback too under `DISTILL_DEBUG=1`) and exit."""
    if os.environ.get("DISTILL_DEBUG") == "1":
        traceback.print_exc()
    line = " ".join(message.split())
    print(f"error: {line[:1].lower() if line[1:2].islower() else line[:1]}{line[1:]}", file=sys.stderr)
    sys.exit(code)


def command(
    app: typer.Typer, model: type[C], name: str
) -> Callable[[Callable[[C, bool], None]], Callable[[C, bool], None]]:
    """Register `run(config, as_json)` as the command `name`, with one flag per field of `model`.

    Flags not given stay out of the config, so that a YAML file can fill them and the model's defaults hold.
    """

    def register(run: Callable[[C, bool], None]) -> Callable[[C, bool], None]:
        def entry(**given: Any) -> None:
            file, as_json = given.pop("config"), given.pop("json")
            flags = {key: value for key, value in given.items() if value is not None and value != []}
            run(build(model, file, flags), as_json)

        fields = sorted(model.model_fields.items(), key=lambda item: not item[1].is_required())
        parameters = [_parameter(key, field) for key, field in fields]
        parameters.append(
            _option("config", Path, typer.Option("--config", metavar="PATH", help="A YAML recipe; a flag beats it."))
        )
        parameters.append(
            _option("json", bool, typer.Option("--json", help="One JSON object on stdout."), default=False)
        )
        entry.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        entry.__doc__ = run.__doc__
        app.command(name, help=inspect.cleandoc(run.__doc__ or ""))(entry)
        return run

    return register


def _parameter(key: str, field: FieldInfo) -> inspect.Parameter:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    flag, text = "--" + key.replace("_", "-"), field.description or ""
    kinds = {field.annotation, *get_args(field.annotation)}
    many = get_origin(field.annotation) is list
    default = _shown(field.get_default(call_default_factory=True))
    if extra.get("argument"):
        info = typer.Argument(metavar=key.upper() + ("..." if many else ""), help=text, show_default=False)
        return _option(key, list[str] if many else str, info)
    if bool in kinds:
        return _option(key, bool, typer.Option(f"{flag}/--no-{flag[2:]}", help=text, show_default=False))
    names = (f"-{key}", flag) if len(key) == 1 else (flag,)
    required = " (required)" if field.is_required() else ""
    shown = f" [{default}]" if default and f"[{default}]" not in text else ""
    metavar = _metavar(field)
    info = typer.Option(*names, help=f"{text}{required}{shown}", metavar=metavar, show_default=False)
    return _option(key, list[str] if many else str, info)


def _shown(default: Any) -> str:
    return "" if default is None or default == [] or not isinstance(default, (int, float, str)) else str(default)


def _metavar(field: FieldInfo) -> str:
    """Return the choices, INT, NUMBER, PATH or TEXT: values travel as text and pydantic reads them."""
    kinds = [field.annotation, *get_args(field.annotation)]
    choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), None)
    if choices:
        return "|".join(map(str, choices))
    named = str(field.annotation)
    shown = {"Path": "PATH", "float": "NUMBER", "int": "INT"}
    return next((metavar for part, metavar in shown.items() if part in named), "TEXT")


def _option(key: str, kind: Any, info: Any, default: Any = None) -> inspect.Parameter:
    annotation: Any = Annotated[kind if default is not None else kind | None, info]
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
