"""Schedules as text: a Kubernetes manifest or a crontab line that runs a command regularly.

Nothing is applied here and no cluster is asked; the user reads the text and hands it to
`kubectl apply -f -` or `crontab`. Running a command once on a cluster is in `jobs`.

On Kubernetes a CronJob starts a small pod that creates a KubeRay `RayJob` and waits for it to
end. Waiting is what makes `concurrencyPolicy: Forbid` cover the whole run and not just its first
second, and gives the CronJob's history the run's own result. The pod may create and read
RayJobs, nothing else. Needs KubeRay 1.6 or newer, for `authOptions.secretName`.
"""

import importlib.metadata
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from cluster.errors import ScheduleError

KUBECTL_IMAGE = "alpine/k8s:1.33.4"  # kubectl with a shell, which the official image lacks
STORAGE_PATH = "/mnt/mone"
HEAD_CPUS, HEAD_MEMORY_GIB = 2, 8
LONGEST_NAME = 41  # KubeRay allows 47, and `generateName` adds a dash and five characters
USER_ID = 1000  # `mone` in the images of infra/container
# For SIGTERM to become a checkpoint before SIGKILL; Kubernetes' own 30 s are too short.
GRACE_SECONDS = 120
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_DAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
# Name, lowest and highest value, and names taken for values; what cron and Kubernetes both take.
_CRON_FIELDS: tuple[tuple[str, int, int, Sequence[str]], ...] = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 6, _DAYS),
)

# Exit code 1 when the run failed, so that the CronJob's history shows it. An API server that is
# away for a moment does not end the wait.
_CREATE_AND_WAIT = """\
set -eu
job=$(kubectl create -f /schedule/rayjob.yaml -o name)
echo "created $job"
while true; do
  sleep 30
  state=$(kubectl get "$job" -o 'jsonpath={.status.jobDeploymentStatus} {.status.jobStatus}') \\
    || continue
  case "$state" in
    'Complete SUCCEEDED') echo "$job: $state"; exit 0 ;;
    Complete*|Failed*|ValidationFailed*) echo "$job: $state" >&2; exit 1 ;;
  esac
done
"""

