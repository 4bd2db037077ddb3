"""The coordinator's half of a run, started by the SuperLink: ask the sites, average, keep a checkpoint a round.

A launch goes on from its own last checkpoint, so a run that died is launched again and loses one round
at most.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from medlsdm.errors import MedlsdmError, RoundError
from medlsdm.federation.arrays import Arrays, check_like
from medlsdm.federation.plan import RoundPlan, RoundReply, Stage
from medlsdm_server.checkpointing import Trained
from medlsdm_server.home import ServerHome
from medlsdm_server.launch import Launch, note, read_launch
from medlsdm_server.registry import Registry

log = logging.getLogger(__name__)
app = ServerApp()

GATHER_POLL_S = 1.0


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the launch that ``run_config`` names."""
    home = ServerHome.default(None)
    identity = str(context.run_config["launch"])
    try:
        Conductor(home, read_launch(home, identity), grid).run()
    except MedlsdmError as error:
        note(home, identity, "failed", message=str(error))
        raise


class Conductor:
    """Lead one launch through its rounds."""

    def __init__(self, home: ServerHome, launch: Launch, grid: Grid) -> None:
        self.home, self.launch, self.grid = home, launch, grid
        self.strategy = FedAvg(
            fraction_evaluate=0.0,
            min_train_nodes=launch.sites,
            min_available_nodes=launch.sites,
            weighted_by_key="weight",
        )

    def _name(self, node: object) -> str:
        """Return the site behind a node number; sites may enrol while a launch waits for them."""
        return next((s.name for s in Registry(self.home.registry).sites() if s.node_id == str(node)), "?")

    def run(self) -> None:
        """Train stage 1, then stage 2, each from its last checkpoint on."""
        note(self.home, self.launch.id, "started")
        trained = Trained.resume(self.home.models, self.launch)
        for stage in Stage:
            plan = self.launch.stage1 if stage is Stage.STAGE1 else self.launch.stage2
            for number in range(trained.rounds_done(stage) + 1, plan.rounds + 1):
                self._round(trained, stage, number)
        note(self.home, self.launch.id, "finished")

    def _round(self, trained: Trained, stage: Stage, number: int) -> None:
        online = self._gather()
        started = time.monotonic()
        plan = self._plan(trained, stage, number)
        note(self.home, self.launch.id, "asked", stage=stage, round=number, rounds=plan.rounds, sites=online)
        expected = trained.arrays(stage)
        messages = self.strategy.configure_train(
            number,
            ArrayRecord({k: _array(v) for k, v in expected.items()}),
            ConfigRecord({"plan": plan.to_json()}),
            self.grid,
        )
        replies = self.grid.send_and_receive(messages, timeout=self.launch.deadline_s)
        usable, rows = self._read(replies, expected)
        if len(usable) < min(2, self.launch.sites):
            raise RoundError(
                f"Round {number} of {stage} got {len(usable)} usable replies from {self.launch.sites} sites.",
                "See the refusals in 'medlsdm-server status', then launch again with --resume.",
            )
        averaged, _ = self.strategy.aggregate_train(number, usable)
        assert averaged is not None
        arrays = {k: a.numpy() for k, a in averaged.items()}
        sites = [r["site"] for r in rows if not r["refused"]]
        checkpoint = trained.save_round(stage, number, arrays, sites)
        seconds = time.monotonic() - started
        training = max((r["training_seconds"] for r in rows), default=0.0)
        note(
            self.home, self.launch.id, "round", stage=stage, round=number, rounds=plan.rounds, sites=rows,
            seconds=round(seconds, 2), training_seconds=round(training, 2), checkpoint=checkpoint,
        )  # fmt: skip

    def _gather(self) -> list[str]:
        """Wait until enough sites are online, but not for ever."""
        end = time.monotonic() + self.launch.gather_s
        while True:
            online = list(self.grid.get_node_ids())
            if len(online) >= self.launch.sites:
                return sorted(self._name(n) for n in online)
            if time.monotonic() > end:
                raise RoundError(
                    f"{len(online)} of {self.launch.sites} sites are online.",
                    "Start the missing nodes, then launch again with --resume.",
                )
            time.sleep(GATHER_POLL_S)

    def _plan(self, trained: Trained, stage: Stage, number: int) -> RoundPlan:
        plan = self.launch.stage1 if stage is Stage.STAGE1 else self.launch.stage2
        return RoundPlan(
            model=self.launch.id,
            stage=stage,
            round=number,
            rounds=plan.rounds,
            steps=plan.steps,
            first_step=(number - 1) * plan.steps,
            total_steps=plan.rounds * plan.steps,
            preset=trained.preset_json,
            labels=trained.schema.to_json(),
            autoencoder=trained.autoencoder_id if stage is Stage.STAGE2 else "",
            sites=self.launch.sites,
            seed=self.launch.seed,
        )

    def _read(self, replies: Iterable[Message], expected: Arrays) -> tuple[list[Message], list[dict[str, Any]]]:
        """Keep the replies that fit the model; note who refused and why, in the site's public words."""
        usable, rows = [], []
        for message in replies:
            site = self._name(message.metadata.src_node_id)
            row: dict[str, Any] = {"site": site, "loss": None, "training_seconds": 0.0, "refused": ""}
            try:
                if message.has_error():
                    raise RoundError(str(message.error.reason or "the site could not be reached")[:200])
                reply = RoundReply.from_json(str(message.content["reply"]["reply"]))  # type: ignore[index]
                record = message.content["arrays"]
                check_like({k: a.numpy() for k, a in record.items()}, expected)  # type: ignore[union-attr]
                row |= {"loss": reply.loss, "training_seconds": reply.training_seconds}
                usable.append(message)
            except (MedlsdmError, KeyError, ValueError, TypeError) as error:
                row["refused"] = error.message if isinstance(error, MedlsdmError) else "the reply cannot be read"
            rows.append(row)
        return usable, rows


def _array(value: Any) -> Any:
    from flwr.app import Array

    return Array(value)
