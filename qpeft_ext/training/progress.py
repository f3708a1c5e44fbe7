"""One progress bar for a training run, in place of the Trainer's log lines."""

from __future__ import annotations

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..utils.progress import progress_bar


class TrainingBar(TrainerCallback):
    """A progress bar with the steps, the time left, and the latest loss and dev measure.

    Args:
        name: what is trained.
        measure: a name in the logs of `Trainer`, shown beside the loss.
    """

    def __init__(self, name: str, measure: str) -> None:
        self.name, self.measure = name, measure
        self.bar: tqdm | None = None
        self.latest: dict[str, str] = {}

    @classmethod
    def install(cls, trainer: Trainer, name: str, measure: str) -> None:
        """Show this bar in place of the bar and the log lines of ``trainer``."""
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(cls(name, measure))

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.bar = progress_bar(total=state.max_steps, desc=f"{self.name} (train)", unit="step")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        for name in ("loss", self.measure):
            if logs and name in logs:
                self.latest[name.removeprefix("eval_")] = f"{float(logs[name]):.3f}"
        if self.bar is not None:
            self.bar.set_postfix(self.latest)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.close()
