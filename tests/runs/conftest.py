"""The model, samples and tokenizer that tests/train uses."""

from tests.train.conftest import dataset, model, stage, tokenizer_folder

__all__ = ["dataset", "model", "stage", "tokenizer_folder"]
