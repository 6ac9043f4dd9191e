"""The adapters of one engine: their names and slots, loading and unloading while it runs.

Lives on the engine's loop thread; only the reading of files has a thread of its own. A request holds its adapter by its
handle, so that unloading takes a name away at once and the slot when the last request that runs with it has ended.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import snapshot_download

from textgen_engine.adapters.peft_folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterError,
    AdapterWeights,
    LinearSizes,
    read_adapter,
)
from textgen_engine.adapters.spec import AdapterCommand, AdapterHandle, AdapterSpec, problem_of_name
from textgen_engine.config import LoraConfig
from textgen_engine.errors import EngineError, EngineFailure, InvalidParameter, ModelLoadError, Unsupported
from textgen_engine.request import GenerationRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Entry:
    spec: AdapterSpec
    handle: AdapterHandle
    rank: int
    num_layers: int
    num_bytes: int


class AdapterPlaces(Protocol):
    """Where adapters go: the layers of one model (see AdapterLayers), or of its parts on several ranks."""

    @property
    def sizes(self) -> Mapping[str, LinearSizes]: ...

    @property
    def head(self) -> str | None: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def base_weight(self, module: str) -> torch.Tensor | None: ...

    def put(self, slot: int, weights: AdapterWeights) -> None: ...

    def clear(self, slot: int) -> None: ...


class AdapterRegistry:
    """Called from the engine's loop thread alone."""

    def __init__(
        self, config: LoraConfig, layers: AdapterPlaces | None, on_read: Callable[[], None] = lambda: None
    ) -> None:
        """Load the adapters of the configuration. layers: None where it enables none. on_read: called from any thread
        when `take_done` may have more.

        Raises ModelLoadError for one that is required and cannot be loaded.
        """
        self._config = config
        self._layers = layers
        self._on_read = on_read
        self._entries: dict[str, _Entry] = {}
        self._leaving: list[_Entry] = []  # unloaded, and still in use
        self._free_slots = list(range(config.max_adapters - 1, -1, -1))
        self._num_loaded = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapter-reader")
        self._reading: dict[str, tuple[AdapterSpec, Future[AdapterWeights]]] = {}
        self._answered: list[tuple[str, EngineError | None]] = []
        for spec in config.adapters:
            try:
                self._install(spec, self._read(spec))
            except (AdapterError, EngineError) as error:
                reason = error.message if isinstance(error, EngineError) else str(error)
                if spec.is_required:
                    raise ModelLoadError(f"cannot load the adapter {spec.name!r}: {reason}") from error
                logger.error("the adapter %r is lost: it cannot be loaded again: %s", spec.name, reason)

    @property
    def specs(self) -> tuple[AdapterSpec, ...]:
        """What an engine in this one's place would have to load."""
        return tuple(entry.spec for entry in self._entries.values())

    def find(self, name: str) -> AdapterHandle:
        """The adapter of this name, for a new request. Raises InvalidParameter that lists the names there are."""
        entry = self._entries.get(name)
        if entry is None:
            raise InvalidParameter(f"`adapter_id`: there is no adapter {name!r:.140}; {self._known()}")
        return entry.handle

    def submit(self, request: GenerationRequest) -> None:
        """Begin what the request's command asks. Raises InvalidParameter or Unsupported for what is not to be had."""
        command = request.adapter_command
        assert command is not None
        if command.action == "load":
            spec = self._spec_of(command)
            reading = self._reader.submit(self._read, spec)
            self._reading[request.request_id] = (spec, reading)
            reading.add_done_callback(lambda _: self._on_read())
        elif command.action == "unload":
            self._unload(command)
            self._answered.append((request.request_id, None))
        else:
            self._answered.append((request.request_id, None))

    def take_done(self) -> list[tuple[str, EngineError | None]]:
        """Requests whose command is carried out, or has failed."""
        done, self._answered = self._answered, []
        for request_id in [i for i, (_, reading) in self._reading.items() if reading.done()]:
            spec, reading = self._reading.pop(request_id)
            try:
                self._install(spec, reading.result())
                done.append((request_id, None))
            except AdapterError as error:
                done.append((request_id, InvalidParameter(f"cannot load the adapter {spec.name!r}: {error}")))
            except EngineError as error:
                done.append((request_id, error))
            except Exception as error:  # a library's fault ends this request alone
                logger.error("an adapter could not be read: %s", error, exc_info=error)
                done.append((request_id, EngineFailure(f"the adapter could not be read ({type(error).__name__})")))
        return done

    def withdraw(self, request_id: str) -> None:
        """The request ended while its adapter was read: it will not be loaded. Unknown: nothing."""
        found = self._reading.pop(request_id, None)
        if found is not None:
            found[1].cancel()

    def free_unused(self, used: Iterable[AdapterHandle | None]) -> None:
        """Empty the slots of unloaded adapters that are not among those in use."""
        if not self._leaving:
            return
        assert self._layers is not None
        still_used = set(used)
        for entry in [entry for entry in self._leaving if entry.handle not in still_used]:
            self._leaving.remove(entry)
            self._layers.clear(entry.handle.slot)
            self._free_slots.append(entry.handle.slot)
            self._free_slots.sort(reverse=True)

    def describe(self, used: Iterable[AdapterHandle | None]) -> str:
        """The answer to every command, as JSON: the adapters as they are now. used: those of the live requests."""
        counts: dict[AdapterHandle, int] = {}
        for handle in used:
            if handle is not None:
                counts[handle] = counts.get(handle, 0) + 1
        adapters = [
            {
                "name": entry.spec.name,
                "rank": entry.rank,
                "num_layers": entry.num_layers,
                "num_bytes": entry.num_bytes,
                "at_start": entry.spec.is_required,
                "live_requests": counts.get(entry.handle, 0),
                "unloading": entry in self._leaving,
            }
            for entry in (*self._entries.values(), *self._leaving)
        ]
        return json.dumps({"adapters": adapters}, ensure_ascii=False)

    def close(self) -> None:
        """End the reader's thread."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _spec_of(self, command: AdapterCommand) -> AdapterSpec:
        """What a `load` command names: a folder below the one that the server's option opens."""
        folder = self._folder()
        name = command.name or ""
        problem = problem_of_name(name)
        if problem:
            raise InvalidParameter(f"`adapter_command`: {problem}; given: {name!r:.140}")
        self._check_room(name)
        try:
            path = (folder / (command.path or name)).resolve()
            is_inside = path.is_relative_to(folder.resolve())
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidParameter(f"`adapter_command`: the path cannot be read: {error}") from None
        if not is_inside:
            raise InvalidParameter("`adapter_command`: the path leads out of the folder that the server allows")
        return AdapterSpec(name, str(path), is_required=False)

    def _unload(self, command: AdapterCommand) -> None:
        self._folder()
        entry = self._entries.pop(command.name or "", None)
        if entry is None:
            raise InvalidParameter(f"`adapter_command`: there is no adapter {command.name!r:.140}; {self._known()}")
        self._leaving.append(entry)
        logger.info("adapter %r unloaded", entry.spec.name)

    def _folder(self) -> Path:
        if self._config.folder is None:
            raise Unsupported(
                "adapters cannot be loaded or unloaded on this server (option `adapter_folder`: TEXTGEN_ADAPTER_FOLDER)"
            )
        return Path(self._config.folder)

    def _check_room(self, name: str) -> None:
        if name in self._entries:
            raise InvalidParameter(f"the adapter {name!r} is loaded already; unload it first")
        if not self._free_slots:
            leaving = f", of which {len(self._leaving)} end with their last request" if self._leaving else ""
            raise InvalidParameter(
                f"{self._config.max_adapters} adapters are loaded{leaving}: no more are allowed (TEXTGEN_MAX_LORAS)"
            )

    def _known(self) -> str:
        return f"loaded are: {', '.join(sorted(self._entries))}" if self._entries else "none is loaded"

    def _read(self, spec: AdapterSpec) -> AdapterWeights:
        layers = self._layers
        assert layers is not None
        return read_adapter(
            _folder_of(spec),
            layers.sizes,
            head=layers.head,
            max_rank=self._config.max_rank,
            dtype=layers.dtype,
            base_weight=layers.base_weight,
        )

    def _install(self, spec: AdapterSpec, weights: AdapterWeights) -> None:
        self._check_room(spec.name)  # again: another request may have been faster
        slot = self._free_slots[-1]
        assert self._layers is not None
        try:
            self._layers.put(slot, weights)
        except (MemoryError, RuntimeError, torch.OutOfMemoryError) as error:
            raise EngineFailure(f"no memory for the adapter {spec.name!r}: {error}") from error
        self._free_slots.pop()
        self._num_loaded += 1
        handle = AdapterHandle(spec.name, slot, self._num_loaded)
        self._entries[spec.name] = _Entry(spec, handle, weights.rank, len(weights.layers), weights.num_bytes)
        logger.info("adapter %r loaded: rank %d, %d layers", spec.name, weights.rank, len(weights.layers))


def _folder_of(spec: AdapterSpec) -> Path:
    """Where the adapter's files are: the folder named, or a repository of the hub (its cache, when offline)."""
    folder = Path(spec.path or spec.name)
    if spec.path is not None or folder.is_dir():
        return folder
    try:
        found = snapshot_download(spec.name, revision=spec.revision, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME])
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(f"{spec.name} is no folder, and no repository that can be had: {reason}") from error
    return Path(found)
