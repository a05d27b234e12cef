"""GGUF weights as safetensors, and GGUF tokenizers as JSON, unpacked once for this user.

transformers reads a GGUF in Python, which takes seconds for the smallest models and minutes
for others; a copy in safetensors loads at once, and so does a tokenizer's own file. Copies lie
in the user's cache folder, named by the file's content and by what unpacked it, and may be
deleted at any time. This module knows folders and transformers' models; what a model is, and
how it is read, its caller knows.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARE_OF_DISK = 0.1
"""Of the free space, what one copy may take."""
UNFINISHED = ".unfinished-"
SECONDS_AT_MOST = 86_400
"""Nothing takes so long to write."""


def unpacked(
    digest: str, dtype: "torch.dtype", read: Callable[[], "PreTrainedModel"]
) -> "Path | PreTrainedModel":
    """The folder of a model's copy, made where it is not there; the model where none fits.

    `read` reads the packed file. A copy that cannot be written, or that would take more than
    `SHARE_OF_DISK`, is not made.
    """
    from safetensors import SafetensorError

    folder = _place(digest, str(dtype).removeprefix("torch."))
    if folder.is_dir():
        return folder
    model = read()
    try:
        with whole(folder) as temporary:
            needed = sum(weights.nbytes for weights in model.state_dict().values())
            if needed > SHARE_OF_DISK * shutil.disk_usage(temporary).free:
                raise OSError(f"{folder}: a copy of {needed:,} bytes does not fit")
            model.save_pretrained(temporary)
    except (OSError, SafetensorError):  # The latter where a disk is full.
        return model
    return folder


def unpacked_tokenizer(
    digest: str, read: Callable[[], "PreTrainedTokenizerBase"]
) -> "PreTrainedTokenizerBase":
    """A tokenizer from its copy, which is made where it is not there.

    `read` reads the packed file. A copy that cannot be written, or that would encode or render
    in another way, is not made.
    """
    folder = _place(digest, "tokenizer")
    if not folder.is_dir():
        packed = read()
        try:
            with whole(folder) as temporary:
                packed.save_pretrained(temporary)
                if _means(_from_copy(temporary)) != _means(packed):
                    raise OSError(f"{folder}: a copy would be another tokenizer")
        except OSError:
            return packed
    return _from_copy(folder)


def _place(digest: str, what: str) -> Path:
    return cache_folder("unpacked") / f"{digest}-{what}-{version('transformers')}"


def _from_copy(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    # By this class and no other: those of a model's kind put their own rules over the file's,
    # as Qwen's does a normaliser that the packed file has not.
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def _means(tokenizer: "PreTrainedTokenizerBase") -> tuple[object, ...]:
    """All that decides what a tokenizer makes of texts and conversations."""
    return (
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        tokenizer.model_max_length,
    )


def cache_folder(kind: str) -> Path:
    """Where what was made of models lies: below XDG_CACHE_HOME, else below ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "misstep" / kind


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes the wanted one at the end, whole or not at all.

    Several processes may do so at once. What killed ones have left is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{UNFINISHED}*"):
        if time.time() - left.stat().st_mtime > SECONDS_AT_MOST:
            shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=UNFINISHED))
    try:
        yield temporary
        try:
            temporary.replace(folder)
        except OSError:
            if not folder.is_dir():  # Else another process has made the same.
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
