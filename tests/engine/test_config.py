"""`options.py` and `configure.py`: every option is read, bounded and explained, and nothing unknown passes."""

from __future__ import annotations

import re

import pytest

from textgen_engine.config import EngineConfig
from textgen_engine.configure import build_config
from textgen_engine.errors import ConfigError
from textgen_engine.options import OPTIONS, UNSUPPORTED_OPTIONS, Option

BY_NAME = {option.name: option for option in OPTIONS}


def build(parameters: dict[str, str] | None = None, **environ: str) -> EngineConfig:
    return build_config({"model_id": "/m", **(parameters or {})}, environ)


def bad_values(option: Option) -> list[str]:
    bad: list[str] = []
    if option.type is int:
        bad += ["x", "1.5", "1e3", "nan"]
    if option.type is float:
        bad += ["x", "nan", "inf", "-inf"]
    if option.type is bool:
        bad += ["maybe", "2"]
    if option.choices:
        bad += ["x"]
    if option.minimum is not None:
        bad += [str(option.type(option.minimum) - 1)]
    if option.maximum is not None:
        bad += [str(option.type(option.maximum) + 1)]
    return bad


@pytest.mark.parametrize(
    ("option", "value"),
    [pytest.param(o, value, id=f"{o.env}={value}") for o in OPTIONS for value in bad_values(o)],
)
def test_a_bad_value_is_refused_with_name_value_and_range(option: Option, value: str) -> None:
    expected = re.escape(f"{option.env} must be {option.allowed()}; given: {value!r}")
    with pytest.raises(ConfigError, match=f"^{expected}$"):
        build(**{option.env: value})
    if option.name != "model_id":
        with pytest.raises(ConfigError, match=f"^{expected}$"):
            build({option.name: value})


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.minimum is not None], ids=lambda o: o.name)
def test_bounds_are_inclusive(option: Option) -> None:
    assert option.minimum is not None
    assert option.read(str(option.type(option.minimum))) == option.minimum
    if option.maximum is not None:
        assert option.read(str(option.type(option.maximum))) == option.maximum


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: o.name)
def test_options_explain_themselves(option: Option) -> None:
    assert option.help and option.allowed()
    assert option.env == option.env.upper() and option.env.removeprefix("TEXTGEN_").lower() == option.name


def test_defaults_are_tgis() -> None:
    config = build()
    assert config.limits.max_concurrent_requests == 128
    assert (config.limits.max_best_of, config.limits.max_stop_sequences, config.limits.max_top_n_tokens) == (2, 4, 5)
    assert (config.watermark.gamma, config.watermark.delta) == (0.5, 2.0)
    assert config.limits.max_input_tokens is None and config.limits.max_total_tokens is None


def test_the_environment_wins_over_parameters() -> None:
    config = build({"max_concurrent_requests": "7", "max_best_of": "3"}, MAX_CONCURRENT_REQUESTS="9")
    assert config.limits.max_concurrent_requests == 9
    assert config.limits.max_best_of == 3


def test_an_empty_value_is_the_default() -> None:
    assert build({"max_best_of": ""}).limits.max_best_of == 2


def test_the_model_is_required() -> None:
    with pytest.raises(ConfigError, match="MODEL_ID is not set"):
        build_config({}, {})
    assert build_config({}, {"MODEL_ID": "/m"}).model.model_id == "/m"


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("TRUE", True), ("1", True), ("on", True), ("false", False), ("0", False)]
)
def test_booleans(text: str, value: bool) -> None:
    assert build(TRUST_REMOTE_CODE=text).model.trust_remote_code is value


def test_an_unknown_variable_of_ours_is_refused_and_others_are_none_of_our_business() -> None:
    with pytest.raises(ConfigError, match="TEXTGEN_BLOK_SIZE; did you mean TEXTGEN_BLOCK_SIZE"):
        build(TEXTGEN_BLOK_SIZE="16")
    with pytest.raises(ConfigError, match=r"TEXTGEN_QQQQQQ$"):
        build(TEXTGEN_QQQQQQ="1")
    build(PATH="/bin", MAX_HEADROOM="1")


def test_an_unknown_parameter_is_refused_and_those_of_triton_are_not() -> None:
    with pytest.raises(ConfigError, match=r"max_bestof.*did you mean max_best_of"):
        build({"max_bestof": "2"})
    build({"EXECUTION_ENV_PATH": "/env.tar.gz", "FORCE_CPU_ONLY_INPUT_TENSORS": "no"})


