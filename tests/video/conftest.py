from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture
def untyped() -> Iterator[None]:
    """Wrong types go in on purpose: the errors that users see are tested, not those of the type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
