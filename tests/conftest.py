"""Settings of the whole suite."""

from hypothesis import HealthCheck, settings

# A busy machine must fail nothing: neither an example's time nor that of drawing it is asserted.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
