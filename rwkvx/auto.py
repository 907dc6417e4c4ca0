"""Makes transformers' Auto classes know this package, at no cost until they are imported."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

AUTO_MODULES = tuple(
    f"transformers.models.auto.{name}_auto"
    for name in ("configuration", "modeling", "tokenization")
)


class _AfterAutoModules:
    """Finds transformers' modules where they are, and imports our adapter after the Auto ones.

    Modules of transformers import one another, in circles too: "after" is when the outermost of
    those that are running has run.
    """

    def __init__(self) -> None:
        self.running = 0

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            self.running += 1
            try:
                run(module)
            finally:
                self.running -= 1
            if not self.running and self in sys.meta_path and _auto_modules_are_there():
                sys.meta_path.remove(self)
                import_module("rwkvx.hf")

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _auto_modules_are_there() -> bool:
    return any(name in sys.modules for name in AUTO_MODULES)


def register_when_used() -> None:
    """Import `rwkvx.hf`, which registers its classes: now, or after transformers' Auto modules."""
    if _auto_modules_are_there():
        import_module("rwkvx.hf")
    else:
        sys.meta_path.insert(0, _AfterAutoModules())
