"""A model with an adapter made into one plain model, for a run that starts from both.

Everything after it knows models only: a run that trains on top of an adapter trains on its sum.
Knows files and PEFT; loads nothing that was folded before.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from misstep.errors import ModelError
from misstep.models.gguf_merge import merge_adapter
from misstep.models.weights import (
    Model,
    adapter_digest,
    is_full_fine_tune,
    load_tokenizer,
    load_weights,
    locate,
    no_progress_bars,
    share,
)
from misstep.records import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_adapter(adapter: str) -> Path:
    """The folder of a PEFT adapter.

    Raises:
        ModelError: it is no such folder.
    """
    folder = Path(adapter).expanduser()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(
                f"adapter {adapter}: expected a PEFT folder with {name}, found none. Check the "
                "path; an adapter in another format must be saved by PEFT as safetensors."
            )
    return folder


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
        weights = weights.merge_and_unload()
    temporary = out.with_name(out.name + ".tmp")
    with no_progress_bars():
        weights.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    share(temporary)
    temporary.replace(out)
