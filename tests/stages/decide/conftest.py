"""Every story runs twice: with tensors as on any device, and with floats as on a CPU."""

import pytest

from guardtest.stories import TWINS, Story


@pytest.fixture(params=TWINS.values(), ids=TWINS.keys())
def story(request):
    def begin(*args, **kwargs) -> Story:
        return Story(request.param, *args, **kwargs)

    return begin
