"""The preliminary study: does a model tell mistakes better than it avoids them?

Every model answers every prompt, unguided and guided; it analyses each of its unguided answers,
right or wrong, unguided and guided; one judge says which answers are mistakes (paper, section
3). Or all analyse those of the first model, which shows whether training taught a model to tell
mistakes, as the paper explains its method. What the numbers mean, and what they do not, stands
in misstep.evidence.study_results and misstep.stages.discriminate.

Like a run, a study is one directory, resumes by content and pays for no model call twice. One
model is in memory at a time; the judge comes last, when all have answered.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

from misstep.claims import claimed
from misstep.data.sources import check_source, load_prompts, source_digest
from misstep.engines.choose import choose
from misstep.engines.store import CACHE
from misstep.errors import DataError, InputError, RecipeError
from misstep.evidence.study_results import (
    Case,
    Study,
    StudyAnswer,
    StudyScore,
    Verdict,
    measure,
    tell,
    write_study,
)
from misstep.inputs import check_judgeable, judge_of_mistakes
from misstep.judges.base import Judge
from misstep.judging import JudgeInputs, judge_of_policy, opened
from misstep.models.adapter import Adapted, check_adapter
from misstep.models.locate import Model, locate
from misstep.policy import Policy, load_policy
from misstep.progress import Engines, Progress
from misstep.records import Prompt, Response, Score, write_jsonl
from misstep.report.study import write_study_report
from misstep.run_folder import Layout, Manifest, described, refuse_own, writable
from misstep.stages.base import score_all
from misstep.stages.discriminate import Discrimination, discriminate
from misstep.stages.respond import RespondSettings, respond
from misstep.study_config import StudyConfig, load_study_recipe

STUDY = "study.json"


class StudyInputs(NamedTuple):
    """All that a study reads, checked before any model loads."""

    config: StudyConfig
    policy: Policy
    models: dict[str, Adapted]
    """By the names that stand in the results."""
    judge: JudgeInputs
    prompts: Sequence[Prompt]


class Work(NamedTuple):
    """What one model wrote, each list in the order of the prompts."""

    answers: list[Response]
    guided_answers: list[Response]
    analyses: list[Discrimination]
    guided_analyses: list[Discrimination]
    """Of unguided answers, its own or the first model's, as `analyses` are."""


def read_study_inputs(recipe: Path, overrides: list[str]) -> StudyInputs:
    """Read and check everything that a study depends on.

    Raises:
        InputError: what is wrong with the recipe, the policy, the data or a model.
    """
    config = load_study_recipe(recipe, overrides)
    policy = load_policy(config.policy)
    check_source(config.prompts)
    prompts = load_prompts(config.prompts, config.seed)
    if not prompts:
        raise DataError("prompts: expected at least one prompt, found none.")
    judge = _judge(config, policy)
    check_judgeable("prompts", prompts, judge.probe())
    return StudyInputs(
        config=config,
        policy=policy,
        models=_models(config),
        judge=judge,
        prompts=prompts,
    )


def _models(config: StudyConfig) -> dict[str, Adapted]:
    located = [locate(name) for name in config.models]
    models = {
        name: Adapted(model) for name, model in zip(names_of(located), located, strict=True)
    }
    if taken := [name for name in config.adapters if name in models]:
        raise RecipeError(f"adapters.{taken[0]}: expected a name of its own, found a model's.")
    for name, path in config.adapters.items():
        try:
            models[name] = _adapted(config, located[0], path)
        except InputError as error:
            raise RecipeError(f"adapters.{name}: {error}") from error
    return models


def _adapted(config: StudyConfig, base: Model, path: str) -> Adapted:
    if base.endpoint is not None:
        raise RecipeError(
            f"the weights of {base.name} are not here, so that no adapter can be put on it. "
            "Name the server's model that has it as one of `models`."
        )
    found = Adapted(base, check_adapter(path, base))
    # What cannot be served is known before the first model answers.
    choose(config.engine, *found)
    return found


def names_of(models: list[Model]) -> list[str]:
    """Names for the results: of a path its last part, where no two are called the same."""
    short = [_short(model) for model in models]
    return short if len(set(short)) == len(short) else [model.name for model in models]


def _short(model: Model) -> str:
    # The embedded model has a file too, but its user wrote a name and no path.
    written = Path(model.name).expanduser()
    if model.path is None or model.path != written:
        return model.name
    return written.stem if model.is_gguf else written.resolve().name


def _judge(config: StudyConfig, policy: Policy) -> JudgeInputs:
    if config.judge_file is not None:
        return judge_of_mistakes(config.judge_file)
    model = None
    if policy.judge.rubric is not None:
        if config.judge is None:
            raise RecipeError(
                f"judge: expected a model, since the policy {policy.name} judges by a rubric; "
                "found none. Name one that judges the answers of all models: judge: MODEL, or "
                "a trained judge: judge: FOLDER."
            )
        model = locate(config.judge)
    return judge_of_policy(config.policy, policy, config.engine, model)


LAYOUT = Layout(
    records=("responses.jsonl", "analyses.jsonl", "scores.jsonl", "study.html", STUDY),
    work=("scratch",),
    mark="models",
    content=("policy", "models", "judge", "data"),
    counted=("stages",),
    config=StudyConfig,
)


def _described(inputs: StudyInputs) -> dict[str, Any]:
    """What a study reads, for its manifest."""
    return described(inputs.config, inputs.policy) | {
        "models": {name: model.digest for name, model in inputs.models.items()},
        "judge": _named(inputs),
        "data": {"prompts": source_digest(inputs.config.prompts)},
    }


