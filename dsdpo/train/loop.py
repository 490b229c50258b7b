"""The training loop. What it calls is set up in `session.py`; evaluation, saving and reporting are calls."""

from __future__ import annotations

import time

from dsdpo.engine.optimizer import optimizer_step, set_learning_rate
from dsdpo.model.packed import RowTensors
from dsdpo.objectives.batch import step_objective
from dsdpo.train.metrics import StepVector
from dsdpo.train.setup import Session
from dsdpo.train.steplog import StepEnd, StepLog


def train(s: Session) -> int:
    """Run the schedule's steps from `s.first_step` on.

    Returns:
        How many steps have been taken; fewer than there are when the run was asked to stop.

    Raises:
        NumericError: a loss or gradient norm is not finite; names the step and its pairs.
        IOFailure: a checkpoint cannot be written.
    """
    engine, config, device = s.engine, s.config, s.hardware.device
    log = StepLog(s)
    steps = range(s.first_step, s.schedule.total_steps)
    batches = s.loader.training_batches(steps, config.train_batch_size, config.seed)
    done = s.first_step
    s.reporter.start()
    if s.evaluation_is_missing(done) and not s.evaluate(done):
        return done
    engine.train()
    started = time.perf_counter()
    # ----------------------------------------------------------------------------------------------------------
    for step, batch in zip(steps, batches):
        learning_rate = s.schedule.learning_rate(step)
        set_learning_rate(engine, learning_rate)
        vector = StepVector(device)
        row_losses = []

        references = s.reference.of_step(batch)
        s.watch.beat(step)
        objective = step_objective(engine, s.objective, batch, references, device)
        for micro_step, (row, reference) in enumerate(zip(batch.rows, references), 1):
            engine.set_gradient_accumulation_boundary(micro_step == len(batch.rows))
            outputs = engine(RowTensors.from_row(row, device))[: 2 * len(row.pairs)]
            total, losses, stats = objective(row, outputs, reference)
            # DeepSpeed averages gradients over dp ranks: times their number, this is the mean over the step's pairs.
            engine.backward(total * (s.mesh.dp_size / len(batch.pair_ids)), scale_wrt_gas=False)
            grad_norm = optimizer_step(engine)
            vector.add(stats, losses)
            row_losses.append(losses)
            s.watch.beat(step)

        vector.reduce(bool(s.stop_flag), s.saver.is_written, s.saver.has_failed, grad_norm)
        log.flush()  # of the step before: the device never has more than one step to do
        done = step + 1
        if s.save_is_due(done) or s.evaluation_is_due(done):
            vector.read()  # waits for this step as well: its time is its own
        log.end(StepEnd(done, batch, vector, row_losses, learning_rate, time.perf_counter() - started))
        if s.save_is_due(done):
            log.flush()
            s.save(done)
        if log.stopping:
            break
        if s.evaluation_is_due(done):
            log.flush()
            if not s.evaluate(done):
                break
        started = time.perf_counter()
    # ----------------------------------------------------------------------------------------------------------
    log.flush()
    return done
