"""Schedules: what the manifest says when it is read back, and what the crontab line really runs."""

import shlex
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
import ray
import yaml

from cluster.errors import ScheduleError
from cluster.schedules import Schedule, crontab_line, kubernetes_manifest

AWKWARD = (
    "retrain",
    "--archive",
    "/mnt/mone/new scans",
    "--note",
    'it\'s 5% of "all" $HOME',
    "a;b",
)


def schedule(**changes) -> Schedule:
    settings = {
        "name": "nightly",
        "cron": "30 2 * * 1-5",
        "command": ("retrain", "--archive", "/mnt/mone/new"),
        "image": "registry.example/mone:0.1.0-cpu",
    }
    return Schedule(**(settings | changes))


def documents(**changes) -> dict[str, dict]:
    """The manifest's documents by kind, and the RayJob that its config map holds."""
    found = {
        doc["kind"]: doc for doc in yaml.safe_load_all(kubernetes_manifest(schedule(**changes)))
    }
    return found | {"RayJob": yaml.safe_load(found["ConfigMap"]["data"]["rayjob.yaml"])}


def pods(found: dict[str, dict]) -> list[dict]:
    cluster = found["RayJob"]["spec"]["rayClusterSpec"]
    return [
        cluster["headGroupSpec"]["template"]["spec"],
        cluster["workerGroupSpecs"][0]["template"]["spec"],
        found["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"],
    ]


def test_the_manifest_holds_all_that_a_schedule_needs_in_one_namespace():
    found = documents(namespace="vision", service_account="nightly-runner")

    kinds = ["ServiceAccount", "Role", "RoleBinding", "ConfigMap", "CronJob", "RayJob"]
    assert list(found) == kinds
    assert {doc["metadata"]["namespace"] for doc in found.values()} == {"vision"}
    assert found["ServiceAccount"]["metadata"]["name"] == "nightly-runner"
    assert found["RoleBinding"]["subjects"] == [
        {"kind": "ServiceAccount", "name": "nightly-runner", "namespace": "vision"}
    ]
    assert found["RoleBinding"]["roleRef"]["name"] == found["Role"]["metadata"]["name"]
    assert pods(found)[2]["serviceAccountName"] == "nightly-runner"


def test_the_account_may_create_and_read_rayjobs_and_nothing_else():
    assert documents()["Role"]["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    ]


def test_the_cron_job_never_overlaps_and_never_creates_a_run_twice():
    cron_job = documents(max_hours=5)["CronJob"]["spec"]
    job = cron_job["jobTemplate"]["spec"]

    assert (cron_job["schedule"], cron_job["timeZone"]) == ("30 2 * * 1-5", "Etc/UTC")
    assert cron_job["concurrencyPolicy"] == "Forbid"
    assert cron_job["startingDeadlineSeconds"] == 3600
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["activeDeadlineSeconds"] == 6 * 3600


def test_the_cron_jobs_pod_reads_the_rayjob_of_its_config_map():
    found = documents()
    pod = pods(found)[2]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}

    assert volumes["schedule"]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    assert f"{mounts['schedule']}/rayjob.yaml" in pod["containers"][0]["command"][2]


def test_a_run_gets_a_cluster_of_its_own_that_goes_when_it_ends():
    found = documents(workers=3, worker_cpus=8, worker_memory_gib=32, max_hours=5)
    job, cluster = found["RayJob"], found["RayJob"]["spec"]["rayClusterSpec"]
    worker = cluster["workerGroupSpecs"][0]

    assert job["apiVersion"] == "ray.io/v1"
    assert job["metadata"]["generateName"] == "nightly-"
    assert "name" not in job["metadata"]
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["ttlSecondsAfterFinished"] == 600
    assert job["spec"]["backoffLimit"] == 1
    assert job["spec"]["activeDeadlineSeconds"] == 5 * 3600
    assert cluster["rayVersion"] == ray.__version__
    assert (worker["replicas"], worker["minReplicas"], worker["maxReplicas"]) == (3, 3, 3)
    resources = worker["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"] == {"cpu": "8", "memory": "32Gi"}


