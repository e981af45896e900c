"""The report of one compression: frozen data first, then the same in words, tables and pictures."""

from .data import Epoch, Latency, Point, Replacement, Report, Spread, Stage, from_dict, to_dict
from .frontiers import picture
from .page import html
from .summary import headline
from .terminal import text

__all__ = [
    "Epoch", "Latency", "Point", "Replacement", "Report", "Spread", "Stage", "from_dict", "headline", "html", "picture", "text", "to_dict",
]  # fmt: skip
