"""A tracker that keeps nothing."""

from typing import Any, Optional


class NoTracker:
    """An sbi `Tracker` that writes nothing to disk.

    Pass it as `tracker=` where no training log is wanted; `inference.summary` holds
    the same numbers.
    """

    @property
    def log_dir(self) -> Optional[str]:
        return None

    def log_metric(self, name: str, value: float, step: Optional[int] = None) -> None:
        pass

    def log_metrics(
        self, metrics: dict[str, float], step: Optional[int] = None
    ) -> None:
        pass

    def log_params(self, params: dict[str, Any]) -> None:
        pass

    def add_figure(self, name: str, figure: Any, step: Optional[int] = None) -> None:
        pass

    def flush(self) -> None:
        pass
