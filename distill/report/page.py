"""The page, put together: figures of `distill.compare`, drawn by the templates of `distill/data`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.evaluate import Evaluation, load_evaluation
from distill.report.answers import SHOWN_QUESTIONS, side_by_side
from distill.report.charts import forest, lengths, levels
from distill.report.curves import HEIGHT, panels
from distill.report.numbers import FILTERS
from distill.report.published import PUBLISHED
from distill.report.questions import STRIP, win_loss
from distill.report.sources import costs, funnel


def write_report(
    result: Mapping[str, Any],
    out: Path,
    *,
    eval_dirs: Sequence[Path],
    stores: Sequence[Path] = (),
    show_questions: int = SHOWN_QUESTIONS,
    tokens: Mapping[str, Any] | None = None,
    title: str = "Distillation compared",
) -> Path:
    """Write the page of a comparison.

    Args:
        result: what `distill.compare.compare` returned (or compare.json, read back).
        out: a file ending in .html, or a folder that gets `report.html`.
        eval_dirs: the evaluation folders of the comparison.
        stores: trace stores whose funnel to show; each has funnel.json, and manifest.json for the cost.
        show_questions: how many questions have their answers side by side.
        tokens: what `distill.token_view.view_tokens` returned, to colour those answers by.
        title: the line above the verdict, and of the browser's tab.

    Returns:
        The file written.

    Raises:
        UserError: a folder is broken, or the folders are not those of the comparison.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    members = _members(result, eval_dirs)
    arms = [{**arm, "index": index} for index, arm in enumerate(result["arms"])]
    funnels = [funnel(Path(store)) for store in stores]
    groups, by_level = levels(members, int(result["samples_per_question"]))
    drawn = forest(result)
    named = {arm["name"]: evaluations for arm, evaluations in zip(arms, members, strict=True)}
    environment = Environment(
        loader=PackageLoader("distill", "data"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(FILTERS)
    page = environment.get_template("report.html.j2").render(
        title=title,
        result=result,
        arms=arms,
        index_of={arm["name"]: arm["index"] for arm in arms},
        many_seeds=any(len(arm["seeds"]) > 1 for arm in arms),
        bits=any(arm["bits_per_byte"] is not None for arm in arms),
        share_ticks=[
            {"at": at, "label": f"{at} %" if at in (0, 100) else f"{at}", "zero": at == 0}
            for at in (0, 25, 50, 75, 100)
        ],
        **drawn,
        panels=panels(arms, result["matched"]),
        panel_height=HEIGHT,
        levels=groups,
        by_level=by_level,
        wins=win_loss(drawn["main_pairs"], named, groups),
        strip_height=STRIP,
        lengths=lengths(members),
        stores=funnels,
        costs=costs(arms, funnels),
        published=PUBLISHED,
        traces=side_by_side(arms, members, number=show_questions, tokens=tokens),
    )
    path = out if out.suffix == ".html" else out / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # A completion may hold half a surrogate pair, which UTF-8 cannot: it is shown as "?".
    partial.write_bytes(page.encode("utf-8", "replace"))
    os.replace(partial, path)
    return path


def _members(result: Mapping[str, Any], eval_dirs: Sequence[Path]) -> list[list[Evaluation]]:
    """Load the evaluations that are the scores of the arms; checkpoints before them stand in `result` alone."""
    given = {Path(folder).resolve(): Path(folder) for folder in eval_dirs}
    members = []
    for arm in result["arms"]:
        missing = [folder for folder in arm["evals"] if Path(folder).resolve() not in given]
        if missing:
            raise UserError(f"the report needs {missing[0]}, an evaluation of arm {arm['name']!r} in the comparison")
        members.append([load_evaluation(Path(folder)) for folder in arm["evals"]])
    return members
