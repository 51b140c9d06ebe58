"""What the tests of the diffusers integration share."""

import pytest
from tiny_pipelines import TinyPipe, build


@pytest.fixture
def sd() -> TinyPipe:
    """A tiny Stable Diffusion pipe of the test's own."""
    return build("sd")
