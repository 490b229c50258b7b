"""The training loop. What it calls is set up in `session.py`; evaluation, saving and reporting are calls."""

from __future__ import annotations

import time

from dsdpo.model.rows import RowTensors
from dsdpo.train.engine import optimizer_step, set_learning_rate
from dsdpo.train.metrics import StepVector
from dsdpo.train.objective import step_objective
from dsdpo.train.session import Session
from dsdpo.train.steplog import StepEnd, StepLog


def train(s: Session) -> bool:
    """Run the schedule's steps.

    Returns:
        True when the run was asked to stop before its last step.

    Raises:
        NumericError: a loss or gradient norm is not finite; names the step and its pairs.
    """
    engine, config, device = s.engine, s.config, s.hardware.device
    log = StepLog(s)
    batches = s.loader.training_batches(range(s.schedule.total_steps), config.train_batch_size, config.seed)
    stopping = False
    s.reporter.start()
    engine.train()
    # ----------------------------------------------------------------------------------------------------------
    for step, batch in enumerate(batches):
        started = time.perf_counter()
        learning_rate = s.schedule.learning_rate(step)
        set_learning_rate(engine, learning_rate)
        vector = StepVector(device)
        row_losses = []

        references = s.reference.of_step(batch)
        objective = step_objective(engine, s.objective, batch, references, device)
        for micro_step, (row, reference) in enumerate(zip(batch.rows, references), 1):
            engine.set_gradient_accumulation_boundary(micro_step == len(batch.rows))
            outputs = engine(RowTensors.from_row(row, device))[: 2 * len(row.pairs)]
            total, losses, stats = objective(row, outputs, reference)
            # DeepSpeed averages gradients over ranks: times their number, this is the mean over the step's pairs.
            engine.backward(total * (s.ranks.world_size / len(batch.pair_ids)), scale_wrt_gas=False)
            grad_norm = optimizer_step(engine)
            vector.add(stats, losses)
            row_losses.append(losses)

        vector.reduce(stop=bool(s.stop_flag))
        seconds = time.perf_counter() - started
        stopping = log.end(StepEnd(step + 1, batch, vector, row_losses, grad_norm, learning_rate, seconds))
        if s.evaluation_is_due(step + 1):
            log.flush()
            s.evaluate(step + 1)
        if s.save_is_due(step + 1):
            log.flush()
            s.save(step + 1)
        if stopping:
            break
    # ----------------------------------------------------------------------------------------------------------
    log.flush()
    return stopping and step + 1 < s.schedule.total_steps
