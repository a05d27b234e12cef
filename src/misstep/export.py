"""`misstep export`: what a run has trained, as one plain model that any server takes.

The adapter is added into the weights, and the chat template asks the model as it was trained
and measured: without thinking, behind the method's marker where it has one, and guided where
that is wished, so that step 4 of the method asks nothing of a server's clients. Reads the
directory of a run or of a comparison; changes nothing there, but for the sum of model and
adapter where the recipe itself names an adapter.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from misstep.comparison import CELLS
from misstep.errors import DataError, InputError, ModelError
from misstep.evidence.results import FOCUS, read_results
from misstep.methods.base import Method
from misstep.methods.registry import METHODS
from misstep.models.adapter import base_of, check_addable, is_full_fine_tune
from misstep.models.chat_template import asked_as_trained
from misstep.models.gguf_merge import merge_adapter
from misstep.models.locate import Model, locate
from misstep.models.merging import folded, save_whole
from misstep.models.rendering import FALLBACK_TEMPLATE, Renderer
from misstep.policy import Policy
from misstep.records import Message, Prompt, write_text
from misstep.report.markdown import rows_table
from misstep.report.reading import read_manifest, run_policy
from misstep.run_folder import writable
from misstep.stages.train import REPORT
from misstep.training.card import card_head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "\ue000"
"""Stands for the user's text."""
TURN = Message(role="user", content='One {x} "y" \\z\n\ntwo?')
"""A turn with what has a meaning to Jinja or in its texts."""
GGUF = ".gguf"


class Exported(NamedTuple):
    """What is exported."""

    model: Model
    """That the adapter was trained on."""
    adapter: Path | None
    """None for a method that trains nothing."""
    method: str
    guided: bool
    words: tuple[str, ...]
    """What stands around the user's text."""


def export(run: Path, method: str, guided: bool, out: Path) -> Path:
    """Write a method's model, to a folder of safetensors or, as NAME.gguf, to a file.

    Args:
        run: the directory of a run or of a comparison.
        method: a method of the recipe; of a comparison, a folder in its `adapters`.
        guided: whether the policy's guide is put around what the user says last.
        out: the folder or the file; nothing may be there yet.

    Raises:
        InputError: what is asked for is not there, or cannot be written so; before any
            weights load.
    """
    out = writable(out.parent) / out.name
    if out.exists():
        raise InputError(f"--out {out}: expected a path where nothing is yet. Give another.")
    source = find(run, method, guided)
    tokenizer = asking(source)
    if out.suffix == GGUF:
        return _as_gguf(source, tokenizer, out)
    save_whole(source.model, source.adapter, tokenizer, out)
    write_text(out / "README.md", card(source, run))
    return out


def find(run: Path, name: str, guided: bool) -> Exported:
    """A method's model in a run or a comparison, and the words around a prompt.

    Raises:
        InputError: there is none, or the model, or the policy whose words are put around a
            prompt, are no longer those of the run.
    """
    manifest = read_manifest(run)
    recipe = manifest["recipe"]
    if name in (recipe.get("others") or {}):
        raise InputError(
            f"--method {name}: expected a method, found one of the recipe's `others`, which is "
            "a model, or an adapter for PEFT, already."
        )
    method = _method(run, name)
    if "model" not in recipe:
        raise DataError(
            f"{run}: expected the directory of a run or of a comparison, found that of a "
            "study, which trains nothing."
        )
    adapter = _adapter(run, name) if method.trains else None
    guided |= method.guided == (True,)
    asks = guided or type(method).ask is not Method.ask
    folder, manifest = _maker(run, manifest, method, adapter, asks)
    recipe = manifest["recipe"]
    model = locate(str(recipe["model"]))
    _refuse_changed(folder, "model", model.digest, manifest)
    if recipe.get("adapter"):
        model = folded(model, check_addable(recipe["adapter"], model), run / "base")
    if adapter is not None:
        _refuse_other_base(adapter, model)
    words: tuple[str, ...] = ("", "")
    if asks:
        policy = run_policy(folder)
        _refuse_changed(folder, "policy", policy.digest, manifest)
        words = words_around(policy, method, guided)
    return Exported(model, adapter, method.name, guided, words)


