"""The command line: parse, call, print. Knows no model and no stage's inside."""

import errno
import gc
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from misstep import __version__
from misstep.errors import InputError, MisstepError, RunError

if TYPE_CHECKING:
    from misstep.bench.measure import Bench

app = typer.Typer(
    name="misstep",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A language model learns from its mistakes: collect, analyse, train, guide, prove.\n\n"
    "Exit status: 0 where it is done, 1 where a run failed (the same command goes on from "
    "there), 2 where the input is wrong, 130 or 143 where it was interrupted.",
)
judge_app = typer.Typer(
    no_args_is_help=True, help="Judges: how far to trust one, and people as judges."
)
app.add_typer(judge_app, name="judge")
bench = typer.Typer(
    no_args_is_help=True, help="Speed side by side with peers, in one run, by turns."
)
app.add_typer(bench, name="bench")
cache_app = typer.Typer(no_args_is_help=True, help="Finished answers of models, kept by runs.")
app.add_typer(cache_app, name="cache")
Recipe = Annotated[Path, typer.Argument(help="A YAML recipe.", show_default=False)]


def _path(given: str) -> Path:
    """A path that names something: an empty one, as of an unset variable, would be `.`."""
    if not given:
        raise InputError("--out: expected a path, found nothing. Write . for where you are.")
    return Path(given)


def _out(about: str, check: Callable[[Path | None], Path | None] | None = None) -> Any:
    return typer.Option("--out", parser=_path, metavar="<path>", help=about, callback=check)


Out = Annotated[Path | None, _out("The run directory; runs/NAME where left out.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Put a value over the recipe's.")
]
Fields = Annotated[
    list[str],
    typer.Option("--field", metavar="FIELD=COLUMN", help="Map a column, as label=is_bad."),
]
BenchModel = Annotated[str, typer.Option("--model", help="A model whose weights are here.")]
Rounds = Annotated[int, typer.Option(min=1, help="So many times each side has its turn.")]


def _writable_file(path: Path | None) -> Path | None:
    """A path that a result can be written to, known before a benchmark has taken its time."""
    if path is None:
        return None
    path = path.expanduser()
    if path.is_dir():
        raise InputError(f"--out {path}: expected the path of a file, found a folder.")
    from misstep.run_folder import writable

    writable(path.parent)
    return path


BenchOut = Annotated[
    Path | None, _out("A JSON file; bench-NAME.json where left out.", _writable_file)
]


class JudgedMetric(StrEnum):
    """What a judge is trained to tell."""

    mistake_rate = "mistake_rate"
    over_refusal = "over_refusal"
    helpfulness = "helpfulness"


def _run(recipe: Path, out: Path | None, overrides: list[str], last: str) -> Path:
    from misstep.pipeline import Stage, run
    from misstep.progress import progress

    stage: Stage = last  # type: ignore[assignment]  # the commands below name stages only
    with progress() as shown:
        return run(recipe, out, overrides, shown, stage)


@app.command("run")
def run_command(recipe: Recipe, out: Out = None, overrides: Overrides = []) -> None:  # noqa: B006
    """Run the whole recipe; run it again to go on after an interruption."""
    from misstep.summary import print_summary

    print_summary(_run(recipe, out, overrides, "evaluate"))


@app.command()
def compare(recipe: Recipe, out: Out = None, overrides: Overrides = []) -> None:  # noqa: B006
    """Run methods x seeds x swept keys; one table with intervals. Run again to go on."""
    from misstep.comparison import compare_methods
    from misstep.progress import progress
    from misstep.summary import print_comparison

    with progress() as shown:
        folder = compare_methods(recipe, out, overrides, shown)
    print_comparison(folder)


@app.command()
def induce(recipe: Recipe, out: Out = None, overrides: Overrides = []) -> None:  # noqa: B006
    """Collect the mistakes."""
    print(_run(recipe, out, overrides, "induce") / "mistakes.jsonl")


@app.command()
def analyse(recipe: Recipe, out: Out = None, overrides: Overrides = []) -> None:  # noqa: B006
    """Have the mistakes analysed."""
    print(_run(recipe, out, overrides, "analyse") / "analyses.jsonl")


@app.command()
def rows(recipe: Recipe, out: Out = None, overrides: Overrides = []) -> None:  # noqa: B006
    """Write the training rows of all methods as TRL reads them, for a trainer of your own."""
    for file in sorted((_run(recipe, out, overrides, "rows") / "rows").glob("*.jsonl")):
        print(file)


