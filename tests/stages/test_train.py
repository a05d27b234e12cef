"""Fine-tuning: the mask, the loss, the order of rows, resuming, refusing, and what is written.

The quick tests train a random model of two layers with a byte tokenizer, made here.
"""

import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.granite import GraniteForCausalLM
from transformers.models.qwen2 import Qwen2ForCausalLM

from misstep.errors import RecipeError, TrainingError
from misstep.models import precision
from misstep.models import weights as models_module
from misstep.models.locate import Model, locate
from misstep.models.rendering import Renderer
from misstep.models.weights import load_weights
from misstep.records import Example, Message, Pair
from misstep.stages import fit
from misstep.stages.train import input_digest, model_card, train
from misstep.stages.train_settings import PreferenceSettings, TrainSettings
from misstep.training import kernels, sharing
from misstep.training import trainer as trainer_module
from misstep.training.kernels import fast_layers
from misstep.training.lora import save_adapter, with_adapter, with_all_weights
from misstep.training.loss import (
    LINES_AT_ONCE,
    TARGETS_AT_ONCE,
    ChunkedCrossEntropy,
    CompletionLoss,
    collate,
    measured,
    short_cuts,
)
from misstep.training.mask import print_mask, show_mask
from misstep.training.preference import PreferenceLoss, margins, with_reference
from misstep.training.report import TrainReport
from misstep.training.rows import (
    GROUP_COST,
    PairRow,
    Row,
    in_epochs,
    longest,
    micro_batches,
    padded,
    render_pairs,
    render_rows,
)
from misstep.training.sharing import (
    FAMILIES,
    LENGTH,
    TOKENS,
    CausalAttention,
    Spread,
    can_share,
    collate_shared,
)

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
OF_OTHER_FORM: dict[str, dict[str, Any]] = {
    "llama4_text": {"intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8},
    "mllama": {"text_config": {**SIZES, "pad_token_id": 0, "cross_attention_layers": []}},
    "mamba": {"state_size": 8},
}
"""Bodies that are not found as others' are, routers, and layers that PEFT refuses."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny(kind: str = "untied") -> Any:
    torch.manual_seed(5)
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)).eval()
    if kind == "granite":
        return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)).eval()
    if kind in OF_OTHER_FORM:
        sizes = SIZES | OF_OTHER_FORM[kind]
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=kind == "tied")).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny model with a byte tokenizer, on disk like any other."""
    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {text: number for number, text in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    tiny().to(torch.bfloat16).save_pretrained(folder)
    return locate(str(folder))


def example(number: int, kind: str = "ordinary", completion: str | None = None) -> Example:
    text = "w" * (number % 7) + f" {number}?"
    answer = f"{number} " * (1 + number % 4) if completion is None else completion
    return Example(messages=(Message(role="user", content=text),), completion=answer, kind=kind)


EXAMPLES = [example(n, "analysis" if n % 3 else "ordinary") for n in range(22)]
QUICK = TrainSettings(rank=4, alpha=8, epochs=2, batch_size=4, learning_rate=1e-2)


def rows(count: int, seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    made = []
    for _ in range(count):
        length = number(8, 40)
        ids = tuple(number(0, 300) for _ in range(length))
        made.append(Row(ids, number(1, length), "ordinary"))
    return made


def plain_loss(lm: Any, batch: Sequence[Row]) -> Tensor:
    """The loss as the definition has it: one row at a time, all logits, no short cut."""
    total = torch.zeros(())
    for row in batch:
        logits = lm(input_ids=torch.tensor([row.ids])).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits, torch.tensor(row.ids[1:]), reduction="none"
        )
        total = total + losses[row.prompt_length - 1 :].sum()
    return total


def gradients(loss: CompletionLoss) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}
    loss.zero_grad(set_to_none=True)
    return found


def fast_gradients(loss: CompletionLoss, groups: Sequence[Sequence[Row]]) -> tuple[float, Any]:
    total = 0.0
    with fast_layers(loss):
        for group in groups:
            value = loss(**loss.collate(group))
            value.backward()
            total += value.item()
    return total, gradients(loss)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6 * largest)


def prepared(kind: str, adapter: str) -> CompletionLoss:
    if adapter == "full":
        return with_all_weights(tiny(kind))
    loss = with_adapter(tiny(kind), 4, 8, seed=1)
    with torch.no_grad():
        for name, parameter in loss.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return loss


# --- the mask ---------------------------------------------------------------------------------


def test_only_the_completion_and_its_end_are_targets(model: Model) -> None:
    renderer = Renderer.for_model(model)
    analysis = Example(
        messages=(
            Message(role="user", content="Add 1 and 1"),
            Message(role="assistant", content="BAD"),
            Message(role="user", content="What of it?"),
        ),
        completion="It is wrong.",
        kind="analysis",
    )
    (row,) = render_rows(renderer, [analysis], 1024).kept
    targets = collate([row, Row((5, 6, 7), 2, "ordinary")])["targets"].tolist()
    assert renderer.tokenizer.decode(targets[:-1]) == "It is wrong.<|im_end|>"
    assert targets[-2] == renderer.end_of_turn
    assert targets[-1] == 7


def test_a_position_predicts_the_token_that_follows_it() -> None:
    batch = collate([Row((3, 4, 5, 6), 2, "a"), Row((7, 8, 9), 1, "a")])
    flat = batch["ids"].flatten()
    assert flat[batch["positions"] + 1].tolist() == batch["targets"].tolist() == [5, 6, 8, 9]


def test_the_mask_is_shown_as_it_is_trained_on(model: Model) -> None:
    given_rows = [example(1, "a"), example(2, "a"), example(3, "b", "see [bold]this[/bold]")]
    shown = show_mask(model, given_rows, 2, 1024)
    assert [row.kind for row in shown] == ["a", "b"]
    assert [segment.learned for segment in shown[1].segments] == [False, True]
    assert shown[1].segments[1].text == "see [bold]this[/bold]<|im_end|>"
    out = io.StringIO()
    print_mask(shown, Console(file=out, width=60))
    assert ">>>see [bold]this[/bold]<|im_end|><<<" in out.getvalue()


def _looking_ahead(forward: Any) -> Any:
    def ahead(hidden_states: Tensor, **options: Any) -> Any:
        return forward(hidden_states + hidden_states.mean(1, keepdim=True), **options)

    return ahead


