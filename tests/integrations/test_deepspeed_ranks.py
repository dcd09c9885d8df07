"""DeepSpeed on two ranks: the guard needs a group for partitions in plain tensors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import fastguard
from guardtest import require
from guardtest.ranks import Ranks

CLIPPED_TO = 0.5


class ForDeepSpeed(fastguard.GuardedOptimizer):
    """The class of docs/recipes.md."""

    @property
    def overflow(self):
        return self.last is not None and bool(self.last.found_inf)


def norms(stage: int, dtype: str | None, joined: bool) -> list[float] | str:
    """Returns the norms of two steps that DeepSpeed clipped, or the message of the error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        deepspeed = require("deepspeed")
        # DeepSpeed compiles its collectives in shared memory at the first use, which takes minutes.
        patch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
        opt = ForDeepSpeed(
            torch.optim.AdamW(model.parameters(), lr=0.01),
            max_norm=1.0,
            group=dist.group.WORLD if joined else None,
        )
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": CLIPPED_TO,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if dtype is not None:
            config[dtype] = {"enabled": True}
        try:
            engine, *_ = deepspeed.initialize(model=model, optimizer=opt, config=config)
            dtype_of = next(engine.module.parameters()).dtype
            for _ in range(2):
                x = torch.ones(4, 8, dtype=dtype_of) * (1 + dist.get_rank())
                engine.backward(engine(x).square().mean() * 1e3)
                engine.step()
        except ValueError as error:
            return str(error)
    return [record.total_norm for record in opt.records()][-2:]


@pytest.mark.parametrize(("stage", "dtype"), [(1, "bf16"), (2, None), (3, "bf16")])
def test_partitions_need_a_group(stage: int, dtype: str | None) -> None:
    with Ranks(2) as ranks:
        for error in ranks.run(norms, stage, dtype, False):
            assert "shards of DeepSpeed ZeRO in plain tensors" in error
            assert "pass group=torch.distributed.group.WORLD" in error
        first, second = ranks.run(norms, stage, dtype, True)
    assert (
        first == second == pytest.approx([CLIPPED_TO] * 2, rel=1e-2)
    )  # the norm over both partitions


def test_whole_gradients_need_no_group() -> None:
    with Ranks(2) as ranks:
        first, second = ranks.run(norms, 0, None, False)
    assert first == second == pytest.approx([CLIPPED_TO] * 2, rel=1e-2)
