"""InfiMed-JAX: trains, aligns, evaluates and exports the InfiMed medical vision-language models."""

__version__ = "0.1.0"