def _named(inputs: StudyInputs) -> dict[str, str] | None:
    """What answers are judged by, where it is not the policy alone."""
    judge, model = inputs.judge, inputs.judge.model
    if inputs.config.judge_file is not None:
        return {"name": judge.title, "digest": judge.digest}
    return None if model is None else {"name": model.name, "digest": model.digest}


class StudyRun:
    """One study directory and the work that fills it, model by model."""

    def __init__(self, inputs: StudyInputs, folder: Path, progress: Progress) -> None:
        self.inputs = inputs
        self.config = inputs.config
        self.folder = folder
        self.progress = progress
        refuse_own(folder, LAYOUT.own, {"prompts": self.config.prompts.path})
        self.manifest = Manifest(folder, _described(inputs), LAYOUT)
        self.scratch = folder / "scratch"
        self._engines = Engines(folder / CACHE, progress)
        self.manifest.begin_anew(progress)
        self.manifest.save()

    def through(self) -> Study:
        """Answer, analyse, judge and count; weights made for serving go at the end."""
        try:
            works: dict[str, Work] = {}
            for name, model in self.inputs.models.items():
                works[name] = self._work(name, model, self._analysed_by(name, works))
            scores = self._judged(works)
        finally:
            self._engines.close()
            rmtree(self.scratch, ignore_errors=True)
        write_jsonl(
            self.folder / "responses.jsonl",
            [
                StudyAnswer(model=name, response=response)
                for name, work in works.items()
                for response in work.answers + work.guided_answers
            ],
        )
        write_jsonl(
            self.folder / "analyses.jsonl",
            [a for work in works.values() for a in work.analyses + work.guided_analyses],
        )
        study = self._study(works, scores)
        write_study(self.folder / STUDY, study)
        return study

    def _analysed_by(self, name: str, works: Mapping[str, Work]) -> list[Response] | None:
        """The first model's answers where all analyse them; None stands for one's own."""
        author = self._author()
        return works[author].answers if author and author != name else None

    def _author(self) -> str | None:
        return next(iter(self.inputs.models)) if self.config.analysed == "first" else None

    def _work(self, name: str, model: Adapted, given: list[Response] | None) -> Work:
        config, policy, prompts = self.config, self.inputs.policy, self.inputs.prompts
        settings = RespondSettings(**config.respond.model_dump())
        chosen = choose(config.engine, *model, self.scratch)
        with self._engines.opened(chosen, f"{name}: answering") as engine:
            with self.manifest.stage("respond"):
                answers, guided_answers = (
                    list(respond(asked, policy, engine, settings, config.seed))
                    for asked in ([(p, guided) for p in prompts] for guided in (False, True))
                )
            with self.manifest.stage("analyse"):
                engine.notify = partial(self.progress.update, f"{name}: analysing")
                analyses, guided_analyses = (
                    discriminate(
                        name,
                        answers if given is None else given,
                        policy,
                        engine,
                        config.analyse,
                        guided,
                        config.seed,
                    )
                    for guided in (False, True)
                )
        return Work(answers, guided_answers, analyses, guided_analyses)

    def _judged(self, works: dict[str, Work]) -> dict[str, list[Score]]:
        """The judge's scores of each model's answers, the unguided first; into scores.jsonl."""
        engine = partial(self._engines.opened, what="judging")
        asked = opened(self.inputs.judge, engine, self._engines.cache, self.scratch)
        with self.manifest.stage("judge"), asked as judge:
            assert isinstance(judge, Judge)
            scores = {
                name: score_all(judge, work.answers + work.guided_answers)
                for name, work in works.items()
            }
        write_jsonl(
            self.folder / "scores.jsonl",
            [StudyScore(model=name, score=s) for name, of in scores.items() for s in of],
        )
        return scores

    def _study(self, works: dict[str, Work], scores: dict[str, list[Score]]) -> Study:
        inputs, author = self.inputs, self._author()
        cases = {
            name: _cases(work, scores[name], scores[author or name])
            for name, work in works.items()
        }
        return Study(
            policy=inputs.policy.name,
            judge=next(score.judge for of in scores.values() for score in of),
            seed=self.config.seed,
            prompts=len(inputs.prompts),
            models=tuple(
                measure(name, inputs.models[name].digest, of, own=author in (None, name))
                for name, of in cases.items()
            ),
            analysed=author,
            told=tell(cases, self.config.seed) if author else (),
        )


def _cases(work: Work, scores: Sequence[Score], analysed: Sequence[Score]) -> list[Case]:
    """Of the scores of a model's answers and of those that it analysed, the unguided first."""
    n = len(work.answers)
    wrong, of_analysed = _mistakes(scores), _mistakes(analysed)[:n]
    said = [[a.says_mistake for a in of] for of in (work.analyses, work.guided_analyses)]
    return [Case(*case) for case in zip(wrong[:n], wrong[n:], of_analysed, *said, strict=True)]


def _mistakes(scores: Iterable[Score]) -> list[Verdict]:
    return [None if score.counted is None else bool(score.counted) for score in scores]


def run_study(recipe: Path, out: Path | None, overrides: list[str], progress: Progress) -> Path:
    """Make a study and give its directory.

    Raises:
        InputError: recipe, data, policy, model or folder; before any model loads.
        RunError: the study failed; the same command goes on from there.
    """
    inputs = read_study_inputs(recipe, overrides)
    with claimed(writable(out or Path("runs") / inputs.config.name)) as folder:
        StudyRun(inputs, folder, progress).through()
        write_study_report(folder)
    return folder
