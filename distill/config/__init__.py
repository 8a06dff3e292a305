"""What a human types: one pydantic model per command.

A field's name with `_` read as `-` is the command's long flag; the same name is the YAML key; its description is the
`--help` text. A flag beats the file. Unknown keys, and values of the wrong kind, are errors that name the key.
"""

from distill.config.evaluation import CompareConfig, EvalConfig
from distill.config.model import Engine, Sampling
from distill.config.pipeline import RunConfig
from distill.config.reinforcing import Reinforcing
from distill.config.section import Count, Section, Share, build, key_values, read_yaml
from distill.config.traces import (
    Curation,
    ExportConfig,
    FilterConfig,
    GenerateConfig,
    Judging,
    ScoreConfig,
    Verifying,
)
from distill.config.training import TrainConfig
from distill.config.view import ViewConfig
from distill.config.whole import AlignConfig, DemoConfig, FetchConfig

__all__ = [
    "AlignConfig",
    "CompareConfig",
    "Count",
    "Curation",
    "DemoConfig",
    "Engine",
    "EvalConfig",
    "ExportConfig",
    "FetchConfig",
    "FilterConfig",
    "GenerateConfig",
    "Judging",
    "Reinforcing",
    "RunConfig",
    "Sampling",
    "ScoreConfig",
    "Section",
    "Share",
    "TrainConfig",
    "Verifying",
    "ViewConfig",
    "build",
    "key_values",
    "read_yaml",
]
