"""Lead one launch through its rounds: ask the sites, take what they return, average, keep a checkpoint a round.

A launch goes on from its own last checkpoint, and a round from the replies that were received before its coordinator
ended, so that an end at any moment loses the step in hand and no more.
"""

from __future__ import annotations

import logging
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from medlsdm.errors import UNTOLD, BusyError, IntegrityError, MedlsdmError, ResourceError, RoundError
from medlsdm.federation.arrays import PACKED, Arrays, pack
from medlsdm.federation.identity import RosterEntry, node_digest
from medlsdm.federation.plan import RoundPlan, Stage
from medlsdm_server.averaging import Aggregator, too_far
from medlsdm_server.checkpointing import Trained
from medlsdm_server.contacts import Contact, read_contacts
from medlsdm_server.exchange import forget_replies, moments_of, replies_of
from medlsdm_server.home import ServerHome
from medlsdm_server.launch import Launch, leading, note, read_events
from medlsdm_server.registry import ADMITTED, Registry, Site
from medlsdm_server.replies import Reply, kept_replies, note_reply, read_reply, refusal, told, within
from medlsdm_server.text import plain

log = logging.getLogger(__name__)

POLL_S, LOOK_S, ROOM_S = 1.0, 2.0, 10.0
TRIES, MOST_ASKS = 3, 10
HEARD_S = 20.0  # a site that was not heard of for so long is away
IDLE_S = 20.0  # a site that has its work and does nothing for so long has lost it
LEAST_EXTRA_S = 30.0
FRESH_S = 5.0  # the same, of one that has signed on since it was asked
AT_REST = ("waiting", "idle", "stopped", "refused", "")
LOST = (3, 4, 5, 8)  # Flower's codes for a message, a reply, a node or a program that is gone


@dataclass(slots=True)
class Asked:
    """Follow one site through a round."""

    site: str
    node: int
    since: float = field(default_factory=time.monotonic)
    at: float = field(default_factory=time.time)
    messages: list[str] = field(default_factory=list)
    asks: int = 0
    rest: float = 0.0  # since when it is seen to do nothing
    lost: float = 0.0  # when Flower said that the message or the reply is gone
    seconds: float = 0.0
    reply: Reply | None = None
    refused: str = ""

    @property
    def open(self) -> bool:
        """Tell whether an answer is still expected."""
        return self.reply is None and not self.refused


