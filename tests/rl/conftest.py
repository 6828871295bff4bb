"""A tiny model with images, a tokenizer of a few words, and yes/no questions for it."""

from dataclasses import dataclass, replace

import jax
import pytest

from data_prep.tokenizer import make_tokenizer
from infimed_jax import config
from infimed_jax.data.batch import Segment
from infimed_jax.data.chat import Tokenizer, load_tokenizer
from infimed_jax.data.images import ImageCache
from infimed_jax.data.prompts import question_text
from infimed_jax.data.sample import Question, Sample
from infimed_jax.data.storage import write_samples
from infimed_jax.models.params import init_params
from infimed_jax.sampling.policy import Policy
from tests.tiny import mesh, one_device, png  # noqa: F401
from tests.tiny import model as tiny_model


def each(score):
    """A reward of a batch from one of a single attempt, `(reply, finished, sample, settings) -> Reward`."""
    return lambda attempts, grpo: [score(a.reply, a.finished, a.sample, grpo) for a in attempts]


@dataclass
class Tiny:
    cfg: config.Config
    params: dict
    tokenizer: Tokenizer
    samples: list[Sample]

    @property
    def policy(self) -> Policy:
        return Policy.of(self.params, self.cfg, self.tokenizer, ImageCache())

    def prompts(self, samples: list[Sample]) -> list[Segment]:
        return Policy(self.cfg, None, self.tokenizer, None).prompts(samples, reasoning=True)  # needs no mesh

    @staticmethod
    def question(number: int, images: int = 1) -> Sample:
        return Question(
            id=f"tiny/train/{number}",
            source="tiny",
            split="train",
            images=tuple(png(number // 2 + 10 * i) for i in range(images)),  # two questions share an image
            kind="yes_no",
            question="Is it bright?" if number % 2 else "Is it dark, or is it round?",
            answer="yes" if number % 3 else "no",
        )


def make_tiny(folder) -> Tiny:
    """Under the current mesh."""
    text = question_text(replace(Tiny.question(0), question="Is it bright? Is it dark, or is it round?"), True)
    tokenizer = load_tokenizer(make_tokenizer([text] * 4, folder / "tokenizer", vocab_size=400))
    samples = [Tiny.question(i) for i in range(10)]
    write_samples(folder / "data", samples, name="tiny")
    cfg = config.Config(
        model=tiny_model(vocab_size=len(tokenizer) + 4),
        data=config.Data(str(folder / "data"), str(folder / "tokenizer"), context=160, images_per_row=4),
        optimizer=config.Optimizer(3e-2, warmup_fraction=0.0, schedule="constant", weight_decay=0.0),
        train=config.Train(
            global_batch=16, micro_batches=2, compute_dtype="float32", remat="none", logit_chunk=32, checkpoint_every=1
        ),
        sampling=config.Sampling(slots=16, burst=6),
        grpo=config.Grpo(steps=3, prompts=4, group_size=8, update_prompts=4, max_prompt=120, max_response=6),
    )
    params = init_params(jax.random.key(0), cfg.model)
    # Larger weights than at initialisation: else the tied embedding repeats the last token for ever.
    params = jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, params)
    return Tiny(cfg, params, tokenizer, samples)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    with one_device():
        return make_tiny(tmp_path_factory.mktemp("tiny"))
