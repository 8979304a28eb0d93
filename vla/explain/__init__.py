"""Looking inside: where in pictures and words each predicted action looks, and how far that can be trusted."""

from vla.explain.episode import Look, play
from vla.explain.maps import Maps, recording
from vla.explain.memory import Memory

__all__ = ["Look", "Maps", "Memory", "play", "recording"]
