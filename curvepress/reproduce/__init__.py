"""The published systems as named commands: a preset of each, run by the stages of curvepress, with work of its own where it differs."""

from .preset import Preset
from .running import SYSTEMS, Asked, reproduce

__all__ = ["SYSTEMS", "Asked", "Preset", "reproduce"]
