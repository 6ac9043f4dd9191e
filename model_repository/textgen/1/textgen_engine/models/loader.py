"""Load a checkpoint once, as transformers' own class with our attention, and find out what it needs of the cache."""

from __future__ import annotations

import functools
import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import is_accelerate_available

from textgen_engine.attention import bridge
from textgen_engine.attention.base import AttentionBackend
from textgen_engine.attention.flash import FlashBackend
from textgen_engine.config import ModelConfig
from textgen_engine.errors import ModelLoadError
from textgen_engine.host_memory import available_bytes, return_freed
from textgen_engine.kernels.cpu import CpuKernels
from textgen_engine.kv_cache import LayerShape
from textgen_engine.mapped_memory import MappedFiles
from textgen_engine.models.checkpoint import Checkpoint, find_checkpoint
from textgen_engine.models.cpu_linear import replace_linears
from textgen_engine.models.dense import DENSE_LAYERS, DenseFallback
from textgen_engine.models.dense import MAX_POSITIONS as DENSE_POSITIONS
from textgen_engine.models.experts import replace_experts
from textgen_engine.models.families import PREPARATIONS
from textgen_engine.models.fusion import Fusion, call_separately, fuse_layers
from textgen_engine.models.gpu_layers import fuse_gpu_layers, triton_kernels
from textgen_engine.models.quantization.hooks import QuantizationHooks, checkpoint_settings, choose_method
from textgen_engine.models.quantization.linear import IntegerLinear, QuantizedLinear
from textgen_engine.models.sharded_reading import PartHooks
from textgen_engine.models.sharding import Plan, connect_ranks, keep_biases_of_rank_0, make_plan
from textgen_engine.models.trial import check_results, gives_wanted_rows, probe_layers, stock_logits
from textgen_engine.models.weights import WeightHooks, WeightReader, as_quantizer, stored_shapes, stored_tensors
from textgen_engine.parallel.group import Collectives
from textgen_engine.parallel.split import CannotSplit, Shard

logger = logging.getLogger(__name__)

