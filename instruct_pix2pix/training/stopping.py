"""Ctrl-C, and the SIGTERM of a cluster that wants its machine back, wait for the end of an update."""

import logging
import signal

import torch

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a terminal and a cluster send them to loader processes too
ASK_EVERY = 10  # updates between two questions to the other processes


class StopRequest:
    """Notes a signal, so that the update can be finished and kept in a checkpoint. A second one does not wait."""

    def __init__(self):
        self.noted = False

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True
        logger.info("stopping when this update is done and kept in a checkpoint; once more stops at once")

    def all_ranks_agree(self, accelerator, step: int) -> bool:
        """Whether to stop after update `step`: where one process was asked to, all do."""
        if accelerator.num_processes == 1:
            return self.noted
        if step % ASK_EVERY:
            return False
        return bool(accelerator.reduce(torch.tensor(float(self.noted), device=accelerator.device), "sum"))


def leave_stopping_to_the_trainer(worker: int) -> None:
    """For a loader process, as DataLoader's worker_init_fn."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
