"""The training loop. What it calls is set up in `setup.py`; what follows a step is in `run.py`."""

from __future__ import annotations

import torch

from dsdpo.engine.optimizer import optimizer_step, set_learning_rate
from dsdpo.train.metrics import MetricSums
from dsdpo.train.run import Run


def train(run: Run) -> None:
    """Take the steps that are left, save and evaluate on the way, and export the weights.

    Raises:
        StopRequested: the run was asked to end; its state is saved.
        NumericError: a loss or gradient norm is not finite; names the step and its examples.
        IOFailure: a checkpoint or the weights cannot be written.
    """
    engine, objective = run.engine, run.objective
    run.begin()
    # ----------------------------------------------------------------------------------------------------------
    for step, batch in run.batches():
        learning_rate = run.schedule.learning_rate(step)
        set_learning_rate(engine, learning_rate)
        reference = run.reference.logps(batch)
        run.watchdog.beat(step)
        grad_norm: torch.Tensor | float = 0.0
        denominator = objective.denominator(batch)
        # a step without loss tokens updates nothing
        micro_batches = batch.to_compute(objective.first_alone) if denominator > 0 else []
        if micro_batches:
            loss_of = objective.bind(batch, reference, run.forward)
            # DeepSpeed averages gradients over data-parallel ranks: times their number, this is the mean over the step.
            scale = run.mesh.dp_size / denominator
        run.scaling.begin_step()
        again = True
        while again:  # once; in fp16 until the gradients fit
            sums = MetricSums(objective.metrics, run.hardware.device)
            for number, micro_batch in enumerate(micro_batches, 1):
                engine.set_gradient_accumulation_boundary(number == len(micro_batches))
                loss = loss_of(micro_batch, run.forward(micro_batch))
                engine.backward(loss.total * scale, scale_wrt_gas=False)
                grad_norm = optimizer_step(engine)
                sums.add(loss)
                run.watchdog.beat(step)
            again = bool(micro_batches) and run.scaling.computes_again(sums.per_example)
        sums.reduce(grad_norm, bool(run.stop_flag), run.saver.status)
        if run.end_step(step, batch, sums, learning_rate):
            break
    # ----------------------------------------------------------------------------------------------------------
    run.finish()
