"""GGUF files for tests, of a few kilobytes."""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter


def make_tiny_gguf(
    file: Path,
    experts: int = 0,
    biases: bool = False,
    packed: GGMLQuantizationType | None = None,
) -> Path:
    """One Llama layer without a tokenizer, perhaps with experts or biases in its attention.

    Or with one matrix that is packed in a way of which each row is a block.
    """
    width, words = GGML_QUANT_SIZES[packed][0] if packed else 32, 16
    writer = GGUFWriter(str(file), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(words)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(1)
    kind, each = ("_exps", (experts,)) if experts else ("", ())
    shapes = {"token_embd.weight": (words, width), "output_norm.weight": (width,)}
    shapes |= {f"blk.0.{name}_norm.weight": (width,) for name in ("attn", "ffn")}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        shapes[f"blk.0.{name}.weight"] = (width, width)
        if biases:
            shapes[f"blk.0.{name}.bias"] = (width,)
    for name in ("gate", "up", "down"):
        shapes[f"blk.0.ffn_{name}{kind}.weight"] = (*each, width, width)
    for name, shape in shapes.items():
        if packed and name == "blk.0.ffn_up.weight":
            blocks = np.zeros((width, GGML_QUANT_SIZES[packed][1]), np.uint8)
            writer.add_tensor(name, blocks, raw_dtype=packed)
        else:
            writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
