"""Files of a round that outlive the program that leads it: the replies it has, the moments it starts from."""

from __future__ import annotations

import shutil
from pathlib import Path

from medlsdm.checks import writing
from medlsdm.federation.plan import Stage
from medlsdm_server.home import ServerHome


def replies_of(home: ServerHome, launch: str, stage: Stage, number: int) -> Path:
    """Return the folder of a round's replies; those of other rounds of its launch are deleted."""
    folder = home.run / "updates" / launch / f"{stage}-{number:04d}"
    for other in folder.parent.glob("*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def forget_replies(home: ServerHome, launch: str) -> None:
    """Delete every reply of a launch that has come to its end."""
    shutil.rmtree(home.run / "updates" / launch, ignore_errors=True)


def moments_of(home: ServerHome, launch: str, stage: Stage, number: int) -> Path:
    """Return the file of FedAdam's moments as the round before left them, so that a round done twice moves them once.

    Raises:
        ResourceError: There is no room.
    """
    older, last, mine = (
        home.launches / f"{launch}.{stage}-{n:04d}.moments.safetensors" for n in range(number - 2, number + 1)
    )
    older.unlink(missing_ok=True)
    mine.unlink(missing_ok=True)
    if last.exists():
        with writing(mine) as draft:
            shutil.copyfile(last, draft)
    return mine
