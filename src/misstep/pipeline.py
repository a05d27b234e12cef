"""The stages in order, into one run directory.

Every stage is a function of content: model calls are cached by model and request, trained
adapters are named by their rows. So a second run of the same recipe, after whatever end the
first one came to, passes through what is done and goes on where it stopped; a changed recipe
pays only for what the change reaches.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal, NamedTuple, TypeVar

from misstep.claims import claimed
from misstep.config import RunConfig
from misstep.data.shelf import Names, Shelf
from misstep.engines.base import Engine
from misstep.engines.cached import CachedEngine, Chosen
from misstep.engines.choose import choose
from misstep.engines.store import CACHE
from misstep.errors import NothingKept, RecipeError
from misstep.evidence.results import FOCUS, Results, write_results
from misstep.inputs import Inputs, read_inputs, warnings
from misstep.judges.base import AnyJudge, Judge
from misstep.judges.choose import cost_judges
from misstep.judges.seats import Seat, seated
from misstep.judging import JudgeInputs, opened
from misstep.methods.base import Materials, Rows
from misstep.methods.registry import METHODS, method_of
from misstep.models.adapter import Adapted
from misstep.models.locate import Model
from misstep.models.merging import folded
from misstep.models.rendering import Renderer
from misstep.policy import Policy
from misstep.progress import Engines, Progress
from misstep.records import (
    Analysis,
    Answer,
    Example,
    Judgement,
    Mistake,
    Pair,
    Praise,
    Prompt,
    RecordFile,
    Response,
    Revision,
    write_jsonl,
)
from misstep.report.page import write_report
from misstep.run_folder import RUN, Manifest, described_run, refuse_own, writable
from misstep.stages.analyse import AnalyseSettings, analyse
from misstep.stages.base import Notify, Tally
from misstep.stages.evaluate import (
    Correct,
    Table,
    agreements,
    corrections,
    judge_answers,
    judged_meanwhile,
)
from misstep.stages.good_answers import distinct, good_answers, with_answer
from misstep.stages.induce import InduceSettings, NoMistakeError, confirm, induce, some_mistakes
from misstep.stages.praise import praise
from misstep.stages.reference import reference_losses
from misstep.stages.reinforce import Feedback, policy_digest, reinforce
from misstep.stages.respond import CUT, respond, whole_counted
from misstep.stages.revise import revise
from misstep.stages.train import REPORT, finished, input_digest, train
from misstep.training.mask import MaskedRow, show_mask
from misstep.training.report import TrainReport
from misstep.training.trl_rows import write_trl

Stage = Literal["induce", "analyse", "rows", "train", "respond", "evaluate"]
OFTEN = 4
"""So often a row may come in an epoch before a word is said of it."""
LOOKING: tuple[Stage, ...] = ("induce", "analyse")
"""Stages that are worth their while though nothing is trained."""
TESTING: tuple[Stage, ...] = ("respond", "evaluate")
"""Stages that what was trained elsewhere takes part in."""
ROUND = "induce, round "
"""How the yield of a further round is called, before its number."""
Chooser = Callable[[str, Model, Path | None, Path | None], Chosen]
A = TypeVar("A", Analysis, Praise)
Writer = Callable[[Policy, Engine, AnalyseSettings, int, Tally], Iterator[A]]
"""What has analyses written: of the materials that it was given, by an engine, with a seed."""


class Collected(NamedTuple):
    """What was made of mistakes, for methods to learn from."""

    mistakes: Iterable[Mistake]
    analyses: Iterable[Analysis]
    revisions: Iterable[Revision] = ()
    unguided: Iterable[Analysis] = ()


GIVEN = {"induce": "prompts", "good answers": "prompts", "praise": "good answers"}
"""What a stage is given that is no mistake."""


class Run:
    """One run directory and the work that fills it, stage by stage."""

    def __init__(
        self,
        inputs: Inputs,
        folder: Path,
        progress: Progress,
        store: Path | None = None,
        chooser: Chooser = choose,
    ) -> None:
        self.inputs = inputs
        self._choose = chooser
        self.store = store
        """A folder of finished work that several runs share: model calls and adapters."""
        self.config = inputs.config
        self.folder = folder
        self.progress = progress
        refuse_own(folder, RUN.own, self.config.paths())
        self.manifest = Manifest(folder, described_run(inputs), RUN)
        self.scratch = folder / "scratch"
        self.model, self.analyst = map(self._whole, (inputs.model, inputs.analyst))
        self._engines = Engines((store or folder) / CACHE, progress)
        self.corrections = self._corrections()
        self.adapters: dict[str, Path | None] = {}
        """Of the methods as far as they are trained; None where a method trains nothing."""
        self.share = 0.0
        """Of the prompts that mistakes were induced on: those with one, before any limit."""
        for warning in warnings(inputs):
            progress.say(warning)
        self.manifest.begin_anew(progress)
        self.manifest.save()

    def _corrections(self) -> dict[str, Correct]:
        if not self.inputs.checks:
            return {}
        with self._judges() as seats:
            return corrections(self.inputs.checks, {s.metric: s.judge.name for s in seats})

    def through(self, last: Stage) -> None:
        """Do the stages up to and including one; weights merged for serving go at the end."""
        try:
            self._through(last)
        finally:
            self._engines.close()
            rmtree(self.scratch, ignore_errors=True)

    def masks(self, count: int) -> list[MaskedRow]:
        """Training rows of the method under test, or of the last one, with what is learned.

        Raises:
            RecipeError: none of the methods trains.
        """
        if not self.config.trained:
            raise RecipeError(
                f"methods: expected one that trains, found {', '.join(self.config.methods)}."
            )
        try:
            mistakes = self.induce()
            analyses = self.analyse(mistakes) if self._needs_analyses else []
            rows = self.rows(self.collected(mistakes, analyses))
        finally:
            self._engines.close()
        found = {name: [r for r in of if isinstance(r, Example)] for name, of in rows.items()}
        shown = found.get(FOCUS, list(found.values())[-1])
        return show_mask(self.model, shown, count, self.config.train.max_length)

    def _whole(self, model: Model) -> Model:
        """The recipe's model with the recipe's adapter in it; any other model as it is."""
        if self.inputs.adapter is None or model != self.inputs.model:
            return model
        return folded(model, self.inputs.adapter, (self.store or self.folder) / "base")

    def _through(self, last: Stage) -> None:
        adapters = self.adapters = self._learned(last)
        if last in (*LOOKING, "rows", "train"):
            return
        if last == "respond":
            self.respond(adapters)
            return
        with self._judges() as seats:
            # What a judge elsewhere says while the model answers is in its cache afterwards.
            answers = self.respond(adapters, partial(judged_meanwhile, seats=seats))
        self.evaluate(answers, adapters)

    def _learned(self, last: Stage) -> dict[str, Path | None]:
        """The adapters; mistakes and analyses are what methods that train learn from."""
        if not self.config.trained and last not in LOOKING:
            self.progress.say("No method of the recipe trains: nothing is collected.")
            return dict.fromkeys(self.config.methods)
        if self.config.trained:
            Renderer.for_model(self.model).refuse_hidden_answers()
        if last in LOOKING and self._has_rounds:
            self.progress.say(
                f"Nothing is done for {last}: mistakes.jsonl and analyses.jsonl hold what "
                "several rounds brought, and would have the first one's alone. `misstep run` "
                "goes through all rounds."
            )
            return {}
        mistakes = self.induce()
        if last == "induce":
            return {}
        analyses: Iterable[Analysis] = []
        if last == "analyse" or self._needs_analyses:
            analyses = self.analyse(mistakes)
            if last == "analyse":
                return {}
            mistakes, analyses = self.further_rounds(mistakes, analyses)
        else:
            self.progress.say("No method of the recipe reads analyses: none is made.")
        collected = self.collected(mistakes, analyses)
        if last == "rows":
            self.write_rows(collected)
            return {}
        return self.train(collected)

    @property
    def _needs_analyses(self) -> bool:
        """Whether rows are made of analyses."""
        config = self.config
        read = any(METHODS[name].uses_analyses for name in config.methods)
        return read or config.rounds > 1

    @property
    def _has_rounds(self) -> bool:
        """Whether a run of this recipe has come beyond the first round."""
        return any(name.startswith(ROUND) for name in self.manifest.data["yields"])

    @property
    def _settings(self) -> InduceSettings:
        assert self.config.mistakes is not None
        return self.config.mistakes

    def induce(self) -> Iterable[Mistake]:
        """Collect the mistakes, into mistakes.jsonl."""
        inputs, settings = self.inputs, self._settings
        with (
            self.manifest.stage("induce"),
            self._judge_of_mistakes() as judge,
            self._counted("induce") as tally,
        ):
            if settings.source == "induced":
                return self._keep_mistakes(self._induced(judge, tally))
            if settings.source == "reported":
                return self._keep_mistakes(confirm(inputs.given, judge, tally))
            tally.given = tally.kept = len(inputs.given)
            return self._keep_mistakes(inputs.given)

    def _induced(
        self, judge: Judge, tally: Tally, adapter: Path | None = None
    ) -> Iterator[Mistake]:
        inputs, settings, seed = self.inputs, self._settings, self.config.seed
        with self._engine(self.model, "inducing", adapter) as engine:
            yield from induce(
                inputs.prompts, inputs.policy, engine, judge, settings, seed, tally
            )

    def _keep_mistakes(self, mistakes: Iterable[Mistake]) -> Iterable[Mistake]:
        kept = RecordFile(self.folder / "mistakes.jsonl", Mistake)
        limit, rounds = self._settings.limit, self.config.rounds
        if limit is None and rounds == 1:
            kept.fill(mistakes)
        else:
            found = Shelf(Mistake, mistakes)
            self.share = self._share_of_mistakes(found)
            kept.fill(some_mistakes(found, limit or len(found), self.config.seed))
            if limit is not None and limit < len(found):
                self.progress.say(f"Of {len(found)} mistakes {limit} are used: mistakes.limit.")
        return kept

    def further_rounds(
        self, mistakes: Iterable[Mistake], analyses: Iterable[Analysis]
    ) -> tuple[Iterable[Mistake], Iterable[Analysis]]:
        """Train, induce the new model's mistakes, analyse them, and so on.

        A round's lessons are added to those before it, and the base model learns them all
        anew: its adapter fits the model that is served, whatever the number of rounds. Rounds
        end early where the share of prompts with a mistake no longer falls; the lessons that
        brought no gain are then left out again.
        """
        share, before = self.share, Shelf(Mistake)
        for number in range(2, self.config.rounds + 1):
            rows = self.rows(Collected(mistakes, analyses), only=(FOCUS,))[FOCUS]
            with self.manifest.stage("rounds"), self._judge_of_mistakes() as judge:
                adapter = self._train(FOCUS, rows, f"rounds/{number - 1}")
                tally = Tally()
                try:
                    found = Shelf(Mistake, self._induced(judge, tally, adapter))
                except NoMistakeError:
                    self.progress.say(f"Round {number}: the model makes no mistake any more.")
                    break
            self._yield(f"{ROUND}{number}", tally)
            now = self._share_of_mistakes(found)
            if now >= share:
                self.progress.say(
                    f"Round {number}: mistakes on {now:.1%} of the prompts, {share:.1%} in the "
                    "round before: one more round would not help."
                )
                if before:
                    mistakes, analyses = self._lessons(before)
                break
            share, before = now, Shelf(Mistake, mistakes)
            seen = Names()
            both = Shelf(Mistake, (m for m in chain(mistakes, found) if seen.add(m.id)))
            some = some_mistakes(both, self._settings.limit or len(both), self.config.seed)
            mistakes, analyses = self._lessons(some)
        return mistakes, analyses

    def _lessons(
        self, mistakes: Iterable[Mistake]
    ) -> tuple[Iterable[Mistake], Iterable[Analysis]]:
        """Make these the run's mistakes, and analyse them."""
        kept = RecordFile(self.folder / "mistakes.jsonl", Mistake).fill(mistakes)
        return kept, self.analyse(kept)

    def _share_of_mistakes(self, mistakes: Iterable[Mistake]) -> float:
        seen = Names()
        hit = sum(seen.add(mistake.prompt.id) for mistake in mistakes)
        return hit / max(1, len(self.inputs.prompts))

    def analyse(self, mistakes: Iterable[Mistake]) -> Iterable[Analysis]:
        """Analyse the mistakes, into analyses.jsonl."""
        found = RecordFile(self.folder / "analyses.jsonl", Analysis)
        self._gated("analyse", found, partial(analyse, mistakes))
        return found

    def praise(self, mistakes: Iterable[Mistake]) -> list[Praise]:
        """Have the good answers to the prompts of mistakes praised, into praise.jsonl.

        Gives what the gate let through.

        Raises:
            NothingKept: there is no such answer, or nothing that was said of one passed.
        """
        found = RecordFile(self.folder / "praise.jsonl", Praise)
        prompts = distinct(mistake.prompt for mistake in mistakes)
        if not any(prompt.reference for prompt in prompts):
            raise NothingKept(
                "praise: expected good answers to the prompts of mistakes, found none. Give "
                "some with the data (column 'reference'), or good_answers.source=self; or "
                "leave out the method that learns from praise."
            )
        self._gated("praise", found, partial(praise, prompts))
        return [words for words in found if words.accepted]

    def _gated(self, stage: str, found: RecordFile[A], write: Writer[A]) -> None:
        """What passes the gate is learned from: something has to.

        Raises:
            NothingKept: nothing did.
        """
        settings = self.config.analysis
        tally = self._analysed(stage, found, write, self.analyst, settings)
        if not tally.kept:
            raise NothingKept(
                f"none of {tally.sampled} analyses was accepted "
                f"({tally.reasons}). Read {found.path}; try another "
                f"analysis.engine, a larger analysis.n (now {settings.n}) or "
                f"analysis.max_tokens (now {settings.max_tokens}), wider patterns in the "
                f"policy's gate ({self.config.policy}), or analysis.gate=false."
            )

    def _analysed(
        self,
        stage: str,
        found: RecordFile[A],
        write: Writer[A],
        model: Model,
        settings: AnalyseSettings,
    ) -> Tally:
        with (
            self.manifest.stage(stage),
            self._engine(model, "analysing") as engine,
            self._counted(stage) as tally,
        ):
            found.fill(write(self.inputs.policy, engine, settings, self.config.seed, tally))
        return tally

    def collected(self, mistakes: Iterable[Mistake], analyses: Iterable[Analysis]) -> Collected:
        """All that the recipe's methods learn from mistakes."""
        methods = [METHODS[name] for name in self.config.methods]
        revised = self.revise(mistakes) if any(m.uses_revisions for m in methods) else []
        praised = self.unguided(mistakes) if any(m.uses_unguided for m in methods) else []
        return Collected(mistakes, analyses, revised, praised)

    def revise(self, mistakes: Iterable[Mistake]) -> Iterable[Revision]:
        """Have the mistakes revised, into revisions.jsonl."""
        policy, settings = self.inputs.policy, self.config.revision
        found = RecordFile(self.folder / "revisions.jsonl", Revision)
        with (
            self.manifest.stage("revise"),
            self._engine(self.model, "revising") as engine,
            self._counted("revise") as tally,
        ):
            found.fill(revise(mistakes, policy, engine, settings, self.config.seed, tally))
        return found

    def unguided(self, mistakes: Iterable[Mistake]) -> Iterable[Analysis]:
        """Have the mistakes analysed without the guide, once each, into unguided.jsonl."""
        once = {"engine": "self", "guided": False, "examples": False, "gate": True, "n": 1}
        found = RecordFile(self.folder / "unguided.jsonl", Analysis)
        settings = self.config.analysis.model_copy(update=once)
        write = partial(analyse, mistakes)
        self._analysed("analyse unguided", found, write, self.model, settings)
        return found

    def train(self, collected: Collected) -> dict[str, Path | None]:
        """Train every method of the recipe; gives the adapter of each, or None."""
        rows = self.rows(collected)
        write_jsonl(self.folder / "examples.jsonl", [row for of in rows.values() for row in of])
        adapters: dict[str, Path | None] = {}
        with self.manifest.stage("train"):
            for method, of in rows.items():
                adapters[method] = self._train(method, of) if of else None
        return adapters

    def write_rows(self, collected: Collected) -> None:
        """Write the rows of every method for another trainer, into rows/."""
        files = {name: self.folder / "rows" / f"{name}.jsonl" for name in METHODS}
        for file in files.values():
            # Those of an earlier recipe would be taken for this one's.
            file.unlink(missing_ok=True)
        for method, rows in self.rows(collected).items():
            begun = any(isinstance(row, Example) and row.prefill for row in rows)
            if rows and METHODS[method].plain and not begun:
                write_trl(files[method], rows)
            elif rows:
                self.progress.say(
                    f"Left out: {method}, whose model is asked, read or taught in a way of its "
                    "own, which TRL's rows have no place for."
                )
        if self.inputs.helpful and "rlhf" in self.config.methods:
            self.progress.say("rlhf.jsonl has the pairs of mistakes; helpful_pairs are yours.")

    def rows(self, collected: Collected, only: tuple[str, ...] = ()) -> dict[str, Rows]:
        """The training rows of every method of the recipe."""
        mistakes, analyses = collected.mistakes, collected.analyses
        asked = self.inputs.prompts or (m.prompt for m in mistakes)
        prompts = distinct(asked)
        answered = self._answered(prompts)

        def learned(mistake: Mistake) -> Mistake:
            return mistake.model_copy(update={"prompt": answered(mistake.prompt)})

        def of_learned(analysis: Analysis) -> Analysis:
            return analysis.model_copy(update={"mistake": learned(analysis.mistake)})

        confirmed = [learned(mistake) for mistake in mistakes if mistake.confirmed]
        methods = only or self.config.methods
        praised = any(METHODS[name].uses_praise for name in methods)
        mix = self.config.mix
        if not self._needs_analyses:
            mix = mix.model_copy(update={"unit": mix.unit or len(confirmed)})
        materials = Materials(
            policy=self.inputs.policy,
            mistakes=confirmed,
            analyses=[of_learned(analysis) for analysis in analyses if analysis.accepted],
            revisions=list(collected.revisions),
            ordinary=self.inputs.ordinary,
            answered=[known for p in prompts if (known := answered(p)).reference],
            mix=mix,
            seed=self.config.training_seed,
            sampled=analyses,
            unguided=[of_learned(analysis) for analysis in collected.unguided],
            praise=self.praise(confirmed) if praised else (),
        )
        return {name: METHODS[name].rows(materials) for name in methods}

    def _answered(self, prompts: Iterable[Prompt]) -> Callable[[Prompt], Prompt]:
        """What gives a prompt the good answer that is learned; good_answers.jsonl."""
        settings = self.config.good_answers
        if settings.source == "data":
            return lambda prompt: prompt
        found = RecordFile(self.folder / "good_answers.jsonl", Response)
        given = (self.inputs.policy, settings, self.config.seed)
        with (
            self.manifest.stage("good answers"),
            self._judge_of_mistakes() as judge,
            self._engine(self.model, "answering well") as engine,
            self._counted("good answers") as tally,
        ):
            found.fill(good_answers(prompts, engine, judge, *given, tally))
        return partial(with_answer, known={a.prompt.messages: a.text for a in found})

    def _train(self, method: str, rows: Rows, place: str = "") -> Path:
        begin, name = self._training(method, rows)
        folder = self._adapter_folder(method, name, place)
        different = len({row.id for row in rows})
        again = "" if different == len(rows) else f", {different} of them different"
        if different * OFTEN <= len(rows):
            again += f": each comes about {len(rows) // different} times an epoch"
        if finished(folder / REPORT, TrainReport, name()) is None:
            self.progress.say(f"Training {method} on {len(rows)} rows{again}")
            self._engines.close()

        def notify(what: str, done: int, total: int) -> None:
            self.progress.update(f"{method}: {what}", done, total)

        report = begin(folder, notify, self.config.hub_datasets())
        made = report.model_dump(mode="json") | {"different": different}
        self.manifest.data["training"][method] = made
        self.manifest.save()
        return folder

    def _training(
        self, method: str, rows: Rows
    ) -> tuple[Callable[[Path, Notify, Sequence[str]], TrainReport], Callable[[], str]]:
        """What trains a method into a folder, and what names that training by content."""
        model, config, seed = self.model, self.config, self.config.training_seed
        if METHODS[method].trainer == "reinforce":
            given = (model, self._feedback(rows), config.train, config.reinforce, seed)
            return partial(reinforce, *given), partial(policy_digest, *given)
        on_rows = (model, rows, config.train, seed)
        return partial(train, *on_rows), partial(input_digest, *on_rows)

    def _feedback(self, rows: Rows) -> Feedback:
        """The pairs, and the prompts that mistakes were collected on, whether made or not."""
        pairs = [row for row in rows if isinstance(row, Pair)]
        asked = self.inputs.prompts or [Prompt(messages=pair.messages) for pair in pairs]
        prompts, helpful = distinct(asked), self.inputs.helpful
        return Feedback(prompts, helpful or pairs, pairs if helpful else ())

    def _tested(self, adapters: Mapping[str, Path | None]) -> dict[str, Adapted]:
        """What is tested, by name: the methods' adapters, then what was trained elsewhere."""
        ours = {name: Adapted(self.model, adapter) for name, adapter in adapters.items()}
        return {**ours, **self.inputs.others}

    def respond(
        self,
        adapters: Mapping[str, Path | None],
        passing: Callable[[Iterable[Answer]], Iterable[Answer]] = iter,
    ) -> Iterable[Answer]:
        """Answer the test prompts with every model, guided and not, into responses.jsonl.

        `passing` may look at the answers as they come.
        """
        found = RecordFile(self.folder / "responses.jsonl", Answer)
        with self.manifest.stage("respond"), self._counted("respond") as tally:
            answers = passing(self._all_answers(adapters))
            found.fill(whole_counted(answers, tally))
        cut = {
            why.removeprefix(f"{CUT}, "): n
            for why, n in tally.refused.most_common()
            if why.startswith(CUT)
        }
        if cut:
            listed = ", ".join(f"{n} of {method}" for method, n in cut.items())
            self.progress.say(
                f"{sum(cut.values())} of {tally.sampled} answers were cut at "
                f"respond.max_tokens ({self.config.respond.max_tokens}) and are judged as they "
                f"stand ({listed}): rates of mistakes and of help are too low."
            )
        return found

    def _all_answers(self, adapters: Mapping[str, Path | None]) -> Iterator[Answer]:
        for name, (model, adapter) in self._tested(adapters).items():
            with self._engine(model, f"answering, {name}", adapter) as engine:
                yield from self._answers(name, engine)

    def _adapter_folder(self, method: str, name: Callable[[], str], place: str) -> Path:
        """Named by the method; in a shared store by all that it is trained from."""
        if self.store is None:
            usual = "adapter" if method == FOCUS else f"adapters/{method}"
            return self.folder / (place or usual)
        return self.store / "adapters" / f"{method}-{name()}"

    def _answers(self, name_of: str, engine: CachedEngine) -> Iterator[Answer]:
        config, policy, method = self.config, self.inputs.policy, method_of(name_of)
        longest = config.respond.max_tokens + method.spare_tokens
        settings = config.respond.model_copy(update={"max_tokens": longest})
        sets = [
            (guided, name, prompts)
            for guided in config.respond.guided
            if guided in method.guided
            for name, prompts in self.inputs.tests.items()
        ]
        asked = ((prompt, guided) for guided, _, prompts in sets for prompt in prompts)
        names = chain.from_iterable(repeat(name, len(prompts)) for _, name, prompts in sets)
        ways = partial(method.ask, policy), partial(method.read, policy)
        responses = respond(asked, policy, engine, settings, config.seed, *ways)
        for name, response in zip(names, responses, strict=True):
            yield Answer(
                method=name_of,
                guided=response.guided,
                test_set=name,
                seed=config.training_seed,
                response=response,
            )

    def evaluate(self, found: Iterable[Answer], adapters: Mapping[str, Path | None]) -> None:
        """Judge the answers, into scores.jsonl, results.json and report.html."""
        # Settings are compared prompt by prompt and resampled: all answers are needed at once.
        answers = list(found)
        with self.manifest.stage("evaluate"):
            with self._judges() as seats:
                judgements = judge_answers(answers, seats)
                names = {seat.metric: seat.judge.name for seat in seats}
            self.manifest.data["judges"] = names
            # The judges' models are gone: this loads the one that was trained.
            self._engines.close()
            judgements += self._reference_losses(answers, adapters)
            write_jsonl(self.folder / "scores.jsonl", judgements)
            write_results(self.folder / "results.json", self._results(answers, judgements))
        write_report(self.folder)

    def _reference_losses(
        self, answers: list[Answer], adapters: Mapping[str, Path | None]
    ) -> Iterator[Judgement]:
        config, policy = self.config, self.inputs.policy
        measured = [a for a in answers if a.test_set in config.evaluate.reference_loss]
        tested = self._tested(adapters)
        for name in dict.fromkeys(answer.method for answer in measured):
            method = method_of(name)
            yield from reference_losses(
                [answer for answer in measured if answer.method == name],
                policy,
                partial(method.ask, policy),
                partial(method.write, policy),
                *tested[name],
                config.train.max_length,
                (self.store or self.folder) / "reference_losses.json",
            )

    def _results(self, answers: list[Answer], judgements: list[Judgement]) -> Results:
        table = Table(
            answers,
            judgements,
            self.config.evaluate.pools,
            self.config.training_seed,
            self.corrections,
        )
        return Results(
            policy=self.inputs.policy.name,
            model=self.inputs.model.name,
            rows=tuple(table.rows(self._sources_of)),
            comparisons=tuple(table.comparisons(FOCUS)),
            agreements=tuple(agreements(answers, judgements)),
        )

    def _sources_of(self, method: str) -> dict[str, Any]:
        config, of = self.config, method_of(method)
        return {
            "mistake_source": self._settings.source if of.uses_mistakes else None,
            "analysis_source": config.analysis.engine if of.uses_analyses else None,
        }

    @contextmanager
    def _counted(self, stage: str) -> Iterator[Tally]:
        """A stage's tally, which is told at its end, and also where nothing was kept."""
        tally = Tally()
        try:
            yield tally
        except NothingKept:
            self._yield(stage, tally)
            raise
        self._yield(stage, tally)

    def _yield(self, stage: str, tally: Tally) -> None:
        counts = tally.counts
        self.manifest.data["yields"][stage] = counts.model_dump(mode="json")
        self.manifest.save()
        kept = "whole" if stage == "respond" else "kept"
        said = f"{stage}: {kept} {counts.kept} of {counts.sampled or counts.given}"
        if counts.sampled > counts.given:
            # At most one is kept for each, as a rule: the share alone would mislead.
            said += (
                f" samples, for {counts.given} {GIVEN.get(stage.partition(',')[0], 'mistakes')}"
            )
        self.progress.say(said)

    @contextmanager
    def _judge_of_mistakes(self) -> Iterator[Judge]:
        with self._opened(self.inputs.of_mistakes) as judge:
            assert isinstance(judge, Judge)
            yield judge

    @contextmanager
    def _judges(self) -> Iterator[list[Seat]]:
        """All that the answers are measured by; models load when they are asked."""
        with ExitStack() as stack:
            first = stack.enter_context(self._judge_of_mistakes())
            further = {
                name: stack.enter_context(self._opened(found))
                for name, found in self.inputs.judges.items()
            }
            yield seated([first, *cost_judges()], further)

    def _opened(self, found: JudgeInputs) -> AbstractContextManager[AnyJudge]:
        whole = found.with_models(self._whole)
        engine = partial(self._engines.opened, what="judging")
        return opened(whole, engine, self._engines.cache, self.scratch)

    def _engine(
        self, model: Model, what: str, adapter: Path | None = None
    ) -> AbstractContextManager[CachedEngine]:
        chosen = self._choose(self.config.engine, model, adapter, self.scratch)
        return self._engines.opened(chosen, what)


