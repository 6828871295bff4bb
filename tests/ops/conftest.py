from tests.tiny import mesh  # noqa: F401