# What transformers raises for a checkpoint it cannot make sense of.
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)
# What the refusal of a model ends with.
DENSE_HINT = "TEXTGEN_DENSE_FALLBACK=true would serve it, slowly"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and the facts the engine needs of it.

    layers: what each attention layer caches. max_positions: the longest sequence the architecture allows.
    eos_token_ids: every id that ends a text. takes_logits_rows: the model's forward accepts logits_to_keep.
    window: the widest of the layers' sliding windows, where all have one.
    plan: set where the model is one rank's part; `connect` has then to be called before the first step. tokenizer: None
    on ranks other than 0. reads_masks: False where every layer knows its mask already (models/gpu_layers.py).
    kernels: the CPU's, where there are any. leaves_out_rows: the last layer computes AttentionMetadata's
    wanted_rows alone, where there are any, and all that is behind it gets no more.
    """

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    layers: list[LayerShape]
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    max_positions: int
    eos_token_ids: frozenset[int]
    takes_logits_rows: bool
    window: int | None = None
    plan: Plan | None = None
    reads_masks: bool = True
    kernels: CpuKernels | None = None
    leaves_out_rows: bool = False

    def connect(self, collectives: Collectives) -> None:
        """Join this rank's part with the others'; every rank does so once."""
        assert self.plan is not None
        connect_ranks(self.model, self.plan, collectives)


def load_model(
    config: ModelConfig,
    backend: AttentionBackend,
    kernels: CpuKernels | None = None,
    shard: Shard | None = None,
    *,
    fused: bool = True,
) -> LoadedModel:
    """Load weights, tokenizer and generation defaults of config.model_id (see find_checkpoint).

    shard: only the part of this rank, which `LoadedModel.connect` then joins with the others'.
    fused: layers may be replaced by ones whose pieces run together, and whose linear layers are joined.

    Raises ModelLoadError, with one line that says what is wrong, for a folder that is missing or no checkpoint, for
    damaged weights, for a model that does not fit into memory, and for one that our attention cannot serve.
    """
    checkpoint = find_checkpoint(config.model_id, revision=config.revision, trust_remote_code=config.trust_remote_code)
    folder = checkpoint.folder
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = torch.device(config.device)
    try:
        hf_config = AutoConfig.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code, **_gguf_keyword(checkpoint)
        )
        dtype = _choose_dtype(config, hf_config)
        preparation = PREPARATIONS.get(hf_config.model_type)
        stock_attention = "eager" if preparation is None else preparation.stock_attention
        quantization = _quantization(config, checkpoint, hf_config, kernels)
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(
                hf_config, dtype=dtype, trust_remote_code=config.trust_remote_code
            )
        if shard is not None and preparation is not None and not preparation.can_be_split:
            raise CannotSplit("its attention is prepared for one process (models/families)")
        plan = None if shard is None else make_plan(outline, shard)
        hooks = quantization if plan is None else PartHooks(plan, outline, quantization)
        _check_memory(folder, outline, dtype, device, hooks, quantization)
        mapped = MappedFiles() if device.type == "cpu" else None
        model, report = read_model(
            checkpoint,
            type(outline),
            hf_config,
            dtype,
            device,
            trust_remote_code=config.trust_remote_code,
            hooks=hooks,
            mapped=mapped,
        )
        if plan is not None:
            keep_biases_of_rank_0(model, plan)
        eos_token_ids = _named_eos_token_ids(folder, hf_config.get_text_config())
    except ModelLoadError:
        raise
    except CannotSplit as error:
        assert shard is not None
        raise ModelLoadError(
            f"{hf_config.model_type} of {folder} cannot be split over {shard.world_size} ranks: {error}"
        ) from error
    except _UNREADABLE as error:
        raise ModelLoadError(f"cannot load {folder}: {_one_line(error)}") from error
    if quantization is not None:
        quantization.check_shapes()
    _check_weights(folder, report)
    applied = [] if quantization is None else [quantization.finish(model, device)]
    if _is_tied(model):
        applied.append("LM head tied to the embedding")
    tokenizer = None
    if shard is None or shard.rank == 0:
        tokenizer = _load_tokenizer(checkpoint, config.trust_remote_code)
        if eos_token_ids is None:
            eos_token_ids = tokenizer.eos_token_id
    model = model.to(device).eval().requires_grad_(False)
    text_config = hf_config.get_text_config()
    takes_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
    # A rank's part is tried by itself: its partial results are as good a measure as whole ones.
    vocab_size = text_config.vocab_size if plan is None else plan.num_local_ids
    expected = stock_logits(model, vocab_size, device, stock_attention)
    reads_masks, leaves_out_rows = True, False
    max_positions = _max_positions(text_config) - (0 if preparation is None else preparation.skipped(text_config))
    try:
        if preparation is not None:
            preparation.prepare(model)
        needs = probe_layers(model, device, {"logits_to_keep": 1} if takes_rows else {})
        backend.check(needs.features)
        layers = [needs.shapes[layer] for layer in range(len(needs.shapes))]
        window = needs.window
        if config.dense_fallback and expected is not None:  # now, for what is fused below cannot be undone
            check_results(model, backend, layers, expected, dtype, rounds_activations=_rounds_activations(model))
    except ModelLoadError as error:
        if not config.dense_fallback:
            raise ModelLoadError(f"{error} ({DENSE_HINT})") from error
        if expected is None or shard is not None or config.batch_invariant or not fused:
            raise ModelLoadError(
                f"{error}; nor can it be computed densely with ranks, adapters or batch_invariant"
            ) from error
        logger.warning("SLOW: %s. Every token computes its whole text anew, without a KV cache.", error)
        model, layers, takes_rows, window = DenseFallback(model), DENSE_LAYERS, True, None
        applied.append("computed densely")
        max_positions = min(max_positions, DENSE_POSITIONS)
    else:
        if device.type == "cpu":
            fusion = Fusion()
            if fused and not config.batch_invariant:
                fusion = fuse_layers(model, kernels, needs.scorings, is_part=plan is not None)
                applied.append(str(fusion))
            applied += _prepare_for_cpu(model, config, kernels, fused=fused)
        elif fused and shard is None and isinstance(backend, FlashBackend):
            num_fused = fuse_gpu_layers(model, backend, triton_kernels(), needs.scorings)
            applied.append(f"{num_fused} layers of kernels in Triton's language")
            reads_masks = num_fused < len(layers)
        if expected is not None:
            check = functools.partial(check_results, rounds_activations=_rounds_activations(model))
            try:
                check(model, backend, layers, expected, dtype)
            except ModelLoadError:
                if device.type != "cpu" or not call_separately(model, kernels):
                    raise
                fusion.all_together = False
                check(model, backend, layers, expected, dtype)
            if device.type == "cpu" and fusion.all_together and takes_rows:
                leaves_out_rows = gives_wanted_rows(model, backend, layers, expected, dtype)
        elif device.type == "cpu":
            call_separately(model, kernels)  # for nothing shows whether the model hands on what a layer gives
    if mapped is not None:
        mapped.settle(model)
    return_freed()
    if window is not None:
        applied.append(f"KV blocks released behind a window of {window}")
    where = f"attention by {type(backend).__name__}, {str(dtype).removeprefix('torch.')} on {device}"
    logger.info("%s loaded: %s", type(outline).__name__, "; ".join([*applied, where]))
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        layers=layers,
        dtype=dtype,
        device=device,
        vocab_size=text_config.vocab_size,
        max_positions=max_positions,
        eos_token_ids=_as_set(eos_token_ids),
        takes_logits_rows=takes_rows,
        window=window,
        plan=plan,
        reads_masks=reads_masks,
        kernels=kernels,
        leaves_out_rows=leaves_out_rows,
    )


def read_model(
    checkpoint: Checkpoint,
    model_class: Any,
    hf_config: Any,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
    hooks: WeightHooks | None = None,
    mapped: MappedFiles | None = None,
) -> tuple[torch.nn.Module, Any]:
    """transformers' model with its weights on the device, and its report on what was missing. Its attention is ours,
    or transformers' own where models/families has yet to prepare it.

    hooks: what may change the model and its weights on their way in; for safetensors only. mapped: see WeightReader.
    """
    bridge.register()
    preparation = PREPARATIONS.get(hf_config.model_type)
    keywords: dict[str, Any] = {
        "config": hf_config,
        "dtype": dtype,
        "attn_implementation": bridge.ATTENTION_NAME if preparation is None else preparation.stock_attention,
        "ignore_mismatched_sizes": True,  # they are reported, and refused by the caller with their names
        "output_loading_info": True,
    }
    if device.type != "cpu" and is_accelerate_available():  # without it weights take the way through host memory
        keywords["device_map"] = {"": device}
    if not checkpoint.shards or getattr(hf_config, "quantization_config", None) is not None:
        if hooks is not None:
            raise CannotSplit("its weights are quantized, or are no safetensors files")
        logger.info("%s: read by transformers, not tensor by tensor", checkpoint.folder)
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            use_safetensors=bool(checkpoint.shards),
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            **keywords,
            **_gguf_keyword(checkpoint),
        )
        return model, report
    hooks = hooks or WeightHooks()
    reader = WeightReader(list(checkpoint.shards), widen=dtype, mapped=mapped)
    with reader, as_quantizer(hooks) as quantization_config:
        model, report = model_class.from_pretrained(
            None, state_dict=stored_tensors(reader, hooks), quantization_config=quantization_config, **keywords
        )
        hooks.complete(model, device)
    return model, report


def _quantization(
    config: ModelConfig, checkpoint: Checkpoint, hf_config: Any, kernels: CpuKernels | None
) -> QuantizationHooks | None:
    """What quantizes this load; takes the checkpoint's own settings, if they are ours to follow, out of hf_config."""
    if not checkpoint.shards:
        if config.quantize is not None:
            raise ModelLoadError(
                f"QUANTIZE={config.quantize} is for safetensors; {checkpoint.folder} is "
                f"{'GGUF' if checkpoint.gguf else 'a pickle'}"
            )
        return None
    settings = checkpoint_settings(checkpoint.folder, hf_config)
    stored = stored_shapes(list(checkpoint.shards))
    method = choose_method(config.quantize, settings, stored)
    if method is None:
        return None
    if settings is not None and hasattr(hf_config, "quantization_config"):
        del hf_config.quantization_config
    return QuantizationHooks(method, kernels, settings, stored)


