"""Ray: many machines, a local engine on each of them.

Engines get requests in the batches in which a single machine's would, so the answers are those
of the local engine, and so is the name under which they are cached. To a GPU several such
batches go out together, so that an engine which begins one answer as another ends is not left
waiting at the end of each. Ray Data runs one engine in each of its actors, hands batches to
whoever is free, and those of a machine that is lost to others; here each is counted in once.
Engines start with a call and end with it: calls should be long. This module knows Ray; which
engine is inside, it is told.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from misstep.engines.base import Completion, Engine, Request, in_order
from misstep.engines.cached import Chosen
from misstep.errors import EngineError, MissingExtra, MisstepError

ON_GPU = 8
"""Batches that go out together to an engine on a GPU."""
REQUESTS = TypeAdapter(list[Request])
COMPLETIONS = TypeAdapter(list[Completion])


Choose = Callable[[], Chosen]
"""Chooses an engine on the machine that it is called on."""


class Share(NamedTuple):
    """What one engine takes of the cluster, and how many fit into it."""

    actors: int
    cpus: float
    gpus: float


class RayEngine(Engine):
    """Answers from the engines of a Ray cluster."""

    def __init__(self, choose: Choose, identity: str, share: Share) -> None:
        self.identity = identity
        self._choose = choose
        self._share = share

    def stream(
        self, requests: Sequence[Request], batch: int
    ) -> Iterator[list[tuple[int, Completion]]]:
        """Answer batches as they come from the machines, in any order, each of them once.

        Raises:
            EngineError: an engine could not answer, or an answer is missing.
        """
        size = batch * ON_GPU if self._share.gpus else batch
        waiting = {
            start: requests[start : start + size] for start in range(0, len(requests), size)
        }
        for start, answers in self._answered(waiting, batch) if waiting else ():
            asked = waiting.pop(start, None)
            if asked is None:
                continue  # A lost machine had answered it already.
            if len(answers) != len(asked):
                raise EngineError(f"Ray gave {len(answers)} answers to {len(asked)} requests.")
            yield list(enumerate(answers, start))
        if waiting:
            raise EngineError(f"Ray ended and left {len(waiting)} parts unanswered.")

    def _answered(
        self, parts: Mapping[int, Sequence[Request]], batch: int
    ) -> Iterator[tuple[int, list[Completion]]]:
        ray = connect()
        rows = [
            {"start": start, "batch": batch, "requests": REQUESTS.dump_json(list(part))}
            for start, part in parts.items()
        ]
        actors = min(self._share.actors, len(rows))
        work = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Worker,
            fn_constructor_args=(self._choose, self.identity),
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=actors, initial_size=actors
            ),
            num_cpus=self._share.cpus,
            num_gpus=self._share.gpus,
        )
        try:
            for row in work.iter_rows():
                if row["failure"]:
                    raise EngineError(row["failure"])
                yield int(row["start"]), COMPLETIONS.validate_json(row["completions"])
        except ray.exceptions.RayError as error:
            raise EngineError(f"Ray: {last_line(error)}") from error


class Worker:
    """One engine in one actor; the model is loaded once.

    What misstep itself says went wrong comes back as an answer: raised here it would come
    wrapped in the tracebacks of two machines.
    """

    def __init__(self, choose: Choose, identity: str) -> None:
        self.engine: Engine | None = None
        self.failure = ""
        try:
            chosen = choose()
            if chosen.identity != identity:
                raise EngineError(
                    f"the machines of the cluster differ: expected {identity}, found "
                    f"{chosen.identity}. Give all the same files, libraries and devices."
                )
            self.engine = chosen.open()
        except MisstepError as error:
            self.failure = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answer one row: the requests of one batch or of several."""
        answers: list[Completion] = []
        if self.engine is not None:
            try:
                asked = REQUESTS.validate_json(batch["requests"][0])
                answers = in_order(self.engine.stream(asked, int(batch["batch"][0])))
            except MisstepError as error:
                self.failure = str(error)
        return {
            "start": batch["start"],
            "completions": [COMPLETIONS.dump_json(answers)],
            "failure": [self.failure],
        }

    def __del__(self) -> None:
        if self.engine is not None:
            self.engine.close()


def connect() -> Any:
    """Ray, connected to its cluster: RAY_ADDRESS, the one on this machine, or a new one.

    Raises:
        MissingExtra: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise MissingExtra("Ray", "ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    return ray


def share(gpus: int) -> Share:
    """So many GPUs for each engine; without any in the cluster, a whole machine for each.

    Machines of unequal size are divided by the smallest.

    Raises:
        EngineError: no engine fits into the cluster.
    """
    ray = connect()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    able = [node for node in nodes if node.get("GPU", 0) >= gpus]
    if any(node.get("GPU") for node in nodes):
        if not able:
            raise EngineError(f"expected a machine with {gpus} GPUs in Ray's cluster.")
        return Share(sum(int(node["GPU"] // gpus) for node in able), 1, gpus)
    cpus = [node["CPU"] for node in nodes if node.get("CPU")]
    if not cpus:
        raise EngineError("expected machines in Ray's cluster, found none with a processor.")
    return Share(sum(int(count // min(cpus)) for count in cpus), min(cpus), 0)


def ask(choose: Choose, share: Share) -> tuple[str, str]:
    """The name of the engine that a machine of the cluster chooses, and why it does.

    Raises:
        EngineError: it can choose none.
    """
    ray = connect()
    asked = ray.remote(_ask_here).options(num_cpus=share.cpus, num_gpus=share.gpus)
    try:
        identity, why, failure = ray.get(asked.remote(choose))
    except ray.exceptions.RayError as error:
        raise EngineError(f"Ray: {last_line(error)}") from error
    if failure:
        raise EngineError(failure)
    return identity, why


def _ask_here(choose: Choose) -> tuple[str, str, str]:
    try:
        chosen = choose()
    except MisstepError as error:
        return "", "", str(error)
    return chosen.identity, chosen.why, ""


def last_line(error: BaseException) -> str:
    """What went wrong on the other machine; Ray's text ends with it, after all tracebacks."""
    return (str(error).strip().splitlines() or [repr(error)])[-1]
