"""Weights read tensor by tensor: equal to transformers' own loading, in little memory; errors name file and tensor."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from textgen_engine.attention.sdpa import SdpaBackend
from textgen_engine.config import ModelConfig
from textgen_engine.errors import ModelLoadError
from textgen_engine.kernels.cpu import load_kernels
from textgen_engine.mapped_memory import MappedFiles, WeightMemory
from textgen_engine.models.checkpoint import find_checkpoint
from textgen_engine.models.loader import LoadedModel, load_model, read_model
from textgen_engine.models.weights import WeightReader

from ..tiny import FAMILIES, make_tokenizer, save_checkpoint

ENGINE = Path(__file__).parents[3] / "model_repository" / "textgen" / "1"


def load(model_id: Path | str, **options: object) -> LoadedModel:
    return load_model(ModelConfig(str(model_id), num_threads=1, **options), SdpaBackend())  # type: ignore[arg-type]


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_read_tensor_by_tensor_is_the_one_transformers_reads(
    checkpoint: Callable[[str], Path], family: str
) -> None:
    """Names, values and types, computed buffers and joined experts included."""
    folder = checkpoint(family)
    for dtype in (torch.float32, torch.bfloat16):
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        config = AutoConfig.from_pretrained(folder)
        found, report = read_model(find_checkpoint(str(folder)), type(expected), config, dtype, torch.device("cpu"))
        assert not any(report.values())
        wanted, given = tensors_of(expected), tensors_of(found)
        assert wanted.keys() == given.keys()
        for name, tensor in wanted.items():
            assert tensor.dtype is given[name].dtype and torch.equal(tensor, given[name]), name
        assert not hasattr(found.config, "quantization_config")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_a_part_of_a_tensor_is_that_part(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of rows and of columns, in sizes beyond one piece of reading; widened where that is asked for."""
    generator = torch.Generator().manual_seed(0)
    stored = {
        "matrix": torch.randn(700, 1030, generator=generator).mul(50).to(dtype),
        "experts": torch.randn(3, 70, 50, generator=generator).mul(50).to(dtype),
        "vector": torch.randn(5000, generator=generator).mul(50).to(dtype),
        "number": torch.tensor(3).to(dtype),
        "nothing": torch.empty(0, 4, dtype=dtype),
    }
    path = tmp_path / "weights.safetensors"
    save_file(stored, path)
    for widen in (None, torch.float32):
        with WeightReader([path], widen=widen) as reader:
            wider = torch.float32 if widen and dtype is torch.bfloat16 else dtype
            for name, tensor in stored.items():
                assert torch.equal(reader.tensors[name][...], tensor.to(wider)), name
                assert reader.tensors[name].get_shape() == list(tensor.shape)
                for dim in range(tensor.dim()):
                    size = tensor.shape[dim]
                    part = reader.tensors[name].narrow(dim, size // 3, size // 2)
                    expected = tensor.narrow(dim, size // 3, size // 2)
                    assert part.shape == expected.shape
                    assert torch.equal(part[...], expected.to(wider)), (name, dim)


def test_a_part_reads_no_more_than_its_rows(tmp_path: Path) -> None:
    save_file({"matrix": torch.zeros(4000, 1000)}, tmp_path / "weights.safetensors")
    with WeightReader([tmp_path / "weights.safetensors"]) as reader:
        _ = reader.tensors["matrix"].narrow(0, 1000, 500)[...]
        assert reader.num_bytes_read == 500 * 1000 * 4


def test_memory_is_given_back_by_each_tensor() -> None:
    """Though they share pages: what is freed leaves the process, what is left keeps its values."""

    def resident() -> int:
        return psutil.Process().memory_info().rss

    memory = WeightMemory()
    before = resident()
    tensors = [memory.empty((700, 1000), torch.float32).fill_(index) for index in range(40)]
    grown = resident() - before
    assert grown > 90 << 20
    kept = tensors[::4]
    del tensors
    assert resident() - before < grown / 2
    assert [float(tensor.mean()) for tensor in kept] == [4.0 * index for index in range(10)]
    part = kept[3][5]
    del kept, memory
    assert part.sum() == 12000
    assert memory_of(part) % 64 == 0


def memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_matrices_are_shown_where_they_lie(tmp_path: Path) -> None:
    """Equal to what is read; writable without a change to the file; given back when they go; settled, no tensor needs
    the file, and what was shared is shared again."""
    generator = torch.Generator().manual_seed(0)
    stored = {
        "large": torch.randn(4000, 1000, generator=generator),
        "half": torch.randn(1000, 2000, generator=generator).bfloat16(),
        "small": torch.randn(10, 10, generator=generator),
        "vector": torch.randn(1_000_000, generator=generator),
    }
    path = tmp_path / "weights.safetensors"
    save_file(stored, path)
    whole = path.read_bytes()
    mapped = MappedFiles()
    with WeightReader([path], mapped=mapped) as reader:
        found = {name: tensor[...] for name, tensor in reader.tensors.items()}
        part = reader.tensors["large"].narrow(0, 1000, 2000)[...]
        columns = reader.tensors["large"].narrow(1, 10, 20)[...]
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    assert torch.equal(part, stored["large"][1000:3000]) and torch.equal(columns, stored["large"][:, 10:30])
    before = psutil.Process().memory_info().rss
    del part
    found["large"] += 1
    assert path.read_bytes() == whole
    model = torch.nn.Module()
    model.first = torch.nn.Parameter(found["large"], requires_grad=False)
    model.second = torch.nn.Parameter(found["large"], requires_grad=False)
    model.register_buffer("third", found["half"])
    mapped.settle(model)
    assert model.first.data_ptr() == model.second.data_ptr()
    del mapped, reader, found
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert psutil.Process().memory_info().rss < before + (8 << 20)
    assert torch.equal(model.first, stored["large"] + 1) and torch.equal(model.third, stored["half"])


def test_a_mapped_file_that_was_cut_is_named_with_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"large": torch.zeros(1000, 1000)}, path)
    with WeightReader([path], mapped=MappedFiles()) as reader:
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(ModelLoadError, match=r"weights\.safetensors is damaged: tensor large: the file ends"):
            reader.tensors["large"][...]


