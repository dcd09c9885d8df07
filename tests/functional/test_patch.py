"""`patch_torch()` replaces the functions of torch.nn.utils, and restores them afterward."""

import sys
import threading

import pytest
import torch
from torch.nn.utils import clip_grad as torchs

# Imported before any patch, as in user code.
from torch.nn.utils import clip_grad_norm_ as held_clip_grad_norm_
from torch.nn.utils import get_total_norm as held_get_total_norm

import fastguard
from fastguard.functional import patch
from guardtest.grads import parameters

PLACES = [
    (torch.nn.utils, "clip_grad_norm_", patch.clip_grad_norm_),
    (torch.nn.utils, "clip_grad_value_", fastguard.clip_grad_value_),
    (torch.nn.utils, "clip_grads_with_norm_", fastguard.clip_grads_with_norm_),
    (torch.nn.utils, "get_total_norm", patch.get_total_norm),
    (torchs, "clip_grad_norm_", patch.clip_grad_norm_),
    (torchs, "clip_grad_value_", fastguard.clip_grad_value_),
    (torchs, "_clip_grads_with_norm_", fastguard.clip_grads_with_norm_),
    (torchs, "_get_total_norm", patch.get_total_norm),
]
TORCHS_OWN = [getattr(place, name) for place, name, _ in PLACES]


def is_patched() -> bool:
    found = {getattr(place, name) is ours for place, name, ours in PLACES}
    assert len(found) == 1, "patched in part"
    return found.pop()


@pytest.fixture(autouse=True)
def undone():
    """Checks that each test starts and ends with torch's functions."""
    assert not is_patched()
    yield
    left = is_patched()
    while is_patched():
        fastguard.unpatch_torch()
    assert not left
    assert [getattr(place, name) for place, name, _ in PLACES] == TORCHS_OWN


def test_a_with_block():
    with fastguard.patch_torch():
        assert is_patched()
    assert not is_patched()


def test_two_calls():
    fastguard.patch_torch()
    assert is_patched()
    fastguard.unpatch_torch()
    assert not is_patched()


def test_an_exception_in_the_block_undoes_the_patch_and_propagates():
    with pytest.raises(KeyError), fastguard.patch_torch():
        raise KeyError
    assert not is_patched()


def test_nested_patches_are_counted():
    with fastguard.patch_torch():
        fastguard.patch_torch()
        with fastguard.patch_torch():
            assert is_patched()
        assert is_patched()
        fastguard.unpatch_torch()
        assert is_patched()
    assert not is_patched()


def test_undoing_too_often_is_an_error():
    with pytest.raises(RuntimeError, match="torch is not patched"):
        fastguard.unpatch_torch()
    with fastguard.patch_torch():
        pass
    with pytest.raises(RuntimeError, match="call patch_torch"):
        fastguard.unpatch_torch()


def test_patches_of_other_libraries_are_restored(monkeypatch):
    def other_patch(*args):
        raise AssertionError

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", other_patch)
    fastguard.patch_torch()
    assert torch.nn.utils.get_total_norm is patch.get_total_norm
    fastguard.unpatch_torch()
    assert torch.nn.utils.get_total_norm is other_patch


def test_callers_get_the_function_of_fastguard():
    grad = torch.full((10,), 1e20)  # torch's norm is inf, so it clips the gradient to 0
    with fastguard.patch_torch():
        assert torch.nn.utils.clip_grad_norm_(parameters(grad), 1.0).isfinite()
    assert grad.norm() == pytest.approx(1.0)
    with fastguard.patch_torch(), pytest.warns(FutureWarning, match="deprecated"):
        # torch's deprecated alias looks the name up at each call.
        assert torch.nn.utils.clip_grad_norm(parameters(grad * 1e20), 1.0).isfinite()


@pytest.mark.parametrize("module", ["torch.nn.utils", "torch.nn.utils.clip_grad"])
def test_each_of_the_four_names_is_replaced(module):
    """Trainers may import from either module; sharded trainers use the private names."""
    place = sys.modules[module]
    private = "_" if place is torchs else ""
    grad = torch.full((10,), 1e20)  # torch's norm is inf
    with fastguard.patch_torch():
        norm = getattr(place, f"{private}get_total_norm")([grad])
        assert norm == pytest.approx(1e20 * 10**0.5)
        getattr(place, f"{private}clip_grads_with_norm_")(parameters(grad), 1.0, norm)
        assert grad.norm() == pytest.approx(1.0)
        assert place.clip_grad_norm_(parameters(grad * 1e20), 1.0).isfinite()
        with pytest.raises(ValueError, match="clip_value"):  # torch flips the signs
            place.clip_grad_value_(parameters(grad), -1.0)


def test_names_imported_before_the_patch_remain_torchs():
    grad = torch.full((10,), 1e20)
    with fastguard.patch_torch():
        assert held_get_total_norm([grad]) == float("inf")
        # this is torch's function, but it calls the replacements
        assert held_clip_grad_norm_ is TORCHS_OWN[0]
        assert held_clip_grad_norm_(parameters(grad), 1.0).isfinite()
    assert grad.norm() == pytest.approx(1.0)
    assert held_clip_grad_norm_(parameters(grad * 1e20), 1.0) == float("inf")


def test_a_name_imported_while_patched_remains_fastguards():
    with fastguard.patch_torch():
        from torch.nn.utils import clip_grad_norm_
    assert clip_grad_norm_ is patch.clip_grad_norm_


def test_the_replacements_do_not_call_the_patched_names(monkeypatch):
    def recursion(*args, **kwargs):
        raise AssertionError("a function of torch.nn.utils was called")

    for place, name, _ in PLACES:
        monkeypatch.setattr(place, name, recursion)
    params = parameters(torch.tensor([3.0, 4.0]))
    assert fastguard.clip_grad_norm_(params, 1.0) == 5.0
    fastguard.clip_grad_value_(params, 0.5)
    fastguard.clip_grads_with_norm_(params, 1.0, fastguard.get_total_norm([params[0].grad]))


def test_the_patch_is_process_wide():
    seen = []
    with fastguard.patch_torch():
        thread = threading.Thread(target=lambda: seen.append(is_patched()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_many_threads_at_once():
    n_threads, rounds = 8, 200
    start = threading.Barrier(n_threads)
    wrong: list[int] = []

    def work(k: int) -> None:
        start.wait()
        for _ in range(rounds):
            with fastguard.patch_torch():
                if torch.nn.utils.clip_grad_norm_ is not patch.clip_grad_norm_:
                    wrong.append(k)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(n_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert wrong == []
    assert not is_patched()


def test_importing_fastguard_patches_nothing():
    modules = {f.__module__ for f in TORCHS_OWN}
    assert all(module.startswith("torch.nn.utils") for module in modules), modules