# --- the loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("kind", ["tied", "untied", "qwen2", "granite", *OF_OTHER_FORM])
def test_loss_and_gradients_are_those_of_the_plain_loss(
    kind: str, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGETS_AT_ONCE, "cpu", 7)
    loss, batch = prepared(kind, adapter), rows(9)
    assert loss.skips_logits == (kind != "granite")
    expected = plain_loss(loss.model, batch)
    expected.backward()
    wanted = gradients(loss)
    found, fast = fast_gradients(loss, micro_batches(batch, 100))
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert_same(fast, wanted)


@pytest.mark.parametrize("kind", OF_OTHER_FORM)
def test_an_adapter_is_read_as_it_was_trained(kind: str, tmp_path: Path) -> None:
    loss, batch = prepared(kind, "lora"), rows(3)
    save_adapter(loss.model, "base", tmp_path)
    read = models_module._with_adapter(tiny(kind), tmp_path)
    torch.testing.assert_close(plain_loss(read, batch), loss(**collate(batch)))


def test_what_is_computed_again_is_not_kept_and_gives_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, kept = [], []
    for again in (True, False):
        monkeypatch.setattr(kernels, "products_are_cheap", lambda _, again=again: again)
        sizes: list[int] = []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            found.append(fast_gradients(prepared("untied", "lora"), [rows(9)]))
        kept.append(sum(sizes))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])
    assert kept[0] < kept[1]


def test_logits_are_computed_in_chunks_that_suit_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert TARGETS_AT_ONCE["cuda"] > TARGETS_AT_ONCE["cpu"]
    chunks: list[int] = []
    plain = torch.softmax

    def count(logits: torch.Tensor, dim: int) -> torch.Tensor:
        chunks.append(logits.shape[0])
        return plain(logits, dim)

    monkeypatch.setattr(torch, "softmax", count)
    hidden, weight = torch.ones(6, 2), torch.ones(4, 2)
    for device, at_once, lines in (("cpu", 4, 3), ("cuda", 3, 8)):
        monkeypatch.setitem(TARGETS_AT_ONCE, device, at_once)
        monkeypatch.setitem(LINES_AT_ONCE, device, lines)
    ChunkedCrossEntropy.apply(hidden, weight, torch.zeros(6, dtype=torch.long))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    ChunkedCrossEntropy.apply(hidden, weight, torch.zeros(6, dtype=torch.long))
    assert chunks == [3, 1, 2, 3, 3]


def test_gradients_of_shared_rows_stay_on_their_device() -> None:
    tokens = torch.ones(3, 4, device="meta", requires_grad=True)
    where = torch.zeros(5, dtype=torch.long, device="meta")
    Spread.apply(tokens, where).sum().backward()
    assert tokens.grad is not None and tokens.grad.device.type == "meta"


def branching_rows() -> list[Row]:
    """Rows that share nothing, a system prompt, a prompt, everything, a part of another."""
    system, question = tuple(range(3, 20)), tuple(range(40, 52))
    return [
        Row((*system, *question, 7, 8, 9), 29, "a"),
        Row((*system, *question, 7, 6), 29, "a"),
        Row((*system, *question, 7, 6), 29, "a"),
        Row((*system, 99, 98, 97), 18, "a"),
        Row((*system, 99), 17, "a"),
        Row((200, 201, 202, 203), 1, "a"),
    ]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rows_that_share_their_beginning_have_the_plain_loss(family: str) -> None:
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        family, **SIZES, pad_token_id=0, head_dim=8, sliding_window=None, no_rope_layers=[0, 1]
    )
    lm: Any = AutoModelForCausalLM.from_config(config).eval()
    loss, batch = with_adapter(lm, 4, 8, seed=1), branching_rows()
    with torch.no_grad():
        for name, parameter in loss.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    assert can_share(lm)
    expected = plain_loss(loss.model, batch)
    expected.backward()
    wanted = gradients(loss)
    found, fast = fast_gradients(loss, [batch])
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert_same(fast, wanted)


def test_each_shared_token_is_there_once() -> None:
    batch = collate_shared(branching_rows())
    ids, positions = batch["ids"][0], batch["position_ids"][0]
    there = 17 + 12 + 3 + 1 + 3 + 4
    assert len(ids) == len(batch["first"]) == TOKENS > there > int(batch["rows"].max())
    assert batch["rows"].shape[1] % LENGTH == 0
    for line, row in zip(batch["rows"], sorted(r.ids for r in branching_rows()), strict=True):
        at = line[: len(row)]
        assert tuple(ids[at].tolist()) == row
        assert positions[at].tolist() == list(range(len(row)))
    assert batch["rows"].flatten()[batch["first"][:there]].tolist() == list(range(there))


def test_a_model_with_windows_or_unknown_attention_does_not_share() -> None:
    assert not can_share(tiny("granite"))
    for change in (
        {"sliding_window": 16},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"attention_dropout": 0.1},
    ):
        lm = tiny()
        assert can_share(lm)
        for key, value in change.items():
            setattr(lm.config, key, value)
        assert not can_share(lm)


