"""What a published system is, as data: its settings with their sources, what its released code does otherwise, what it reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Correction:
    """What ``--corrected`` sets instead, and why the released code is not taken at its word."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Published:
    """A figure that its authors gave, and where it was read."""

    what: str
    value: str
    source: str


@dataclass(frozen=True)
class Preset:
    """A published system.

    Attributes:
        formula: what ranks its decisions, in the notation of the paper.
        settings: all that the system fixes, as its released code has it (where there is none, as the paper has it).
        sources: by setting, where it was read; every setting has one.
        corrections: by setting, what ``corrected`` sets instead.
        deviations: what is done otherwise here in any case.
        published: figures of the paper that could be read.
        unread: what could not be read, for which nothing is guessed.
    """

    name: str
    title: str
    paper: str
    formula: str
    settings: Mapping[str, Any]
    sources: Mapping[str, str]
    corrections: Mapping[str, Correction] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()
    published: tuple[Published, ...] = ()
    unread: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if set(self.settings) != set(self.sources) or not set(self.corrections) <= set(self.settings):
            raise ValueError(f"{self.name}: every setting needs a source, and corrections must be of settings; see {sorted(self.settings)}")

    def chosen(self, *, corrected: bool = False, **own: Any) -> dict[str, Any]:
        """The settings as released or corrected, with those of ``own`` that are not ``None``.

        Raises:
            ValueError: if ``own`` has a setting that the system has not.
        """
        if unknown := sorted(set(own) - set(self.settings)):
            raise ValueError(f"{self.name} has no setting {unknown[0]!r}; it has {', '.join(self.settings)}")
        right = {name: c.value for name, c in self.corrections.items()} if corrected else {}
        return {**self.settings, **right, **{k: v for k, v in own.items() if v is not None}}
