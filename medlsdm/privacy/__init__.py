"""What protects patients: the copy detector and the ledger of what training has spent."""

MIN_PATIENTS = 5
"""Below this many patients no threshold can be calibrated, and nothing is exported."""
