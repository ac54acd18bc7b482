"""Breast cancer detection on histopathology, on Ray: `bcd.load(uri)` opens a model bundle."""

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import `load` on first use: torch takes seconds."""
    if name == "load":
        from bcd.model.predictor import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