@pytest.mark.parametrize("name", UNSUPPORTED_OPTIONS)
def test_an_option_that_cannot_be_honoured_is_refused_unless_it_is_off(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name.upper()}=something is not supported"):
        build(**{name.upper(): "something"})
    with pytest.raises(ConfigError, match=f"{name.upper()}=something is not supported"):
        build({name: "something"})
    for harmless in UNSUPPORTED_OPTIONS[name]:
        build(**{name.upper(): harmless})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"MAX_INPUT_TOKENS": "100", "MAX_TOTAL_TOKENS": "100"}, r"MAX_INPUT_TOKENS \(100\).*MAX_TOTAL_TOKENS \(100\)"),
        ({"MAX_INPUT_TOKENS": "9", "MAX_INPUT_LENGTH": "9"}, "MAX_INPUT_LENGTH is the older name"),
        (
            {"MAX_TOTAL_TOKENS": "1000", "MAX_BATCH_TOTAL_TOKENS": "999"},
            r"MAX_BATCH_TOTAL_TOKENS \(999\).*MAX_TOTAL_TOKENS \(1000\)",
        ),
    ],
)
def test_combinations_that_cannot_work_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**environ)


def test_the_older_name_of_an_option_counts() -> None:
    assert build(MAX_INPUT_LENGTH="77").limits.max_input_tokens == 77


def test_the_cache_holds_at_least_the_tokens_asked_for() -> None:
    cache = build(MAX_BATCH_TOTAL_TOKENS="100", TEXTGEN_BLOCK_SIZE="16").cache
    assert cache.num_blocks == 7
    assert build().cache.num_blocks is None


def test_the_device_decides_what_follows_from_it() -> None:
    cpu, gpu = build_config({"model_id": "/m"}, {}), build_config({"model_id": "/m"}, {}, has_gpu=True)
    assert (cpu.model.device, gpu.model.device) == ("cpu", "cuda")
    assert cpu.scheduler.max_tokens_per_step < gpu.scheduler.max_tokens_per_step
    assert build(MAX_BATCH_PREFILL_TOKENS="33").scheduler.max_tokens_per_step == 33


def on_gpu(num_gpus: int = 1, **environ: str) -> EngineConfig:
    return build_config({"model_id": "/m"}, environ, has_gpu=True, num_gpus=num_gpus)


def test_steps_overlap_on_a_gpu_unless_something_waits_for_each() -> None:
    assert on_gpu().scheduler.overlap_steps
    assert not build().scheduler.overlap_steps
    assert build(TEXTGEN_OVERLAP_STEPS="true").scheduler.overlap_steps
    assert not on_gpu(TEXTGEN_OVERLAP_STEPS="false").scheduler.overlap_steps
    assert not on_gpu(SPECULATE="2").scheduler.overlap_steps
    assert not on_gpu(num_gpus=2).scheduler.overlap_steps
    for environ in ({"SPECULATE": "2"}, {"NUM_SHARD": "2"}):
        with pytest.raises(ConfigError, match="TEXTGEN_OVERLAP_STEPS needs NUM_SHARD=1 and SPECULATE=0"):
            on_gpu(num_gpus=2, TEXTGEN_OVERLAP_STEPS="true", **{"NUM_SHARD": "1", **environ})


def test_batch_sizes_of_graphs() -> None:
    assert build(CUDA_GRAPHS="1,2").model.graph_sizes == (), "there are none on the CPU"
    sizes = on_gpu(MAX_BATCH_SIZE="21").model.graph_sizes
    assert sizes == (1, 2, 4, 8, 16, 21), "the largest step fits exactly"
    assert on_gpu().model.graph_sizes[-1] == 256
    assert on_gpu(CUDA_GRAPHS="4, 1,999").model.graph_sizes == (1, 4), "none that no step can have"
    assert on_gpu(CUDA_GRAPHS="0").model.graph_sizes == ()
    for bad in ("x", "1,-2", "1;2"):
        with pytest.raises(ConfigError, match=r"^CUDA_GRAPHS must be batch sizes separated by commas, or 0; given: "):
            build(CUDA_GRAPHS=bad)
