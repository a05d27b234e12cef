"""A Ray cluster of two nodes analyses mistakes; one node is killed half-way.

Both nodes are on this machine; the engine inside the actors is scripted and slow, so that what
is tested is Ray's part and ours. Prints JSON: the records, how many came back, how often one
came twice, whether ids and order are those of the local engine, and the seconds.

    python benchmarks/ray_node_loss.py --records 20000

Needs `pip install 'misstep[ray]'`.
"""

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from misstep.engines.base import Completion, Engine, Request
from misstep.engines.cached import Chosen
from misstep.engines.ray import RayEngine, Share
from misstep.engines.scripted import ScriptedEngine, echo
from misstep.policy import load_policy
from misstep.records import Analysis, Mistake, Prompt
from misstep.stages.analyse import AnalyseSettings, analyse
from misstep.stages.base import Tally

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 << 20}


class Watched(Engine):
    """Another engine, in batches; something happens when so many answers are there.

    A stage asks for its records in portions, so the count goes on from call to call.
    """

    def __init__(
        self, inner: Engine, batch: int, when: float, then: Callable[[], None]
    ) -> None:
        self.identity = inner.identity
        self.inner = inner
        self.batch = batch
        self.when = when
        self.then = then
        self.received = 0

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        answers: dict[int, Completion] = {}
        for part in self.inner.stream(requests, self.batch):
            before = self.received
            self.received += len(part)
            answers.update(part)
            if before < self.when <= self.received:
                self.then()
        return [answers[place] for place in range(len(requests))]


def choose_slow(seconds: float) -> Callable[[], Chosen]:
    """A scripted engine that takes its time over each request."""

    def slow(request: Request) -> str:
        time.sleep(seconds)
        return echo(request)

    def choose() -> Chosen:
        engine = ScriptedEngine(slow)
        return Chosen(engine.identity, "scripted", lambda: engine)

    return choose


def analysed(engine: Engine, records: int) -> list[Analysis]:
    """The stage that users run, on made-up mistakes."""
    mistakes = [
        Mistake(prompt=Prompt.of(f"Attack {i}"), response="Obeyed.", source="origin")
        for i in range(records)
    ]
    settings = AnalyseSettings(n=1, gate=False, examples=False)
    policy = load_policy("goal-hijacking")
    return list(analyse(mistakes, policy, engine, settings, 0, Tally()))


def lose_a_node(records: int, batch: int, seconds: float) -> dict[str, Any]:
    """Analyse on two nodes, kill one half-way, and compare with one engine here."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    lost = cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        choose = choose_slow(seconds)
        fleet = RayEngine(choose, choose().identity, Share(2, 1, 0))
        killed: list[float] = []

        def kill() -> None:
            killed.append(time.monotonic() - started)
            cluster.remove_node(lost, allow_graceful=False)

        watched = Watched(fleet, batch, records / 2, kill)
        started = time.monotonic()
        found = analysed(watched, records)
        taken = time.monotonic() - started
        nodes = sum(node["Alive"] for node in ray.nodes())
    finally:
        ray.shutdown()
        cluster.shutdown()
    ids = [analysis.id for analysis in found]
    here = [analysis.id for analysis in analysed(ScriptedEngine(), records)]
    return {
        "records": records,
        "received": watched.received,
        "different": len(set(ids)),
        "as_the_local_engine": ids == here,
        "nodes_left": nodes,
        "killed_after_seconds": round(killed[0], 1),
        "seconds": round(taken, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=0.001, help="for a request")
    given = parser.parse_args()
    print(json.dumps(lose_a_node(given.records, given.batch, given.seconds)))
