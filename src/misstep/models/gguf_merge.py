"""Write a GGUF file as F16, with a LoRA adapter added into its weights.

OpenVINO ignores adapters on a model that was read from a GGUF, so the adapter has to be in the
weights; the base model is written the same way, so that both answer in the same precision. The
sum is formed in fp32, one tensor at a time. Metadata, and with it tokenizer and chat template,
is copied byte for byte, but for a template that is to stand in the other's place. An adapter
that holds anything which cannot be added is refused.
This module knows LoRA and the file layout; it knows no backend.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from misstep.errors import EngineError
from misstep.models.adapter import DOWN, TENSORS, UP, check_merge, module_of
from misstep.models.gguf_header import (
    ALIGNMENT,
    MAGIC,
    STRING,
    Header,
    TensorPlace,
    read_header,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]

F32, F16 = 0, 1
TEMPLATE = "tokenizer.chat_template"
LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class Delta:
    """What LoRA adds to one matrix: `scale * up @ down`."""

    down: "Matrix"
    up: "Matrix"
    scale: float

    def matrix(self) -> "Matrix":
        """The product, one row for each output of the module."""
        import numpy as np

        scaled: Matrix = self.up * np.float32(self.scale)
        return scaled @ self.down


def merge_adapter(
    model: Path, adapter: Path | None, out: Path, template: str | None = None
) -> Path:
    """Write `model` to `out` with F16 matrices, an adapter's deltas added.

    Args:
        model: a GGUF file.
        adapter: a folder that PEFT has written.
        out: the file to write.
        template: the chat template of the new file, where it is not to be the model's.

    Raises:
        ModelError: the adapter holds something that cannot be added to this file.
        EngineError: a weight does not fit into F16.
    """
    header = read_header(model)
    deltas = read_deltas(adapter, header) if adapter else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    with temporary.open("wb") as file:
        _write_head(file, header, template)
        for place in header.tensors:
            file.write(_tensor_bytes(model, place, deltas.get(place.name), header))
            file.write(bytes(-file.tell() % ALIGNMENT))
    return temporary.replace(out)


def _write_head(file: BinaryIO, header: Header, template: str | None) -> None:
    added = template is not None and TEMPLATE not in header.positions
    file.write(struct.pack("<4sIQQ", MAGIC, 3, len(header.tensors), header.pairs + added))
    file.write(_metadata(header, template))
    offset = 0
    for place in header.tensors:
        file.write(_string(place.name))
        file.write(struct.pack(f"<I{len(place.shape)}Q", len(place.shape), *place.shape))
        file.write(struct.pack("<IQ", _new_type(place), offset))
        size = math.prod(place.shape) * (4 if _new_type(place) == F32 else 2)
        offset += size + -size % ALIGNMENT
    file.write(bytes(-file.tell() % ALIGNMENT))


def _metadata(header: Header, template: str | None) -> bytes:
    """The metadata: what describes how tensors are stored is changed, and the template."""
    metadata = bytearray(header.metadata)
    for key, value in (("general.file_type", F16), ("general.alignment", ALIGNMENT)):
        if key in header.positions:
            struct.pack_into("<I", metadata, header.positions[key], value)
    if template is None:
        return bytes(metadata)
    if TEMPLATE not in header.positions:
        return (
            bytes(metadata) + _string(TEMPLATE) + struct.pack("<I", STRING) + _string(template)
        )
    start = header.positions[TEMPLATE]
    (length,) = struct.unpack_from("<Q", metadata, start)
    metadata[start : start + 8 + length] = _string(template)
    return bytes(metadata)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _new_type(place: TensorPlace) -> int:
    return F16 if len(place.shape) > 1 else F32


def _tensor_bytes(
    model: Path, place: TensorPlace, delta: Delta | None, header: Header
) -> bytes:
    import numpy as np

    weights = dequantised(model, place)
    if delta:
        # Into the delta's own memory: to get more from the system takes longer than the sum.
        added = stored_order(delta.matrix(), place.name, header)
        weights = np.add(weights, added, out=added)
    if _new_type(place) == F32:
        return weights.astype(np.float32).tobytes()
    if max(weights.max(), -weights.min()) > LARGEST_F16:
        raise EngineError(
            f"{model}: the weights of {place.name} exceed what F16 can hold. "
            "Serve this model with `transformers`."
        )
    return weights.astype(np.float16).tobytes()


def dequantised(model: Path, place: TensorPlace) -> "Matrix":
    """One tensor of the file in fp32, one row for each output."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(place.type_code)
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    columns = place.shape[0] // per_block * block_bytes
    rows = math.prod(place.shape[1:])
    mapped = np.memmap(model, np.uint8, "r", place.offset, (rows, columns))
    # A plain array over the same bytes: each of the many parts that `dequantize` takes would
    # else be a memory map of its own, which takes longer than the arithmetic.
    packed: NDArray[Any] = np.asarray(mapped)
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        # `dequantize` expects these two in their own type, and all others as bytes.
        packed = packed.view(np.float32 if kind == GGMLQuantizationType.F32 else np.float16)
    weights: Matrix = dequantize(packed, kind).reshape(place.shape[::-1])
    return weights


def stored_order(rows: "Matrix", name: str, header: Header) -> "Matrix":
    """Rows of a matrix in the order in which the file keeps them.

    For the llama architecture GGUF interleaves the two halves of each head of q and k, as the
    original checkpoints did; transformers keeps them one after the other.
    """
    counts = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
    key = counts.get(name.removesuffix(".weight").rpartition(".")[2])
    if header.architecture != "llama" or key is None:
        return rows
    halves = rows.reshape(header.number(key), 2, -1, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def read_deltas(adapter: Path, header: Header) -> dict[str, Delta]:
    """What an adapter adds, by the name of the GGUF tensor that it is added to.

    Raises:
        ModelError: the adapter is no plain LoRA, or a target has no tensor in this file.
    """
    import torch
    from safetensors import safe_open

    scale, names = check_merge(adapter, header)
    with safe_open(adapter / TENSORS, framework="pt") as tensors:

        def matrix(key: str) -> "Matrix":
            found: Matrix = tensors.get_tensor(key).to(torch.float32).numpy()
            return found

        downs = [key for key in tensors.keys() if key.endswith(DOWN)]  # noqa: SIM118
        return {
            names[module_of(down)]: Delta(
                matrix(down), matrix(down.removesuffix(DOWN) + UP), scale
            )
            for down in downs
        }
