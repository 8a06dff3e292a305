"""Where a model's files are: a local folder, a .gguf file, or the hub's cache.

A name that leads nowhere is one line that says what was tried. Nothing is loaded here.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from distill.errors import UserError
from distill.tables import suggest

# What a tokenizer and a configuration are read from; weights are left out.
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")


def is_gguf(model: str) -> bool:
    """Return whether a name means a GGUF file."""
    return model.endswith(".gguf")


def require_gguf(model: str) -> None:
    """Raise UserError unless the `gguf` extra is installed."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading {model} needs the gguf extra: pip install 'distill[gguf]'")


def locate(model: str, *, weights: bool = False, trust_remote_code: bool = False) -> Path:
    """Return the folder or .gguf file that `model` names, downloading from the hub when it is a hub id.

    Args:
        model: a local folder, a .gguf file, or a hub id (`name` or `owner/name`).
        weights: also download the weights of a hub id; otherwise only configuration and tokenizer.

    Raises:
        UserError: nothing is there; the hub cannot be reached, or has no such model.
    """
    path = Path(model).expanduser()
    if path.is_dir() or (path.is_file() and is_gguf(model)):
        return path
    if path.is_file():
        raise UserError(f"{model} is a file: a MODEL is a folder, a hub id or a .gguf file")
    looks_like_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) and not model.startswith(".") and not is_gguf(model)
    if not looks_like_hub_id or (len(path.parts) > 1 and path.parent.is_dir()):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"no model at {model}: no such folder or .gguf file{suggest(path.name, siblings)}")
    return _from_hub(model, weights, trust_remote_code)


def _from_hub(model: str, weights: bool, trust_remote_code: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    patterns = [*SMALL_FILES, *(["*.py"] if trust_remote_code else [])]
    try:
        if weights:
            files = HfApi().list_repo_files(model) if not _hub_is_offline() else []
            patterns.append("*.safetensors" if not files or any(f.endswith(".safetensors") for f in files) else "*.bin")
        return Path(snapshot_download(model, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(f"the hub's model {model!r} is gated: accept its terms there and log in") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"no model {model!r}: no folder of that name here, and the hub has none") from error
    except Exception as error:  # no network shows itself in many ways: OSError, the HTTP client's own, a missing cache
        raise UserError(
            f"no model {model!r}: no folder of that name here, not in the hub's cache, and the hub was not reached "
            f"({'HF_HUB_OFFLINE is set' if _hub_is_offline() else one_line(error)})"
        ) from error


def _hub_is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return a library's message as one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
