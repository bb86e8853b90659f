"""The log of a run, log.jsonl: a line of JSON an epoch."""

import json
import os
from pathlib import Path
from typing import Any

from dbnet.errors import UserError
from dbnet.files import write_whole


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add the row of an epoch. Raises UserError where it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
            log.flush()
            os.fsync(log.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room, or mend the folder") from None


def keep_rows(path: Path, epochs: int) -> None:
    """Leave the rows of the first `epochs` epochs, one for each: what a run wrote after its last save, it writes again,
    and a line that was cut short goes."""
    rows: dict[int, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            epoch = int(json.loads(line)["epoch"])
        except (ValueError, KeyError, TypeError):
            continue
        if epoch <= epochs:
            rows[epoch] = line
    with write_whole(path, "w") as log:
        log.writelines(f"{line}\n" for line in rows.values())
