"""Models that need more than transformers' attention interface to be served: how each is prepared.

A preparation changes one model, never a class of transformers: it puts a step's metadata where the model's attention
modules find it (step.py) and gives some modules a forward of their own. models/trial.py then compares what comes out
with what the model computed before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from textgen_engine.models.families import alibi, falcon, inner_attention, llama4, positions


@dataclass(frozen=True)
class Preparation:
    """prepare: makes one model ready. stock_attention: which of transformers' implementations the model is loaded with,
    and compared with. skipped: positions before a text's first token. can_be_split: it may be one rank's part, too.
    """

    prepare: Callable[[Any], None]
    stock_attention: str = "eager"
    skipped: Callable[[Any], int] = lambda config: 0
    can_be_split: bool = False


_BART = ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus", "plbart")
_ROBERTA = ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl")
# model_type of a configuration -> what a model of that type needs.
PREPARATIONS: dict[str, Preparation] = {
    "bloom": Preparation(alibi.prepare_bloom, can_be_split=True),
    "mpt": Preparation(alibi.prepare_mpt, can_be_split=True),
    "falcon": Preparation(falcon.prepare, "sdpa", can_be_split=True),  # its eager form adds the linear biases twice
    "gptj": Preparation(inner_attention.prepare, can_be_split=True),
    "codegen": Preparation(inner_attention.prepare, can_be_split=True),
    "gpt_neo": Preparation(inner_attention.prepare_gpt_neo),
    "gpt_neox_japanese": Preparation(inner_attention.prepare),
    "llama4": Preparation(llama4.prepare),
    "llama4_text": Preparation(llama4.prepare),
    **dict.fromkeys(_BART, Preparation(positions.prepare_decoder)),
    **dict.fromkeys(_ROBERTA, Preparation(positions.prepare_after_padding, skipped=positions.first_position)),
}
