"""A run's report, results and pictures, written beside it and kept with it in MLflow."""

from pathlib import Path

from pipelines.checkpoint import checkpoint_of, step_of
from pipelines.config import read_config
from pipelines.results import RESULTS, read_results
from pipelines.run_report import report_files, report_run
from pipelines.tracking import MlflowTracker


def publish_report(run: Path) -> str | None:
    """Write `report.html` and send it to the run's place in MLflow.

    Returns:
        What MLflow did not take, None when it took everything. The files beside the run are
        whole either way.
    """
    content = report_run(run)
    config = read_config(run)
    files = report_files(run, content)
    tracker = MlflowTracker(config)
    if (run / RESULTS).is_file():
        files[RESULTS] = (run / RESULTS).read_bytes()
        settings = read_results(run).settings
        tracker.log_summary(
            {f"accuracy/ec_{s.effective_capacity:.2f}": s.accuracy for s in settings}
        )
    tracker.log_files(files)
    ended = step_of(checkpoint_of(run)) == config.train.steps
    tracker.finish("FINISHED" if ended else "KILLED")
    return tracker.problem
