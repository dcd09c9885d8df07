"""A diagnosis on a GPU has the same findings and triggers no device-side assert."""

import torch
from torch import nn

import fastguard


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    ).cuda()


def batch(n_classes: int = 10):
    return torch.randn(16, 3, 8, 8, device="cuda"), torch.arange(16, device="cuda") % n_classes


def test_a_healthy_model_has_no_findings_and_is_not_changed():
    for dtype in (None, torch.bfloat16, torch.float16):
        model = classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        images, labels = batch()
        rng = torch.cuda.get_rng_state()
        autocast = torch.autocast("cuda", dtype) if dtype else None
        found = fastguard.diagnose(
            model, (images, labels), nn.CrossEntropyLoss(), optimizer, autocast=autocast
        )
        assert found.ok, str(found)
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
        assert torch.equal(rng, torch.cuda.get_rng_state()) and not optimizer.state


def test_after_an_invalid_label_the_device_is_still_usable():
    found = fastguard.diagnose(classifier(), batch(n_classes=11), nn.CrossEntropyLoss())
    assert [f.kind for f in found.errors] == ["index-out-of-range"]
    assert torch.ones(3, device="cuda").sum().item() == 3


def test_an_overflow_is_attributed_to_float16():
    model = classifier()
    nn.init.constant_(model[0].bias, 1e5)
    autocast = torch.autocast("cuda", torch.float16)
    found = fastguard.diagnose(model, batch(), nn.CrossEntropyLoss(), autocast=autocast)
    assert found.of("float16-range")[0].where == "0 (Conv2d)"
