"""What protects patients: the copy detector and the ledger of what training has spent."""