def test_the_token_comes_from_a_secret_and_its_value_is_nowhere():
    cluster = documents(token_secret="team-token")["RayJob"]["spec"]["rayClusterSpec"]

    assert cluster["authOptions"] == {"mode": "token", "secretName": "team-token"}
    assert "Secret" not in documents()


def test_ray_pods_share_the_storage_and_have_time_to_write_a_checkpoint():
    for pod in pods(documents(storage_claim="big-disk"))[:2]:
        assert pod["volumes"] == [
            {"name": "storage", "persistentVolumeClaim": {"claimName": "big-disk"}}
        ]
        assert pod["containers"][0]["volumeMounts"] == [
            {"name": "storage", "mountPath": "/mnt/mone"}
        ]
        assert pod["terminationGracePeriodSeconds"] == 120
        assert pod["automountServiceAccountToken"] is False
        assert pod["containers"][0]["image"] == "registry.example/mone:0.1.0-cpu"


def test_no_pod_runs_as_root_or_gains_rights():
    for pod in pods(documents()):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        security = pod["containers"][0]["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}


def test_awkward_arguments_reach_the_command_unchanged_on_kubernetes():
    entrypoint = documents(command=AWKWARD)["RayJob"]["spec"]["entrypoint"]

    assert shlex.split(entrypoint) == ["python", "-m", "pipelines", *AWKWARD]


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["Initializing ", "Running RUNNING", "Complete SUCCEEDED"], 0),
        (["Running RUNNING", "", "Complete SUCCEEDED"], 0),  # the API server was away
        (["Failed FAILED"], 1),
        (["Complete FAILED"], 1),
        (["ValidationFailed "], 1),
    ],
)
def test_the_cron_jobs_pod_waits_for_the_run_and_ends_as_it_ended(states, code, tmp_path):
    for number, state in enumerate(states):
        (tmp_path / f"state{number}").write_text(state)
    programs = {
        "sleep": "exit 0",
        "kubectl": f"""
            cd {shlex.quote(str(tmp_path))}
            [ "$1" = create ] && echo rayjob.ray.io/nightly-x1 && exit
            [ "$2" = rayjob.ray.io/nightly-x1 ] || exit 9
            now=$(ls state* | head -n 1)
            cat $now; [ -s $now ]; away=$?
            rm $now; exit $away
        """,
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / name).chmod(0o755)
    command = pods(documents())[2]["containers"][0]["command"]

    done = subprocess.run(
        command,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=20,
    )

    assert done.returncode == code
    assert done.stdout.startswith("created rayjob.ray.io/nightly-x1\n")
    assert states[-1] in done.stdout + done.stderr
    assert not list(tmp_path.glob("state*"))


def as_cron_would_run_it(line: str) -> list[str]:
    """Cron takes five fields, then the rest with each escaped percent sign made plain."""
    return ["/bin/sh", "-c", line.split(" ", 5)[5].replace(r"\%", "%")]


PRINTS_ARGUMENTS = (sys.executable, "-c", "import os, sys; print(os.getcwd(), sys.argv[1:])")


def test_the_crontab_line_runs_the_command_with_its_arguments_unchanged(tmp_path):
    workdir, log = tmp_path / "a folder", tmp_path / "50%.log"
    workdir.mkdir()

    line = crontab_line(
        schedule(command=AWKWARD), workdir=workdir, log=log, program=PRINTS_ARGUMENTS
    )

    assert line.startswith("30 2 * * 1-5 cd ")
    assert "%" not in line.replace(r"\%", "")
    subprocess.run(as_cron_would_run_it(line), check=True, timeout=20)
    assert log.read_text() == f"{workdir} {list(AWKWARD)}\n"


def test_a_crontab_run_that_finds_another_one_going_ends_at_once(tmp_path):
    log = tmp_path / "log"
    line = crontab_line(schedule(), workdir=tmp_path, log=log, program=PRINTS_ARGUMENTS)
    lock = tmp_path / ".nightly.lock"
    with subprocess.Popen(["flock", str(lock), "cat"], stdin=subprocess.PIPE) as holder:
        while subprocess.run(["flock", "-n", str(lock), "true"]).returncode == 0:
            assert holder.poll() is None

        done = subprocess.run(as_cron_would_run_it(line), timeout=20)
        holder.stdin.close()

    assert done.returncode == 1
    assert log.read_text() == ""


