"""Every story is told twice: in tensors as on any device, in floats as on a CPU."""

import pytest

from guardtest.stories import TWINS, Story


@pytest.fixture(params=TWINS.values(), ids=TWINS.keys())
def story(request):
    def begin(*args, **kwargs) -> Story:
        return Story(request.param, *args, **kwargs)

    return begin