def _maker(
    run: Path, manifest: Mapping[str, Any], method: Method, adapter: Path | None, asks: bool
) -> tuple[Path, dict[str, Any]]:
    """What knows how a model was trained and asked: a run's directory, or a cell's.

    `asks`: whether the policy's words are put around a prompt.

    Raises:
        InputError: the adapter is none of theirs, or cells that differ have the same one.
    """
    trained = {run: manifest.get("training", {})}
    if "cells" in manifest:
        cells = manifest["cells"].items()
        trained = {run / CELLS / name: cell["training"] for name, cell in cells}
    if adapter is not None:
        inputs = json.loads((adapter / REPORT).read_text(encoding="utf-8")).get("inputs")
        trained = {
            folder: of
            for folder, of in trained.items()
            if of.get(method.name, {}).get("inputs") == inputs
        }
    if not trained:
        raise DataError(
            f"{adapter}: expected an adapter that the recipe of {run} has trained, found one "
            "of a former recipe. Run that one again, or this one to its end."
        )
    found = {folder: read_manifest(folder) for folder in trained}
    for what in ("model", "adapter", "policy")[: 2 + asks]:
        names = {_digest(of, what): str(of["recipe"].get(what)) for of in found.values()}
        if len(names) > 1:
            raise InputError(
                f"{run}: expected one {what} that {method.name} belongs to, found cells of "
                f"several: {', '.join(names.values())}. Run a recipe of one of them by itself, "
                "and export that."
            )
    return next(iter(found.items()))


def _digest(manifest: Mapping[str, Any], what: str) -> str | None:
    """Names what the recipe of a manifest names by its content; None where it names none."""
    parts: dict[str, str] = manifest.get("parts", {})
    return parts.get(what) if what == "adapter" else str(manifest[what]["digest"])


def words_around(policy: Policy, method: Method, guided: bool) -> tuple[str, ...]:
    """What a method that was measured so puts around the text of the last user turn."""
    turns = method.ask(policy, policy.turns(Prompt.of(PLACE), guided))
    return tuple(turns[-1].content.split(PLACE))


def asking(source: Exported) -> "PreTrainedTokenizerBase":
    """The model's tokenizer with a template that asks as the source was trained.

    Raises:
        ModelError: the model's template does not let the words be put into it.
    """
    own = Renderer.for_model(source.model)
    tokenizer = deepcopy(own.tokenizer)
    template = tokenizer.chat_template or _fallback(own)
    if isinstance(template, dict):
        named = {name: asked_as_trained(of, source.words) for name, of in template.items()}
        tokenizer.chat_template = named
    else:
        tokenizer.chat_template = asked_as_trained(template, source.words)
    _check_tokens(own, Renderer(tokenizer), source)
    return tokenizer


def _fallback(renderer: Renderer) -> str:
    """A template for a model that has none, with what its tokenizer puts first by itself."""
    first = renderer.prompt((TURN,))[0]
    begins = "{{ bos_token }}" if first == renderer.tokenizer.bos_token_id else ""
    return begins + FALLBACK_TEMPLATE


def _check_tokens(own: Renderer, made: Renderer, source: Exported) -> None:
    """A template may do with its turns whatever it likes, so two conversations are tried."""
    for before in ((), (TURN, Message(role="assistant", content="Three."))):
        around = Message(role="user", content=TURN.content.join(source.words))
        if made.prompt((*before, TURN)) != own.prompt((*before, around)):
            raise ModelError(
                f"model {source.model.name}: its chat template does not let words be put "
                "around what the user says. Export without --guided, and put the policy's "
                "guide around prompts yourself."
            )


