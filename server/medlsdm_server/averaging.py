"""From accepted replies to the next weights: bounds on updates, the streamed mean, and Flower's strategies.

The mean is taken tensor by tensor from files, so that memory does not grow with the number of sites. Strategies that
start from the mean (FedAvg, FedProx, FedAdam) are given it as one reply; FedMedian, trimmed mean and Krum need all
replies at once and hold them in memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from medlsdm.checks import writing
from medlsdm.errors import IntegrityError, RoundError
from medlsdm.federation.arrays import Arrays
from medlsdm_server.replies import Reply
from medlsdm_server.strategy import Strategy


def too_far(replies: Sequence[Reply], bound: float | None, earlier: Sequence[float]) -> list[Reply]:
    """Return the replies whose update is longer than ``bound`` times the usual.

    The usual is the lower median of the lengths in this round, or of the accepted ones in earlier rounds where that is
    longer: so of two sites the longer one does not set its own measure, and a site that changed nothing does not
    condemn the others.
    """
    norms = [r.norm for r in replies if r.norm > 0]
    if bound is None or not norms:
        return []
    usual = statistics.median_low(norms)
    if earlier:
        usual = max(usual, statistics.median_low(list(earlier)))
    return [r for r in replies if r.norm > bound * usual]


def mean_of(replies: Sequence[Reply], like: Arrays) -> Arrays:
    """Return the weighted mean, computed in float64 one tensor at a time; whole numbers are rounded.

    Raises:
        IntegrityError: A mean is not finite.
    """
    total = sum(r.weight for r in replies)
    mean: Arrays = {}
    for name, shape in like.items():
        sum_ = np.zeros(shape.shape, np.float64)
        for reply in replies:
            sum_ += reply.array(name).astype(np.float64) * (reply.weight / total)
        if not np.isfinite(sum_).all():
            raise IntegrityError("The average holds values that are not finite.", "The round is not used.")
        mean[name] = _as(sum_, shape.dtype)
    return mean


def _as(value: Any, dtype: Any) -> Any:
    """Return real numbers in the type that was sent; whole numbers are rounded."""
    return (np.rint(value) if dtype.kind in "iu" else value > 0.5 if dtype.kind == "b" else value).astype(dtype)


class Aggregator:
    """Apply one strategy over the rounds of a stage; FedAdam's moments are kept in a file between runs."""

    def __init__(self, strategy: Strategy, memory: Path) -> None:
        self.strategy, self.memory = strategy, memory

    def aggregate(self, number: int, replies: Sequence[Reply], current: Arrays) -> Arrays:
        """Return the next weights.

        Raises:
            IntegrityError: They are not finite, or not of the shape that was sent.
            RoundError: The strategy cannot work with so few replies.
        """
        name = self.strategy.name
        if name in ("fedavg", "fedprox"):
            return mean_of(replies, current)
        if name == "fedadam":
            return self._adam(number, replies, current)
        return _checked(self._of_all(number, replies, current), current)

    def _of_all(self, number: int, replies: Sequence[Reply], current: Arrays) -> Any:
        from flwr.serverapp.exception import AggregationError
        from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum

        chosen = {
            "fedmedian": lambda: FedMedian(weighted_by_key="weight"),
            "trimmed-mean": lambda: FedTrimmedAvg(beta=self.strategy.beta, weighted_by_key="weight"),
            "krum": lambda: Krum(num_malicious_nodes=self.strategy.malicious, weighted_by_key="weight"),
        }[self.strategy.name]()
        messages = [_message(dict(r.arrays()), r.weight) for r in replies]
        try:
            return chosen.aggregate_train(number, messages)[0]
        except AggregationError as error:
            raise RoundError(f"The strategy {self.strategy.name} failed.", "Ask more sites, or change it.") from error

    def _adam(self, number: int, replies: Sequence[Reply], current: Arrays) -> Arrays:
        from flwr.serverapp.strategy import FedAdam
        from safetensors.numpy import load_file, save_file

        s = self.strategy
        adam = FedAdam(eta=s.eta, beta_1=s.beta_1, beta_2=s.beta_2, tau=s.tau, weighted_by_key="weight")
        floats = {name: value for name, value in current.items() if value.dtype.kind == "f"}
        adam.current_arrays = dict(floats)
        if self.memory.exists():
            kept = load_file(self.memory)
            adam.m_t = {k[2:]: v for k, v in kept.items() if k.startswith("m.")}
            adam.v_t = {k[2:]: v for k, v in kept.items() if k.startswith("v.")}
        mean = mean_of(replies, current)
        made = adam.aggregate_train(number, [_message({k: mean[k] for k in floats}, 1.0)])[0]
        assert adam.m_t is not None
        assert adam.v_t is not None
        moments = {f"m.{k}": v for k, v in adam.m_t.items()} | {f"v.{k}": v for k, v in adam.v_t.items()}
        with writing(self.memory) as draft:
            save_file({k: np.asarray(v, order="C") for k, v in moments.items()}, draft)
        return _checked(made, floats) | {k: v for k, v in mean.items() if k not in floats}


def _message(arrays: Arrays, weight: float) -> Message:
    content = {
        "arrays": ArrayRecord({k: Array(np.asarray(v, order="C")) for k, v in arrays.items()}),
        "metrics": MetricRecord({"weight": weight}),
    }
    return Message(RecordDict(content), dst_node_id=1, message_type="train")


def _checked(made: Any, like: Arrays) -> Arrays:
    if made is None or set(made.keys()) != set(like):
        raise IntegrityError("The strategy returned other weights than it was given.", "The round is not used.")
    result = {k: _as(made[k].numpy(), v.dtype).reshape(v.shape) for k, v in like.items()}
    if not all(np.isfinite(v).all() for v in result.values() if v.dtype.kind == "f"):
        raise IntegrityError("The new weights hold values that are not finite.", "The round is not used.")
    return result