def _gguf_keyword(checkpoint: Checkpoint) -> dict[str, str]:
    return {} if checkpoint.gguf is None else {"gguf_file": checkpoint.gguf}


def _load_tokenizer(checkpoint: Checkpoint, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    folder = checkpoint.folder
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder,
            trust_remote_code=trust_remote_code,
            **({} if any(folder.glob("tokenizer*")) else _gguf_keyword(checkpoint)),
        )
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ModelLoadError(f"cannot load the tokenizer of {folder}: {_one_line(error)}") from error
    return tokenizer


def _choose_dtype(config: ModelConfig, hf_config: Any) -> torch.dtype:
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype
    # 16-bit arithmetic is three times slower than float32 on CPUs without bf16 units.
    if config.device == "cpu":
        return torch.float32
    return hf_config.get_text_config().dtype or hf_config.dtype or torch.bfloat16


def _check_memory(
    folder: Path,
    outline: torch.nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    hooks: WeightHooks | None,
    quantization: QuantizationHooks | None,
) -> None:
    """Refuse a model that does not fit before anything of it is allocated.

    The size is that of the model the config describes, not of the files: a config that does not belong to its weights
    may describe a far larger one.
    """
    names = {name for name, _ in outline.named_parameters()}  # tied ones once
    if hooks is not None:
        hooks.prepare(outline)  # it has served its purpose
    kept = (parameter for name, parameter in outline.named_parameters(remove_duplicate=False) if name in names)
    needed: float = dtype.itemsize * sum(parameter.numel() for parameter in kept)
    if quantization is not None:
        needed += quantization.num_quantized * quantization.method.bytes_per_weight
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    if needed > free:
        raise ModelLoadError(
            f"not enough memory: the model of {folder} needs {needed / 2**30:.1f} GiB as {dtype}, "
            f"{free / 2**30:.1f} GiB are free"
        )