Manifest = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A command of `mone`, when it runs and on what.

    Attributes:
        name: Name of everything made for it: small letters, digits and dashes.
        cron: Five fields: minute, hour, day of month, month, day of week (0 is Sunday).
        command: Verb of `mone` and its arguments, unquoted; usually `retrain`.
        image: Container image that holds `mone`, as built from infra/container.
        namespace: Kubernetes namespace.
        service_account: Account made for the pod that creates the RayJob.
        time_zone: Zone of `cron` on Kubernetes; a crontab follows its machine's.
        storage_claim: Volume claim, shared by all pods, mounted at /mnt/mone.
        token_secret: Secret whose key `auth_token` guards the Ray cluster.
        workers: Ray workers.
        worker_cpus: CPU cores of each.
        worker_memory_gib: Memory of each, GiB.
        max_hours: A run that takes longer is ended.
    """

    name: str
    cron: str
    command: tuple[str, ...]
    image: str
    namespace: str = "default"
    service_account: str = "mone-schedule"
    time_zone: str = "Etc/UTC"
    storage_claim: str = "mone-storage"
    token_secret: str = "mone-ray-token"
    workers: int = 2
    worker_cpus: int = 4
    worker_memory_gib: int = 16
    max_hours: int = 24

    def __post_init__(self) -> None:
        _check_name("schedule name", self.name, LONGEST_NAME)
        for field in ("namespace", "service_account", "storage_claim", "token_secret"):
            _check_name(field.replace("_", " "), getattr(self, field), 63)
        for field in ("workers", "worker_cpus", "worker_memory_gib", "max_hours"):
            if getattr(self, field) < 1:
                raise ScheduleError(f"{field} is {getattr(self, field)}; give 1 or more")
        if not self.image or re.search(r"\s", self.image):
            raise ScheduleError(
                f"image {self.image!r} is not a container image; give one that holds mone, "
                "such as registry.example/mone:0.1.0-cpu (infra/README.md builds it)"
            )
        if not self.command or any(re.search(r"[\n\r\0]", word) for word in self.command):
            raise ScheduleError(
                f"command {list(self.command)} cannot be scheduled; give a verb of mone and its "
                "arguments without line breaks, e.g. `retrain --archive /mnt/mone/new`"
            )
        _check_cron(self.cron)


def kubernetes_manifest(schedule: Schedule) -> str:
    """Everything that Kubernetes needs to run `schedule`, as YAML for `kubectl apply -f -`.

    The namespace, the volume claim and the secret are referred to, not made: infra/README.md
    says how. No secret value is in the text.

    Args:
        schedule: What to run and when.

    Returns:
        Service account, role, role binding, config map and cron job, in this order.
    """
    return str(
        yaml.safe_dump_all(
            [*_account(schedule), _config_map(schedule), _cron_job(schedule)],
            sort_keys=False,
            explicit_start=True,
            width=100,
        )
    )


def crontab_line(
    schedule: Schedule,
    *,
    workdir: PurePosixPath,
    log: PurePosixPath,
    program: Sequence[str] = (sys.executable, "-m", "pipelines"),
) -> str:
    """The line that runs `schedule` on this machine, for `crontab -e`.

    A run that finds the former one still going ends at once. Cron has neither the user's `PATH`
    nor a terminal, so the program is named in full and all output goes to `log`.

    Args:
        schedule: What to run and when; image and cluster settings play no part here.
        workdir: Absolute folder to run in; the lock file lies there.
        log: Absolute file that output is appended to.
        program: Absolute program and first arguments that stand for `mone`.

    Raises:
        ScheduleError: A path is not absolute or has a line break.
    """
    for kind, path in (("working folder", workdir), ("log", log)):
        if not path.is_absolute() or re.search(r"[\n\r]", str(path)):
            raise ScheduleError(
                f"{kind} {str(path)!r} is no absolute path on one line; cron starts elsewhere "
                "than you do, so give the path from / on"
            )
    lock = workdir / f".{schedule.name}.lock"
    run = shlex.join(["flock", "-n", str(lock), *program, *schedule.command])
    line = f"cd {shlex.quote(str(workdir))} && {run} >> {shlex.quote(str(log))} 2>&1"
    # To cron, an unescaped % ends the command, quoted or not.
    escaped = line.replace("%", r"\%")
    return f"{schedule.cron} {escaped}"


def _check_name(kind: str, name: str, longest: int) -> None:
    if len(name) > longest or not _NAME.fullmatch(name):
        raise ScheduleError(
            f"{kind} {name!r} is not a name that Kubernetes takes; use up to {longest} small "
            "letters, digits and dashes, beginning with a letter and not ending with a dash"
        )


def _check_cron(cron: str) -> None:
    values = cron.split(" ")
    if len(values) != len(_CRON_FIELDS) or "" in values:
        raise ScheduleError(
            f"cron expression {cron!r} does not have five fields with one space between; write "
            "minute, hour, day of month, month, day of week, e.g. '30 2 * * *' for every night"
        )
    for value, (field, low, high, names) in zip(values, _CRON_FIELDS, strict=True):
        if not all(_cron_item_fits(item, low, high, names) for item in value.split(",")):
            also = f" or {names[0]} to {names[-1]}" if names else ""
            raise ScheduleError(
                f"{field} {value!r} of cron expression {cron!r} is not usable; take *, or "
                f"{low} to {high}{also}, with lists 1,2, ranges 1-5 and steps */2"
            )


def _cron_item_fits(item: str, low: int, high: int, names: Sequence[str]) -> bool:
    if item.lower() in names:
        return True
    found = re.fullmatch(r"(?:\*|(\d{1,2})(?:-(\d{1,2}))?)(?:/(\d{1,2}))?", item)
    if not found:
        return False
    first, last, step = (int(text) if text else None for text in found.groups())
    if step is not None and (step == 0 or (first is not None and last is None)):
        return False  # what `5/10` means differs between crons
    return first is None or low <= first <= (first if last is None else last) <= high


def _metadata(schedule: Schedule, **extra: str) -> Manifest:
    return {
        "name": schedule.name,
        **extra,
        "namespace": schedule.namespace,
        "labels": {"app.kubernetes.io/name": "mone", "app.kubernetes.io/component": schedule.name},
    }


def _account(schedule: Schedule) -> list[Manifest]:
    """The account of the pod that creates the RayJob, and all that it may do."""
    account = _metadata(schedule, name=schedule.service_account)
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": _metadata(schedule),
            "rules": [
                {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": _metadata(schedule),
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "Role",
                "name": schedule.name,
            },
            "subjects": [
                {
                    "kind": "ServiceAccount",
                    "name": schedule.service_account,
                    "namespace": schedule.namespace,
                }
            ],
        },
    ]


def _config_map(schedule: Schedule) -> Manifest:
    """The RayJob, as a file that the cron job's pod reads."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(schedule),
        "data": {"rayjob.yaml": yaml.safe_dump(_ray_job(schedule), sort_keys=False, width=100)},
    }