@app.command()
def train(
    recipe: Recipe,
    out: Out = None,
    overrides: Overrides = [],  # noqa: B006
    show_mask: Annotated[
        int,
        typer.Option(
            min=0, help="Print so many training rows, what is learned marked; train nothing."
        ),
    ] = 0,
) -> None:
    """Train on the analyses, and the recipe's other methods on their rows."""
    from misstep.progress import progress

    if show_mask:
        from misstep.pipeline import masked_rows
        from misstep.training.mask import print_mask

        with progress() as shown:
            rows = masked_rows(recipe, out, overrides, shown, show_mask)
        if not rows:
            raise InputError(
                f"{recipe}: methods: expected rows of one answer each from the method that is "
                "shown (mistake_analysis, or the last one), found none: its rows are pairs, or "
                "all longer than train.max_length. Put another method last."
            )
        print_mask(rows)
        return
    from misstep.pipeline import run_training

    with progress() as shown:
        folders = run_training(recipe, out, overrides, shown)
    for folder in folders:
        print(folder)


@app.command()
def respond(recipe: Recipe, out: Out = None, overrides: Overrides = []) -> None:  # noqa: B006
    """Answer the test prompts with every model, guided and unguided."""
    print(_run(recipe, out, overrides, "respond") / "responses.jsonl")


@app.command()
def evaluate(recipe: Recipe, out: Out = None, overrides: Overrides = []) -> None:  # noqa: B006
    """Judge the answers and write results.json and report.html."""
    from misstep.summary import print_summary

    print_summary(_run(recipe, out, overrides, "evaluate"))


@app.command()
def study(recipe: Recipe, out: Out = None, overrides: Overrides = []) -> None:  # noqa: B006
    """Set telling mistakes against making them, and guided against unguided analysis."""
    from misstep.progress import progress
    from misstep.study import run_study
    from misstep.summary import print_study

    with progress() as shown:
        folder = run_study(recipe, out, overrides, shown)
    print_study(folder)


@app.command()
def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="The directory of a run or of a comparison.", show_default=False
        ),
    ],
    out: Annotated[Path, _out("A new folder, or NAME.gguf where the model is a GGUF file.")],
    method: Annotated[
        str,
        typer.Option(
            "--method", help="Whose model; of a comparison, a folder in its `adapters`."
        ),
    ] = "mistake_analysis",
    guided: Annotated[
        bool,
        typer.Option(
            "--guided", help="Put the policy's guide into the chat template, for all clients."
        ),
    ] = False,
) -> None:
    """Write what was trained as one plain model, which any server answers from."""
    from misstep.export import export as write

    print(write(run, method, guided, out))


@judge_app.command("check")
def judge_check(
    judge: Annotated[
        str,
        typer.Argument(
            help="A rule (obedience, helpfulness, refusal), policy:NAME, rubric:NAME, "
            "guard:NAME, the folder of a trained judge, or a YAML file.",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[str],
        typer.Argument(
            help="Labelled data: files (.csv, .jsonl, .json, .parquet), Hugging Face data "
            "sets, or YAML files with the keys of a recipe's source.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, _out("The check's directory; runs/check-JUDGE where left out.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The model that is asked, or the guard's.")
    ] = None,
    field: Fields = [],  # noqa: B006
    decoys: Annotated[
        bool,
        typer.Option(
            "--decoys",
            help="Judge each answer once more, with a refusal, a harmless answer or a claim to "
            "be safe beside it. Of judges of mistakes.",
        ),
    ] = False,
) -> None:
    """Measure a judge on people's labels: agreement and errors with intervals, a page."""
    from misstep.judge_check import check_judge
    from misstep.progress import progress
    from misstep.summary import print_check

    with progress() as shown:
        folder = check_judge(judge, data, out, model, field, shown, decoys)
    print_check(folder)


@judge_app.command("train")
def judge_train(
    data: Annotated[
        list[str],
        typer.Argument(help="Labelled data, as `judge check` reads them.", show_default=False),
    ],
    out: Annotated[Path, _out("The folder of the judge.")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="What it is made of: a language model's lower layers, or an encoder.",
        ),
    ] = "smollm2-135m",
    metric: Annotated[
        JudgedMetric, typer.Option("--metric", help="What a label of 1 says.")
    ] = JudgedMetric.mistake_rate,
    field: Fields = [],  # noqa: B006
    settings: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="held_out, dev, seed, epochs, learning_rate, batch_size, max_tokens, layers, "
            "adapted, rank or decoys.",
        ),
    ] = [],  # noqa: B006
) -> None:
    """Train a classifier judge on labelled answers, parted by question; a card with it."""
    from misstep.judge_train import read_train_inputs, train_judge
    from misstep.progress import progress
    from misstep.summary import print_card

    inputs = read_train_inputs(data, model, metric.value, field, settings)
    with progress() as shown:
        folder = train_judge(inputs, out, shown)
    print_card(folder)


