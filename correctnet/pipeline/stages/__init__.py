"""The stages of the paper: files in, files out.

    pretrain -> suppress -> sweep -> search (one for each limit) -> compensate -> evaluate

Each is an ordinary function; `correctnet STAGE` calls it, and the workflow calls that. A stage writes its result last
and whole, and keeps resume checkpoints in a folder of its own (`correctnet.pipeline.runtime.Runtime.work`).
"""

from correctnet.pipeline.stages.evaluation import evaluate_chips, sensitivity
from correctnet.pipeline.stages.searching import search, search_state, sweep
from correctnet.pipeline.stages.training import (
    compensate,
    distil,
    finetune,
    inject,
    moments,
    pretrain,
    sidepath,
    suppress,
)

__all__ = [
    "compensate",
    "distil",
    "evaluate_chips",
    "finetune",
    "inject",
    "moments",
    "pretrain",
    "search",
    "search_state",
    "sensitivity",
    "sidepath",
    "suppress",
    "sweep",
]