def _check_weights(folder: Path, report: Any) -> None:
    """Refuse a checkpoint that lacks weights: transformers would make them up, and the model would talk nonsense."""
    mismatched = [
        f"{name} ({_shape(given)} in the checkpoint, {_shape(wanted)} in the model)"
        for name, given, wanted in sorted(report["mismatched_keys"])
    ]
    for problem, names in (("lacks", sorted(report["missing_keys"])), ("has weights of another shape:", mismatched)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelLoadError(f"{folder} {problem} {names[0]}{more}: incomplete, or config.json is another model's")


def _shape(size: Any) -> str:
    return "x".join(str(length) for length in size)


def _max_positions(text_config: Any) -> int:
    """The longest sequence the architecture allows.

    Some rotary embeddings (dynamic, longrope) depend on the longest sequence in the step once it exceeds the length
    of pretraining: neighbours would change one another's tokens, and cached keys would no longer fit. Up to that
    length they do not, so it is the limit.
    """
    limit = int(getattr(text_config, "max_position_embeddings", None) or 1 << 30)
    rope = getattr(text_config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):  # one record, or one per type of layer
        if isinstance(parameters, dict) and parameters.get("rope_type") in ("dynamic", "longrope"):
            pretrained = parameters.get("original_max_position_embeddings") or limit
            if pretrained < limit:
                logger.warning("%s rotary embedding: %d positions of %d", parameters["rope_type"], pretrained, limit)
                limit = pretrained
    return limit


def _named_eos_token_ids(folder: Path, text_config: Any) -> Any:
    """What generation_config, else config, names as the end: an id, a list of ids, or None."""
    named = None
    if (folder / "generation_config.json").is_file():
        named = GenerationConfig.from_pretrained(folder).eos_token_id
    return getattr(text_config, "eos_token_id", None) if named is None else named


def _as_set(ids: Any) -> frozenset[int]:
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])


def _prepare_for_cpu(
    model: torch.nn.Module, config: ModelConfig, kernels: CpuKernels | None, *, fused: bool
) -> list[str]:
    """What was done, for the log."""
    done = []
    if fused and not config.batch_invariant:
        num_experts = replace_experts(model, kernels)
        if num_experts:
            done.append(f"experts of {num_experts} layers by compiled grouped products")
    num_replaced = replace_linears(model, kernels, batch_invariant=config.batch_invariant)
    form = "batch-invariant tiles" if config.batch_invariant else "turned products" if kernels is None else "kernels"
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.pack()
    if num_replaced:
        done.append(f"{num_replaced} linear layers by {form if kernels is None else f'compiled {form}'}")
    return done


def _is_tied(model: Any) -> bool:
    try:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return False
    weight = getattr(head, "weight", None)
    return weight is not None and weight is getattr(embedding, "weight", None)


def _rounds_activations(model: torch.nn.Module) -> bool:
    return any(isinstance(module, IntegerLinear) for module in model.modules())


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
