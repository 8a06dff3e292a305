"""A stream of rows through vLLM engines on a Ray cluster, by Ray Data's own vLLM processor (`ray.data.llm`).

Ray Data reads a data set once, from front to back, and starts its engines for it. So that they start once for all the
samples of a run, the data set here does not end: its only input task takes rows from an actor as they are sent. One
row is one block, so that an answer comes back alone and as soon as it is there. What a row means is not known here
(teachers/engines/ray_engine.py does); workers need Ray and vLLM, no `distill`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

from distill.errors import RunError
from teachers.engines.ray_cluster import cause, debugging

Row = dict[str, Any]
ENGINE_STAGE = "vLLMEngineStage"  # Ray Data's name
RESTARTS = 3  # of one engine that dies; what kills it again and again must end the run


class Stream:
    """Rows in, and the same rows with their answers out, in order of completion.

    Args:
        model: as every machine finds it.
        options: vLLM's engine arguments, `max_num_seqs` among them.
        engines: how many.
        each: what each device of an engine takes of a machine, see `ray_cluster.bundle`.
        accelerator: the kind of device as Ray names it.

    Raises:
        RunError: Ray Data refuses the settings.
    """

    def __init__(
        self,
        model: str,
        options: dict[str, Any],
        *,
        engines: int,
        each: dict[str, float] | None,
        accelerator: str | None,
    ) -> None:
        import ray
        from ray.data import DataContext

        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        self.feed = feed = _feed_class().options(num_cpus=0, label_selector=here).remote()
        context = copy.deepcopy(DataContext.get_current())
        context.target_max_block_size = 1  # bytes: every row is a block, which nothing holds back
        context._max_num_blocks_in_streaming_gen_buffer = engines * options["max_num_seqs"]  # else 20 rows a second
        context.execution_no_progress_timeout_s = -1  # a verifier, or a long trace, may take its time
        context.enable_progress_bars = context.print_on_execution_start = False
        with DataContext.current(context), _quiet():
            processor = _processor(model, options, engines=engines, each=each, accelerator=accelerator)
            column = processor.DATA_COLUMN

            def pull(_: Any) -> Iterator[Row]:
                ray.get(feed.open.remote())
                while (rows := ray.get(feed.take.remote())) is not None:
                    for row in rows:
                        yield {column: row}

            source = ray.data.from_items([{"source": 0}]).flat_map(pull, num_cpus=0, label_selector=here)
            dataset = processor(source)

        def answers() -> Iterator[Row]:
            for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
                yield from batch[column].to_pylist()

        self.rows = answers()

    def put(self, rows: list[Row]) -> None:
        """Send rows on their way.

        Raises:
            RunError: the cluster is gone.
        """
        import ray

        try:
            ray.get(self.feed.put.remote(rows))
        except Exception as error:  # Ray's errors share no base class
            raise RunError(f"the Ray cluster is gone: {cause(error)}") from error

    def next(self) -> Row:
        """Wait for a row that is done. One that failed has `__inference_error__`.

        Raises:
            RunError: no engine, or no cluster, is left.
        """
        try:
            return next(self.rows)
        except StopIteration as error:
            raise RunError("Ray Data stopped: the process that feeds the engines died") from error
        except Exception as error:  # Ray's errors share no base class
            raise RunError(f"Ray Data stopped: {cause(error)}") from error

    def close(self) -> None:
        """End the engines, whatever they still do."""
        import ray

        if not ray.is_initialized():  # whatever is asked of Ray now would start it again
            return
        with contextlib.suppress(Exception):  # the cluster may be gone
            self.rows.close()  # type: ignore[attr-defined]
            ray.kill(self.feed)


def _feed_class() -> Any:
    import asyncio

    import ray

    @ray.remote
    class Feed:
        """Lists of rows, handed to the one task that reads them."""

        def __init__(self) -> None:
            self.rows: asyncio.Queue[list[Row]] = asyncio.Queue()
            self.opened = False

        async def open(self) -> None:
            """Admit one reader: a second is Ray's repetition of the first, whose rows it would take for the same."""
            if self.opened:
                raise RuntimeError("the process that feeds the engines died")
            self.opened = True

        async def put(self, rows: list[Row]) -> None:
            self.rows.put_nowait(rows)

        async def take(self) -> list[Row]:
            return await self.rows.get()

    return Feed


def _processor(
    model: str, options: dict[str, Any], *, engines: int, each: dict[str, float] | None, accelerator: str | None
) -> Any:
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    in_flight = options["max_num_seqs"]
    try:
        processor = build_processor(
            vLLMEngineProcessorConfig(
                model_source=model,
                engine_kwargs=options,
                concurrency=(engines, engines),
                accelerator_type=accelerator,
                placement_group_config={"bundle_per_worker": each} if each else None,
                batch_size=1,
                max_concurrent_batches=in_flight,
                max_tasks_in_flight_per_actor=in_flight,
                should_continue_on_error=True,
                log_engine_metrics=False,
                chat_template_stage=False,  # rows carry token ids, and token ids come back
                tokenize_stage=False,
                detokenize_stage=False,
            )
        )
    except Exception as error:  # pydantic's, or Ray's own
        raise RunError(f"Ray Data refuses the settings: {cause(error)}") from error
    processor.get_stage_by_name(ENGINE_STAGE).map_batches_kwargs["max_restarts"] = RESTARTS
    # They would only rename columns, by one more task and 0.2 s for every row.
    processor.preprocess = processor.postprocess = None
    return processor


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray to errors while a processor is built, which turns its messages on."""
    names = ("ray", "ray.data", "ray.llm")
    levels = {name: logging.getLogger(name).level for name in names}
    before = logging.root.manager.disable
    if not debugging():
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