def _as_gguf(source: Exported, tokenizer: "PreTrainedTokenizerBase", out: Path) -> Path:
    full = source.adapter is not None and is_full_fine_tune(source.adapter)
    if not source.model.is_gguf or full:
        found = "a full fine-tune" if full else f"model {source.model.name}"
        raise InputError(
            f"--out {out}: a GGUF file is written where the model is one and the adapter is "
            f"LoRA; found {found}. Name a folder, and convert that by llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    assert source.model.path is not None
    return merge_adapter(source.model.path, source.adapter, out, str(tokenizer.chat_template))


def card(source: Exported, run: Path) -> str:
    """What whoever serves the model should know: how it is asked, and what was measured."""
    shown = "{what the user says}".join(source.words)
    indented = "\n".join("    " + line for line in shown.splitlines())
    asked = (
        "puts words around what the user says last, with thinking off, as the run did:\n\n"
        + indented
        if source.words != ("", "")
        else "is the base model's, with thinking off."
    )
    parts = [
        card_head(source.model, [source.method], []),
        f"# {source.model.published}, repaired with misstep by {source.method}",
        f"Its chat template {asked}",
        *_measured(source, run),
    ]
    return "\n\n".join(parts) + "\n"


def _measured(source: Exported, run: Path) -> Iterator[str]:
    """Its rates beside the untrained model's, asked alike too; of a comparison, none.

    A comparison has several of it.
    """
    if not (run / "results.json").is_file():
        return
    results = read_results(run / "results.json")
    shown = {("vanilla", False), ("vanilla", source.guided), (source.method, source.guided)}
    rows = tuple(row for row in results.rows if (row.method, row.guided) in shown)
    if rows and not results.pooled:
        yield "Measured by the run, with 95 % intervals:"
        yield rows_table(results.model_copy(update={"rows": rows}))


def _method(run: Path, name: str) -> Method:
    found = METHODS.get(name)
    if found is None and (run / "adapters" / name).is_dir():
        found = METHODS.get(name.rpartition("-")[0])
    if found is None:
        raise InputError(
            f"--method {name}: expected a method ({', '.join(METHODS)}), or of a comparison a "
            "folder in its `adapters`."
        )
    if type(found).read is not Method.read:
        raise InputError(
            f"--method {name}: its answers hold what users are not to get, which misstep takes "
            "out and a server does not. Use its adapter with PEFT."
        )
    return found


def _adapter(run: Path, name: str) -> Path:
    places = [run / "adapters" / name]
    if name == FOCUS:
        places.append(run / "adapter")
    for place in places:
        if (place / REPORT).is_file():
            return place
        if place.is_dir():
            raise DataError(
                f"{place}: expected a training that is finished, found none yet: no {REPORT}. "
                "Run the recipe to its end."
            )
    there = [FOCUS] if (run / "adapter").is_dir() else []
    there += _with_cells(run, sorted(folder.name for folder in (run / "adapters").glob("*")))
    otherwise = "Give one of these as --method, or run" if there else "Run"
    raise DataError(
        f"{run}: expected what {name} has trained, found {', '.join(there) or 'nothing'}. "
        f"{otherwise} the recipe to its end, with {name} among its methods."
    )


def _with_cells(run: Path, adapters: Sequence[str]) -> list[str]:
    """Names of adapters; of a comparison's, whose names say little, with seed and variant."""
    known: dict[str, list[str]] = {}
    for cell in read_manifest(run).get("cells", {}).values():
        of = ", ".join(filter(None, (cell["variant"], f"seed {cell['seed']}")))
        for method, trained in cell["training"].items():
            known.setdefault(f"{method}-{trained.get('inputs')}", []).append(of)
    return [
        f"{name} ({'; '.join(known[name])})" if name in known else name for name in adapters
    ]


def _refuse_changed(run: Path, what: str, found: str, manifest: dict[str, Any]) -> None:
    expected = manifest.get(what, {}).get("digest")
    if found != expected:
        raise InputError(
            f"{run}: expected the {what} of its manifest (digest {expected}), found another "
            f"under the same name ({found}). Put the former back, or run the recipe again."
        )


def _refuse_other_base(adapter: Path, model: Model) -> None:
    """Of a comparison that sweeps the model, the manifest names one of several."""
    if is_full_fine_tune(adapter):
        return
    base = base_of(adapter)
    if base is None or Path(base).resolve() != Path(model.published).resolve():
        raise ModelError(
            f"{adapter}: expected an adapter of {model.published}, found one of {base}. Merge "
            "it with that model by PEFT."
        )
