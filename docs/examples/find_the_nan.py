"""A bad batch is skipped; then its replay names the operation that produced the first NaN."""

import torch
from torch import nn
from torch.nn import functional as F

import fastguard


class CosineHead(nn.Module):
    """Classifies by the angle to one vector per class."""

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        self.classes = nn.Parameter(torch.randn(n_classes, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 10 * (x / x.norm(dim=1, keepdim=True)) @ F.normalize(self.classes, dim=1).T


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), CosineHead(32, 4))
nn.init.zeros_(model[0].bias)
opt = fastguard.GuardedOptimizer(
    torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
    max_norm=1.0,
    named_parameters=model.named_parameters(),
)

batches = [(torch.randn(8, 16), torch.randint(0, 4, (8,))) for _ in range(30)]
batches[20][0][3] = 0.0  # an empty sample: all features are 0
model[0].bias.requires_grad_(False)  # so that its features stay 0

for number, (inputs, targets) in enumerate(batches):
    loss = F.cross_entropy(model(inputs), targets)
    loss.backward()
    opt.step(loss=loss, tag=number)  # skips batch 20
    opt.zero_grad()

(bad,) = [record for record in opt.records() if record.is_incident]
print(bad)
assert bad.tag == 20

report = fastguard.explain_nonfinite(model, batches[bad.tag], F.cross_entropy)
print(report)
assert report.module == "2 (CosineHead)"
assert report.operation == "aten.div.Tensor"
