"""The training tests' stage in seconds, here too."""

from tests.train.conftest import dataset, stage, tokenizer_folder

__all__ = ["dataset", "stage", "tokenizer_folder"]
