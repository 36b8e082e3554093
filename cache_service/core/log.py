"""Positions and entries of a delta log: the values that its writer, its store and its readers share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class LogPosition:
    """A place in a log: `seq` 0 is the start of the epoch, before its first segment."""

    epoch: int
    seq: int


@dataclass(frozen=True, slots=True)
class Segment:
    """The changes after position `seq - 1`."""

    position: LogPosition
    payload: bytes


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything up to and including `position`; a reader forgets what it had. b"" says nothing is there."""

    position: LogPosition
    payload: bytes


LogEntry = Segment | Snapshot
