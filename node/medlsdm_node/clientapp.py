"""Flower's way in: one message in, one message out. Only public words and weights leave."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from medlsdm.errors import MedlsdmError, ResourceError
from medlsdm.federation.arrays import PACKED, Arrays, pack, unpack
from medlsdm.federation.helpers import rotate
from medlsdm.federation.plan import RoundPlan
from medlsdm_node.home import NodeHome
from medlsdm_node.policy import load_policy
from medlsdm_node.rounds import run_round
from medlsdm_node.status import write_activity

log = logging.getLogger(__name__)
app = ClientApp()

LAST_SECONDS = 5.0


@app.train()
def train(message: Message, context: Context) -> Message:
    """Run one round. Whatever goes wrong, the coordinator reads ``public_text`` and no more."""
    home = NodeHome.default(None)
    try:
        plan = RoundPlan.from_json(str(message.content["config"]["plan"]))  # type: ignore[index]
        arrays, packed = _arrays(message)
        with home.locked("round"):
            os.nice(load_policy(home.policy_file).niceness)
            write_activity(home, "starting", model=plan.model, stage=plan.stage, round=plan.round, rounds=plan.rounds)
            trained, reply = run_round(home, plan, arrays)
    except MedlsdmError as error:
        return _refusal(home, message, error, str(error))
    except MemoryError:
        return _refusal(home, message, ResourceError("Memory ran out.", "Use a smaller preset."), "Memory ran out.")
    except OSError as error:
        full = ResourceError(f"A file of the node could not be written ({error.strerror}).", "Check free space.")
        return _refusal(home, message, full, traceback.format_exc())
    except Exception as error:
        unexpected = MedlsdmError(f"Unexpected {type(error).__name__}.")
        return _refusal(home, message, unexpected, traceback.format_exc())
    content = RecordDict(
        {
            "arrays": ArrayRecord(
                {PACKED: Array(pack(trained))} if packed else {k: Array(v) for k, v in trained.items()}
            ),
            "metrics": MetricRecord({"weight": reply.weight}),
            "reply": ConfigRecord({"reply": reply.to_json()}),
        }
    )
    return Message(content, reply_to=message)


def _arrays(message: Message) -> tuple[Arrays, bool]:
    """Return the weights that were sent, and whether they came as one array; the answer goes back the same way."""
    record = message.content["arrays"]
    assert isinstance(record, ArrayRecord)
    if set(record) == {PACKED}:
        return unpack(record.pop(PACKED).numpy()), True
    return {name: array.numpy() for name, array in record.items()}, False


def _end_with_parent() -> None:
    """End this process soon after the node: Flower alone would go on calling a node that is gone.

    Watched are the process that started this one and the SuperNode that ``--parent-pid`` names, for either
    may be gone before this line runs.
    """
    parent = os.getppid()
    stated = sys.argv[sys.argv.index("--parent-pid") + 1 :][:1]

    def watch() -> None:
        while os.getppid() == parent and all(Path(f"/proc/{pid}").exists() for pid in stated):
            time.sleep(0.5)
        time.sleep(LAST_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _refusal(home: NodeHome, message: Message, error: MedlsdmError, local: str) -> Message:
    """Keep the full story on this machine, if it has room for it; send the public sentence in any case."""
    try:
        rotate(home.logs / "rounds.log")
        with (home.logs / "rounds.log").open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {error.code}: {local}\n")
        write_activity(home, "refused", reason=error.message)
    except (OSError, MedlsdmError):
        print(f"{error.code}: {error.message} (and the log cannot be written)", file=sys.stderr)
    return Message(Error(error.exit_status, error.public_text), reply_to=message)


if "--parent-pid" in sys.argv:  # as Flower starts it
    _end_with_parent()