def _ray_job(schedule: Schedule) -> Manifest:
    metadata = _metadata(schedule, generateName=f"{schedule.name}-")
    del metadata["name"]  # every run gets a name of its own
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata,
        "spec": {
            "entrypoint": shlex.join(["python", "-m", "pipelines", *schedule.command]),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "activeDeadlineSeconds": schedule.max_hours * 3600,
            # A retry makes a new cluster; the run itself goes on from its last checkpoint.
            "backoffLimit": 1,
            "rayClusterSpec": _ray_cluster(schedule),
        },
    }


def _ray_cluster(schedule: Schedule) -> Manifest:
    return {
        "rayVersion": importlib.metadata.version("ray"),
        "authOptions": {"mode": "token", "secretName": schedule.token_secret},
        "headGroupSpec": {
            # The driver runs on the head; the work does not.
            "rayStartParams": {"num-cpus": "0"},
            "template": _ray_pod(schedule, "ray-head", HEAD_CPUS, HEAD_MEMORY_GIB),
        },
        "workerGroupSpecs": [
            {
                "groupName": "cpu",
                "replicas": schedule.workers,
                "minReplicas": schedule.workers,
                "maxReplicas": schedule.workers,
                "rayStartParams": {},
                "template": _ray_pod(
                    schedule, "ray-worker", schedule.worker_cpus, schedule.worker_memory_gib
                ),
            }
        ],
    }


def _ray_pod(schedule: Schedule, container: str, cpus: int, memory_gib: int) -> Manifest:
    size = {"cpu": str(cpus), "memory": f"{memory_gib}Gi"}
    return {
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "securityContext": _pod_security(),
            "containers": [
                {
                    "name": container,
                    "image": schedule.image,
                    "resources": {"requests": size, "limits": dict(size)},
                    "securityContext": _container_security(),
                    "volumeMounts": [{"name": "storage", "mountPath": STORAGE_PATH}],
                }
            ],
            "volumes": [
                {
                    "name": "storage",
                    "persistentVolumeClaim": {"claimName": schedule.storage_claim},
                }
            ],
        }
    }


def _cron_job(schedule: Schedule) -> Manifest:
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": _metadata(schedule),
        "spec": {
            "schedule": schedule.cron,
            "timeZone": schedule.time_zone,
            "concurrencyPolicy": "Forbid",
            # A start that was missed, e.g. while the control plane was down, is made up for
            # within the hour or not at all.
            "startingDeadlineSeconds": 3600,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 3,
            "jobTemplate": {
                "spec": {
                    "backoffLimit": 0,  # a second try would create a second RayJob
                    "activeDeadlineSeconds": schedule.max_hours * 3600 + 3600,
                    "template": _creator_pod(schedule),
                }
            },
        },
    }


def _creator_pod(schedule: Schedule) -> Manifest:
    size = {"cpu": "100m", "memory": "128Mi"}
    return {
        "spec": {
            "serviceAccountName": schedule.service_account,
            "restartPolicy": "Never",
            "securityContext": _pod_security(),
            "containers": [
                {
                    "name": "create-rayjob",
                    "image": KUBECTL_IMAGE,
                    "command": ["/bin/sh", "-c", _CREATE_AND_WAIT],
                    "env": [{"name": "HOME", "value": "/tmp"}],  # where kubectl caches
                    "resources": {"requests": size, "limits": dict(size)},
                    "securityContext": {**_container_security(), "readOnlyRootFilesystem": True},
                    "volumeMounts": [
                        {"name": "schedule", "mountPath": "/schedule", "readOnly": True},
                        {"name": "tmp", "mountPath": "/tmp"},
                    ],
                }
            ],
            "volumes": [
                {"name": "schedule", "configMap": {"name": schedule.name}},
                {"name": "tmp", "emptyDir": {}},
            ],
        }
    }


def _pod_security() -> Manifest:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security() -> Manifest:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
