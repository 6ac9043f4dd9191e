"""Imports transformers without PyTorch's compiler, which nobody here calls and which takes a second to import.

transformers' modules name `torch._dynamo` for three marks on functions, of use to nobody but that compiler, and for one
class in a file that needs nothing of the rest. While `without_compiler` lasts, a module of that name keeps the marks.
Afterwards the name is free again: whoever asks for `torch._dynamo` then, a checkpoint's own code with torch.compile,
say, gets the real one, which is told of the marks before its first use. So does who asks meanwhile for anything else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

_NAME = "torch._dynamo"
# The part that masking_utils takes a class of.
_PART = "_trace_wrapped_higher_order_op"
_Mark = tuple[str, Callable[..., Any]]  # a function of torch._dynamo, and what it is to be called with


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """For the imports of one thread. Does nothing where the compiler is there already."""
    import torch  # only here: without it nothing below is needed

    if _NAME in sys.modules:
        yield
        return
    standing_in = _StandIn(_NAME)
    standing_in.__path__ = [f"{path}/_dynamo" for path in torch.__path__]
    sys.modules[_NAME] = standing_in
    try:
        importlib.import_module(f"{_NAME}.{_PART}")
        del standing_in.__path__  # any other part needs the real package
        yield
    finally:
        standing_in.give_way()


class _StandIn(ModuleType):
    """Keeps the marks that it is asked for; asked for anything else, gives way to the real module."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.marks: list[_Mark] = []

    def allow_in_graph(self, function: Any) -> Any:
        return self._kept("allow_in_graph", function)

    def assume_constant_result(self, function: Any) -> Any:
        return self._kept("assume_constant_result", function)

    def disable(self, function: Any = None, *arguments: Any, **keywords: Any) -> Any:
        """Until there is a compiler, the function itself."""
        if function is None:
            return lambda function: self.disable(function, *arguments, **keywords)
        if not isinstance(function, FunctionType):
            return self._real().disable(function, *arguments, **keywords)
        return _disabled_later(function, lambda: sys.modules[_NAME].disable(function, *arguments, **keywords))

    def _kept(self, name: str, function: Any) -> Any:
        if not isinstance(function, FunctionType):
            return getattr(self._real(), name)(function)
        self.marks.append((name, function))
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # what the import system looks for in any module
            raise AttributeError(name)
        return getattr(self._real(), name)

    def _real(self) -> ModuleType:
        self.give_way()
        return importlib.import_module(_NAME)

    def give_way(self) -> None:
        if sys.modules.get(_NAME) is self:
            del sys.modules[_NAME]
            sys.meta_path.insert(0, _Finder(self.marks))


def _disabled_later(function: FunctionType, disable: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    disabled = functools.cache(disable)

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        compiler = sys.modules.get(_NAME)
        if compiler is None or isinstance(compiler, _StandIn):
            return function(*args, **keywords)
        return disabled()(*args, **keywords)

    return call


class _Finder:
    """Finds the real module, once, and has it take over the marks as soon as it is there."""

    def __init__(self, marks: list[_Mark]) -> None:
        self._marks = marks

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)  # by those that remain, which may be one more of these
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_mark(module: ModuleType) -> None:
            execute(module)
            setattr(module, _PART, sys.modules[f"{_NAME}.{_PART}"])  # as if it had been imported from there
            for mark, function in self._marks:
                getattr(module, mark)(function)

        spec.loader.exec_module = execute_and_mark  # type: ignore[method-assign]
        return spec