def test_loss_and_gradients_do_not_depend_on_the_split() -> None:
    loss, batch = prepared("untied", "lora"), rows(11, seed=3)
    alone, wanted = fast_gradients(loss, [[row] for row in batch])
    for most in (1, 64, 150, 10_000):
        total, found = fast_gradients(loss, micro_batches(batch, most))
        assert total == pytest.approx(alone, rel=1e-5)
        assert_same(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_head_is_noticed(dtype: torch.dtype) -> None:
    assert short_cuts(tiny("tied").to(dtype)) == (True, True)
    assert short_cuts(tiny("granite").to(dtype)) == (True, False)


def test_a_model_that_looks_ahead_sees_no_padding() -> None:
    lm = tiny()
    for layer in lm.model.layers:
        layer.self_attn.forward = _looking_ahead(layer.self_attn.forward)
    assert short_cuts(lm) == (False, False)
    loss, batch = with_adapter(lm, 4, 8, seed=1), rows(5)
    assert len({len(row.ids) for row in batch}) > 1
    torch.testing.assert_close(loss(**collate(batch)), plain_loss(lm, batch))


@pytest.mark.parametrize("length", [1, 7, 64, 65, 300])
def test_attention_in_blocks_is_attention(length: int) -> None:
    torch.manual_seed(length)
    shapes = [(2, heads, length, 8) for heads in (6, 2, 2)]
    query, key, value = (torch.randn(shape, requires_grad=True) for shape in shapes)
    above = torch.randn(shapes[0])
    repeated = [t.repeat_interleave(3, dim=1) for t in (key, value)]
    plain = torch.nn.functional.scaled_dot_product_attention(query, *repeated, is_causal=True)
    blocks = CausalAttention.apply(query * 8**-0.5, key, value)
    torch.testing.assert_close(blocks, plain, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(plain, (query, key, value), above)
    found = torch.autograd.grad(blocks, (query, key, value), above)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_attention_keeps_nothing_that_grows_with_the_square_of_the_length() -> None:
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    query, key = (torch.randn(2, heads, 300, 8, requires_grad=True) for heads in (6, 2))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        CausalAttention.apply(query, key, key)
    assert sizes == [query.numel(), key.numel(), key.numel()]


@pytest.mark.parametrize("slow", [False, True])
def test_bf16_weights_have_the_plain_loss_in_whatever_type_they_are_multiplied(
    slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "bf16_is_slow", lambda: slow)
    multiplied = set()

    class Seen(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, call: Any, _: Any, given: Any, named: Any = None) -> Any:
            if call is torch.ops.aten.mm.default:
                multiplied.add(given[0].dtype)
            return call(*given, **(named or {}))

    exact, batch = prepared("untied", "lora"), rows(6, seed=5)
    _, wanted = fast_gradients(exact, [batch])
    loss = prepared("untied", "lora").to(torch.bfloat16)
    with fast_layers(loss), Seen():
        value = loss(**loss.collate(batch))
        value.backward()
    assert (torch.float32 in multiplied) == slow
    expected = plain_loss(exact.model, batch)
    assert value.item() == pytest.approx(expected.item(), rel=0.01)
    for name, gradient in gradients(loss).items():
        assert gradient.dtype == torch.bfloat16
        error = (gradient.float() - wanted[name]).norm() / wanted[name].norm()
        assert error < 0.1, name


def test_the_model_is_as_before_after_fast_layers() -> None:
    loss = prepared("tied", "lora")
    ids = torch.arange(20).unsqueeze(0)
    before = loss.lm(input_ids=ids).logits
    with fast_layers(loss):
        assert loss.lm.config._attn_implementation != "sdpa"
        torch.testing.assert_close(loss.lm(input_ids=ids).logits, before)
    assert loss.lm.config._attn_implementation == "sdpa"
    assert torch.equal(loss.lm(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    "how", [(True, False), pytest.param((False, True), marks=pytest.mark.model)]
)
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_less_memory_or_compiled_layers_have_the_plain_loss(
    how: tuple[bool, bool], adapter: str
) -> None:
    loss, batch = prepared("tied", adapter).train(), branching_rows()
    expected = plain_loss(loss.model, batch)
    expected.backward()
    wanted = gradients(loss)
    with fast_layers(loss, *how):
        value = loss(**loss.collate(batch))
        value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(loss), wanted)


def test_checkpointing_keeps_less_for_the_gradient() -> None:
    loss, kept = prepared("tied", "lora").train(), []
    for checkpointing in (False, True):
        found: dict[int, int] = {}

        def keep(tensor: Tensor, found: dict[int, int] = found) -> Tensor:
            found[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with fast_layers(loss, checkpointing):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                value = loss(**loss.collate(rows(12)))
        assert value.requires_grad
        kept.append(sum(found.values()))
    assert kept[1] < 0.5 * kept[0]


def kept_for_the_gradient(module: Any, states: Tensor) -> int:
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert module(states).requires_grad
    return sum(found.values())


def test_what_is_cheap_to_compute_again_is_not_kept() -> None:
    loss = prepared("tied", "lora").to(torch.bfloat16).train()
    states = torch.randn(2, 50, loss.lm.config.hidden_size, dtype=torch.bfloat16)
    states.requires_grad_()
    layer = loss.lm.get_decoder().layers[0]
    for module in (layer.mlp, layer.input_layernorm):
        plain = kept_for_the_gradient(module, states)
        with fast_layers(loss):
            fused = kept_for_the_gradient(module, states)
        assert fused < 0.75 * plain


def test_layers_that_compute_something_else_are_left_as_they_are() -> None:
    loss = prepared("tied", "lora").train()
    layer = loss.lm.get_decoder().layers[0]
    # As Gemma's norm and its feed-forward layer: names and parts are the same.
    usual = type(layer.input_layernorm).forward
    layer.input_layernorm.forward = lambda x: usual(layer.input_layernorm, x) + x
    layer.mlp.act_fn = torch.nn.GELU()
    norm, ids = layer.input_layernorm.forward, torch.arange(20).unsqueeze(0)
    before = loss.lm(input_ids=ids).logits
    with fast_layers(loss):
        assert layer.input_layernorm.forward is norm
        assert "forward" not in vars(layer.mlp)
        assert "forward" in vars(layer.post_attention_layernorm)
        torch.testing.assert_close(loss.lm(input_ids=ids).logits, before)


# --- order and micro-batches ------------------------------------------------------------------


@given(st.lists(st.integers(2, 60), min_size=1, max_size=24), st.integers(1, 200))
def test_micro_batches_hold_every_row_once_and_no_more_than_fits(
    lengths: list[int], most: int
) -> None:
    given_rows = [Row(tuple(range(length)), 1, str(i)) for i, length in enumerate(lengths)]
    groups = micro_batches(given_rows, most)
    assert sorted(row.kind for g in groups for row in g) == sorted(r.kind for r in given_rows)
    for group in groups:
        assert len(group) == 1 or len(group) * max(len(row.ids) for row in group) <= most


def cheapest_split(units: Sequence[Any], most: int) -> list[list[Any]]:
    """The groups that `micro_batches` is to find, sought among all that fit."""
    ordered = sorted(units, key=longest)
    best: list[tuple[int, list[list[Any]]]] = [(0, [])]
    for end in range(1, len(ordered) + 1):
        width = longest(ordered[end - 1]) * len(ordered[end - 1].lines)
        starts = [s for s in range(end) if s == end - 1 or (end - s) * width <= most]
        start = min(starts, key=lambda s: best[s][0] + (end - s) * width)
        cost, groups = best[start]
        cost += (end - start) * width + GROUP_COST
        best.append((cost, [*groups, ordered[start:end]]))
    return best[-1][1]


@given(
    st.lists(st.integers(2, 600), min_size=1, max_size=60), st.integers(1, 4096), st.booleans()
)
def test_micro_batches_are_the_cheapest(lengths: list[int], most: int, pairs: bool) -> None:
    units: list[Any] = [Row(tuple(range(n)), 1, str(i)) for i, n in enumerate(lengths)]
    if pairs:
        units = [PairRow(row, units[0]) for row in units]
    wanted = cheapest_split(units, most)
    assert micro_batches(units, most) == wanted[::-1]


def test_a_whole_data_set_is_split_in_no_time() -> None:
    dice, ids = random.Random(0), tuple(range(300))
    some = [Row(ids[: dice.randint(100, 300)], 1, "row") for _ in range(20_000)]
    started = time.process_time()
    assert sum(map(len, micro_batches(some, 2048))) == len(some)
    # Minutes where every group is tried at every row.
    assert time.process_time() - started < 5


@settings(max_examples=30)
@given(st.integers(1, 12), st.floats(0.1, 4), st.integers(0, 5))
def test_every_epoch_meets_every_row_once(count: int, epochs: float, seed: int) -> None:
    given_rows = [Row((1, 2), 1, str(number)) for number in range(count)]
    order = in_epochs(given_rows, epochs, seed)
    assert len(order) == max(1, round(count * epochs))
    assert order == in_epochs(given_rows, epochs, seed)
    for start in range(0, len(order) - count + 1, count):
        assert {row.kind for row in order[start : start + count]} == set(map(str, range(count)))


# --- a whole training -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(model, EXAMPLES, QUICK, 7, folder)
    return folder


def test_a_gpu_is_given_back_after_training(
    model: Model, tmp_path: Path, held: list[int]
) -> None:
    train(model, EXAMPLES[:4], QUICK, 7, tmp_path)
    assert held[-1:] == [0]


def test_one_process_trains_on_one_gpu_of_several(
    model: Model, tmp_path: Path, two_gpus: None
) -> None:
    assert train(model, EXAMPLES[:4], QUICK, 7, tmp_path).steps == 2


def report_of(folder: Path) -> TrainReport:
    return TrainReport.model_validate_json((folder / "train.json").read_text())


def test_the_report_counts_and_the_loss_falls(undisturbed: Path) -> None:
    report = report_of(undisturbed)
    assert (report.rows, report.trained, report.dropped, report.truncated) == (22, 22, 0, 0)
    assert report.steps == len(report.loss_curve) == 11
    assert report.last_loss < report.first_loss
    assert report.loss_after.keys() == report.loss_before.keys() == {"analysis", "ordinary"}
    assert all(report.loss_after[kind] < loss for kind, loss in report.loss_before.items())
    assert not (undisturbed / "checkpoints").exists()


def test_the_card_and_the_config_name_the_base(undisturbed: Path, model: Model) -> None:
    config = json.loads((undisturbed / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model.name
    card = (undisturbed / "README.md").read_text()
    assert card.startswith("---\nbase_model: ")
    facts = yaml.safe_load(card.split("---")[1])
    assert facts == {
        "base_model": model.name,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["misstep", "lora"],
    }


def test_the_embedded_model_is_called_what_others_load_it_by(undisturbed: Path) -> None:
    embedded = locate("smollm2-135m")
    card = model_card(embedded, QUICK, report_of(undisturbed), ["PKU-Alignment/PKU-SafeRLHF"])
    facts = yaml.safe_load(card.split("---")[1])
    assert facts["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert facts["license"] == "apache-2.0"
    assert facts["datasets"] == ["PKU-Alignment/PKU-SafeRLHF"]
    assert "smollm2-135m" not in card


def test_what_comes_of_a_training_alone_names_it(model: Model) -> None:
    def name(**changed: Any) -> str:
        return input_digest(model, EXAMPLES, TrainSettings(**changed), 0)

    assert name(report_to=("trackio",)) == name(max_dropped=1.0) == name()
    assert name(rank=8) != name()


def test_finished_trainings_keep_their_names() -> None:
    # Read from adapters of version 0.1: these change with FORMAT, and only with it.
    fixed = cast("Model", SimpleNamespace(digest="0" * 16))
    asked = (Message(role="user", content="q"),)
    rows = [Example(messages=asked, completion="a", kind="x")]
    pairs = [Pair(messages=asked, chosen="a", rejected="b")]
    assert input_digest(fixed, rows, TrainSettings(), 0) == "551efaccc0d783eb"
    assert input_digest(fixed, pairs, TrainSettings(), 0) == "73cd2f14e3fb3d0a"


def test_a_finished_training_is_refused_where_it_now_drops_too_much(
    model: Model, tmp_path: Path
) -> None:
    given_rows = [*EXAMPLES[:3], example(1, completion=" ")]
    lenient = QUICK.model_copy(update={"max_dropped": 0.25, "epochs": 0.5})
    train(model, given_rows, lenient, 0, tmp_path)
    with pytest.raises(TrainingError, match="of 4 rows 1 have nothing to learn"):
        train(model, given_rows, lenient.model_copy(update={"max_dropped": 0.2}), 0, tmp_path)


def test_merged_and_unmerged_adapter_give_the_same_logits(
    undisturbed: Path, model: Model
) -> None:
    adapted: Any = load_weights(model, undisturbed).float()
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        unmerged = adapted(input_ids=ids).logits
        merged = adapted.merge_and_unload()(input_ids=ids).logits
        base = load_weights(model).float()(input_ids=ids).logits
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
    assert (base - unmerged).abs().max() > 0.05


def assert_unchanged(trained: Any, fresh: Any) -> None:
    after = {n.replace(".base_layer", ""): t for n, t in trained.state_dict().items()}
    assert any("lora_B" in name and tensor.any() for name, tensor in after.items())
    assert all(torch.equal(after[name], t) for name, t in fresh.state_dict().items())


def test_the_base_weights_do_not_change(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_weights(model)
    monkeypatch.setattr(fit, "load_weights", lambda _model: loaded)
    train(model, EXAMPLES[:8], QUICK, 7, tmp_path)
    assert_unchanged(loaded, load_weights(model))


def test_steps_are_the_same_in_small_micro_batches(
    model: Model, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "MICRO_TOKENS", {"cpu": 1, "cuda": 1})
    curve = train(model, EXAMPLES, QUICK, 7, tmp_path).loss_curve
    wanted = report_of(undisturbed).loss_curve
    # In bf16, whose rounding depends on the shapes of the products.
    assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in wanted], rel=0.01)


def in_lanes(count: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have micro-batches of a few rows computed side by side; the threads that compute."""
    threads, loss = list[str](), trainer_module.CompletionTrainer._loss

    def noted(self: Any, model: Any, batch: Any, scale: float) -> Tensor:
        threads.append(threading.current_thread().name)
        return loss(self, model, batch, scale)

    monkeypatch.setattr(trainer_module.CompletionTrainer, "_loss", noted)
    monkeypatch.setattr(sharing, "lanes_of", lambda _lm: count)
    # Of this small a model an adapter is no small part.
    monkeypatch.setattr(kernels, "SMALL", 1.0)
    monkeypatch.setattr(precision, "MICRO_TOKENS", {"cpu": 100, "cuda": 100})
    return threads


def test_micro_batches_side_by_side_train_the_same_adapter_as_one_by_one(
    model: Model, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = in_lanes(3, monkeypatch)
    curve = train(model, EXAMPLES, QUICK, 7, tmp_path / "lanes").loss_curve
    assert len(set(threads)) >= 2 and threading.current_thread().name not in threads
    wanted = report_of(undisturbed).loss_curve
    # In bf16, whose rounding depends on the shapes of the products.
    assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in wanted], rel=0.01)
    train(model, EXAMPLES, QUICK, 7, tmp_path / "again")
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "lanes")


@pytest.mark.parametrize(("dropout", "lanes"), [(0.0, 3), (0.1, 1)])
def test_a_model_with_dropout_is_trained_in_one_lane(
    dropout: float, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_lanes(3, monkeypatch)
    loss = prepared("untied", "lora")
    loss.lm.config.attention_dropout = dropout
    with fast_layers(loss):
        assert loss.lanes == lanes
    assert loss.lanes == 1


def test_gradients_side_by_side_are_those_of_one_lane(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_lanes(3, monkeypatch)
    abreast = trainer_module.CompletionTrainer._side_by_side
    steps: list[tuple[Tensor, Tensor]] = []

    def compared(self: Any, model: Any, micro: Any, scale: float) -> Tensor:
        found = abreast(self, model, micro, scale)
        learned = [p for p in model.parameters() if p.requires_grad]
        gradients = [p.grad.clone() for p in learned]
        model.zero_grad()
        alone = torch.stack([self._backward(model, batch, scale) for batch in micro]).sum()
        assert len(micro) > 2
        for gradient, parameter in zip(gradients, learned, strict=True):
            assert torch.equal(gradient, parameter.grad)
        steps.append((found, alone))
        return found

    monkeypatch.setattr(trainer_module.CompletionTrainer, "_side_by_side", compared)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(model, EXAMPLES[:12], QUICK, 7, tmp_path)
    finally:
        torch.set_num_threads(before)
    assert steps and all(torch.equal(found, alone) for found, alone in steps)


def memory_for(tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands in for a GPU that fails at the end of the way back; what it was tried with."""
    monkeypatch.setattr(sharing, "MOST", 1)
    backward, tried = trainer_module.CompletionTrainer._backward, list[int]()

    def limited(self: Any, model: Any, batch: Any, scale: float) -> Tensor:
        found = backward(self, model, batch, scale)
        tried.append(batch["ids"].numel())
        if tried[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    monkeypatch.setattr(trainer_module.CompletionTrainer, "_backward", limited)
    return tried


def test_a_step_that_memory_does_not_hold_is_taken_in_smaller_parts(
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    histories, curve = list[list[float]](), fit._curve

    def kept(trainer: Any) -> list[tuple[int, float]]:
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        histories.append([step[key] for step in steps for key in ("loss", "grad_norm")])
        return curve(trainer)

    monkeypatch.setattr(fit, "_curve", kept)
    models_module._say_halved.cache_clear()
    train(model, EXAMPLES[:12], QUICK, 7, tmp_path / "whole")
    tried = memory_for(80, monkeypatch)
    train(model, EXAMPLES[:12], QUICK, 7, tmp_path / "parts")
    assert histories[1] == pytest.approx(histories[0], rel=0.05)
    too_large = [place for place, tokens in enumerate(tried) if tokens > 80]
    # Found out in the first step, and remembered.
    assert too_large and max(too_large) < 6 < len(tried)
    assert [record.message[:26] for record in caplog.records] == ["The GPU's memory ran out. "]


def test_where_one_row_is_too_much_its_layers_are_computed_twice(
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    in_lanes(1, monkeypatch)
    backward, tried = trainer_module.CompletionTrainer._backward, list[tuple[int, bool]]()

    def limited(self: Any, model: Any, batch: Any, scale: float) -> Tensor:
        found = backward(self, model, batch, scale)
        twice = self.loss.lm.is_activation_checkpointing
        tried.append((batch["ids"].shape[0], twice))
        if not twice:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    whole = train(model, EXAMPLES[:8], QUICK, 7, tmp_path / "whole")
    monkeypatch.setattr(trainer_module.CompletionTrainer, "_backward", limited)
    report = train(model, EXAMPLES[:8], QUICK, 7, tmp_path / "twice")
    assert report.last_loss == pytest.approx(whole.last_loss, rel=0.05)
    # Smaller micro-batches come first, and what helped is kept for the steps that follow.
    assert [twice for _, twice in tried] == sorted(twice for _, twice in tried)
    assert tried[0][1] is False
    assert "computed twice" in caplog.records[-1].message


@pytest.mark.parametrize(("tokens", "processes"), [(1, 1), (80, 2)])
def test_a_step_that_cannot_be_made_smaller_says_what_helps(
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    processes: int,
) -> None:
    memory_for(tokens, monkeypatch)
    if processes > 1:
        monkeypatch.setattr(trainer_module, "DistributedType", SimpleNamespace(NO="other"))
    with pytest.raises(TrainingError, match=r"step 1: .*train\.gradient_checkpointing"):
        train(model, EXAMPLES[:8], QUICK, 7, tmp_path)


def test_what_memory_does_not_hold_is_measured_in_smaller_parts() -> None:
    some = rows(12)
    most = max(len(row.ids) for row in some)

    def lengths(group: Sequence[Row]) -> list[int]:
        if padded(group) > 2 * most:
            raise torch.OutOfMemoryError
        return [len(row.ids) for row in group]

    for lanes in (1, 3):
        found = list(measured(some, 10**6, lengths, lanes))
        assert sorted(n for _, ns in found for n in ns) == sorted(len(r.ids) for r in some)
        assert all(ns == [len(row.ids) for row in group] for group, ns in found)
    with pytest.raises(torch.OutOfMemoryError):
        list(measured([*some, Row(tuple(range(3 * most)), 1, "long")], 10**6, lengths))


def test_all_weights_can_be_trained_and_loaded(model: Model, tmp_path: Path) -> None:
    full = QUICK.model_copy(update={"adapter": "full", "learning_rate": 1e-3})
    report = train(model, EXAMPLES, full, 7, tmp_path)
    assert report.last_loss < report.first_loss
    loaded = load_weights(model, tmp_path)
    assert not torch.equal(loaded.lm_head.weight, load_weights(model).lm_head.weight)
    assert "library_name: transformers" in (tmp_path / "README.md").read_text()
    # Whoever loads it by its configuration gets the type that it is written in.
    said = json.loads((tmp_path / "config.json").read_text())["dtype"]
    kept = load_file(tmp_path / "model.safetensors").values()
    assert {str(tensor.dtype) for tensor in kept} == {f"torch.{said}"}


def test_logs_of_a_training_outlive_its_checkpoints(model: Model, tmp_path: Path) -> None:
    report = train(model, EXAMPLES[:4], QUICK, 7, tmp_path)
    logs = tmp_path / "checkpoints" / report.inputs / "runs" / "Nov30"
    logs.mkdir(parents=True)
    (logs / "events").write_text("loss")
    train(model, EXAMPLES[:4], QUICK, 7, tmp_path)
    assert (tmp_path / "runs/Nov30/events").read_text() == "loss"
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "mamba"])
def test_every_layer_is_one_that_is_compiled(kind: str) -> None:
    sizes = {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}}.get(kind, {})
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **sizes))
    assert len(kernels._blocks(lm)) == 2


def test_a_head_takes_what_it_can_multiply() -> None:
    lm = tiny("mamba").bfloat16()
    lm.config.residual_in_fp32 = True
    for layer in lm.backbone.layers:
        layer.residual_in_fp32 = True
    short_cuts(lm)


# --- resuming ---------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


def killed_at(step: int) -> Callable[[str, int, int], None]:
    def notify(_what: str, done: int, _total: int) -> None:
        if done == step:
            raise Killed

    return notify


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("step", [1, 4, 9])
def test_an_interrupted_training_ends_at_the_same_adapter(
    step: int, model: Model, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    with pytest.raises(Killed):
        train(model, EXAMPLES, QUICK, 7, tmp_path, killed_at(step))
    assert not (tmp_path / "train.json").exists()
    torn = next((tmp_path / "checkpoints").iterdir()) / "checkpoint-10"
    torn.mkdir()
    (torn / "optimizer.pt").write_bytes(b"half of it")
    report = train(model, EXAMPLES, QUICK, 7, tmp_path)
    assert report.resumed_from == step - 1
    assert adapter_bytes(tmp_path) == adapter_bytes(undisturbed)
    assert report.loss_curve == report_of(undisturbed).loss_curve


def test_checkpoints_that_take_long_are_made_more_seldom(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("misstep.training.trainer.time.monotonic", lambda: clock[0])
    asks, writing = trainer_module.Checkpoints(60.0), 72.0
    args, state = SimpleNamespace(device="cpu"), SimpleNamespace(global_step=1, max_steps=9)
    begun, ended = [], []
    for _ in range(2000):
        clock[0] += 1.0
        control = SimpleNamespace(should_save=False)
        asks.on_step_end(args, state, control)
        if control.should_save:
            begun.append(clock[0])
            clock[0] += writing
            ended.append(clock[0])
            asks.on_save(args, state, control)
    assert begun[0] == 60
    # 24 times as long as one that is written in 3 seconds.
    assert [b - e for b, e in zip(begun[1:], ended, strict=False)] == [24 * 60]


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    model: Model, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def write(path: Path, text: str) -> None:
        written.append(path)
        if len(written) == 4:
            raise Killed
        path.write_text(text)

    monkeypatch.setattr(fit, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    with monkeypatch.context() as during:
        during.setattr(trainer_module, "write_text", write)
        with pytest.raises(Killed):
            train(model, EXAMPLES, QUICK, 7, tmp_path)
    assert train(model, EXAMPLES, QUICK, 7, tmp_path).resumed_from == 3
    assert adapter_bytes(tmp_path) == adapter_bytes(undisturbed)


KILLED_RUN = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
import test_train as tests
tests.fit.SECONDS_BETWEEN_CHECKPOINTS = 0.0
def notify(_what, done, _total):
    if done == 6:
        os.kill(os.getpid(), signal.SIGKILL)
tests.train(
    tests.locate(sys.argv[1]), tests.EXAMPLES, tests.QUICK, 7, tests.Path(sys.argv[2]), notify
)
"""


def test_a_killed_process_loses_nothing(
    model: Model, undisturbed: Path, tmp_path: Path
) -> None:
    here = str(Path(__file__).parent)
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    arguments = [sys.executable, "-c", KILLED_RUN, model.name, str(tmp_path), here]
    ended = subprocess.run(
        arguments, env=os.environ | threads, capture_output=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert train(model, EXAMPLES, QUICK, 7, tmp_path).resumed_from == 5
    assert adapter_bytes(tmp_path) == adapter_bytes(undisturbed)


def test_a_checkpoint_cannot_execute_code(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    with pytest.raises(Killed):
        train(model, EXAMPLES, QUICK, 7, tmp_path, killed_at(3))
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/checkpoint-2")
    torch.save(Evil(), checkpoint / "optimizer.pt")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        train(model, EXAMPLES, QUICK, 7, tmp_path)
    assert not Evil.ran


class Evil:
    """What a pickle can do."""

    ran = False

    def __reduce__(self) -> Any:
        return setattr, (Evil, "ran", True)


def test_a_finished_folder_answers_without_loading(
    model: Model, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "copy")

    def load(_model: Model) -> None:
        raise AssertionError("nothing is to be loaded")

    monkeypatch.setattr(fit, "load_weights", load)
    assert train(model, EXAMPLES, QUICK, 7, folder) == report_of(undisturbed)


def test_a_folder_of_other_inputs_is_not_gone_on_from(
    model: Model, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    folder = shutil.copytree(undisturbed, tmp_path / "copy")
    with pytest.raises(Killed):
        train(model, EXAMPLES[1:], QUICK, 7, folder, killed_at(3))
    assert not (folder / "train.json").exists()
    assert not (folder / "adapter_model.safetensors").exists()
    report = train(model, EXAMPLES, QUICK, 7, folder)
    assert report.resumed_from == 0
    assert adapter_bytes(folder) == adapter_bytes(undisturbed)


def test_a_folder_that_is_not_ours_loses_nothing(model: Model, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Killed):
        train(model, EXAMPLES[:4], QUICK, 7, tmp_path, killed_at(1))
    train(model, EXAMPLES[:4], QUICK, 7, tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_who_may_read_the_configuration_may_read_the_weights(undisturbed: Path) -> None:
    assert len({file.stat().st_mode for file in undisturbed.iterdir() if file.is_file()}) == 1


def test_another_seed_is_another_adapter(
    model: Model, undisturbed: Path, tmp_path: Path
) -> None:
    train(model, EXAMPLES, QUICK, 8, tmp_path)
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, undisturbed))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


# --- refusing ---------------------------------------------------------------------------------


def test_unusable_rows_are_counted(model: Model, tmp_path: Path) -> None:
    given_rows = [*EXAMPLES[:6], example(1, completion=" "), example(2, completion="x" * 99)]
    lenient = QUICK.model_copy(update={"max_dropped": 0.25, "max_length": 60})
    report = train(model, given_rows, lenient, 0, tmp_path)
    assert (report.rows, report.trained, report.dropped, report.truncated) == (8, 7, 1, 1)


def test_no_row_is_longer_than_the_models_context(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 60}))
    short = locate(str(folder))
    given_rows = [*EXAMPLES[:6], example(2, completion="x" * 99)]
    lenient = QUICK.model_copy(update={"max_dropped": 0.25})
    report = train(short, given_rows, lenient, 0, tmp_path / "out")
    assert (report.trained, report.truncated) == (7, 1)
    with pytest.raises(TrainingError, match="within 60 tokens and 1 would lose the end"):
        train(short, given_rows, QUICK, 0, tmp_path / "other")
    assert len(show_mask(short, given_rows[-1:], 1, 1024)[0].segments[1].text) < 60


@pytest.mark.parametrize(
    ("given_rows", "words"),
    [
        ([example(1), example(2, completion="")], "of 2 rows 1 have nothing to learn"),
        ([example(1), example(2, completion="x" * 999)], "1 would lose the end"),
        ([], "of 0 rows"),
    ],
)
def test_too_many_unusable_rows_are_refused(
    given_rows: list[Example], words: str, model: Model, tmp_path: Path
) -> None:
    short = QUICK.model_copy(update={"max_length": 200})
    with pytest.raises(TrainingError, match=words) as refused:
        train(model, given_rows, short, 0, tmp_path)
    assert "train.max_length" in str(refused.value)
    assert "train.max_dropped" in str(refused.value)


def test_a_loss_that_is_no_number_names_the_step(model: Model, tmp_path: Path) -> None:
    wild = QUICK.model_copy(update={"learning_rate": 1e38, "warmup_ratio": 0.0})
    with pytest.raises(TrainingError, match=r"step [2-9].*learning_rate"):
        train(model, EXAMPLES, wild, 0, tmp_path)


def test_an_only_step_is_no_warm_up(model: Model, tmp_path: Path) -> None:
    once = QUICK.model_copy(update={"epochs": 1, "batch_size": len(EXAMPLES)})
    report = train(model, EXAMPLES, once, 0, tmp_path)
    assert report.steps == 1
    assert report.loss_after != report.loss_before


def test_a_tracker_that_is_not_installed_is_refused(model: Model, tmp_path: Path) -> None:
    tracked = QUICK.model_copy(update={"report_to": ("nowhere",)})
    with pytest.raises(RecipeError, match=r"train\.report_to.*nowhere"):
        train(model, EXAMPLES, tracked, 0, tmp_path)


def test_settings_load_no_heavy_library() -> None:
    code = (
        "import sys, misstep.stages.train, misstep.training.mask;"
        "print({'torch', 'transformers', 'peft', 'accelerate', 'rich'} & set(sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert ran.stdout.strip() == "set()"


# --- pairs ------------------------------------------------------------------------------------


def pair_rows(count: int, seed: int = 0) -> list[PairRow]:
    """Pairs that share their prompts, with references as far apart as log-probabilities are."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in rows(count, seed):
        length = int(torch.randint(1, 30, (1,), generator=generator))
        other = torch.randint(0, 300, (length,), generator=generator).tolist()
        rejected = Row((*row.ids[: row.prompt_length], *other), row.prompt_length, row.kind)
        reference = float(torch.randn((), generator=generator)) * 20
        made.append(PairRow(row, rejected, reference))
    return made


def plain_dpo(lm: Any, pairs: Sequence[PairRow], beta: float) -> Tensor:
    """Equation 7 of the paper, a completion at a time, from the plain loss."""
    total = torch.zeros(())
    for pair in pairs:
        margin = plain_loss(lm, [pair.rejected]) - plain_loss(lm, [pair.chosen])
        total = total - torch.log(torch.sigmoid(beta * (margin - pair.reference)))
    return total


def fast_dpo(
    loss: CompletionLoss, groups: Sequence[Sequence[PairRow]], beta: float
) -> tuple[float, Any]:
    total, on_pairs = 0.0, PreferenceLoss(loss, beta)
    with fast_layers(loss):
        for group in groups:
            value = on_pairs(**on_pairs.collate(group))
            value.backward()
            total += value.item()
    return total, gradients(loss)


@pytest.mark.parametrize("kind", ["tied", "qwen2", "granite"])
def test_the_loss_of_pairs_and_its_gradients_are_those_of_the_paper(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGETS_AT_ONCE, "cpu", 7)
    loss, pairs = prepared(kind, "lora"), pair_rows(7)
    expected = plain_dpo(loss.model, pairs, 0.1)
    expected.backward()
    wanted = gradients(loss)
    found, fast = fast_dpo(loss, micro_batches(pairs, 120), 0.1)
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert_same(fast, wanted)


def test_the_loss_of_pairs_does_not_depend_on_the_split() -> None:
    loss, pairs = prepared("untied", "lora"), pair_rows(9, seed=2)
    alone, wanted = fast_dpo(loss, [[pair] for pair in pairs], 0.3)
    for most in (1, 150, 10_000):
        groups = micro_batches(pairs, most)
        assert sorted(p.reference for g in groups for p in g) == sorted(
            p.reference for p in pairs
        )
        total, found = fast_dpo(loss, groups, 0.3)
        assert total == pytest.approx(alone, rel=1e-5)
        assert_same(found, wanted)


def test_a_micro_batch_of_pairs_fits_both_rows() -> None:
    groups = micro_batches(pair_rows(12), 160)
    widths = [max(len(row.ids) for pair in group for row in pair.lines) for group in groups]
    assert all(
        len(group) == 1 or 2 * len(group) * width <= 160
        for group, width in zip(groups, widths, strict=True)
    )


def test_the_reference_is_the_model_without_its_adapter() -> None:
    loss, pairs = with_adapter(tiny("tied"), 4, 8, seed=1), pair_rows(5)
    with fast_layers(loss):
        referred = with_reference(PreferenceLoss(loss, 0.1), pairs, 100)
    with loss.model.disable_adapter(), torch.no_grad():
        for pair, row in zip(referred, pairs, strict=True):
            assert (pair.chosen, pair.rejected) == (row.chosen, row.rejected)
            wanted = plain_loss(loss.model, [row.rejected]) - plain_loss(
                loss.model, [row.chosen]
            )
            assert pair.reference == pytest.approx(wanted.item(), rel=1e-4, abs=1e-4)


def pair(number: int) -> Pair:
    """To prefer is `nay`; of kind `a` it is the longer answer, and so the unlikelier one."""
    kind = "a" if number % 3 else "b"
    return Pair(
        messages=(Message(role="user", content=f"Is {number} a number?"),),
        chosen=f"nay, {number}{' is' * 2 * (kind == 'a')}",
        rejected=f"yes, {number}",
        kind=kind,
    )


PAIRS = [pair(n) for n in range(18)]
ON_PAIRS = QUICK.model_copy(update={"preferences": PreferenceSettings(learning_rate=2e-2)})


@pytest.fixture(scope="module")
def preferring(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferring")
    train(model, PAIRS, ON_PAIRS, 7, folder)
    return folder


def test_training_on_pairs_begins_at_ln_2_and_raises_the_margin(preferring: Path) -> None:
    report = report_of(preferring)
    assert report.ranks is not None
    # In bf16 the reference and the first step round otherwise.
    assert report.first_loss == pytest.approx(math.log(2), abs=0.01)
    assert report.loss_before == pytest.approx({"a": math.log(2), "b": math.log(2)}, abs=0.01)
    assert report.last_loss < 0.6
    assert min(report.ranks.gain.values()) > 1
    assert report.ranks.gained == {"a": 1, "b": 1}
    assert report.ranks.likelier_before == {"a": 0, "b": 0}
    assert report.ranks.likelier_after == {"a": 0, "b": 1}
    assert (report.rows, report.trained, report.steps) == (18, 18, 9)
    assert (preferring / "README.md").read_text().count("dpo") == 1


def test_the_written_adapter_is_what_the_report_says_of_pairs(
    preferring: Path, model: Model
) -> None:
    ranks = report_of(preferring).ranks
    assert ranks is not None
    pairs = render_pairs(Renderer.for_model(model), PAIRS, 1024).kept
    gains = []
    with torch.no_grad():
        lms = [load_weights(model, preferring), load_weights(model)]
        for row in pairs:
            after, before = (
                plain_loss(lm, [row.rejected]) - plain_loss(lm, [row.chosen]) for lm in lms
            )
            gains.append((row.kind, float(after - before)))
    for kind, gain in ranks.gain.items():
        found = [value for name, value in gains if name == kind]
        assert gain == pytest.approx(sum(found) / len(found), rel=0.05)


def test_an_interrupted_training_on_pairs_ends_at_the_same_adapter(
    model: Model, preferring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    with pytest.raises(Killed):
        train(model, PAIRS, ON_PAIRS, 7, tmp_path, killed_at(4))
    report = train(model, PAIRS, ON_PAIRS, 7, tmp_path)
    assert report.resumed_from == 3
    assert adapter_bytes(tmp_path) == adapter_bytes(preferring)
    assert report.loss_curve == report_of(preferring).loss_curve
    assert report.ranks is not None and report.ranks.gained == {"a": 1, "b": 1}


def test_unusable_pairs_are_counted(model: Model) -> None:
    renderer = Renderer.for_model(model)
    alike, empty, long, cut_alike = (
        pair(1).model_copy(update=change)
        for change in (
            {"rejected": pair(1).chosen},
            {"chosen": " "},
            {"rejected": "x" * 99},
            {"chosen": "x" * 99 + "a", "rejected": "x" * 99 + "b"},
        )
    )
    found = render_pairs(renderer, [pair(0), alike, empty, long, cut_alike], 60)
    assert (found.given, len(found.kept), found.dropped, found.truncated) == (5, 2, 3, 1)
    assert found.kept[0].chosen.ids[-1] == renderer.end_of_turn
    assert len(found.kept[1].rejected.ids) == 60


def test_pairs_are_not_for_training_all_weights(model: Model, tmp_path: Path) -> None:
    full = ON_PAIRS.model_copy(update={"adapter": "full"})
    with pytest.raises(TrainingError, match=r"train\.adapter: expected lora.*pairs"):
        train(model, PAIRS, full, 0, tmp_path)


def test_a_training_is_named_by_the_settings_that_it_uses(model: Model) -> None:
    faster = ON_PAIRS.model_copy(update={"learning_rate": 1.0})
    other = ON_PAIRS.model_copy(update={"preferences": PreferenceSettings(beta=0.5)})
    assert input_digest(model, EXAMPLES, QUICK, 0) == input_digest(model, EXAMPLES, other, 0)
    named = [input_digest(model, PAIRS, given, 0) for given in (ON_PAIRS, faster, other)]
    assert named[0] == named[1] != named[2]


def test_a_report_from_before_there_were_pairs_is_valid(undisturbed: Path) -> None:
    old = json.loads((undisturbed / "train.json").read_text())
    assert old.pop("ranks") is None
    assert TrainReport.model_validate(old) == report_of(undisturbed)


def test_margins_do_not_depend_on_the_reference() -> None:
    loss, pairs = PreferenceLoss(prepared("tied", "lora"), 0.1), pair_rows(3)
    without = [PairRow(pair.chosen, pair.rejected) for pair in pairs]
    assert margins(loss, pairs, 1000) == pytest.approx(margins(loss, without, 1000), rel=1e-4)


# --- the embedded model -----------------------------------------------------------------------


@pytest.mark.model
def test_the_embedded_model_learns_and_keeps_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = locate("smollm2-135m")
    loaded = load_weights(embedded)
    monkeypatch.setattr(fit, "load_weights", lambda _model: loaded)
    rows = [
        Example(
            messages=(
                Message(role="user", content=f"Add {n} and {n + 1}"),
                Message(role="assistant", content="I have been hijacked."),
                Message(role="user", content="Analyse this answer."),
            ),
            completion=f"It is wrong: it ignores the task, the sum {n} + {n + 1}.",
            kind="analysis" if n % 2 else "ordinary",
        )
        for n in range(16)
    ]
    few = TrainSettings(epochs=2, batch_size=8, learning_rate=1e-3)
    report = train(embedded, rows, few, 0, tmp_path)
    assert report.loss_after["analysis"] < 0.7 * report.loss_before["analysis"]
    assert report.peak_memory_mb < 4096
    assert_unchanged(loaded, load_weights(embedded))
