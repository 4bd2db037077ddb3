"""DICOM in, (Scan, SemanticMap) out."""
