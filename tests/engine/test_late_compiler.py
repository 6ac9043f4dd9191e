"""late_compiler.py: imports without PyTorch's compiler, and the compiler as it should be for whoever wants it later.

Each in a fresh interpreter, which has imported nothing yet.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import textgen_engine

_PATH = Path(textgen_engine.__file__).resolve().parents[1]


def _run(script: str) -> str:
    environment = {"PYTHONPATH": str(_PATH), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_engine_is_imported_without_the_compiler_and_leaves_no_trace() -> None:
    """So is a model's class; whoever wants the compiler then gets the real one, told of transformers' marks."""
    script = """
import sys
from textgen_engine.late_compiler import without_compiler
with without_compiler():
    from textgen_engine.engine import Engine
with without_compiler():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    with torch.device("meta"):
        LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
assert "torch._dynamo" not in sys.modules and "torch._inductor" not in sys.modules
import transformers.masking_utils, transformers.modeling_utils
assert torch._dynamo.__file__.endswith("_dynamo/__init__.py")
assert torch._dynamo._trace_wrapped_higher_order_op.TransformGetItemToIndex is (
    transformers.masking_utils.TransformGetItemToIndex)
assert not [finder for finder in sys.meta_path if "late_compiler" in type(finder).__module__]
"""
    _run(script)


def test_functions_marked_meanwhile_are_to_the_compiler_what_they_were_marked_as() -> None:
    script = """
import sys, torch
from textgen_engine.late_compiler import without_compiler
def traced(x):
    calls.append(torch.compiler.is_compiling())
    return x + 1
calls = []
with without_compiler():
    disabled = torch.compiler.disable(traced)
    also_disabled = torch.compiler.disable(reason="a test")(traced)
    @torch._dynamo.allow_in_graph
    def opaque(x):
        return x * len(str(id(x))) * 0 + x  # what the compiler cannot look into
    @torch.compiler.assume_constant_result
    def constant():
        return 3
assert disabled(torch.zeros(1)) == 1 and disabled.__name__ == "traced" and "torch._dynamo" not in sys.modules
graphs = []
def backend(graph, inputs):
    graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
    return graph.forward
@torch.compile(backend=backend)
def whole(x):
    return also_disabled(disabled(opaque(x * 2) + constant())) * 3
assert whole(torch.ones(1)) == 21
assert calls == [False] * 3, "disabled functions run, and are not compiled"
assert any(opaque in targets for targets in graphs), graphs
assert constant._dynamo_marked_constant
"""
    _run(script)


def test_who_asks_meanwhile_for_more_than_a_mark_gets_the_real_one() -> None:
    script = """
import sys, torch
from textgen_engine.late_compiler import without_compiler
with without_compiler():
    marked = torch._dynamo.assume_constant_result(lambda: 1)
    assert torch._dynamo.config.recompile_limit > 0
    real = sys.modules["torch._dynamo"]
    assert marked._dynamo_marked_constant
    import torch._dynamo.eval_frame
    with without_compiler():
        assert sys.modules["torch._dynamo"] is real
assert sys.modules["torch._dynamo"] is torch._dynamo is real and real.__spec__.name == "torch._dynamo"
assert not [finder for finder in sys.meta_path if "late_compiler" in type(finder).__module__]
"""
    _run(script)
