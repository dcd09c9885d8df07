# For `.ci/known_types.py`, which explains it.
from typing import Any

def __getattr__(name: str) -> Any: ...