@pytest.mark.parametrize("options", [{}, {"quantize": "eetq"}, {"batch_invariant": True}])
def test_a_model_in_memory_needs_its_files_no_more(tmp_path: Path, options: dict[str, object]) -> None:
    """All that was mapped is packed, quantized or copied."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "tie_word_embeddings": False}
    folder = save_checkpoint(tmp_path / "model", **sizes)
    config = ModelConfig(str(folder), dtype="float32", num_threads=1, **options)  # type: ignore[arg-type]
    loaded = load_model(config, SdpaBackend(), load_kernels(1))
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    embedding = loaded.model.get_input_embeddings().weight  # type: ignore[operator]
    assert torch.equal(embedding, load_file(folder / "model.safetensors")["model.embed_tokens.weight"])


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_cut_file_is_named_with_its_tensor(llama: Path, tmp_path: Path) -> None:
    """Whether it was cut before the load or in the midst of it."""
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    with WeightReader([path]) as reader:
        last = max(reader.tensors.values(), key=lambda tensor: tensor.offset)
        path.write_bytes(whole[:-10])
        with pytest.raises(ModelLoadError, match=rf"model\.safetensors is damaged: tensor {last.name}: the file ends"):
            last[...]
    with pytest.raises(ModelLoadError, match=rf"model\.safetensors is damaged: it ends .*within tensor {last.name}"):
        load(folder)
    path.write_bytes(whole + b"more")
    with pytest.raises(ModelLoadError, match="4 bytes behind its last tensor"):
        load(folder)


def test_a_header_that_contradicts_itself_names_the_tensor(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"shape":[64,96]', b'"shape":[63,96]', 1))
    with pytest.raises(ModelLoadError, match=r"tensor model\.layers\.\S+ of shape \[63, 96\] has 24576 bytes"):
        load(folder)
    path.write_bytes(whole.replace(b'"dtype":"F32"', b'"dtype":"F99"', 1))
    with pytest.raises(ModelLoadError, match="is of type F99, which cannot be served"):
        load(folder)


def test_pickles_are_refused_unless_trusted(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin is a pickle.*TRUST_REMOTE_CODE=true"):
        load(folder)
    assert_same_model(load(folder, trust_remote_code=True), load(llama))


# ---- where a checkpoint may lie --------------------------------------------------------------------------------------


def assert_same_model(found: LoadedModel, expected: LoadedModel) -> None:
    wanted, given = tensors_of(expected.model), tensors_of(found.model)
    assert wanted.keys() == given.keys() and all(torch.equal(wanted[name], given[name]) for name in wanted)
    assert found.tokenizer.get_vocab() == expected.tokenizer.get_vocab()


def test_shards_with_an_index(llama: Path, tmp_path: Path) -> None:
    """Only what the index names is read; a shard that is missing is named."""
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    make_tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    save_file({"stray": torch.ones(1)}, tmp_path / "stray.safetensors")
    assert_same_model(load(tmp_path), load(llama))
    shards[1].unlink()
    with pytest.raises(ModelLoadError, match=f"lacks 1 of {len(shards)} weight files: {shards[1].name}"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weights": []}))
    with pytest.raises(ModelLoadError, match="is no index of weights"):
        load(tmp_path)


def test_a_folder_laid_out_like_the_hubs_cache(llama: Path, tmp_path: Path) -> None:
    for commit in ("aaaa", "bbbb"):
        shutil.copytree(llama, tmp_path / "snapshots" / commit)
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("aaaa\n")
    for revision, commit in ((None, "aaaa"), ("main", "aaaa"), ("bbbb", "bbbb")):
        assert find_checkpoint(str(tmp_path), revision=revision).folder == tmp_path / "snapshots" / commit
    with pytest.raises(ModelLoadError, match=r"REVISION=cccc is not in .*; it holds aaaa, bbbb"):
        find_checkpoint(str(tmp_path), revision="cccc")
    with pytest.raises(ModelLoadError, match=r"REVISION=cccc: the folder .* has no snapshots"):
        find_checkpoint(str(llama), revision="cccc")


def test_a_gguf_file(llama: Path, tmp_path: Path) -> None:
    """Named itself or by its folder; with several in a folder, one has to be named."""
    write_gguf(llama, tmp_path / "tiny.gguf")
    make_tokenizer().save_pretrained(tmp_path)
    expected = tensors_of(load(llama).model)
    for model_id in (tmp_path, tmp_path / "tiny.gguf"):
        found = tensors_of(load(model_id, dtype="float32").model)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, msg=name)
    shutil.copy(tmp_path / "tiny.gguf", tmp_path / "other.gguf")
    with pytest.raises(ModelLoadError, match=r"several GGUF files \(other\.gguf, tiny\.gguf\)"):
        load(tmp_path)


def write_gguf(folder: Path, path: Path) -> None:
    """The llama of tiny.py as GGUF, float32."""
    import gguf

    config = AutoConfig.from_pretrained(folder)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_merges(["< 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:  # llama.cpp turns neighbouring pairs, transformers halves
                rows = tensor.view(count, 2, -1, tensor.shape[1])
                tensor = rows.transpose(1, 2).reshape(tensor.shape)
        stem = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(stem, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- memory ----------------------------------------------------------------------------------------------------------

_MEASURE = """
import json, logging, resource, sys
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
from textgen_engine.attention.sdpa import SdpaBackend
from textgen_engine.config import ModelConfig
from textgen_engine.models.loader import load_model
from transformers import LlamaForCausalLM
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model = load_model(ModelConfig("tests/large", revision="v1", num_threads=1), SdpaBackend()).model
tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values()
print(json.dumps({
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    "weights": sum(t.numel() * t.itemsize for t in tensors),
    "largest": max(t.numel() * t.itemsize for t in tensors),
}))
"""


def test_the_memory_of_a_load_is_that_of_the_weights(tmp_path: Path) -> None:
    """A checkpoint of several shards, found by its name and revision in a local cache of the hub, without network."""
    snapshot = tmp_path / "hub" / "models--tests--large" / "snapshots" / "0123"
    shutil.copytree(save_checkpoint(tmp_path / "small", hidden_size=1024, num_hidden_layers=1), snapshot)
    (snapshot / "model.safetensors").unlink()
    (tmp_path / "hub" / "models--tests--large" / "refs").mkdir()
    (tmp_path / "hub" / "models--tests--large" / "refs" / "v1").write_text("0123")
    config = json.loads((snapshot / "config.json").read_text())
    sizes = {"vocab_size": 16384, "intermediate_size": 4096, "num_hidden_layers": 5}
    (snapshot / "config.json").write_text(json.dumps(config | sizes))
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(snapshot))
    noise = (torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)) * 0.05).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in outline.state_dict().items():
        if sum(t.numel() for t in shards[-1].values()) > 20_000_000:
            shards.append({})
        values = noise.repeat(-(-tensor.numel() // len(noise)))[: tensor.numel()].view(tensor.shape)
        shards[-1][name] = values if len(shards) % 2 else values.float()  # which is mapped, not read
    assert len(shards) > 2
    index = {name: f"model-{i}.safetensors" for i, shard in enumerate(shards) for name in shard}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for i, shard in enumerate(shards):
        save_file(shard, snapshot / f"model-{i}.safetensors", metadata={"format": "pt"})
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ENGINE)}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout)
    assert measured["weights"] > 400 << 20, "stored in 16 bits as well as float32, loaded as float32"
    assert measured["peak"] <= measured["weights"] + 2 * measured["largest"] + (128 << 20)
    assert "weights: 0.3" in done.stderr, "what was read, and how fast, is logged"
