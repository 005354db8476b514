# SPDX-License-Identifier: Apache-2.0
"""``torchair``: graphs are compiled by a backend of torch.compile instead."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from typing import Any


class CompilerConfig:
    """Takes every setting of the real one, at any depth; none has an effect here."""

    def __getattr__(self, name: str) -> CompilerConfig:
        if name.startswith("__"):
            raise AttributeError(name)
        group = CompilerConfig()
        setattr(self, name, group)
        return group


def make(graph_backend: str) -> dict[str, types.ModuleType]:
    """The modules by name, each an attribute of its parent too."""

    def get_npu_backend(
        *, compiler_config: CompilerConfig | None = None, custom_decompositions: Any = None
    ) -> Callable[..., Any]:
        """A backend for torch.compile; the arguments have no effect."""
        import torch._dynamo  # not before it is needed: it is slow to import

        backend: Callable[..., Any] = torch._dynamo.lookup_backend(graph_backend)
        return backend

    contents: dict[str, dict[str, Any]] = {
        "torchair": {"get_npu_backend": get_npu_backend, "CompilerConfig": CompilerConfig},
        "torchair.configs": {},
        "torchair.configs.compiler_config": {"CompilerConfig": CompilerConfig},
        "torchair.core": {},
        "torchair.core.utils": {"logger": logging.getLogger("torchair")},
        "torchair.ge_concrete_graph": {},
        "torchair.ge_concrete_graph.ge_apis": {},
    }
    modules: dict[str, types.ModuleType] = {}
    for name, attributes in contents.items():
        module = modules[name] = types.ModuleType(name, __doc__)
        module.__path__ = []
        vars(module).update(attributes)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    return modules
