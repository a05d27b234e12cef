"""Shared parts: a tiny model with random weights, real in every other respect."""

import gc
import os
import shutil
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

# As the command line does: before torch loads, or busy machines make the tests crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def libraries_are_not_searched() -> None:
    """Whoever gives memory back looks for garbage, and took 0.3 s for what libraries hold."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of safetensors: two Llama layers, byte tokens, a ChatML template."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def untuned_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("untuned") / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("chat_template*"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of safetensors: two BERT layers, byte tokens, its separators around texts."""
    return make_tiny_encoder(tmp_path_factory.mktemp("tiny-encoder"))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Each time that torch gives a GPU's memory back: how many models of the test are held."""
    import torch
    from transformers import PreTrainedModel

    made, found, make = weakref.WeakSet[Any](), list[int](), PreTrainedModel.__init__

    def watched(self: Any, *given: Any, **options: Any) -> None:
        made.add(self)
        make(self, *given, **options)

    monkeypatch.setattr(PreTrainedModel, "__init__", watched)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append(len(made)))
    return found


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer's arguments count two GPUs; who would spread a model over them is stopped."""
    import torch
    from transformers import TrainingArguments

    settle: Any = TrainingArguments.__dict__["_setup_devices"].func

    def counted(arguments: Any) -> Any:
        device = settle(arguments)
        arguments._n_gpu = 2
        return device

    def refuse(*_: Any) -> None:
        raise AssertionError("spread over all GPUs")

    known = cached_property(counted)
    known.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", known)
    monkeypatch.setattr(torch.nn.DataParallel, "__init__", refuse)


def byte_tokenizer(special: list[str], **options: Any) -> Any:
    """One token for each byte, after those given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **options
    )


def make_tiny_encoder(folder: Path) -> Path:
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertForMaskedLM

    special = ["[PAD]", "[CLS]", "[SEP]"]
    tokenizer = byte_tokenizer(
        special, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=64
    )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def make_tiny_model(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_tokenizer(
        special, pad_token="<|pad|>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A Chromium, where it and Playwright are installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("neither chromium nor google-chrome is on the path")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()
