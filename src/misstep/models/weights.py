"""What a model's files say of it, and how weights and tokenizers are loaded.

Weights come from safetensors or GGUF only: no pickle, no code from a model's folder. This
module knows transformers and PEFT; it knows no engine and renders no conversation.
"""

import gc
import io
import json
import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misstep.errors import ModelError
from misstep.models.adapter import TENSORS, is_full_fine_tune
from misstep.models.gguf_header import read_header
from misstep.models.locate import (
    WEIGHTS,
    Model,
    refuse_encoder,
    weight_files,
)
from misstep.models.precision import device, memory_bytes, products_dtype, weights_dtype
from misstep.models.unpacked import unpacked, unpacked_tokenizer

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LORA = re.compile(r"\.lora_[AB]\.")
"""In the name of a matrix of an adapter."""


def load_weights(model: Model, adapter: Path | None = None) -> "PreTrainedModel":
    """Load a model for answering, with an adapter or with the weights of a full fine-tune.

    The weights are in `weights_dtype`, an adapter in fp32 and not merged, as in training.

    Raises:
        ModelError: transformers or PEFT cannot read the files.
    """
    # One on the Hub is seen for what it is when it is here.
    refuse_encoder(model)
    if adapter is not None and not is_full_fine_tune(adapter):
        return _with_adapter(load_weights(model), adapter)
    if adapter is None and model.is_gguf:
        return _from_gguf(model).eval()
    return _from_pretrained(adapter if adapter is not None else model.files).eval()


def load_for_answers(model: Model, adapter: Path | None = None) -> "PreTrainedModel":
    """Load a model, on the device and in the type in which it answers fastest.

    Raises:
        ModelError: as `load_weights` does.
    """
    import torch

    loaded: PreTrainedModel = load_weights(model, adapter).to(device())
    # An adapter is in fp32 in any case.
    return loaded.float() if answering_dtype(model) == torch.float32 else loaded


def answering_dtype(model: Model) -> "torch.dtype":
    """The type of the weights while a model answers; loads none.

    That of the fastest products, where half of the memory holds it: to write a token takes
    every weight once, and to convert them for that, as training does, would cost the gain.
    """
    held = weights_dtype()
    fastest = products_dtype(held, device())
    if fastest == held or count_weights(model) * fastest.itemsize > memory_bytes() // 2:
        return held
    return fastest


def count_weights(model: Model) -> int:
    """How many weights the model's files hold; loads none."""
    if model.is_gguf:
        return sum(math.prod(place.shape) for place in read_header(model.files).tensors)
    from safetensors import safe_open

    count = 0
    for file in weight_files(model.files):
        with safe_open(file, "np") as tensors:
            names = tensors.keys()
            shapes = (tensors.get_slice(name).get_shape() for name in names)
            count += sum(map(math.prod, shapes))
    return count


def load_tokenizer(model: Model) -> "PreTrainedTokenizerBase":
    """Load a model's tokenizer, once per process and content.

    Raises:
        ModelError: transformers cannot read it.
    """
    return _tokenizer(model.files, model.digest)


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write a tokenizer beside a model, for whatever release of transformers serves it."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        # Its name since the fifth release, which knows the former one, too.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def text_config(model: Model) -> dict[str, Any]:
    """What the configuration of a model in a folder says of its text.

    A model that sees, too, says that apart.
    """
    config = json.loads((model.files / "config.json").read_text(encoding="utf-8"))
    return dict(config.get("text_config") or config)


def context_length(model: Model) -> int | None:
    """So many tokens of prompt and answer a model was made for; None where it does not say."""
    if model.is_gguf:
        header = read_header(model.files)
        said = header.values.get(f"{header.architecture}.context_length")
        return int(said) if said else None
    config = text_config(model)
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if longest and rope.get("rope_type", rope.get("type")) in ("linear", "dynamic", "yarn"):
        # Stretched positions; some configurations name the length before, some that after.
        before = rope.get("original_max_position_embeddings", longest)
        return int(before * rope.get("factor", 1))
    return int(longest) if longest else None


