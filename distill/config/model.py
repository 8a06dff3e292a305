"""How a model is run and sampled: what several commands ask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from distill.config.section import Count, Section, Share


class Sampling(Section):
    """How tokens are drawn. Part of a sample's identity: another value is another sample."""

    temperature: Annotated[float, Field(ge=0)] = Field(0.6, description="Sampling temperature; 0 is greedy.")
    top_p: Share = Field(0.95, description="Nucleus mass kept when sampling.")
    max_completion_length: Count | None = Field(
        None, description="Most tokens of a completion; default: what the model's context leaves."
    )

    thinking_budget: Count | None = Field(
        None, description="Tokens after which the reasoning is closed by force (vllm, server)."
    )
    loop_stop: str | None = Field(
        None,
        pattern=r"^[1-9]\d*:[1-9]\d*$",
        description="SIZE:COUNT, e.g. 64:8: end a completion once up to SIZE tokens came COUNT times in a row.",
    )

    def sampling(self) -> dict[str, Any]:
        """Return the settings that shape a completion, as they enter a sample's uid; what is not asked is left out."""
        shaping: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_completion_length": self.max_completion_length,
        }
        if self.thinking_budget is not None:
            shaping["thinking_budget"] = self.thinking_budget
        if self.loop_stop is not None:
            shaping["loop_stop"] = [int(part) for part in self.loop_stop.split(":")]
        return shaping


class Engine(Section):
    """Which program runs a model, and how."""

    backend: str = Field("auto", description="auto, transformers, vllm, server, ray, replay.")
    base_url: list[str] = Field(
        default_factory=list,
        description="server: an OpenAI-compatible endpoint, e.g. http://host:8000/v1 (repeatable: replicas).",
    )
    request_timeout: Annotated[float, Field(gt=0)] = Field(14400.0, description="server: seconds for one completion.")
    retries: Annotated[int, Field(ge=0)] = Field(8, description="server: further attempts of a failed request.")
    concurrency: Count | None = Field(None, description="Samples in flight at once; default: the backend's own.")
    tensor_parallel_size: Count | None = Field(None, description="vllm, ray: devices that share one layer.")
    pipeline_parallel_size: Count | None = Field(
        None, description="vllm, ray: groups of layers on devices of their own."
    )
    data_parallel_size: Count | None = Field(None, description="Engines side by side, each with the whole model.")
    engine_arg: list[str] = Field(
        default_factory=list, description="key=value passed to the backend, e.g. dtype=bfloat16 (repeatable)."
    )
    chat_template: Path | None = Field(None, description="A Jinja file used where the model has no chat template.")
    trust_remote_code: bool = Field(False, description="Run Python code shipped inside a model folder.")
