"""DICOM in, (Scan, SemanticMap) out: admit, de-identify, verify, then build volumes.

``pipeline.deidentify`` takes a hospital's folder to a clean one, ``pairs.read_pairs`` reads the
clean folder as training pairs, ``write.write_synthetic_series`` exports what the model made.
"""
