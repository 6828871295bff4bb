"""The quickstart's compute: five training stages, GRPO with its control, each evaluated on held-out images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax

from infimed_jax.config import Config
from infimed_jax.data.chat import load_tokenizer
from infimed_jax.data.storage import open_samples
from infimed_jax.evaluation.run import Evaluation, evaluate
from infimed_jax.evaluation.statistics import majority_baseline
from infimed_jax.models.compute import Compute
from infimed_jax.models.params import param_count
from infimed_jax.rl.grpo import grpo
from infimed_jax.runs.parameters import load_params
from infimed_jax.sampling.weights import sampler_weights
from infimed_jax.sharding import make_mesh
from infimed_jax.train.loop import train
from launch.progress import step_note
from launch.quickstart import LAST_SUPERVISED, REASONING, SAMPLED, STAGES, Chain
from launch.quickstart_data import make_data, test_samples

EDGE = 0.1
"""Share of the steps whose mean is a run's first and its last reward."""


def run(chain: Chain) -> dict[str, Any]:
    """Every step in order; the result of each by name, evaluations under `evaluation`."""
    results: dict[str, Any] = {"data": chain.step("data", "Data", lambda: make_data(chain))}
    samples = test_samples(chain)
    results["baseline"] = majority_baseline(samples).accuracy
    config = chain.stage_config("sft_medical")
    counts = param_count(config.model)
    chain.progress.say(f"        model: {counts['total']:,} parameters ({', '.join(_parts(counts))})")
    evaluations: dict[str, Any] = {}
    with jax.set_mesh(make_mesh(config.mesh)):
        previous = ""
        for stage, title in STAGES.items():
            results[stage] = chain.step(stage, title, lambda s=stage, p=previous: _train(chain, s, p))
            previous = stage
            evaluations[stage] = _evaluation(chain, stage, f"Evaluation: {title}", samples)
        evaluations["blind"] = _evaluation(
            chain, "sft_cross_distribution", "Evaluation without images", samples, image=False
        )
        title = f"Sampled replies: {STAGES[LAST_SUPERVISED]}"
        evaluations[LAST_SUPERVISED + SAMPLED] = _evaluation(chain, LAST_SUPERVISED, title, samples, sampled=True)
        for name, label, note in (("grpo", "GRPO", ""), ("control", "GRPO control", " (constant reward)")):
            results[name] = chain.step(name, label + note, lambda n=name: _grpo(chain, n, previous))
            evaluations[name] = _evaluation(chain, name, f"Evaluation: {label}", samples)
            title = f"Sampled replies: {label}"
            evaluations[name + SAMPLED] = _evaluation(chain, name, title, samples, sampled=True)
    return results | {"evaluation": evaluations}


def _parts(counts: dict[str, int]) -> list[str]:
    return [f"{name} {count:,}" for name, count in counts.items() if name != "total"]


def _train(chain: Chain, stage: str, previous: str) -> tuple[dict[str, Any], str]:
    config = chain.stage_config(stage)
    if previous:
        config = replace(config, train=replace(config.train, init_from=str(chain.run_folder(previous))))

    def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
        chain.progress.update(step / total, step_note(step, total, metrics))

    result = train(config, on_step=on_step)
    values = {
        "steps": result.steps,
        "tokens": result.tokens,
        "loss_first": result.loss_first,
        "loss_last": result.loss_last,
        "seconds": result.seconds,
    }
    return values, f"{result.steps} steps, loss {result.loss_first:.3f} -> {result.loss_last:.3f}"


def _grpo(chain: Chain, name: str, previous: str) -> tuple[dict[str, Any], str]:
    """GRPO from the last supervised stage; `control` is the same run with a reward that teaches nothing."""
    config = chain.stage_config("grpo")
    output, start = str(chain.run_folder(name)), str(chain.run_folder(previous))
    config = replace(config, train=replace(config.train, output=output, stage=name, init_from=start))
    if name == "control":
        config = replace(config, grpo=replace(config.grpo, reward="constant"))
    params, _ = load_params(start)

    def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
        chain.progress.update(step / total, step_note(step, total, metrics))

    result = grpo(
        config,
        params=params,
        samples=open_samples(config.data.dataset),
        tokenizer=load_tokenizer(config.data.tokenizer),
        on_step=on_step,
    )
    history = result.history
    edge = max(1, round(EDGE * len(history)))
    values = {
        "steps": len(history),
        "reward_first": sum(row["reward"] for row in history[:edge]) / edge,
        "reward_last": sum(row["reward"] for row in history[-edge:]) / edge,
        "seconds": sum(row["seconds"] for row in history),
        "dropped": result.dropped,
    }
    return values, f"{values['steps']} steps, reward {values['reward_first']:.3f} -> {values['reward_last']:.3f}"


def _evaluation(
    chain: Chain, stage: str, title: str, samples: list[Any], *, image: bool = True, sampled: bool = False
) -> dict[str, Any]:
    """Greedy replies, or one drawn reply a question at GRPO's own temperature; `image=False` is the blind control."""
    name = (stage if image else "blind") + (SAMPLED if sampled else "")

    def work() -> tuple[dict[str, Any], str]:
        params, _ = load_params(chain.run_folder(stage))
        config = chain.stage_config("grpo" if stage in ("grpo", "control") else stage)
        if sampled:
            temperature = chain.stage_config("grpo").grpo.temperature  # also of the stages before
            config = replace(config, sampling=replace(config.sampling, temperature=temperature))
        evaluation = _evaluate(chain, config, params, samples, name, reasoning=stage in REASONING, image=image)
        summary = evaluation.summary()
        low, high = summary["interval"]
        return summary, f"{summary['accuracy']:.1%} of {summary['n']:,} [{low:.1%}, {high:.1%}]"

    return chain.step(f"evaluation_{name}", title, work)


def _evaluate(
    chain: Chain, config: Config, params: Any, samples: list[Any], name: str, *, reasoning: bool, image: bool
) -> Evaluation:
    compute = Compute.of(config.train)
    return evaluate(
        samples,
        weights=sampler_weights(params, config.model, compute.dtype),
        model=config.model,
        compute=compute,
        tokenizer=load_tokenizer(config.data.tokenizer),
        sampling=config.sampling,
        key=jax.random.key(chain.options.seed),
        reasoning=reasoning,
        image=image,
        folder=chain.folder / "evaluation" / name,
        name=name,
        on_progress=lambda done, total, tokens: chain.progress.update(done / total, f"{done}/{total} questions"),
    )
