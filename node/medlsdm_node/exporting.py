"""The only way out: waiting synthetic volumes pass the gate and leave with card and receipt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from medlsdm.errors import DataError, GateError
from medlsdm.sharing.bundle import export
from medlsdm.sharing.gate import AuditReport, audit
from medlsdm.sharing.receipt import ExportReceipt
from medlsdm.types import Scan, SemanticMap
from medlsdm_node.home import NodeHome
from medlsdm_node.policy import load_policy
from medlsdm_node.status import write_activity
from medlsdm_node.vault import MAP, SYNTHETIC, Vault


def export_waiting(home: NodeHome, folder: Path, *, with_labels: bool = True) -> tuple[ExportReceipt, AuditReport, int]:
    """Audit every waiting volume against this site's patients and write those that pass.

    What was blocked is dropped and counted in the audit log; it is never made again until it passes. An
    export holds the volumes of one model; the number of those that still wait for the next is returned.

    Raises:
        DataError: Nothing waits.
        GateError: The gate refused the whole export.
    """
    from deid_tools.write import write_synthetic_series

    vault, policy = Vault(home), load_policy(home.policy_file)
    names = vault.names(SYNTHETIC)
    if not names:
        raise DataError("No synthetic volume waits for export.", "Run 'medlsdm-node synthesise LABELS' first.")
    with home.locked("export"):
        write_activity(home, "auditing", steps=len(names))
        waiting = {name: vault.synthetic(name) for name in names}
        digest = waiting[names[0]][0].provenance.card_digest
        chosen = [name for name in names if waiting[name][0].provenance.card_digest == digest]
        volumes, labels = zip(*(waiting[name] for name in chosen), strict=True)

        def references() -> Iterator[tuple[Scan, SemanticMap]]:
            return vault.pairs()

        report = None
        try:
            report = audit(volumes, labels, references, policy.gate)
            head = home.audit.append("gate", **report.to_public_json())
            card, card_markdown = _card(home, digest)
            receipt = export(
                volumes, labels, report, folder, card=card, card_markdown=card_markdown, site=home.settings.site,
                signing_key=home.identity, audit_head=head, write_dicom=write_synthetic_series,
                include_labels=with_labels,
            )  # fmt: skip
        except GateError as error:
            home.audit.append("export-refused", reason=error.message)
            if report is not None:
                _drop(vault, chosen)  # a batch that failed is gone: trying until it passes would hide copies
            raise
        finally:
            write_activity(home, "idle")
        home.audit.append("export", id=receipt.id, files=len(receipt.files), signature=receipt.signature)
        _drop(vault, chosen)
    return receipt, report, len(names) - len(chosen)


def _drop(vault: Vault, names: list[str]) -> None:
    for name in names:
        vault.delete(SYNTHETIC, name)
        vault.delete(MAP, name)


def _card(home: NodeHome, digest: str) -> tuple[bytes, str]:
    """Return the model card that the volumes' provenance names."""
    from medlsdm.checkpoints import load_checkpoint

    for folder in sorted(home.models.iterdir()):
        if folder.name.startswith(".") or ".stage2-" not in folder.name:
            continue
        card = load_checkpoint(folder).card
        if card.digest == digest:
            return card.to_json_bytes(), card.to_markdown()
    raise DataError("The model that made the volumes is no longer here.", "Synthesise again.")