class Conductor:
    """Lead one launch."""

    def __init__(self, home: ServerHome, launch: Launch, grid: Grid) -> None:
        self.home, self.launch, self.grid = home, launch, grid
        self.registry = Registry(home.registry)

    def run(self) -> None:
        """Train stage 1, then stage 2, each from its last checkpoint on.

        Raises:
            BusyError: Another process leads this launch.
            RoundError: A round fell short three times.
        """
        with leading(self.home, self.launch.id):
            note(self.home, self.launch.id, "started")
            try:
                trained = Trained.resume(self.home.models, self.launch)
                for event in read_events(self.home, self.launch.id):
                    if event["event"] == "round" and event.get("loss") is not None:
                        trained.losses[event["checkpoint"]] = event["loss"]
                for stage in Stage:
                    for number in range(trained.rounds_done(stage) + 1, self._rounds(stage) + 1):
                        self._until_done(trained, stage, number)
                note(self.home, self.launch.id, "finished")
                forget_replies(self.home, self.launch.id)
            except ResourceError:
                raise  # not the launch's fault: it is led on when there is room, from the last round
            except MedlsdmError as error:
                note(self.home, self.launch.id, "failed", message=str(error))
                raise

    def _rounds(self, stage: Stage) -> int:
        return (self.launch.stage1 if stage is Stage.STAGE1 else self.launch.stage2).rounds

    def _until_done(self, trained: Trained, stage: Stage, number: int) -> None:
        """Hold a round; one that falls short is tried again twice."""
        for attempt in range(1, TRIES + 1):
            try:
                self._round(trained, stage, number)
                return
            except (RoundError, ResourceError, IntegrityError) as error:
                if attempt == TRIES:
                    raise
                log.warning("%s round %s is tried again: %s", stage, number, error)
                fields = {"stage": stage, "round": number, "message": str(error), "attempt": attempt}
                with suppress(ResourceError):  # the log has it
                    note(self.home, self.launch.id, "again", **fields)
                if isinstance(error, ResourceError):
                    time.sleep(ROOM_S * attempt)  # somebody may make room

    def _round(self, trained: Trained, stage: Stage, number: int) -> None:
        online = self._gather(stage, number)
        started = time.monotonic()
        rounds = self._rounds(stage)
        note(
            self.home, self.launch.id, "asked", stage=stage, round=number, rounds=rounds,
            sites=sorted(s.name for s in online),
        )  # fmt: skip
        current = trained.arrays(stage)
        folder = replies_of(self.home, self.launch.id, stage, number)
        asked = self._ask_all(online, trained, stage, number, current, folder)
        self._collect(asked, trained, stage, number, current, folder)
        self._bound(asked, stage)
        replies = [a.reply for a in asked if a.reply is not None]
        rows = [_row(a) for a in asked]
        if len(replies) < self.launch.enough:
            note(self.home, self.launch.id, "short", stage=stage, round=number, rounds=rounds, sites=rows)
            raise RoundError(
                f"Round {number} of {stage} got {len(replies)} usable replies from {len(asked)} sites;"
                f" {self.launch.enough} are needed.",
                "See the refusals in 'medlsdm-server status', then 'medlsdm-server launch --resume'.",
            )
        memory = moments_of(self.home, self.launch.id, stage, number)
        arrays = Aggregator(self.launch.strategy, memory).aggregate(number, replies, current)
        sites = [r.site for r in replies]
        losses = [(r.loss, r.weight) for r in replies if r.loss is not None]
        loss = sum(x * w for x, w in losses) / sum(w for _, w in losses) if losses else None
        checkpoint = trained.save_round(stage, number, arrays, sites, loss)
        note(
            self.home, self.launch.id, "round", stage=stage, round=number, rounds=rounds, sites=rows, loss=loss,
            seconds=round(time.monotonic() - started, 2),
            training_seconds=round(max((r.training_seconds for r in replies), default=0.0), 2), checkpoint=checkpoint,
        )  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
        trained.retire()

    def _bound(self, asked: Sequence[Asked], stage: Stage) -> None:
        """Refuse updates that are far longer than the usual."""
        earlier = [
            s["norm"]
            for e in read_events(self.home, self.launch.id)
            if e["event"] == "round" and e["stage"] == stage
            for s in e["sites"]
            if not s["refused"] and s.get("norm")
        ][-50:]
        replies = [a.reply for a in asked if a.reply is not None]
        wrong = {r.site: r.norm for r in too_far(replies, self.launch.update_bound, earlier)}
        for one in asked:
            if one.site in wrong and one.reply is not None:
                one.refused = (
                    f"The reply was not used: its update is more than {self.launch.update_bound:g} times the usual."
                )
                one.reply.forget()
                one.reply = None

    def _sites(self) -> dict[int, Site]:
        """Return the admitted sites by the number that Flower gave their node."""
        return {int(s.node_id): s for s in self.registry.sites() if s.node_id and s.status == ADMITTED}

    def _gather(self, stage: Stage, number: int) -> list[Site]:
        """Wait until enough sites are online, but not for ever."""
        end, told_of = time.monotonic() + self.launch.gather_s, None
        while True:
            known = self._sites()
            online = [known[n] for n in self.grid.get_node_ids() if n in known]
            if len(online) >= self.launch.sites:
                return sorted(online, key=lambda s: s.name)
            missing = sorted(s.name for s in self.registry.sites() if s.status == ADMITTED and s not in online)
            if missing != told_of:
                told_of = missing
                note(
                    self.home, self.launch.id, "gathering", stage=stage, round=number, rounds=self._rounds(stage),
                    online=len(online), missing=missing,
                )  # fmt: skip
            if time.monotonic() > end:
                names = ", ".join(missing) or "unknown"
                raise RoundError(
                    f"{len(online)} of {self.launch.sites} sites are online; missing: {names}.",
                    "Start the missing nodes, then 'medlsdm-server launch --resume'.",
                )
            time.sleep(POLL_S)

    def _ask_all(
        self, online: Sequence[Site], trained: Trained, stage: Stage, number: int, current: Arrays, folder: Path
    ) -> list[Asked]:
        """Send the round to every site but those whose reply an earlier coordinator had received whole."""
        kept = {r.site: r for r in kept_replies(folder, current)}
        asked = [Asked(s.name, int(s.node_id)) for s in online]
        for one in asked:
            if (reply := kept.get(one.site)) is not None:
                one.reply, one.seconds = reply, reply.training_seconds
        self._send([a for a in asked if a.open], trained, stage, number, current)
        return asked

    def _send(self, asked: Sequence[Asked], trained: Trained, stage: Stage, number: int, current: Arrays) -> None:
        if not asked or not hasattr(self.grid, "push_messages"):
            return
        record = ArrayRecord({PACKED: Array(pack(current))})
        config = self._config(trained, stage, number)
        for one in asked:
            message = _message(one.node, record, config, number)
            one.messages += [i for i in self.grid.push_messages([message]) if i]
            one.asks, one.at, one.rest, one.lost = one.asks + 1, time.time(), 0.0, 0.0
            if not one.messages:
                one.refused = "The site's node is not known to Flower any more."

    def _config(self, trained: Trained, stage: Stage, number: int) -> ConfigRecord:
        return ConfigRecord({"plan": self._plan(trained, stage, number).to_json()})

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
            schedule={
                s: (p.rounds, p.steps) for s, p in zip(Stage, (self.launch.stage1, self.launch.stage2), strict=True)
            },
            roster=self._roster(),
            proximal_mu=self.launch.strategy.proximal_mu if self.launch.strategy.name == "fedprox" else 0.0,
        )

    def _roster(self) -> tuple[RosterEntry, ...]:
        """Return who takes part, each in its own signed words."""
        entries = (
            {"site": s.name, "identity": s.identity, "node_digest": node_digest(s.node_key), "pledge": s.pledge}
            for s in self.registry.sites()
            if s.status == ADMITTED and s.pledge
        )
        return tuple(RosterEntry.model_validate(e) for e in entries)

    def _collect(
        self, asked: Sequence[Asked], trained: Trained, stage: Stage, number: int, current: Arrays, folder: Path
    ) -> None:
        """Take replies as they come, until all are here or the time is over; ask again where a message was lost."""
        looked = 0.0
        while waiting := [a for a in asked if a.open]:
            for one, message in self._arrived(waiting, trained, stage, number, current):
                self._take(one, message, current, folder)
            if not any(a.open for a in asked) or self._over(asked):
                break
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                self._drop_sent_away(waiting)
                again = self._lost(waiting, number, stage)
                self._send(again, trained, stage, number, current)
            time.sleep(POLL_S)
        for one in asked:
            if one.open:
                one.refused = self._silence(one)

    def _arrived(
        self, waiting: Sequence[Asked], trained: Trained, stage: Stage, number: int, current: Arrays
    ) -> Iterator[tuple[Asked, Message]]:
        """Yield replies, one in memory at a time. A site that is away is not asked for: Flower would drop its work."""
        if not hasattr(self.grid, "push_messages"):  # a grid that answers whole rounds
            record = ArrayRecord({k: Array(v) for k, v in current.items()})
            config = self._config(trained, stage, number)
            messages = [_message(a.node, record, config, number) for a in waiting]
            by_node = {a.node: a for a in waiting}
            for message in self.grid.send_and_receive(messages, timeout=self.launch.deadline_s):
                if (one := by_node.pop(message.metadata.src_node_id, None)) is not None:
                    yield one, message
            for one in by_node.values():
                one.refused = "The site did not answer in time."
            return
        contacts, online = read_contacts(self.home), set(self.grid.get_node_ids())
        for one in waiting:
            if one.node not in online:
                continue
            if contacts and time.time() - contacts.get(one.site, Contact()).at > HEARD_S:
                continue
            for name in list(one.messages):
                for message in self._pull(one, name, current):
                    one.messages.remove(name)
                    yield one, message
                if not one.open:
                    break

    def _pull(self, one: Asked, name: str, current: Arrays) -> list[Message]:
        """Return the answer to a message, if it is there. One that cannot be put together is the site's refusal."""
        try:
            with within(current):
                return list(self.grid.pull_messages([name]))
        except (httpx.HTTPError, OSError):
            raise  # Flower is gone: this program ends and is started again
        except Exception as error:
            log.warning("a reply of %s could not be put together: %s", one.site, type(error).__name__)
            one.refused = refusal(error)
            return []

    def _take(self, one: Asked, message: Message, current: Arrays, folder: Path) -> None:
        """Read one message of a site. Whatever is wrong with it is the site's refusal, never the launch's end."""
        try:
            if message.has_error():
                self._failed(one, message)
                return
            reply = read_reply(message, one.site, current, folder / f"{one.site}.safetensors")
            note_reply(reply)
            one.reply, one.seconds = reply, time.monotonic() - one.since
        except ResourceError:
            raise  # our own disk is full
        except Exception as error:
            log.warning("a reply of %s was refused: %s", one.site, type(error).__name__)
            one.refused = refusal(error)

    def _failed(self, one: Asked, message: Message) -> None:
        reason, code = str(message.error.reason or ""), message.error.code
        flowers = code in LOST and told(reason) == UNTOLD  # our own sentences have numbers of the same kind
        if code == BusyError.exit_status and reason == BusyError.public_text and one.messages:
            return  # it was asked twice and works on the first
        if flowers and one.asks < MOST_ASKS:
            one.lost = time.time()  # ask again when the site is there
            return
        one.refused = plain(told(reason))

    def _drop_sent_away(self, waiting: Sequence[Asked]) -> None:
        known = self._sites()
        for one in waiting:
            if one.node not in known:
                site = next((s for s in self.registry.sites() if s.name == one.site), None)
                if site is not None and site.status == ADMITTED and site.node_id:
                    one.node = int(site.node_id)  # it enrolled anew
                elif site is None or site.status != ADMITTED:
                    one.refused = "The coordinator has sent the site away."

    def _lost(self, waiting: Sequence[Asked], number: int, stage: Stage) -> list[Asked]:
        """Return the sites that are in contact but do not have this round's work any more."""
        contacts, now, lost = read_contacts(self.home), time.time(), []
        for one in waiting:
            contact = contacts.get(one.site, Contact()) if contacts else Contact(at=now, pulled=now)
            if not one.open or now - contact.at > HEARD_S or one.asks >= MOST_ASKS:
                continue
            doing = contact.activity
            here = (doing.get("model"), doing.get("stage"), doing.get("round")) == (self.launch.id, stage, number)
            rests = contact.pulled > one.at and doing.get("activity", "") in AT_REST and not here
            one.rest = (one.rest or now) if rests else 0.0
            patience = FRESH_S if contact.activated > one.at else IDLE_S
            if (one.lost and contact.pulled >= one.lost) or (one.rest and now - one.rest > patience):
                log.warning("%s has lost its work of %s round %s and is asked again", one.site, stage, number)
                lost.append(one)
        return lost

    def _over(self, asked: Sequence[Asked]) -> bool:
        """Tell whether the round's time is over, for all or for those who are late after a quorum."""
        now = time.monotonic()
        began = min(a.since for a in asked)
        done = [a.seconds for a in asked if a.reply is not None]
        if now - began > self.launch.deadline_s:
            return True
        if len(done) < self.launch.enough:
            return False
        return now - began > max(2 * statistics.median(done), LEAST_EXTRA_S + statistics.median(done))

    def _silence(self, one: Asked) -> str:
        contact = read_contacts(self.home).get(one.site)
        away = contact is not None and time.time() - contact.at > HEARD_S
        return "The site is out of contact." if away else "The site did not answer in time."


def _message(node: int, record: ArrayRecord, config: ConfigRecord, number: int) -> Message:
    content = RecordDict({"arrays": record, "config": config})
    return Message(content, dst_node_id=node, message_type="train", group_id=str(number))


def _row(one: Asked) -> dict[str, Any]:
    reply = one.reply
    return {
        "site": one.site,
        "loss": reply.loss if reply else None,
        "training_seconds": reply.training_seconds if reply else 0.0,
        "weight": reply.weight if reply else None,
        "norm": round(reply.norm, 6) if reply else None,
        "asks": one.asks,
        "refused": plain(one.refused),
    }
