"""One real federation on loopback: a coordinator, three nodes, TLS, and everything the nodes sent on record."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import ssl
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from deid_tools.plant import write_planted_study
from medlsdm.anatomy import generate
from medlsdm.federation.identity import Invitation, fingerprint, sign_request
from medlsdm.types import Modality
from medlsdm.volumes import write_nifti
from medlsdm_node.demo.leaks import search
from medlsdm_node.home import NodeHome
from medlsdm_server.registry import Registry

from .conftest import Programs, RecordingProxy, Request, ask, call, free_port, of_home, wait_for, wait_until_gone
from .federation import SIZE, Federation

SITES = {"site-a": 5, "site-b": 6, "site-c": 7}
FLEET = re.compile(r"^/v1/fleet/[a-z-]+$")
OURS = re.compile(r"^/v1/(ca|enrol|site|models(/[a-z0-9.-]+/[a-z.]+)?)$")

pytestmark = pytest.mark.slow


def admit_patients(federation: Federation, number: int) -> None:
    site = list(SITES)[number]
    incoming, home = federation.root / site / "incoming", federation.home(site)
    for patient in range(SITES[site]):
        seed = 100 * number + patient
        scan, labels = generate(seed, Modality.MR, SIZE)
        federation.tokens += write_planted_study(
            scan.array,
            scan.geometry,
            scan.modality,
            labels,
            incoming / f"{patient}",
            seed=seed,
            hospital=f"{site} ward",
        )
    ask("medlsdm-node", "init", "--home", home, "--site", site, "--threads", "1")
    taken = ask("medlsdm-node", "ingest", incoming, "--home", home)
    assert taken["patients"] == SITES[site]


def admitted(federation: Federation) -> set[str]:
    sites = ask("medlsdm-server", "status", "--home", federation.coordinator)["sites"]
    return {s["site"] for s in sites if s["status"] == "admitted"}


def join(federation: Federation, site: str) -> None:
    ticket = federation.root / f"{site}.invitation"
    ask("medlsdm-server", "invite", "--hospital", site, "--out", ticket, "--home", federation.coordinator)
    where = f"127.0.0.1:{federation.proxied.port}"
    federation.nodes[site] = federation.programs.start(
        f"{site}.log",
        "medlsdm-node",
        "join",
        "--server",
        where,
        "--invitation",
        ticket,
        "--home",
        federation.home(site),
    )


def build(federation: Federation) -> None:
    home, port = federation.coordinator, free_port()
    ask("medlsdm-server", "init", "--host", "127.0.0.1", "--port", str(port), "--home", home)
    federation.port = port
    federation.programs.homes += [home / "flower", *(federation.home(s) / "flower" for s in SITES)]
    federation.server = federation.programs.start(
        "server.log", "medlsdm-server", "start", "--bind", "127.0.0.1", "--home", home
    )
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda n: admit_patients(federation, n), range(len(SITES))))
    wait_for(lambda: ask("medlsdm-server", "status", "--home", home)["running"], 60, "the coordinator")
    federation.proxy = RecordingProxy(
        federation.root / "sent", home / "server.crt", home / "keys/server.key", home / "ca.crt", port,
        {site: federation.home(site) / "keys/site.pem" for site in SITES},
    )  # fmt: skip
    federation.proxy.start()
    for site in SITES:
        join(federation, site)
    wait_for(lambda: admitted(federation) == set(SITES), 60, "three admitted sites")
    federation.launched = ask(
        "medlsdm-server", "launch", "--plan", federation.plan("plan"), "--home", home, timeout=170
    )
    federation.sent = federation.proxy.requests()


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, programs: Programs):
    made = Federation(tmp_path_factory.mktemp("federation"), programs)
    try:
        build(made)
        yield made
    finally:
        programs.end()
        if made.proxy is not None:
            made.proxy.stop()


@pytest.fixture(scope="module")
def client(federation: Federation):
    """Speak to the gateway as anybody could who knows the CA."""
    trust = ssl.create_default_context(cafile=str(federation.coordinator / "ca.crt"))
    with httpx.Client(verify=trust, base_url=f"https://127.0.0.1:{federation.port}", trust_env=False) as made:
        yield made


def objects(sent: list[Request], kind: bytes) -> list[bytes]:
    """Return the Flower objects of one kind that travelled: kind, children, size and a zero byte stand before each."""
    found = []
    for request in sent:
        for match in re.finditer(kind + rb" [0-9a-f,]* ?(\d+)\x00", request.body):
            found.append(request.body[match.end() : match.end() + int(match.group(1))])
    return found


def test_both_rounds_ran_at_three_sites(federation: Federation):
    assert federation.launched["state"] == "finished"
    rounds = federation.launched["finished_rounds"]
    assert [(r["stage"], r["round"]) for r in rounds] == [("stage1", 1), ("stage2", 1)]
    for row in rounds:
        assert sorted(s["site"] for s in row["sites"]) == sorted(SITES)
        assert [s["refused"] for s in row["sites"]] == ["", "", ""]
        assert all(s["loss"] > 0 for s in row["sites"])


def test_the_coordinator_lists_the_models(federation: Federation):
    models = ask("medlsdm-server", "models", "--home", federation.coordinator)
    launch = federation.launched["id"]
    assert [m["id"] for m in models] == [f"{launch}.stage1-0001", f"{launch}.stage2-0001"]
    card = json.loads((federation.coordinator / "models" / models[-1]["id"] / "card.json").read_text())
    assert card["sites"] == sorted(SITES)


def test_nodes_made_nothing_but_the_calls_they_need(federation: Federation):
    paths = {r.path for r in federation.sent}
    assert "/v1/fleet/push-object" in paths
    assert [p for p in paths if not FLEET.match(p) and not OURS.match(p)] == []


def test_the_record_is_in_plain_text(federation: Federation):
    """Else the search below would find nothing because it could see nothing."""
    assert {r.headers.get("content-encoding", "identity") for r in federation.sent} == {"identity"}
    replies = [r for r in federation.sent if b"training_seconds" in r.body]
    assert len(replies) == 2 * len(SITES)
    moved = sum(len(o) for o in objects(federation.sent, b"ArrayChunk"))
    weights = federation.coordinator / "models" / f"{federation.launched['id']}.stage1-0001" / "autoencoder.safetensors"
    assert moved > 3 * weights.stat().st_size


def test_the_weight_is_the_declared_one_and_no_count_travels(federation: Federation):
    replies = [
        json.loads(m.group())
        for o in objects(federation.sent, b"ConfigRecord")
        for m in re.finditer(rb'\{"version":1[^}]*\}', o)
    ]
    assert len(replies) == 2 * len(SITES)
    for reply in replies:
        assert set(reply) == {"version", "weight", "loss", "training_seconds"}
        assert reply["weight"] == 4.0
    records = objects(federation.sent, b"MetricRecord")
    assert records  # equal objects travel once
    assert {r.partition(b"weight")[2][-8:] for r in records} == {struct.pack("<d", 4.0)}
    assert {len(r) for r in records} == {21}, "one number and its name, no room for another"


def roots(federation: Federation) -> list[Path]:
    nodes = [federation.home(site) for site in SITES]
    return [federation.root / "sent", federation.coordinator, federation.programs.folder, *nodes]


def test_no_planted_identifier_is_sent_kept_or_logged(federation: Federation):
    found = search(roots(federation), federation.tokens)
    assert found.tokens > 500
    assert found.bytes_searched > 1_000_000
    assert found.found == ()


def test_the_search_sees_what_is_there(federation: Federation, tmp_path: Path):
    for number, token in enumerate(sorted(set(federation.tokens))[::50]):
        (tmp_path / f"{number}.bin").write_bytes(b"\0" * 7 + token.encode() + b"\xff")
    assert len(search([tmp_path], federation.tokens).found) == number + 1
    hospital = federation.root / "site-a/incoming"
    assert len(search([hospital], federation.tokens).found) == sum(p.is_file() for p in hospital.rglob("*"))


def test_the_audit_log_is_intact_and_each_round_was_charged_before_it_ran(federation: Federation):
    for site in SITES:
        home = federation.home(site)
        seen = ask("medlsdm-node", "audit", "--home", home)
        assert seen["ledger"]["charges"] == 2
        assert seen["ledger"]["epsilon"] == "infinite"
        rounds = [r for r in seen["records"] if r["event"] == "round"]
        charges = [json.loads(line) for line in (home / "ledger.jsonl").read_text().splitlines()]
        assert [r["fields"]["stage"] for r in rounds] == ["stage1", "stage2"]
        assert [c["fields"]["run"] for c in charges] == [r["fields"]["model"] for r in rounds]
        assert all(c["time"] <= r["time"] for c, r in zip(charges, rounds, strict=True))
        losses = [json.loads(line) for line in (home / "losses.jsonl").read_text().splitlines()]
        assert {row["stage"] for row in losses} == {"stage1", "stage2"}


def test_a_node_fetches_the_model_and_synthesises(federation: Federation, tmp_path: Path):
    _, labels = generate(9001, Modality.MR, SIZE)
    write_nifti(tmp_path / "map.nii.gz", labels.array, labels.geometry)
    home = federation.home("site-a")
    rows = ask("medlsdm-node", "synthesise", tmp_path / "map.nii.gz", "--home", home)
    assert [row["shape"] for row in rows] == [list(SIZE)]
    assert f"{federation.launched['id']}.stage2-0001" in ask("medlsdm-node", "status", "--home", home)["models"]
    assert ask("medlsdm-node", "status", "--home", home)["waiting_synthetic"] == 1


def test_a_model_that_was_changed_is_not_used(federation: Federation, tmp_path: Path):
    home = tmp_path / "node"
    shutil.copytree(federation.home("site-a"), home, ignore=shutil.ignore_patterns("*.lock", "flower"))
    weights = home / "models" / f"{federation.launched['id']}.stage2-0001" / "denoiser.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    _, labels = generate(9002, Modality.MR, SIZE)
    write_nifti(tmp_path / "map.nii.gz", labels.array, labels.geometry)
    done = call("medlsdm-node", "synthesise", tmp_path / "map.nii.gz", "--home", home)
    assert done.returncode == 8
    assert len(done.stderr.splitlines()) == 1
    assert "digest" in done.stderr


def test_only_the_fleet_calls_pass_the_gateway(federation: Federation, client: httpx.Client):
    trust = ssl.create_default_context(cafile=str(federation.coordinator / "ca.crt"))
    inside = httpx.get(f"https://{federation.superlink()}/openapi.json", verify=trust, trust_env=False)
    paths = sorted(inside.json()["paths"])
    assert any(p.startswith("/v1/control/") for p in paths)
    assert any(p.startswith("/v1/runtime/") for p in paths)
    from medlsdm_server.gateway import FLEET_CALLS

    assert set(paths) >= FLEET_CALLS
    hidden = [p for p in paths if p not in FLEET_CALLS] + ["/docs", "/redoc", "/openapi.json", "/health"]
    answers = {(p, m): client.request(m, p).status_code for p in hidden for m in ("GET", "POST")}
    assert {k: v for k, v in answers.items() if v not in (404, 405)} == {}
    sneaky = ["/v1/fleet/../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs", "//v1/control/list-runs"]
    assert {client.post(p).status_code for p in sneaky} == {404}


def test_a_key_that_is_not_enrolled_is_refused(federation: Federation, client: httpx.Client, tmp_path: Path):
    key, programs = ec.generate_private_key(ec.SECP384R1()), federation.programs
    (tmp_path / "key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    (tmp_path / "key").chmod(0o600)
    programs.homes.append(tmp_path / "flower")
    stranger = programs.start(
        "stranger.log", "flower-supernode", "--superlink", f"127.0.0.1:{federation.port}",
        "--root-certificates", federation.coordinator / "ca.crt", "--auth-supernode-private-key", tmp_path / "key",
        "--max-retries", "1", "--port", str(free_port()), FLWR_HOME=str(tmp_path / "flower"),
    )  # fmt: skip
    stranger.wait(120)  # it ends by itself
    assert not [r for r in federation.proxied.requests() if "x-medlsdm-site" not in r.headers and FLEET.match(r.path)]


def test_a_fleet_call_needs_certificate_identity_and_flower_s_signature(federation: Federation, tmp_path: Path):
    asked = [r for r in federation.proxied.requests() if r.path.endswith("/pull-messages")][-1]
    home = NodeHome(federation.home(asked.headers["x-medlsdm-site"]))
    trust = ssl.create_default_context(cafile=str(home.ca_cert))
    bare = ssl.create_default_context(cafile=str(home.ca_cert))
    trust.load_cert_chain(home.tls_file)
    flowers = {k: v for k, v in asked.headers.items() if k.startswith(("content-type", "accept", "flwr-"))}
    url = f"https://127.0.0.1:{federation.port}{asked.path}"

    def post(context: ssl.SSLContext, **changed: str) -> int:
        signed = sign_request(home.identity, home.settings.site, "POST", asked.path, asked.body)
        headers = flowers | signed | {k.replace("_", "-"): v for k, v in changed.items()}
        return httpx.post(url, headers=headers, content=asked.body, verify=context, trust_env=False).status_code

    assert post(trust) == 200
    assert post(trust, flwr_signature=flowers["flwr-signature"][::-1]) == 401
    assert post(trust, x_medlsdm_signature="0" * 128) == 403
    assert post(trust, x_medlsdm_site="site-z") == 403
    assert post(bare) == 403
    replayed = httpx.post(url, headers=asked.headers, content=asked.body, verify=trust, trust_env=False)
    assert replayed.status_code == 403


def test_invitations_that_are_not_good_admit_nobody(federation: Federation, tmp_path: Path):
    home = federation.coordinator
    ca = fingerprint((home / "ca.crt").read_bytes())
    late, unknown = Invitation.new("site-d", ca, -1), Invitation.new("site-d", ca, 1)
    wrong = Invitation.new("site-d", "0" * 64, 1)
    Registry(home / "registry.db").invite(late)
    ask("medlsdm-node", "init", "--site", "site-d", "--home", tmp_path / "node")
    for invitation, word in ((late, "expired"), (unknown, "unknown"), (wrong, "not the one")):
        (tmp_path / "ticket").write_text(invitation.encode())
        done = call(
            "medlsdm-node", "join", "--server", f"127.0.0.1:{federation.port}", "--invitation", tmp_path / "ticket",
            "--home", tmp_path / "node",
        )  # fmt: skip
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (6, "", 1), done.stderr
        assert word in done.stderr
        assert not (tmp_path / "node/ca.crt").exists()
    assert admitted(federation) == set(SITES)


def test_a_server_with_another_ca_is_refused(federation: Federation, tmp_path: Path):
    other = tmp_path / "other"
    ask("medlsdm-server", "init", "--host", "127.0.0.1", "--home", other)
    home = tmp_path / "node"
    shutil.copytree(federation.home("site-b"), home, ignore=shutil.ignore_patterns("*.lock", "flower"))
    shutil.copy(other / "ca.crt", home / "ca.crt")
    _, labels = generate(9003, Modality.MR, SIZE)
    write_nifti(tmp_path / "map.nii.gz", labels.array, labels.geometry)
    done = call("medlsdm-node", "synthesise", tmp_path / "map.nii.gz", "--home", home)
    assert done.returncode == 6
    assert "certificate" in done.stderr
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(
            f"https://127.0.0.1:{federation.port}/",
            verify=ssl.create_default_context(cafile=str(other / "ca.crt")),
            trust_env=False,
        )


def foreign_app(folder: Path, marker: Path, answers: Path) -> Path:
    """Write a Flower app of somebody else, whose client half would leave a mark."""
    app = folder / "foreign"
    (app / "foreign").mkdir(parents=True)
    (app / "foreign/__init__.py").write_text("")
    (app / "LICENSE").write_text("none\n")
    (app / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "foreign"\nversion = "1.0.0"\ndescription = "x"\nlicense = { file = "LICENSE" }\n'
        'dependencies = ["flwr>=1.42,<1.43"]\n[tool.hatch.build.targets.wheel]\npackages = ["foreign"]\n'
        '[tool.flwr.app]\npublisher = "somebody"\nfab-format-version = 1\nflwr-version-target = "1.42.0"\n'
        '[tool.flwr.app.components]\nserverapp = "foreign.server:app"\nclientapp = "foreign.client:app"\n'
    )
    (app / "foreign/client.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).write_text('imported')\n"
        "from flwr.app import Message\nfrom flwr.clientapp import ClientApp\napp = ClientApp()\n\n\n"
        "@app.train()\ndef train(message, context):\n"
        f"    Path({str(marker)!r}).write_text('trained')\n    return Message(message.content, reply_to=message)\n"
    )
    (app / "foreign/server.py").write_text(
        "import json\nfrom pathlib import Path\nfrom flwr.app import ConfigRecord, Message, RecordDict\n"
        "from flwr.serverapp import ServerApp\napp = ServerApp()\n\n\n@app.main()\ndef main(grid, context):\n"
        "    nodes = list(grid.get_node_ids())\n"
        "    empty = RecordDict({'c': ConfigRecord({})})\n"
        "    asked = [Message(empty, dst_node_id=n, message_type='train') for n in nodes]\n"
        "    replies = list(grid.send_and_receive(asked, timeout=60))\n"
        "    rows = [[m.has_error(), str(m.error.reason) if m.has_error() else ''] for m in replies]\n"
        f"    path = Path({str(answers)!r})\n    path.with_suffix('.new').write_text(json.dumps([len(nodes), rows]))\n"
        "    path.with_suffix('.new').rename(path)\n"
    )
    return app


def test_an_app_that_is_not_ours_runs_no_code_at_a_hospital(federation: Federation, tmp_path: Path):
    marker, answers = tmp_path / "marker", tmp_path / "answers"
    app, flwr_home = foreign_app(tmp_path, marker, answers), tmp_path / "flower"
    flwr_home.mkdir()
    config = (federation.coordinator / "flower/config.toml").read_text()
    (flwr_home / "config.toml").write_text(config)
    before = {s: sorted(p.name for p in (federation.home(s) / "flower/apps").iterdir()) for s in SITES}
    done = call("flwr", "run", app, "medlsdm", "--format", "json", FLWR_HOME=str(flwr_home))
    assert done.returncode == 0, done.stdout + done.stderr
    wait_for(answers.exists, 90, "the answers to the foreign app")
    nodes, rows = json.loads(answers.read_text())
    assert nodes == len(rows) == 3
    assert all(failed for failed, _ in rows), rows
    assert not marker.exists()
    after = {s: sorted(p.name for p in (federation.home(s) / "flower/apps").iterdir()) for s in SITES}
    assert before == after
    assert search([answers], federation.tokens).found == ()


def test_a_site_refuses_what_its_policy_forbids_and_the_round_goes_on(federation: Federation):
    policy = federation.home("site-c") / "policy.yaml"
    policy.write_text(re.sub(r"max_steps_per_round: \d+", "max_steps_per_round: 1", policy.read_text()))
    charged = (federation.home("site-c") / "ledger.jsonl").read_text()
    started = ask(
        "medlsdm-server", "launch", "--plan", federation.plan("second"), "--sites", "3", "--detach",
        "--home", federation.coordinator,
    )  # fmt: skip

    def first_round() -> Any:
        launch = ask("medlsdm-server", "status", "--home", federation.coordinator)["launch"]
        assert launch["state"] != "failed", launch["message"]
        return launch["id"] == started["id"] and launch["finished_rounds"]

    rows = {s["site"]: s for s in wait_for(first_round, 120, "the first round")[0]["sites"]}
    assert rows["site-c"]["refused"] == "the site's policy refused the request"
    assert rows["site-c"]["loss"] is None
    assert all(rows[s]["refused"] == "" and rows[s]["loss"] > 0 for s in ("site-a", "site-b"))
    assert (federation.home("site-c") / "ledger.jsonl").read_text() == charged
    card = federation.coordinator / "models" / f"{started['id']}.stage1-0001" / "card.json"
    assert json.loads(card.read_text())["sites"] == ["site-a", "site-b"]
    words = b"".join(r.body for r in federation.proxied.requests())
    assert b"the site's policy refused the request" in words
    assert b"are allowed" not in words
    assert "are allowed" in (federation.home("site-c") / "logs/rounds.log").read_text()


def test_what_was_sent_later_holds_no_identifier_either(federation: Federation):
    assert search(roots(federation), federation.tokens).found == ()


def test_a_killed_node_leaves_no_program_behind(federation: Federation):
    """While a round is going on, so that Flower's helpers are there too."""
    node, flwr_home = federation.nodes["site-b"], federation.home("site-b") / "flower"
    assert any("flower-supernode" in command for command in of_home(flwr_home).values())
    os.kill(node.pid, signal.SIGKILL)
    node.wait(10)
    wait_until_gone(flwr_home, 90)


def test_a_node_that_is_told_to_stop_says_so(federation: Federation):
    node, home = federation.nodes["site-a"], federation.home("site-a")
    node.terminate()
    assert node.wait(40) == 0
    wait_until_gone(home / "flower", 10)
    assert ask("medlsdm-node", "status", "--home", home)["activity"]["activity"] == "stopped"


def test_a_stopped_server_leaves_no_program_behind(federation: Federation):
    assert federation.server is not None
    flwr_home = federation.coordinator / "flower"
    assert any("flower-superlink" in command for command in of_home(flwr_home).values())
    federation.server.terminate()
    federation.server.wait(40)
    wait_until_gone(flwr_home, 20)
    assert ask("medlsdm-server", "status", "--home", federation.coordinator)["running"] is None