@judge_app.command("sheet")
def judge_sheet(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run directory.", show_default=False)
    ],
    a: Annotated[
        str | None,
        typer.Option("--a", help="A setting; vanilla/unguided where left out."),
    ] = None,
    b: Annotated[
        str | None,
        typer.Option("--b", help="The other; what the run is about where left out."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="At most so many prompts.")] = 100,
    seed: Annotated[int, typer.Option("--seed", help="Of prompts, order and sides.")] = 0,
) -> None:
    """Write a blind, shuffled sheet of two settings' answers for people to rate."""
    from misstep.people import write_sheet

    sheet = write_sheet(folder, a, b, n, seed)
    print(f"{sheet / 'sheet.html'}\n{sheet / 'sheet.csv'}")
    print(f"{sheet / 'key.json'} says whose answers they are: keep it from the raters.")


@judge_app.command("import")
def judge_import(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="The run directory of the sheet.", show_default=False
        ),
    ],
    sheets: Annotated[
        list[Path],
        typer.Argument(
            metavar="SHEET...",
            help="Rated sheets, one a rater, named after them.",
            show_default=False,
        ),
    ],
) -> None:
    """Read rated sheets back: agreement of the raters, and of the judge with them."""
    from misstep.people import import_sheets
    from misstep.summary import print_ratings

    path, ratings = import_sheets(folder, sheets)
    print_ratings(path, ratings)


@app.command("import-inspect")
def import_inspect(
    logs: Annotated[
        list[Path],
        typer.Argument(
            metavar="LOG...",
            help="Logs of `inspect eval misstep/recipe`, of one recipe.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, _out("The directory; runs/inspect-NAME where left out.")
    ] = None,
) -> None:
    """Make results of inspect_ai's logs of a recipe's test sets."""
    from misstep.inspect_log import import_logs
    from misstep.summary import print_summary

    print_summary(import_logs(logs, out))


@app.command()
def report(
    folder: Annotated[
        Path,
        typer.Argument(
            help="The directory of a run, a comparison, a study or a check.", show_default=False
        ),
    ],
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the run's numbers as Markdown instead.")
    ] = False,
    picture: Annotated[
        bool,
        typer.Option(
            "--picture",
            help="Write the picture of a comparison or study as picture.svg instead.",
        ),
    ] = False,
) -> None:
    """Write what a directory holds as one self-contained HTML page."""
    from misstep.report import pages

    if picture:
        print(pages.picture(folder))
    elif markdown:
        print(pages.markdown(folder), end="")
    else:
        print(pages.page(folder))


@bench.command("train")
def bench_train(
    model: BenchModel = "smollm2-135m",
    rows: Annotated[int, typer.Option(min=1, help="Rows of each kind of work.")] = 160,
    work: Annotated[list[str], typer.Option(help="analysis, mixed; all where left out.")] = [],  # noqa: B006
    rounds: Rounds = 3,
    out: BenchOut = None,
) -> None:
    """Training, beside TRL's SFTTrainer as documented and at its best settings."""
    from misstep.bench.run import bench_train
    from misstep.progress import progress

    with progress() as shown:
        found = bench_train(model, rows, work, rounds, shown)
    _keep_bench(found, out)


@bench.command("generate")
def bench_generate(
    model: BenchModel = "smollm2-135m",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each kind of work.")] = 48,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of an answer.")] = 64,
    work: Annotated[
        list[str], typer.Option(help="analysis, attacks; all where left out.")
    ] = [],  # noqa: B006
    rounds: Rounds = 3,
    out: BenchOut = None,
) -> None:
    """Answers, beside model.generate, and llama.cpp's server and vLLM where installed."""
    from misstep.bench.run import bench_generate
    from misstep.progress import progress

    with progress() as shown:
        found = bench_generate(model, prompts, max_tokens, work, rounds, shown)
    _keep_bench(found, out)


@bench.command("pipeline")
def bench_pipeline(
    recipe: Recipe,
    overrides: Overrides = [],  # noqa: B006
    script: Annotated[Path, typer.Option(help="The peer's script for the same work.")] = Path(
        "benchmarks/pipeline_trl.py"
    ),
    rounds: Rounds = 1,
    out: BenchOut = None,
) -> None:
    """A whole recipe, beside a script of TRL and transformers for the same work."""
    from misstep.bench.run import bench_pipeline
    from misstep.progress import progress

    with progress() as shown:
        found = bench_pipeline(recipe, overrides, script, rounds, shown)
    _keep_bench(found, out)


