"""Scores of answers, and what they add up to: rates with intervals, paired differences.

Every setting (a method, guided or not) answers the same prompts, so differences are paired.
Knows no engine but the one inside a judge.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from misstep.judges.base import Judge
from misstep.records import Answer, Judgement, Score
from misstep.results import (
    Comparison,
    Corrected,
    Metric,
    Row,
    Setting,
    Side,
    compare,
    metric_from_scores,
)
from misstep.stages.base import score_all

Pools = Mapping[str, Sequence[str]]
Describe = Callable[[str], dict[str, str | None]]
"""Given a method's name, the sources of its mistakes and analyses."""
Correct = Callable[[Sequence[Score]], Corrected | None]
"""From a judge's scores to the rate that they stand for."""

BASE = Setting("vanilla", False)


def judge_answers(answers: Sequence[Answer], judges: Sequence[Judge]) -> list[Judgement]:
    """Score every test set with every judge that can say something about it."""
    judgements: list[Judgement] = []
    for test_set in dict.fromkeys(answer.test_set for answer in answers):
        members = [answer for answer in answers if answer.test_set == test_set]
        for judge in judges:
            if any(judge.applies(answer.response.prompt) for answer in members):
                scores = score_all(judge, [answer.response for answer in members])
                for answer, score in zip(members, scores, strict=True):
                    found = [score, *judge.further(answer.response, score)]
                    judgements += [Judgement.of(answer, each) for each in found]
    return judgements


class Table:
    """The scores of one run, looked up by setting, test set and metric; pools are test sets."""

    def __init__(
        self,
        answers: Sequence[Answer],
        judgements: Sequence[Judgement],
        pools: Pools,
        seed: int,
        corrections: Mapping[str, Correct] = MappingProxyType({}),
    ) -> None:
        self.seed = seed
        self.corrections = corrections
        """For metrics whose judge was measured."""
        self._responses = defaultdict(list)
        self._scores = defaultdict(list)
        belongs = _memberships(answers, pools)
        for answer in answers:
            for test_set in belongs[answer.test_set]:
                setting = Setting(answer.method, answer.guided)
                self._responses[setting, test_set].append(answer.response)
        for item in judgements:
            for test_set in belongs[item.test_set]:
                key = (Setting(item.method, item.guided), test_set)
                self._scores[key, item.score.metric].append(item.score)
        self.test_sets = list(
            dict.fromkeys(name for names in belongs.values() for name in names)
        )
        self.settings: list[Setting] = list(
            dict.fromkeys(Setting(a.method, a.guided) for a in answers)
        )

    def rows(self, describe: Describe) -> list[Row]:
        """One row a setting and test set."""
        return [
            Row(
                method=setting.method,
                guided=setting.guided,
                **describe(setting.method),
                seed=self.seed,
                test_set=test_set,
                metrics=metrics,
            )
            for setting in self.settings
            for test_set in self.test_sets
            if (metrics := self._metrics(setting, test_set))
        ]

    def comparisons(self, focus: str) -> list[Comparison]:
        """Every setting against the model as it was; the focus method against all others."""
        pairs = [(a, BASE) for a in self.settings if a != BASE and BASE in self.settings]
        ours = [setting for setting in self.settings if setting.method == focus]
        others = [
            setting for setting in self.settings if setting.method != focus and setting != BASE
        ]
        pairs += [(a, b) for a in ours for b in others]
        found = (
            compare(self._side(a, t, m), self._side(b, t, m), m, t, self.seed)
            for a, b in pairs
            for t in self.test_sets
            for m in self._metrics(a, t)
        )
        return [comparison for comparison in found if comparison is not None]

    def _metrics(self, setting: Setting, test_set: str) -> dict[str, Metric]:
        key = (setting, test_set)
        return {
            metric: self._metric(metric, scores)
            for (where, metric), scores in self._scores.items()
            if where == key
        }

    def _metric(self, name: str, scores: Sequence[Score]) -> Metric:
        found = metric_from_scores(scores, self.seed)
        if name not in self.corrections:
            return found
        return found.model_copy(update={"corrected": self.corrections[name](scores)})

    def _side(self, setting: Setting, test_set: str, metric: str) -> Side:
        key = (setting, test_set)
        return Side(setting.name, self._responses[key], self._scores[key, metric])


def _memberships(answers: Iterable[Answer], pools: Pools) -> dict[str, list[str]]:
    """Each test set with itself and the pools that it is part of."""
    names = dict.fromkeys(answer.test_set for answer in answers)
    return {n: [n, *(pool for pool, members in pools.items() if n in members)] for n in names}
