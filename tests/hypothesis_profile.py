"""How many examples hypothesis draws."""

from hypothesis import settings


def examples(full: int, **options: object) -> settings:
    """Settings of `full` examples, or of as few as the profile `dev` draws (see tests/conftest.py)."""
    profile = settings.get_current_profile_name()
    return settings(max_examples=min(full, settings().max_examples) if profile == "dev" else full, **options)
