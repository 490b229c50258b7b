import pytest
import torch
from transformers import get_scheduler

from dsdpo.train.schedule import Schedule


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_learning_rates_are_those_of_transformers(kind: str, warmup: int) -> None:
    total, peak = 20, 3e-4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    schedule = Schedule(total, warmup, peak, kind)
    for step in range(total):
        assert schedule.learning_rate(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()
