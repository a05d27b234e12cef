"""A model with an adapter made into one plain model, for a run that starts from both.

Everything after it knows models only: a run that trains on top of an adapter trains on its sum.
Knows files and PEFT; loads nothing that was folded before.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from misstep.errors import ModelError
from misstep.models.adapter import (
    adapter_digest,
    is_full_fine_tune,
)
from misstep.models.gguf_merge import merge_adapter
from misstep.models.locate import Model, locate
from misstep.models.weights import (
    load_tokenizer,
    load_weights,
    make_readable,
    no_progress_bars,
    save_tokenizer,
)
from misstep.records import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def folded(model: Model, adapter: Path, folder: Path) -> Model:
    """The sum of a model and an adapter, written into a folder that content names.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    out = folder / digest([model.digest, adapter_digest(adapter)])
    if model.is_gguf:
        assert model.path is not None
        file = out / "model.gguf"
        return locate(str(file if file.is_file() else merge_adapter(model.path, adapter, file)))
    if not out.is_dir():
        save_whole(model, adapter, load_tokenizer(model), out)
    return locate(str(out))


def save_whole(
    model: Model, adapter: Path | None, tokenizer: "PreTrainedTokenizerBase", out: Path
) -> None:
    """Write a model as a folder of safetensors, with an adapter added into its weights."""
    weights: Any = load_weights(model, adapter)
    if adapter is not None and not is_full_fine_tune(adapter):
        try:
            weights = weights.merge_and_unload()
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{adapter}: expected one that can be added into weights, found one that "
                f"PEFT cannot add: {error}"
            ) from error
    temporary = out.with_name(out.name + ".tmp")
    with no_progress_bars():
        weights.save_pretrained(temporary)
    save_tokenizer(tokenizer, temporary)
    make_readable(temporary)
    temporary.replace(out)
