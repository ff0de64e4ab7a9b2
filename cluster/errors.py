"""What can go wrong with machines, as one tree, and what goes wrong between them.

    ClusterError            a user's mistake: the command line prints it and exits 2
    ├── LaunchError         Ray cannot be started or joined
    ├── JobError            a job cannot be submitted or followed
    └── ScheduleError       a schedule cannot be written
    CollectiveError         ranks lost each other: no user's mistake, a run goes on later

A message is one line: the thing, its value, the values it takes, the next step. A job that ran
and failed is no error of this tree: its exit code is in `jobs.JobOutcome`.
"""


class ClusterError(Exception):
    """A user's mistake about machines; its message is one line that says how to go on."""


class LaunchError(ClusterError):
    """Ray cannot be started or joined with what was given."""


class JobError(ClusterError):
    """A job cannot be submitted to, or followed on, the cluster that was named."""


class ScheduleError(ClusterError):
    """A schedule with a field that Kubernetes or cron would refuse."""


class CollectiveError(Exception):
    """Something that all ranks do together did not complete; names the rank and what it was at."""
