"""Label-conditioned synthesis of 3D medical volumes, trained where the patients are."""

__version__ = "0.1.0"
