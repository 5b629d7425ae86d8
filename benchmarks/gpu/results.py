"""The results file: one JSON document, whole on disk after every case."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import clocks

Record = dict[str, Any]
"""One case: "stage", "case", "status" (ok, failed or skipped), "date", "clocks", "machine", and
"error" where it is not ok; else what the stage measured. Times are in milliseconds."""


@dataclass
class Results:
    """Records in the order they were made, and the case that is running.

    machine: `machine.describe()`, repeated in every record.
    running: (stage, case), so that what was running is known after a crash.
    """

    path: Path
    machine: dict[str, Any]
    records: list[Record] = field(default_factory=list)
    running: tuple[str, str] | None = None

    @classmethod
    def load(cls, path: Path) -> Results:
        """The results in a file that `save` wrote."""
        document = json.loads(path.read_text())
        running = document["running"]
        return cls(path, document["machine"], document["records"], running and tuple(running))

    def begin(self, stage: str, case: str) -> None:
        """Note that a case runs."""
        self.running = (stage, case)
        self.save()

    def add(self, stage: str, case: str, status: str, found: dict[str, Any]) -> Record:
        """Add a record and save."""
        record = {
            "stage": stage,
            "case": case,
            "status": status,
            **found,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "clocks": clocks() if self.machine["device_type"] == "cuda" else None,
            "machine": self.machine,
        }
        self.records.append(record)
        self.running = None
        self.save()
        return record

    def of(self, stage: str, status: str | None = None) -> Iterator[Record]:
        """The records of a stage, all or those of one status."""
        for record in self.records:
            if record["stage"] == stage and status in (None, record["status"]):
                yield record

    def save(self) -> None:
        """Write the file; a reader sees the old one or the new one, never a part."""
        document = {"machine": self.machine, "running": self.running, "records": self.records}
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(document, indent=1) + "\n")
        os.replace(beside, self.path)
