"""A run as a Markdown page, for a repository's own documents.

Made from results.json and manifest.json alone, so that a page in the repository can be held
equal to the files it was made from. What was imported has no manifest, and its page nothing of
what that says.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from misstep.data.held_out import told
from misstep.evidence.results import (
    BASE,
    FOCUS,
    Comparison,
    Corrected,
    Metric,
    Pooled,
    Results,
    Setting,
    adjusted,
    read_results,
)
from misstep.report.compared import (
    between_variants,
    by_kind,
    by_test_set,
    differences_line,
    within_variants,
)
from misstep.report.reading import read_manifest
from misstep.report.words import direction, duration, in_order, metric_title, rate

SHOWN = (BASE, Setting("sft", guided=True))
"""What a comparison's page sets the others against; guided SFT may be missing in none."""
BAR = r"\|"
HOLM = "The adjusted p is Holm's, for all comparisons of one metric and test set"
CORRECTED = (
    "Corrected: the rate that the judge's verdicts stand for (Rogan and Gladen), with an "
    "interval that holds what is not known of the judge's errors. It supposes that the judge "
    "errs on these answers as it does on the labelled ones that it was checked on; a rate that "
    "no true rate explains then, such as one below the judge's false alarms, has no corrected "
    "one. Differences are not corrected."
)


def run_markdown(folder: Path) -> str:
    """The page of a run directory.

    Raises:
        DataError: results.json is absent or unreadable.
    """
    results = read_results(folder / "results.json")
    manifest = read_manifest(folder) if (folder / "manifest.json").is_file() else None
    parts = [
        f"# {named(folder, manifest)}: {results.policy} on {results.model}",
        *([made_by(manifest), *_overlaps(manifest)] if manifest else []),
        "## Rates with 95 % intervals",
        rows_table(results),
        *([CORRECTED] if results.corrected else []),
        *_paired(results),
        *_agreements(results),
        *(["## Yields", _yields(manifest["yields"])] if manifest else []),
    ]
    return "\n\n".join(parts) + "\n"


def _paired(results: Results) -> list[str]:
    if not results.comparisons:
        return []
    found = adjusted(results.comparisons)
    about = [c for c in found if c.a.startswith(f"{FOCUS}/") or c.b == BASE.name]
    told = HOLM + "."
    if about and len(about) < len(found):
        told = (
            f"{HOLM}, which `results.json` holds; shown are those of {FOCUS} and those with "
            "the untrained model."
        )
    return ["## Paired differences (a minus b)", told, _differences(about or found)]


def _overlaps(manifest: dict[str, Any]) -> list[str]:
    found = list(told(manifest.get("overlaps", {})))
    return [f"**Not all test prompts are held out:** {'; '.join(found)}."] if found else []


def _agreements(results: Results) -> list[str]:
    """The judges that were put side by side, where there are such."""
    if not results.agreements:
        return []
    lines = table(["test set", "judges of", "and of", "same verdict", "Cohen's kappa", "n"])
    for found in results.agreements:
        same, kappa = found.same, found.kappa
        # What has no score is told once.
        beyond = kappa and kappa.model_copy(update={"unscored": 0})
        cells = [metric_cell(same), metric_cell(beyond, "kappa"), str(same.n)]
        lines.append(line([found.test_set, found.a, found.b, *cells]))
    return ["## Agreement of the judges", "\n".join(lines)]


def comparison_markdown(folder: Path) -> str:
    """The page of a comparison's directory.

    Raises:
        DataError: results.json or manifest.json is absent or unreadable.
    """
    results, manifest = read_results(folder / "results.json"), read_manifest(folder)
    spent = sum(s["seconds"] for c in manifest["cells"].values() for s in c["stages"].values())
    seeds = sorted({row.seed for row in results.rows})
    parts = [
        f"# {named(folder, manifest)}: {results.policy} on {results.model}",
        "`results.json` and `manifest.json` lie beside this page.\n"
        f"Machine: {manifest['device']}. Training seeds {', '.join(map(str, seeds))}. "
        f"{len(manifest['cells'])} cells, {duration(spent)} in all.",
        *_overlaps(manifest),
        "## Rates with 95 % intervals",
        pooled_table(results),
        *([CORRECTED] if results.corrected else []),
        *_kinds(results),
        "## Paired differences (a minus b)",
        f"{HOLM}, which `results.json` holds; shown are those with the untrained model and "
        "with guided SFT.",
        _differences(_shown(results.comparisons)),
        *_between(results.comparisons),
        *_agreements(results),
    ]
    return "\n\n".join(parts) + "\n"


