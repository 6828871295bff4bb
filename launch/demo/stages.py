"""The demo's compute: six training stages, GRPO with its control, each evaluated on held-out images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax

from infimed_jax.evaluation.respondents import PolicyRespondent, Terms
from infimed_jax.evaluation.run import evaluate
from infimed_jax.evaluation.statistics import majority_baseline
from infimed_jax.models.params import param_count
from infimed_jax.rl.grpo import grpo
from infimed_jax.sampling.policy import Policy
from infimed_jax.sharding import make_mesh
from infimed_jax.train.stage import train
from launch.cli.progress import step_reports
from launch.demo.chain import BLIND, LAST_DIRECT, LAST_SUPERVISED, REASONING, REINFORCED, SAMPLED, STAGES, Chain
from launch.demo.data import Prepared, make_data, test_samples


@dataclass(frozen=True)
class Trained:
    """A stage or a GRPO run."""

    measure: str
    """loss or reward."""
    first: float
    """Mean of the measure over the first steps."""
    last: float
    steps: int
    tokens: int
    seconds: float

    @property
    def facts(self) -> dict[str, float]:
        """What `summary.json` holds."""
        ends = {f"{self.measure}_first": self.first, f"{self.measure}_last": self.last}
        return {"steps": self.steps, "tokens": self.tokens, **ends, "seconds": self.seconds}

    @property
    def line(self) -> str:
        return f"{self.steps} steps, {self.measure} {self.first:.3f} -> {self.last:.3f}"


@dataclass(frozen=True)
class Scored:
    """An evaluation."""

    summary: dict[str, Any]
    """`Evaluation.summary()`."""

    @property
    def accuracy(self) -> float:
        return self.summary["accuracy"]

    @property
    def line(self) -> str:
        low, high = self.summary["interval"]
        return f"{self.accuracy:.1%} of {self.summary['n']:,} [{low:.1%}, {high:.1%}]"


@dataclass(frozen=True)
class Results:
    data: Prepared
    baseline: float
    """Accuracy of the most frequent answer per question template."""
    trained: dict[str, Trained]
    scored: dict[str, Scored]


def run(chain: Chain) -> Results:
    """Every step up to the export, in order."""
    data = chain.step("data", Prepared, lambda: make_data(chain))
    samples = test_samples(chain)
    config = chain.stage_config("sft_medical")
    counts = param_count(config.model)
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if name != "total")
    chain.progress.say(f"        model: {counts['total']:,} parameters ({parts})")
    results = Results(data, majority_baseline(samples).accuracy, {}, {})
    with jax.set_mesh(make_mesh(config.mesh)):
        previous = ""
        for stage in STAGES:
            results.trained[stage] = chain.step(stage, Trained, lambda s=stage, p=previous: _train(chain, s, p))
            previous = stage
            results.scored[stage] = _score(chain, stage, stage, samples)
        results.scored[BLIND] = _score(chain, BLIND, LAST_DIRECT, samples)
        results.scored[LAST_SUPERVISED + SAMPLED] = _score(chain, LAST_SUPERVISED + SAMPLED, LAST_SUPERVISED, samples)
        for stage in REINFORCED:
            results.trained[stage] = chain.step(stage, Trained, lambda s=stage: _grpo(chain, s))
            for name in (stage, stage + SAMPLED):
                results.scored[name] = _score(chain, name, stage, samples)
    return results


def _train(chain: Chain, stage: str, previous: str) -> Trained:
    config = chain.stage_config(stage)
    if previous:
        config = replace(config, train=replace(config.train, init_from=str(chain.run_folder(previous))))
    result = train(config, on_step=step_reports(chain.report))
    return Trained("loss", result.loss_first, result.loss_last, result.steps, result.tokens, result.seconds)


def _grpo(chain: Chain, stage: str) -> Trained:
    """GRPO from the last supervised stage; `control` is the same run with a reward that teaches nothing."""
    config = chain.stage_config("grpo")
    output, start = str(chain.run_folder(stage)), str(chain.run_folder(LAST_SUPERVISED))
    config = replace(config, train=replace(config.train, output=output, stage=stage, init_from=start))
    if stage == "control":
        config = replace(config, grpo=replace(config.grpo, reward="constant"))
    result = grpo(config, on_step=step_reports(chain.report))
    return Trained("reward", result.reward_first, result.reward_last, result.steps, result.tokens, result.seconds)


def _score(chain: Chain, name: str, stage: str, samples: list[Any]) -> Scored:
    """Greedy replies; one sampled reply a question at GRPO's temperature for SAMPLED, no images for BLIND."""

    def work() -> Scored:
        policy = Policy.open(chain.run_folder(stage), chain.options.settings)
        sampling = policy.config.sampling
        if name.endswith(SAMPLED):
            sampling = replace(sampling, temperature=chain.stage_config("grpo").grpo.temperature)
        terms = Terms(sampling, reasoning=stage in REASONING, image=name != BLIND)
        respond = PolicyRespondent(policy, terms, jax.random.key(chain.options.seed), chain.report)
        folder = chain.folder / "evaluation" / name
        return Scored(evaluate(samples, respond, terms, folder=folder, name=name).summary())

    return chain.step(f"evaluation_{name}", Scored, work)
