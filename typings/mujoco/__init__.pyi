"""MuJoCo's compiled modules carry no types: to pyright everything in them is Any."""

from typing import Any

def __getattr__(name: str) -> Any: ...