def run(
    recipe: Path,
    out: Path | None,
    overrides: list[str],
    progress: Progress,
    last: Stage = "evaluate",
) -> Path:
    """Run a recipe through a stage and give the run directory.

    Raises:
        InputError: recipe, data, policy, model or folder; before any model loads.
        RunError: the run failed; the same command goes on from there.
    """
    return _through(recipe, out, overrides, progress, last).folder


def run_training(
    recipe: Path, out: Path | None, overrides: list[str], progress: Progress
) -> list[Path]:
    """Run a recipe through training and give the folders of what was trained.

    Raises:
        InputError: as `run` does.
        RunError: as `run` does.
    """
    done = _through(recipe, out, overrides, progress, "train")
    return [folder for folder in done.adapters.values() if folder is not None]


def _refuse_idle(config: RunConfig, last: Stage) -> None:
    """Refuse a stage that this recipe gives nothing to do, before anything is moved for it."""
    if last in LOOKING and config.mistakes is None:
        raise RecipeError(f"mistakes: expected a source, which {last} reads; found none.")
    if last == "rows" and not any(METHODS[name].plain for name in config.trained):
        able = ", ".join(name for name, of in METHODS.items() if of.trains and of.plain)
        raise RecipeError(
            "methods: expected one that trains, and whose model is asked as any other "
            f"({able}); found {', '.join(config.methods)}."
        )


def _through(
    recipe: Path, out: Path | None, overrides: list[str], progress: Progress, last: Stage
) -> Run:
    inputs = read_inputs(recipe, overrides, tested=last in TESTING)
    _refuse_idle(inputs.config, last)
    with claimed(writable(out or Path("runs") / inputs.config.name)) as folder:
        whole = Run(inputs, folder, progress)
        whole.through(last)
    return whole


def masked_rows(
    recipe: Path, out: Path | None, overrides: list[str], progress: Progress, count: int
) -> list[MaskedRow]:
    """Go as far as the analyses and give training rows with what is learned; train nothing.

    Raises:
        InputError: as `run` does.
    """
    inputs = read_inputs(recipe, overrides, tested=False)
    with claimed(writable(out or Path("runs") / inputs.config.name)) as folder:
        # What is only looked at leaves the run as it is; it shares the run's model calls.
        return Run(inputs, folder / "mask", progress, store=folder).masks(count)
