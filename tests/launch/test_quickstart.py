"""The quickstart's chain: what it announces is what it runs."""

from types import SimpleNamespace

from infimed_jax.config import Mesh
from launch import quickstart_stages
from launch.quickstart import planned_steps


def test_every_step_that_runs_has_its_share_of_the_time_left(monkeypatch):
    """A step without one would stop the chain when it ends."""
    titles = []
    chain = SimpleNamespace(
        step=lambda name, title, work: titles.append(title) or {},
        stage_config=lambda stage: SimpleNamespace(model=None, mesh=Mesh(1, 1, 1)),
        progress=SimpleNamespace(say=print),
    )
    monkeypatch.setattr(quickstart_stages, "test_samples", lambda chain: [])
    monkeypatch.setattr(quickstart_stages, "majority_baseline", lambda samples: SimpleNamespace(accuracy=0.0))
    monkeypatch.setattr(quickstart_stages, "param_count", lambda model: {"total": 0})
    quickstart_stages.run(chain)
    assert [*titles, "Hugging Face export", "Report"] == list(planned_steps())