def pooled_table(results: Results) -> str:
    """The rates of a comparison over all seeds."""
    metrics = in_order(p.metric for p in results.pooled)
    titles = [title(m) for m in metrics]
    lines = table(["test set", "setting", *titles])
    for test_set, settings in by_test_set(results.pooled).items():
        for setting, of in settings.items():
            cells = [metric_cell(of.get(metric), metric) for metric in metrics]
            lines.append(line([test_set, setting.name, *cells]))
    return "\n".join(lines)


def _kinds(results: Results) -> list[str]:
    """Mistakes by kind of prompt, a table for each test set that has several."""
    parts = [
        "\n".join([*table(heads), *map(line, lines)])
        for heads, *lines in by_kind(results.kinds)
    ]
    about = "In brackets the prompts of a kind; intervals stand in `results.json`."
    return ["## Mistakes by kind of prompt", about, *parts] if parts else []


def _shown(comparisons: Iterable[Comparison]) -> list[Comparison]:
    return [
        c
        for c in within_variants(comparisons)
        if Setting.parse(c.b)._replace(variant="") in SHOWN
    ]


def _between(comparisons: Iterable[Comparison]) -> list[str]:
    """What swept keys change, where there are such."""
    found = between_variants(comparisons)
    if not found:
        return []
    return [
        "## Between variants (a minus b)",
        "Each method with itself where one swept key differs. The adjusted p is Holm's, for "
        "these comparisons of one metric and test set.",
        _differences(found),
    ]


def _differences(comparisons: Iterable[Comparison]) -> str:
    titles = ("metric", "test set", "a", "b", "difference", "95 % interval", "p", "adjusted p")
    lines = table([*titles, "n"])
    lines += [line(differences_line(c)) for c in comparisons]
    return "\n".join(lines)


def rows_table(results: Results) -> str:
    """Every row of the results."""
    metrics = in_order(m for row in results.rows for m in row.metrics)
    titles = [title(m) for m in metrics]
    lines = table(["test set", "method", "guided", *titles])
    for row in sorted(results.rows, key=lambda row: row.test_set):
        cells = [metric_cell(row.metrics.get(m), m) for m in metrics]
        lines.append(line([row.test_set, row.method, "yes" if row.guided else "no", *cells]))
    return "\n".join(lines)


def named(folder: Path, manifest: dict[str, Any] | None) -> str:
    """What a page is called: as its folder, and beside it as the recipe, of which several
    folders may be."""
    own = folder.resolve().name
    recipe = manifest["recipe"]["name"] if manifest else own
    return own if own == recipe else f"{own}, of the recipe {recipe}"


def made_by(manifest: dict[str, Any], numbers: str = "results.json") -> str:
    """What the numbers come from, and what they took."""
    stages = manifest["stages"].items()
    spent = ", ".join(f"{name} {duration(stage['seconds'])}" for name, stage in stages)
    versions = ", ".join(f"{name} {number}" for name, number in manifest["versions"].items())
    return (
        f"`{numbers}` and `manifest.json` (the recipe as resolved) lie beside this page.\n"
        f"Machine: {manifest['device']}. Time: {spent}. "
        f"Peak memory: {manifest['peak_memory_mb']} MB. Seed {manifest['seed']}. {versions}."
    )


def _yields(yields: dict[str, Any]) -> str:
    lines = table(["stage", "given", "sampled", "kept", "refused"])
    for stage, counts in yields.items():
        reasons = "; ".join(f"{why}: {n}" for why, n in counts["refused"].items())
        numbers = [str(counts[key]) for key in ("given", "sampled", "kept")]
        lines.append(line([stage, *numbers, reasons]))
    return "\n".join(lines)


def metric_cell(metric: Metric | None, name: str = "", spread: bool = True) -> str:
    """A number with its interval, and what has no score; a rate where it has no name.

    With `spread`, of a comparison also the lowest and the highest of the seeds.
    """
    if metric is None:
        return "–"
    unscored = f"{metric.unscored} unscored" if metric.unscored else ""
    if metric.value is None:
        return f"– ({unscored})" if unscored else "–"
    about = ", ".join(filter(None, (_interval(metric, name), unscored)))
    if spread and isinstance(metric, Pooled) and len(seeds := metric.by_seed.values()) > 1:
        about += f"; seeds {rate(min(seeds), name)} to {rate(max(seeds), name)}"
    shown = f"{rate(metric.value, name)} ({about})"
    true = metric.corrected
    return f"{shown}; corrected {rate(true.value)} ({_interval(true)})" if true else shown


def _interval(found: Metric | Corrected, name: str = "") -> str:
    return f"{rate(found.low, name)} to {rate(found.high, name)}"


def title(metric: str) -> str:
    """The head of a metric's column."""
    good = direction(metric)
    return metric_title(metric) + (f" ({good})" if good else "")


def table(titles: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [line(titles), line(["---"] * len(titles))]


def line(cells: Iterable[str]) -> str:
    """A line of a table; a bar in a cell, as a name may have one, would end it."""
    return f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |"
