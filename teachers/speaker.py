"""From settings to who speaks: the author of the completions, and the function that starts the engine.

Everything that can be refused is refused here, before anything is written and before an engine is started.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from distill.config import Engine
from distill.errors import UserError
from distill.progress import say
from teachers import backend_class, choose_backend
from teachers.backend import Backend
from teachers.plan import Author

OWN = ("base_url", "request_timeout", "retries", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def speaker(
    name: str | None, location: str | None, config: Engine, *, features: Iterable[str] = (), reasoning: str = "auto"
) -> tuple[Author, Callable[[], Backend]]:
    """Return who writes, and what starts the engine.

    Args:
        name: the model as the user names it; None where the backend can tell.
        location: what the loaders take.
        config: which backend, and how it is run.
        features: what the backend must provide, besides what the sampling settings ask for.

    Raises:
        UserError: no such backend or model, or one that is asked for what it does not have.
    """
    backend, why = choose_backend(config.backend, location, config.base_url)
    asked = [name for name in ("thinking_budget", "loop_stop") if getattr(config, name, None) is not None]
    wants = (*features, *asked)
    kind = backend_class(backend, wants)
    options = _options(kind, backend, config)
    if "wants" in inspect.signature(kind).parameters:  # an engine that must be started for what it is asked to do
        options["wants"] = wants
    template, trust = config.chat_template, config.trust_remote_code
    options |= {"concurrency": config.concurrency, "chat_template": template, "trust_remote_code": trust}
    if hasattr(kind, "identify"):
        name, identity = kind.identify(name, **options)
        location = name
    elif name is None or location is None:
        raise UserError(f"--teacher is required: the {backend} backend runs a model you name")
    else:
        from distill.models import load_tokenizer, model_identity

        # A folder that is no model, or has no tokenizer, is refused before anything is written.
        load_tokenizer(location, chat_template=template, trust_remote_code=trust)
        identity = model_identity(location)
        if name == "nano":  # its folder's name inside the package says nothing
            identity = f"nano@{identity.rpartition('@')[2]}"
    model, replicas = location, options.pop("replicas", None)

    def opened() -> Backend:
        say(f"backend: {backend} ({why})")
        if replicas is not None:
            from teachers.engines.replicas import open_replicas

            return open_replicas(backend, model, replicas, **options)
        return kind(model, **options)

    return Author(name=name, location=model, identity=identity, reasoning=reasoning), opened


def _options(kind: Any, backend: str, config: Engine) -> dict[str, Any]:
    """Return the settings that this backend's constructor takes.

    Raises:
        UserError: one is given that it does not take.
    """
    taken = inspect.signature(kind).parameters
    options: dict[str, Any] = {key: getattr(config, key) for key in OWN if key in taken}
    for key in OWN:
        if key not in taken and key in config.model_fields_set:
            if key == "data_parallel_size" and not hasattr(kind, "identify"):
                options["replicas"] = config.data_parallel_size  # processes of our own, for any engine of this machine
                continue
            raise UserError(f"--{key.replace('_', '-')} is not for the {backend} backend")
    options["engine_args"] = config.engine_arg
    return options
