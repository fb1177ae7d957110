"""Scenarios by name. Importing this package registers them."""

from . import isolation, lifetime, reuse
from .context import ONLY, REGISTRY, Context, Options

__all__ = ["ONLY", "REGISTRY", "Context", "Options", "isolation", "lifetime", "reuse"]
