"""LoRA adapters over several ranks: in mixed batches, loaded at start and while the engine runs, as on one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from textgen_engine.adapters.spec import AdapterSpec
from textgen_engine.config import LoraConfig
from textgen_engine.request import GenerationRequest

from ..adapters.folders import linear_sizes, save_adapter
from ..adapters.test_registry import command
from ..test_engine_equalities import ids_of, prompts_of
from ..tiny import Harness, make_config, make_request, save_checkpoint
from .threads import RankThreads

NAMES = ("everything", "mlp", None)
PROMPTS = prompts_of([5, 1, 33, 64, 17, 90])


def requests(prefix: str) -> list[GenerationRequest]:
    return [make_request(f"{prefix}{row}", prompt, 10, adapter_id=NAMES[row % 3]) for row, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize(
    ("family", "world_size", "quantize"),
    [("llama", 2, None), ("llama", 4, None), ("gpt2", 2, None), ("phi3", 2, None), ("llama", 2, "bitsandbytes-nf4")],
)
def test_adapters_equal_those_of_one_rank(
    checkpoint: Callable[[str], Path], tmp_path: Path, family: str, world_size: int, quantize: str | None
) -> None:
    sizes_of_blocks = {"hidden_size": 128, "intermediate_size": 256}  # of 64 weights, on each of two ranks
    model = checkpoint(family) if quantize is None else save_checkpoint(tmp_path / "model", family, **sizes_of_blocks)
    sizes = linear_sizes(model)
    save_adapter(tmp_path / "everything", sizes, r"(?!.*embed).*", rank=3, seed=3, strength=0.9)
    inner = [name for name in sizes if "mlp" in name]
    save_adapter(tmp_path / "mlp", sizes, "|".join(inner).replace(".", r"\."), rank=12, seed=2)
    lora = LoraConfig((AdapterSpec("everything", str(tmp_path / "everything")),), str(tmp_path), 4, 64)
    found = []
    for num_ranks in (1, world_size):
        config = make_config(model, lora=lora, tokens_per_step=64, quantize=quantize)
        harness = Harness(config, RankThreads(config, num_ranks) if num_ranks > 1 else None)
        harness.run_alone(make_request("warm", PROMPTS[3], 3))  # the layers have run before one more adapter comes
        command(harness, "load", "mlp")
        found.append(ids_of(harness.run(requests("r"))))
        plain = ids_of(harness.run(make_request(f"p{row}", prompt, 10) for row, prompt in enumerate(PROMPTS)))
        assert [a == b for a, b in zip(found[-1], plain, strict=True)] == [False, False, True] * 2
        harness.close()
    assert found[0] == found[1]