def test_the_crontab_line_names_this_python_unless_told_otherwise():
    line = crontab_line(schedule(), workdir=PurePosixPath("/w"), log=PurePosixPath("/l"))

    assert f" {sys.executable} -m pipelines retrain --archive /mnt/mone/new >> /l 2>&1" in line


@pytest.mark.parametrize("path", ["relative", "/two\nlines"])
def test_a_crontab_path_must_be_absolute_and_on_one_line(path):
    paths = {"workdir": PurePosixPath("/w"), "log": PurePosixPath("/l")}
    with pytest.raises(ScheduleError, match=r"working folder .* is no absolute path on one line"):
        crontab_line(schedule(), **(paths | {"workdir": Path(path)}))
    with pytest.raises(ScheduleError, match=r"log .* is no absolute path on one line"):
        crontab_line(schedule(), **(paths | {"log": Path(path)}))


@pytest.mark.parametrize(
    "cron",
    ["* * * * *", "*/15 0-23/2 1,15 jan 0", "0 2 * * sun", "59 23 31 12 6", "5,10-20/5 * * DEC *"],
)
def test_usual_cron_expressions_are_taken(cron):
    assert documents(cron=cron)["CronJob"]["spec"]["schedule"] == cron


@pytest.mark.parametrize(
    ("cron", "message"),
    [
        ("", "does not have five fields"),
        ("@daily", r"'@daily' does not have five fields .* e\.g\. '30 2 \* \* \*'"),
        ("30 2 * *", "does not have five fields"),
        ("30  2 * * *", "with one space between"),
        ("30 2 * * *\n* * * * * rm -r /", "does not have five fields"),
        ("60 2 * * *", r"minute '60' of .* not usable; take \*, or 0 to 59, with lists"),
        ("0 24 * * *", "hour '24' of .* 0 to 23"),
        ("0 0 0 * *", "day of month '0' of .* 1 to 31"),
        ("0 0 * 13 *", "month '13' of .* 1 to 12 or jan to dec"),
        ("0 0 * * 7", "day of week '7' of .* 0 to 6 or sun to sat"),
        ("9-5 * * * *", "minute '9-5'"),
        ("*/0 * * * *", r"minute '\*/0'"),
        ("5/10 * * * *", "minute '5/10'"),
        ("1,,2 * * * *", "minute '1,,2'"),
        ("-1 * * * *", "minute '-1'"),
        ("0 0 * * mon-fri", "day of week 'mon-fri'"),
    ],
)
def test_a_cron_expression_that_would_be_refused_later_is_refused_now(cron, message):
    with pytest.raises(ScheduleError, match=message):
        schedule(cron=cron)


@pytest.mark.parametrize("name", ["", "Nightly", "2nightly", "nightly-", "a.b", "a_b", "x" * 42])
def test_a_name_that_kubernetes_would_refuse_is_refused(name):
    with pytest.raises(ScheduleError, match=r"schedule name '.*' is not .* up to 41 small letters"):
        schedule(name=name)


@pytest.mark.parametrize("field", ["namespace", "service_account", "storage_claim", "token_secret"])
def test_every_name_in_the_manifest_is_checked(field):
    words = field.replace("_", " ")
    with pytest.raises(ScheduleError, match=rf"^{words} 'A b' is not a name that Kubernetes takes"):
        schedule(**{field: "A b"})


@pytest.mark.parametrize("field", ["workers", "worker_cpus", "worker_memory_gib", "max_hours"])
def test_sizes_are_at_least_one(field):
    with pytest.raises(ScheduleError, match=f"{field} is 0; give 1 or more"):
        schedule(**{field: 0})


@pytest.mark.parametrize("image", ["", "two words"])
def test_an_image_is_needed(image):
    with pytest.raises(ScheduleError, match="is not a container image; give one that holds mone"):
        schedule(image=image)


@pytest.mark.parametrize("command", [(), ("retrain", "a\nb")])
def test_a_command_is_needed_and_fits_on_one_line(command):
    with pytest.raises(ScheduleError, match="cannot be scheduled; give a verb of mone"):
        schedule(command=command)
