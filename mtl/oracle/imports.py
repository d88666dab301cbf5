"""Objects named in settings as ``package.module:name``."""

from __future__ import annotations

import importlib
from typing import Any

from mtl.errors import ConfigError


def load_object(key: str, path: str) -> Any:
    """The object at ``path``.

    Raises:
        ConfigError: naming the setting ``key`` and what could not be imported.
    """
    module, colon, name = path.partition(":")
    if not colon:
        raise ConfigError(f"{key} = {path!r}: write package.module:name")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key} = {path!r}: {error}") from None
