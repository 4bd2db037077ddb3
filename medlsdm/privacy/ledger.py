"""What training has spent on a site's patients: charged before it starts, never taken back.

Guarantee: none of its own. The ledger adds up what was charged, for the site as a whole: a patient
in several data sets, renamed or regrouped, is still covered, since no patient's spend exceeds the
site's (basic composition). Training without differential privacy is unbounded: epsilon is infinite
from then on, and no later charge makes it finite again.
"""

from __future__ import annotations

import fcntl
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from medlsdm.chain import HashChain
from medlsdm.errors import DataError, IntegrityError, PolicyError

Mechanism = Literal["none", "dp-sgd"]
_CHARGE = "charge"


@dataclass(frozen=True, slots=True)
class Spend:
    """Sum up the ledger: an upper bound of what any one patient of the site has been charged."""

    epsilon: float
    delta: float
    charges: int

    @property
    def statement(self) -> str:
        """Return the spend in one plain sentence."""
        if not self.charges:
            return "No training has been charged."
        if math.isinf(self.epsilon):
            return "Trained without differential privacy: epsilon is infinite, there is no formal guarantee."
        return f"At most epsilon {self.epsilon:.3g} at delta {self.delta:.2g} for each patient, add/remove one patient."


class PrivacyLedger:
    """Keep the hash-chained account of one site.

    Args:
        path: The chain's file. A ``.lock`` beside it keeps two processes from overspending together.
    """

    def __init__(self, path: Path) -> None:
        self._chain = HashChain(path)
        self._lock = path.with_name(path.name + ".lock")

    @property
    def head(self) -> str:
        """Return the hash of the last record. A copy kept elsewhere shows a rolled-back ledger."""
        return self._chain.head

    def charge(
        self,
        run: str,
        round: int,
        mechanism: Mechanism,
        patients_digest: str,
        *,
        epsilon: float = math.inf,
        delta: float = 0.0,
        max_epsilon: float | None = None,
    ) -> str:
        """Record a spend before training starts and return the ledger's new head; it is on disk by then.

        Args:
            run: The run's id.
            round: The round within the run. A round that is run again is charged again.
            mechanism: ``"none"`` is training without differential privacy: unbounded.
            patients_digest: Salted digest of the patients; the salt never leaves the node.
            epsilon: What the mechanism spends in this round, by its own accountant.
            delta: The delta of that epsilon.
            max_epsilon: The site's budget, checked under the same lock.

        Raises:
            PolicyError: The charge would exceed ``max_epsilon``; nothing is recorded.
            IntegrityError: The ledger was changed or cut short; nothing may train.
            DataError: The charge itself makes no sense.
        """
        if mechanism not in get_args(Mechanism):
            raise DataError(f"The mechanism {mechanism!r} is not known.", f"Use one of {get_args(Mechanism)}.")
        if mechanism == "none" and math.isfinite(epsilon):
            raise DataError("Training without differential privacy has no finite epsilon.", "Leave epsilon out.")
        if not epsilon > 0 or not 0 <= delta < 1:
            raise DataError("A charge needs an epsilon above 0 and a delta from 0 to 1.", "Check the accountant.")
        with self._locked():
            self._check(max_epsilon, epsilon)
            fields = {"run": run, "round": round, "mechanism": mechanism, "patients": patients_digest}
            shown = {"epsilon": "infinite" if math.isinf(epsilon) else epsilon, "delta": delta}
            return self._chain.append(_CHARGE, **fields, **shown)

    def spent(self) -> Spend:
        """Add up every charge.

        Raises:
            IntegrityError: The ledger was changed or cut short.
        """
        epsilon, delta, charges = 0.0, 0.0, 0
        for record in self._chain.records():
            step_epsilon, step_delta = _read(record)
            epsilon, delta, charges = epsilon + step_epsilon, delta + step_delta, charges + 1
        return Spend(epsilon, min(delta, 1.0), charges)

    def check(self, max_epsilon: float | None, *, epsilon: float = math.inf) -> None:
        """Raise PolicyError if a charge of ``epsilon`` would exceed the site's budget; None is no budget."""
        with self._locked():
            self._check(max_epsilon, epsilon)

    def _check(self, max_epsilon: float | None, epsilon: float) -> None:
        spent = self.spent().epsilon  # a damaged ledger stops training even where there is no budget
        if max_epsilon is None:
            return
        if not (math.isfinite(max_epsilon) and max_epsilon >= 0):
            raise PolicyError("The site's privacy budget is not a finite number.", "Correct max_epsilon in the policy.")
        if math.isinf(spent):
            raise PolicyError(
                "Patients of this site were trained on without differential privacy; no budget holds any more.",
                "The data steward must lift max_epsilon, or other patients must be used.",
            )
        if not spent + epsilon <= max_epsilon:
            asked = "unbounded (no differential privacy)" if math.isinf(epsilon) else f"{epsilon:.3g}"
            raise PolicyError(
                f"The round would spend {asked} on top of {spent:.3g}, above the site's budget of {max_epsilon:.3g}.",
                "Train with differential privacy within the budget, or have the data steward raise it.",
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        with self._lock.open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def _read(record: dict[str, Any]) -> tuple[float, float]:
    try:
        if record["event"] != _CHARGE:
            raise KeyError("event")
        stated = record["fields"]["epsilon"]
        epsilon = math.inf if stated == "infinite" else float(stated)
        delta = float(record["fields"]["delta"])
        if not epsilon > 0 or not 0 <= delta < 1:
            raise ValueError("out of range")
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            "The privacy ledger holds a record that is no charge.", "Restore the ledger from a good copy."
        ) from error
    return epsilon, delta
