"""The whole walk: DICOM in three hospitals, federated rounds, synthesis, gate, export, report."""

from __future__ import annotations

import fcntl
import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from medlsdm.checks import write_atomic
from medlsdm.config import config_folder
from medlsdm.errors import BusyError, MedlsdmError, RoundError
from medlsdm.federation.app import free_port
from medlsdm.types import LabelSchema, Modality
from medlsdm.volumes import read_nifti, to_ras
from medlsdm_node.demo import cohort
from medlsdm_node.demo.cohort import Hospital
from medlsdm_node.demo.leaks import LeakSearch, search
from medlsdm_node.demo.live import Board
from medlsdm_node.demo.programs import Running, ask
from medlsdm_node.report_pictures import Example

EXAMPLES_PER_SITE = 2
JOIN_SECONDS = 180


def walk(out: Path, data: Path | None, plan: str) -> dict[str, Any]:
    """Run the demo in a new folder below ``out`` and return where things are.

    Raises:
        BusyError: A demo runs there already. Earlier demos are never touched.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BusyError(f"A demo is running in {out}.", "Wait for it, or give another --out.") from error
        root = _new_folder(out)
        return Demo(root, data, plan).run()


def _new_folder(out: Path) -> Path:
    name = time.strftime("%Y%m%d-%H%M%S")
    root = next(p for n in range(100) if not (p := out / (f"{name}-{n}" if n else name)).exists())
    root.mkdir()
    return root.resolve()


class Demo:
    """Carry one demo through its steps."""

    def __init__(self, root: Path, data: Path | None, plan: str) -> None:
        self.root, self.data, self.plan = root, data, plan
        self.board = Board()
        self.server = root / "coordinator"
        self.hospitals: list[Hospital] = []
        self.schema: LabelSchema | None = None
        self.gates: list[dict[str, Any]] = []
        self.port = free_port()

    def run(self) -> dict[str, Any]:
        """Run every step and return where things are."""
        started, board = time.monotonic(), self.board
        signal.signal(signal.SIGTERM, _stop)
        try:
            with board.running(), ExitStack() as programs:
                with board.stage("hospitals and their DICOM"):
                    self._write_data()
                with board.stage("coordinator, nodes, invitations"):
                    self._init()
                with board.stage("start the federation"):
                    self._start(programs)
                with board.stage("ingest: de-identify, verify, vault"):
                    self._ingest()
                with board.stage("federated rounds"):
                    launch = self._launch()
                with board.stage("synthesise from label maps"):
                    self._each(self._synthesise)
                with board.stage("gate and export"):
                    self._each(self._export)
            with board.stage("search for planted identifiers"):
                leaks = self._search()
            with board.stage("report"):
                report = self._report(launch, leaks)
        except MedlsdmError:
            board.say(f"The demo stopped at '{board.step}'. What it made so far, with logs, is in {self.root}.")
            raise
        return self._finish(report, leaks, time.monotonic() - started)

    def _write_data(self) -> None:
        root = self.root / "hospitals"
        if self.data is None:
            self.hospitals, self.schema = cohort.made_up(root)
        else:
            self.hospitals, self.schema = cohort.dealt(self.data, root)
        write_atomic(self.root / "labels.yaml", yaml.safe_dump(self.schema.to_json()).encode())
        cohort.write_hospitals(self.hospitals, self.board.progress)

    def _init(self) -> None:
        ask("medlsdm-server", "init", "--home", self.server, "--host", "127.0.0.1", "--port", str(self.port))
        for hospital in self.hospitals:
            ticket = self.root / "invitations" / hospital.site
            ask("medlsdm-server", "invite", "--home", self.server, "--hospital", hospital.site, "--out", ticket)
            ask("medlsdm-node", "init", "--home", self._home(hospital), "--site", hospital.site,
                "--schema", self.root / "labels.yaml", "--threads", "1")  # fmt: skip

    def _home(self, hospital: Hospital) -> Path:
        return hospital.folder / "node"

    def _start(self, programs: ExitStack) -> None:
        logs = self.root / "logs"
        server = Running(logs / "server.log", "medlsdm-server", "start", "--home", self.server, "--bind", "127.0.0.1")
        programs.callback(server.stop)
        self._wait_for(lambda: self._server_status()["running"], server)
        for hospital in self.hospitals:
            home, site = self._home(hospital), hospital.site
            ticket = self.root / "invitations" / site
            node = Running(logs / f"{site}.log", "medlsdm-node", "join", "--home", home,
                           "--server", f"127.0.0.1:{self.port}", "--invitation", ticket)  # fmt: skip
            programs.callback(node.stop)
            watch = Running(logs / f"{site}.log", "medlsdm-node", "status", "--watch", "--home", home, read=True)
            programs.callback(watch.stop)
            self.board.follow(site, watch)
            self._wait_for(lambda site=site: site in self._enrolled(), node)

    def _server_status(self) -> dict[str, Any]:
        return ask("medlsdm-server", "status", "--home", self.server)

    def _enrolled(self) -> set[str]:
        return {s["site"] for s in self._server_status()["sites"] if s["status"] == "admitted"}

    def _wait_for(self, ready: Callable[[], Any], program: Running) -> None:
        end = time.monotonic() + JOIN_SECONDS
        while not ready():
            program.check()
            if time.monotonic() > end:
                raise RoundError(f"{program.name} was not ready in {JOIN_SECONDS} s.", f"See {program.log}.")
            time.sleep(0.5)

    def _ingest(self) -> None:
        self._each(lambda h: ask("medlsdm-node", "ingest", h.incoming, "--home", self._home(h)))

    def _each(self, work: Callable[[Hospital], Any]) -> None:
        """Do the same at every hospital, two at a time."""
        with ThreadPoolExecutor(2) as pool:
            for done, _ in enumerate(pool.map(work, self.hospitals), start=1):
                self.board.progress(done, len(self.hospitals))

    def _launch(self) -> dict[str, Any]:
        plan = self._plan_file()
        settings = yaml.safe_load(plan.read_text())
        self.board.rounds |= {"of": settings["stage1"]["rounds"] + settings["stage2"]["rounds"]}
        log = self.root / "logs" / "launch.log"
        launched = Running(log, "medlsdm-server", "launch", "--home", self.server, "--plan", plan)
        self.board.rounds["since"] = time.monotonic()
        try:
            while launched.process.poll() is None:
                time.sleep(0.5)
                self._count_rounds(log)
        finally:
            launched.stop()
        launched.check()
        return self._server_status()["launch"]

    def _count_rounds(self, log: Path) -> None:
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if " round " in line]
        for line in lines[self.board.rounds["done"] :]:
            self.board.say(f"  {line}")
        self.board.rounds["done"] = len(lines)
        self.board.progress(len(lines), self.board.rounds["of"])

    def _plan_file(self) -> Path:
        """Write the federation plan with the schema and modalities of the data."""
        name = self.plan or ("demo" if self.data is None else "demo-data")
        source = Path(name) if name.endswith((".yaml", ".yml")) else config_folder() / "federation" / f"{name}.yaml"
        plan = yaml.safe_load(source.read_text(encoding="utf-8"))
        kinds = sorted({str(p.modality) for h in self.hospitals for p in h.patients})
        plan |= {"schema": str(self.root / "labels.yaml"), "modalities": kinds, "sites": len(self.hospitals)}
        path = self.root / "plan.yaml"
        write_atomic(path, yaml.safe_dump(plan).encode())
        return path

    def _synthesise(self, hospital: Hospital) -> None:
        for modality in hospital.modalities:
            ask("medlsdm-node", "synthesise", hospital.maps(modality), "--home", self._home(hospital),
                "--modality", str(modality), "--seed", "1")  # fmt: skip

    def _export(self, hospital: Hospital) -> None:
        home, folder, refusal = self._home(hospital), hospital.folder / "export", ""
        try:
            ask("medlsdm-node", "export", "--out", folder, "--home", home)
        except RoundError as error:
            refusal = error.message
        seen = ask("medlsdm-node", "audit", *([] if refusal else [folder]), "--home", home)
        gates = [r["fields"] for r in seen["records"] if r["event"] == "gate"]
        plants = gates[-1]["plants"] if gates else {"planted": 0, "caught": 0}
        made = gates[-1]["made"] if gates else 0
        passed = 0 if refusal or not gates else gates[-1]["passed"]
        reasons = gates[-1]["reasons"] if gates else {}
        self.gates.append(
            {"site": hospital.site, "made": made, "passed": passed, "blocked": made - passed,
             "reasons": reasons | ({refusal: 1} if refusal else {}), "plants_caught": plants["caught"],
             "planted": plants["planted"]}
        )  # fmt: skip

    def _search(self) -> LeakSearch:
        """Search what left each hospital, and everything that its node wrote or logged."""
        tokens = [t for h in self.hospitals for t in h.tokens]
        roots = [self.server, self.root / "logs", *(h.folder / p for h in self.hospitals for p in ("node", "export"))]
        return search([r for r in roots if r.is_dir()], tokens)

    def _report(self, launch: dict[str, Any], leaks: LeakSearch) -> Path:
        from medlsdm_node.demo.reporting import report

        return report(self, launch, leaks)

    def examples(self) -> Iterator[Example]:
        """Yield some exported volumes beside the held-out patient whose label map they follow."""
        for hospital in self.hospitals:
            shown: dict[Modality, int] = {}
            for path in sorted((hospital.folder / "export" / "volumes").glob("*.nii.gz")):
                synthetic, geometry = read_nifti(path)
                labels, _ = read_nifti(hospital.folder / "export" / "labels" / path.name)
                pair = cohort.real_of(hospital, labels)
                if pair is None or shown.get(pair[0].modality, 0) >= EXAMPLES_PER_SITE:
                    continue
                shown[pair[0].modality] = shown.get(pair[0].modality, 0) + 1
                real, turned = to_ras(pair[0].array, pair[0].geometry)
                yield Example(
                    hospital.site, pair[0].modality, real, to_ras(labels, geometry)[0], to_ras(synthetic, geometry)[0],
                    turned.spacing,
                )  # fmt: skip

    def _finish(self, report: Path, leaks: LeakSearch, seconds: float) -> dict[str, Any]:
        passed = sum(g["passed"] for g in self.gates)
        made = sum(g["made"] for g in self.gates)
        places = {"report": str(report), "picture": str(self.root / "picture.png"), "folder": str(self.root)}
        self.board.say(f"\n[bold]The demo took {seconds:.0f} s.[/bold] {passed} of {made} synthetic volumes left.")
        self.board.say(f"Planted identifiers: {leaks.tokens} searched in {leaks.bytes_searched / 1e6:.0f} MB of "
                       f"everything sent, logged or exported; found in {len(leaks.found)} files.")  # fmt: skip
        self.board.say(f"Report:  {report}")
        for hospital in self.hospitals:
            self.board.say(f"Export:  {hospital.folder / 'export'}")
        self.board.say(f"Models:  {self.server / 'models'}")
        result = places | {"seconds": round(seconds, 1), "gates": self.gates, "leaks": len(leaks.found)}
        write_atomic(self.root / "demo.json", json.dumps(result | {"timings": self.board.timings}, indent=2).encode())
        if leaks.found:
            raise MedlsdmError(f"Planted identifiers were found in {len(leaks.found)} files.", f"See {report}.")
        if not passed:
            raise RoundError("No synthetic volume passed the gate at any site.", f"See {report}.")
        return result


def _stop(*_: object) -> None:
    raise SystemExit(143)
