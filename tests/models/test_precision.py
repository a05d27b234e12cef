"""Which types this machine computes in."""

from collections.abc import Iterator

import pytest
import torch

from misstep.engines import openvino
from misstep.models.precision import (
    bf16_is_slow,
    fastest_dtype,
    products_dtype,
    weights_dtype,
)

SAPPHIRE_RAPIDS = {
    "cpu_name": "Intel Xeon",
    "avx512_bf16": True,
    "avx512_fp16": True,
    "amx_bf16": True,
}
HIDDEN_AMX = SAPPHIRE_RAPIDS | {"amx_bf16": False}
COOPER_LAKE = HIDDEN_AMX | {"avx512_fp16": False}
EPYC = HIDDEN_AMX | {"cpu_name": "AMD EPYC"}
OLD = {"cpu_name": "Intel Xeon", "avx512_bf16": False, "avx512_fp16": False}


@pytest.fixture
def processor(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, object]]:
    """A machine without a GPU whose processor is another."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bf16_is_slow.cache_clear()
    yield request.param
    bf16_is_slow.cache_clear()


@pytest.mark.parametrize(
    ("processor", "held", "multiplied"),
    [
        (SAPPHIRE_RAPIDS, torch.bfloat16, torch.bfloat16),
        (HIDDEN_AMX, torch.bfloat16, torch.float32),
        (COOPER_LAKE, torch.bfloat16, torch.bfloat16),
        (EPYC, torch.bfloat16, torch.bfloat16),
        (OLD, torch.float32, torch.float32),
    ],
    indirect=["processor"],
)
def test_bf16_is_multiplied_as_fp32_where_that_is_faster(
    processor: dict[str, object], held: torch.dtype, multiplied: torch.dtype
) -> None:
    assert weights_dtype() == held
    assert products_dtype(held, "cpu") == fastest_dtype() == multiplied
    # Of a GPU the processor says nothing, and nothing but bf16 is multiplied in another type.
    assert products_dtype(held, "cuda") == held
    for other in (torch.float32, torch.float16, torch.float64):
        assert products_dtype(other, "cpu") == other


@pytest.mark.parametrize("slow", [False, True])
def test_openvino_computes_in_bf16_only_where_it_is_fast(
    slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")

    class Core:
        def get_property(self, _device: str, name: str) -> object:
            return {"RANGE_FOR_STREAMS": (1, 8), "OPTIMIZATION_CAPABILITIES": ["BF16"]}[name]

    monkeypatch.setattr("openvino.Core", Core)
    monkeypatch.setattr(openvino, "bf16_is_slow", lambda: slow)
    assert openvino._precision() == ("f32" if slow else "bf16")
