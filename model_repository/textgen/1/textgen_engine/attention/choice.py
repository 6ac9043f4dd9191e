"""Which attention serves which layers on a GPU: for chunks of prompts, and for decodes.

A pure function of what the layers need and what is installed; the reasons against each candidate go into one log line.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from textgen_engine.attention.libraries import Need, VarlenLibrary

# The option's name of our kernel for decodes, and of PyTorch's operations for all.
PAGED_KERNEL, PLAIN = "paged", "sdpa"


@dataclass(frozen=True)
class Choice:
    """prefill, decode: what attends to chunks and to decodes; None: PyTorch's operations. paged_kernel: decodes run in
    kernels/paged_decode.py. prefill_pages: chunks with a prefix are read from the cache in its place, not gathered."""

    prefill: VarlenLibrary | None
    decode: VarlenLibrary | None
    paged_kernel: bool
    prefill_pages: bool
    reasons: tuple[str, ...] = field(default=(), compare=False)

    @property
    def fits_graphs(self) -> bool:
        """Whether decodes can be captured: nothing of their launch depends on the step."""
        return self.paged_kernel or self.decode is not None

    def __str__(self) -> str:
        prefill = PLAIN if self.prefill is None else self.prefill.name + (" (paged)" if self.prefill_pages else "")
        decode = PAGED_KERNEL if self.paged_kernel else PLAIN if self.decode is None else f"{self.decode.name} (paged)"
        against = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        return f"attention: {prefill} for prompts, {decode} for decodes{against}"


def choose(
    need: Need, libraries: list[VarlenLibrary], *, has_kernel: bool, forced: str = "auto", absent: tuple[str, ...] = ()
) -> Choice:
    """The first library that can serve prompts; for decodes the first that reads the cache's blocks in place, then our
    kernel (has_kernel: Triton is there), then PyTorch's operations.

    forced: the name of a library, which is then the only one asked; PAGED_KERNEL: our kernel decodes whatever the
    libraries could; PLAIN: PyTorch's operations for all.
    """
    reasons = list(absent)
    if forced == PLAIN:
        return Choice(None, None, False, False, ("as the option says",))
    asked = libraries if forced in ("auto", PAGED_KERNEL) else [one for one in libraries if one.name == forced]
    prefill = decode = None
    prefill_pages = False
    for library in asked:
        lack = library.lacks(need)
        if lack is not None:
            reasons.append(f"{library.name}: {lack}")
            continue
        page_lack = library.lacks_pages(need)
        if prefill is None:
            prefill, prefill_pages = library, page_lack is None
        if page_lack is not None:
            reasons.append(f"{library.name} for decodes: {page_lack}")
        elif decode is None and forced != PAGED_KERNEL:
            decode = library
    kernel_lack = _kernel_lacks(need, has_kernel)
    if decode is None and kernel_lack is not None:
        reasons.append(f"{PAGED_KERNEL}: {kernel_lack}")
    return Choice(prefill, decode, decode is None and kernel_lack is None, prefill_pages, tuple(reasons))


def _kernel_lacks(need: Need, has_kernel: bool) -> str | None:
    if not has_kernel:
        return "Triton's language is not installed"
    if need.cache_dtype is torch.float8_e4m3fn and need.capability < (8, 9):
        return "no e4m3 cache below compute capability 8.9"
    if max(need.head_dim, need.value_dim) > 512:
        return f"no heads of {need.head_dim}"
    return None