def attends_plainly(config: Any) -> bool:
    """Whether by a loaded configuration every token sees all that stand before it."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    window = getattr(config, "sliding_window", None)
    unused = getattr(config, "use_sliding_window", True) is False
    return set(kinds) == {"full_attention"} and (window is None or unused)


def vocabulary_size(model: Model) -> int | None:
    """So many tokens have an embedding; None where the files do not say so."""
    if model.is_gguf:
        return None
    size = text_config(model).get("vocab_size")
    return int(size) if size else None


def within_context(model: Model, tokens: int) -> int:
    """So many tokens, or as many as the model was made for where that is less."""
    return min(tokens, context_length(model) or tokens)


def configured_ends(model: Model) -> frozenset[int]:
    """The tokens on which the files of a model in a folder end an answer.

    A GGUF file names one, which is its tokenizer's.
    """
    ends: set[int | None] = set()
    for name in () if model.is_gguf else ("generation_config.json", "config.json"):
        if (file := model.files / name).is_file():
            said = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            ends.update(said if isinstance(said, list) else [said])
    return frozenset(end for end in ends if end is not None)


def free() -> None:
    """Give back the memory of weights that nobody holds any more, to other processes too.

    On a GPU torch would keep it for itself, and a server such as vLLM's would not start.
    """
    import torch

    # Trainer and its callbacks hold each other, and the model with them.
    gc.collect()
    torch.cuda.empty_cache()


def halve(tokens: int) -> int:
    """How many tokens to try at once where a GPU had no memory for so many; says so once."""
    free()
    _say_halved()
    return tokens // 2


@lru_cache
def _say_halved() -> None:
    logging.getLogger(__name__).warning(
        "The GPU's memory ran out. Less is computed at once from here on; this takes longer, "
        "and changes results by rounding only."
    )


def make_readable(folder: Path) -> None:
    """Let whoever may read the configuration in a folder read the weights beside it, too.

    safetensors 0.8 keeps what it writes from all but the owner (safetensors#782), and a server
    under another account does not find the adapter.
    """
    mode = min(folder.glob("*config.json")).stat().st_mode
    for file in folder.glob(WEIGHTS):
        file.chmod(mode)


def _from_gguf(model: Model) -> "PreTrainedModel":
    from transformers import GgufConfig

    def read() -> "PreTrainedModel":
        # Without `dequantize` the matrices would stay packed, and training needs them plain.
        packed = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
        return _from_pretrained(file.parent, packed)

    file = model.files
    with no_progress_bars():
        found = unpacked(model.digest, weights_dtype(), read)
    loaded = _from_pretrained(found) if isinstance(found, Path) else found
    _refuse_lost(file, loaded)
    return loaded


def _refuse_lost(file: Path, loaded: "PreTrainedModel") -> None:
    """Refuse a GGUF file of which transformers has passed over a part, without a word.

    Copies that an earlier release made of such a file are refused, too.
    """
    tensors, weights = read_header(file).tensors, loaded.state_dict()
    for part, theirs, ours in (("biases", ".bias", "bias"), ("experts", "_exps.", "expert")):
        there = [place for place in tensors if theirs in place.name]
        taken = sum(held.numel() for name, held in weights.items() if ours in name)
        if sum(math.prod(place.shape) for place in there) > taken:
            raise ModelError(
                f"model {file}: expected a file all of whose weights transformers reads, found "
                f"{part} that it leaves out, such as {there[0].name}. Use the safetensors that "
                "the file was made of."
            )


def _from_pretrained(folder: Path, packed: dict[str, Any] | None = None) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    file = folder / packed["gguf_file"] if packed else folder
    try:
        # The bar over a GGUF's tensors has no switch; log messages keep their own handle.
        with no_progress_bars(), redirect_stderr(io.StringIO()):
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=weights_dtype(),
                use_safetensors=None if packed else True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **(packed or {}),
            )
    # NotImplementedError is what gguf says of a quantisation that it cannot unpack.
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        # Where it does not know the kind, all kinds that it does know follow.
        why = str(error).partition("\nModel type should be one of")[0]
        raise ModelError(f"model {file}: transformers cannot load it: {why}") from error
    _refuse_drawn(file, model, found)
    loaded: PreTrainedModel = model
    return loaded


def _refuse_drawn(file: Path, model: "PreTrainedModel", found: dict[str, Any]) -> None:
    """Refuse a model some of whose weights are random, because its files lack them.

    Tied heads and what is computed from the configuration do not count as missing.
    """
    misfits = {name for name, *_ in found["mismatched_keys"]}
    if drawn := sorted({*found["missing_keys"], *misfits}):
        raise ModelError(
            f"model {file}: expected all weights of a {model.config.model_type} model of the "
            f"shape that its configuration says, {len(drawn)} are missing or of another shape, "
            f"the first is {drawn[0]}. Download or convert the model again."
        )


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars of its own over loading and saving."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _with_adapter(base: "PreTrainedModel", adapter: Path) -> "PreTrainedModel":
    from peft import PeftModel

    try:
        # What is missing is told below, as an error.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            adapted = PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=True)
        _refuse_unused(adapter, adapted)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{adapter}: this adapter does not fit the model: {why}") from error
    model: PreTrainedModel = adapted.eval()
    return model


def _refuse_unused(adapter: Path, adapted: "PeftModel") -> None:
    """Refuse an adapter of which the model has no place for a part: PEFT would leave it out."""
    from safetensors import safe_open

    with safe_open(adapter / TENSORS, "np") as tensors:
        given = {*filter(LORA.search, tensors.keys())}
    named = f".{adapted.active_adapter}"
    held = filter(LORA.search, adapted.state_dict())
    ends = {named + kind: kind for kind in (".weight", ".bias")}
    taken = {
        key.removesuffix(end) + kind
        for key in held
        for end, kind in ends.items()
        if key.endswith(end)
    }
    if odd := sorted(given ^ taken):
        raise ValueError(
            f"{len(odd)} of its matrices, or of those that it should have, have no place, such "
            f"as {odd[0]}"
        )


@lru_cache(maxsize=8)
def _tokenizer(files: Path, digest: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    def read(folder: Path, **where: str) -> "PreTrainedTokenizerBase":
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, **where
        )
        return tokenizer

    try:
        if not files.is_file():
            return read(files)
        packed = partial(read, files.parent, gguf_file=files.name)
        return unpacked_tokenizer(digest, packed)
    # A package that a tokenizer needs may be absent, and so may its files.
    except (ValueError, OSError, KeyError, ImportError, TypeError) as error:
        raise ModelError(f"model {files}: its tokenizer cannot be loaded: {error}") from error
