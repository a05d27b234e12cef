"""A model with an adapter made into one plain model, for a run that starts from both.

Everything after it knows models only: a run that trains on top of an adapter trains on its sum.
Knows files and PEFT; loads nothing that was folded before.
"""

from pathlib import Path

from misstep.errors import ModelError
from misstep.models.gguf_merge import merge_adapter
from misstep.models.weights import (
    Model,
    adapter_digest,
    load_tokenizer,
    load_weights,
    locate,
    no_progress_bars,
)
from misstep.records import digest


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
        _save_sum(model, adapter, out)
    return locate(str(out))


def _save_sum(model: Model, adapter: Path, out: Path) -> None:
    weights = load_weights(model, adapter)
    whole = weights.merge_and_unload()
    temporary = out.with_name(out.name + ".tmp")
    with no_progress_bars():
        whole.save_pretrained(temporary)
    load_tokenizer(model).save_pretrained(temporary)
    temporary.replace(out)
