"""Files of a run: written whole or not at all, checked when read; no torch but in `checkpoint`."""

from clbench.store.files import make_folder, read_json, write_bytes, write_json
from clbench.store.record import refuse_mixture
from clbench.store.run_folder import (
    COLUMNS,
    SCHEMA,
    SCORINGS,
    STATUSES,
    EventLog,
    Score,
    find_runs,
    read_events,
    read_record,
    read_scores,
    run_id,
    scores_bytes,
    write_record,
    write_scores,
)

__all__ = [
    "COLUMNS",
    "SCHEMA",
    "SCORINGS",
    "STATUSES",
    "EventLog",
    "Score",
    "find_runs",
    "make_folder",
    "read_events",
    "read_json",
    "read_record",
    "read_scores",
    "refuse_mixture",
    "run_id",
    "scores_bytes",
    "write_bytes",
    "write_json",
    "write_record",
    "write_scores",
]