@bench.command("overhead")
def bench_overhead(
    records: Annotated[
        list[int],
        typer.Option(min=1, help="So many; give it again for more than one measurement."),
    ] = [10_000, 100_000],  # noqa: B006
    out: BenchOut = None,
) -> None:
    """What the pipeline costs beside the model: time a record, memory, the cache."""
    from misstep.bench.overhead import print_overhead
    from misstep.bench.run import bench_overhead
    from misstep.progress import progress
    from misstep.records import write_json

    with progress() as shown:
        found = bench_overhead(records, shown)
    print_overhead(found)
    path = out or Path("bench-overhead.json")
    write_json(path, {"schema": 1} | found.model_dump(mode="json"))
    print(path)


def _keep_bench(found: "Bench", out: Path | None) -> None:
    from misstep.bench.measure import print_bench
    from misstep.records import write_json

    print_bench(found)
    path = out or Path(f"bench-{found.bench}.json")
    write_json(path, {"schema": 1} | found.model_dump(mode="json"))
    print(path)


Cache = Annotated[
    Path,
    typer.Argument(
        metavar="CACHE", help="A run directory, or a cache.sqlite.", show_default=False
    ),
]


@cache_app.command("list")
def cache_list(cache: Cache) -> None:
    """Say what is kept, a line for each engine: answers, first and last day, identity."""
    from misstep.engines.store import open_existing

    with open_existing(cache, only_read=True) as store:
        for held in store.holdings():
            days = f"{held.first:%Y-%m-%d}  {held.last:%Y-%m-%d}"
            print(f"{held.answers:>9,}  {days}  {held.identity}")
        print(f"{store.used_bytes() / 1e6:,.1f} MB")


@cache_app.command("prune")
def cache_prune(
    cache: Cache,
    engine: Annotated[
        str | None, typer.Option(help="Of engines whose identity contains this, only.")
    ] = None,
    days: Annotated[
        float | None, typer.Option(min=0, help="Only answers older than so many days.")
    ] = None,
    megabytes: Annotated[
        float | None, typer.Option(min=0, help="Only the oldest, down to this size.")
    ] = None,
) -> None:
    """Remove answers, also while runs use them: what a run misses it asks for again."""
    from misstep.engines.store import open_existing

    if engine is None and days is None and megabytes is None:
        raise InputError("cache prune: expected --engine, --days or --megabytes, found none.")
    if engine == "":
        raise InputError(
            "cache prune: --engine: expected a part of an engine's identity, as `misstep cache "
            "list` prints them, found nothing; it would remove all answers."
        )
    with open_existing(cache) as store:
        print(f"{store.prune(engine, days, megabytes):,} answers removed")


def _version(show: bool) -> None:
    if show:
        print(f"misstep {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options that stand before the command; `--debug` is read by `main`."""


def main() -> None:
    """Run the command line: status 0 done, 1 a run failed, 2 the input is wrong."""
    # Threads that wait by spinning slow training many times over on a machine that others use
    # too; this must be set before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Records hold no cycles; looking for some among them again and again takes a fifth of the
    # time that passes beside the model.
    gc.set_threshold(100_000)
    debug = "--debug" in sys.argv
    if not debug:
        # Libraries warn each other of coming changes; who runs a command cannot act on them.
        warnings.simplefilter("ignore", FutureWarning)
    # The option may stand anywhere, as people type it last after a failure.
    sys.argv = [arg for arg in sys.argv if arg != "--debug"]
    # Schedulers and containers ask with this signal before they kill: servers and temporary
    # files are then cleared away as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        _run_app()
    except MisstepError as error:
        advice = error.advice if isinstance(error, RunError) else ""
        _fail(str(error), debug, error.exit_status, advice)
    except (KeyboardInterrupt, SystemExit) as end:
        # Within a command Typer makes an exit of the interruption, and says nothing.
        status = end.code if isinstance(end, SystemExit) else INTERRUPTED
        if status in (INTERRUPTED, TERMINATED):
            print(f"\nInterrupted. {RunError.advice}", file=sys.stderr)
        sys.exit(status)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        advice = "--debug shows where it happened."
        if isinstance(error, OSError) and error.errno in FULL:
            text = f"{error.filename or 'a file'}: not written whole ({error.strerror})"
            advice = f"Make room, for the run and in {tempfile.gettempdir()}."
        _fail(text, debug, 1, f"{RunError.advice} {advice}")


def _run_app() -> None:
    """The command; of several processes of `accelerate launch` the first one alone runs it."""
    from misstep.training import processes

    if processes.is_leader():
        with processes.leading():
            app()
        return
    from misstep.stages.train import follow

    processes.follow(follow)


INTERRUPTED = 130
TERMINATED = 143
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where a disk, or a user's share of it, is full; often of no file."""


def _fail(text: str, debug: bool, status: int, advice: str) -> None:
    if debug:
        traceback.print_exc()
    print(f"error: {text}", file=sys.stderr)
    if advice:
        print(advice, file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
