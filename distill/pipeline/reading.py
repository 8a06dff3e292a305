"""A file to a pipeline: written as one, the manifest of a run, or a comparison's recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distill.config import read_yaml
from distill.errors import UserError
from distill.pipeline.comparison import comparison_stages
from distill.pipeline.document import Document, parse_document


def read_document(path: Path, variables: list[str]) -> Document:
    """Read what `distill run` can run.

    Args:
        variables: NAME=VALUE in place of the file's `vars`.

    Raises:
        UserError: see `parse_document` and `comparison_stages`; the file is named.
    """
    try:
        content = read_yaml(path)
    except UserError as error:
        hint = '; inside {...} and [...] a reference needs quotes: "${name}"' if "not YAML" in str(error) else ""
        raise UserError(f"{error}{hint}") from error
    try:
        if isinstance(content.get("pipeline"), Mapping):
            content = dict(content["pipeline"])
        if "arms" in content:
            return parse_document(comparison_stages(content, variables))
        return parse_document(content, variables)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
