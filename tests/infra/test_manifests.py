"""The files of infra/: they parse, fit each other, and fit the project. No cluster is asked."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.schedules import GRACE_SECONDS, STORAGE_PATH, USER_ID, Schedule
from pipelines.cli import VERBS

REPOSITORY = Path(__file__).parents[2]
INFRA = REPOSITORY / "infra"
YAMLS = sorted([*INFRA.rglob("*.yaml"), *INFRA.rglob("*.yml")])
KUSTOMIZATIONS = [path for path in YAMLS if path.name == "kustomization.yaml"]
DOCKERFILES = sorted(INFRA.rglob("Dockerfile*"))
MONE_DOCKERFILES = sorted((INFRA / "container").glob("Dockerfile.*"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def name_of(path: Path) -> str:
    return str(path.relative_to(INFRA))


def documents(path: Path) -> list:
    return list(yaml.safe_load_all(path.read_text()))


def objects() -> list[dict]:
    """Every Kubernetes object of the folder, patches and kustomizations left out."""
    every = [doc for path in YAMLS for doc in documents(path) if isinstance(doc, dict)]
    return [doc for doc in every if "kind" in doc and doc["kind"] != "Kustomization"]


def ray_cluster() -> dict:
    return next(doc for doc in objects() if doc["kind"] == "RayCluster")


def worker_groups() -> dict[str, dict]:
    groups = [*ray_cluster()["spec"]["workerGroupSpecs"]]
    for path in (INFRA / "kubernetes" / "overlays").rglob("workers.yaml"):
        groups += [patch["value"] for patch in documents(path)[0] if patch["op"] == "add"]
    return {group["groupName"]: group for group in groups}


def pods() -> dict[str, dict]:
    """Every pod specification, by the name of what makes it."""
    found = {"head": ray_cluster()["spec"]["headGroupSpec"]["template"]["spec"]}
    found |= {name: group["template"]["spec"] for name, group in worker_groups().items()}
    for doc in objects():
        if doc["kind"] in ("Deployment", "StatefulSet"):
            found[doc["metadata"]["name"]] = doc["spec"]["template"]["spec"]
    return found


def named(kind: str) -> set[str]:
    return {doc["metadata"]["name"] for doc in objects() if doc["kind"] == kind}


def instructions(path: Path) -> list[tuple[str, str]]:
    """A Dockerfile's instructions, with continued lines joined and comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def test_the_folder_holds_all_that_the_readme_promises():
    promised = re.findall(
        r"`((?:container|kubernetes|mlflow)/[\w./]+)`", (INFRA / "README.md").read_text()
    )

    assert len(promised) > 5
    assert [path for path in promised if not (INFRA / path).exists()] == []
    assert [path.name for path in MONE_DOCKERFILES] == [
        f"Dockerfile.{d}" for d in ("cpu", "cuda", "tpu")
    ]


@pytest.mark.parametrize("path", YAMLS, ids=name_of)
def test_every_yaml_file_parses_and_holds_something(path):
    assert documents(path)
    assert all(documents(path))


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=name_of)
def test_every_kustomization_names_files_that_are_there(path):
    content = documents(path)[0]
    named_files = content["resources"] + [patch["path"] for patch in content.get("patches", [])]

    assert [name for name in named_files if not (path.parent / name).exists()] == []


@pytest.mark.parametrize("overlay", ["gpu", "tpu"])
def test_every_image_of_the_cluster_is_built_here_and_placed_by_a_kustomization(overlay):
    folder = INFRA / "kubernetes" / "overlays" / overlay
    placed = {
        image["name"]
        for path in (folder, INFRA / "kubernetes" / "base")
        for image in documents(path / "kustomization.yaml")[0]["images"]
    }
    patches = documents(folder / "workers.yaml")[0]
    used = {patch["value"] for patch in patches if patch["path"].endswith("/image")}
    groups = [patch["value"] for patch in patches if patch["op"] == "add"]
    used |= {group["template"]["spec"]["containers"][0]["image"] for group in groups}
    built = {f"mone-{path.suffix[1:]}" for path in MONE_DOCKERFILES}

    assert used
    assert used <= placed
    assert used <= built


def test_patches_replace_the_containers_they_mean():
    spec = ray_cluster()["spec"]
    assert spec["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] == "mone-cpu"
    assert spec["workerGroupSpecs"][0]["groupName"] == "cpu"
    assert spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["image"] == "mone-cpu"


def test_ray_has_the_version_that_the_images_install():
    pinned = re.search(r"^ray==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)

    assert str(ray_cluster()["spec"]["rayVersion"]) == pinned[1]


@pytest.mark.parametrize("path", MONE_DOCKERFILES, ids=name_of)
def test_images_start_the_console_script_and_install_with_constraints(path):
    found = dict(instructions(path))
    install = next(
        rest for word, rest in instructions(path) if word == "RUN" and "pip install" in rest
    )

    assert found["ENTRYPOINT"] == '["mone"]'
    assert "mone" in PROJECT["scripts"]
    assert "--constraint constraints.txt" in install
    extra = re.search(r"'\.\[(\w+)\]'", install)
    assert extra is None or extra[1] in PROJECT["optional-dependencies"]
    assert (extra is not None) == (path.suffix == ".tpu")


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_dockerfiles_copy_files_that_exist_and_end_as_a_user_without_rights(path):
    copied = [
        source
        for word, rest in instructions(path)
        if word == "COPY"
        for source in shlex.split(rest)[:-1]
    ]
    users = [rest for word, rest in instructions(path) if word == "USER"]
    last_run = max(i for i, (word, _) in enumerate(instructions(path)) if word == "RUN")

    assert copied
    assert [source for source in copied if not (REPOSITORY / source).exists()] == []
    assert users == [str(USER_ID)]
    assert instructions(path)[last_run + 1 :].count(("USER", str(USER_ID))) == 1


@pytest.mark.parametrize("path", MONE_DOCKERFILES, ids=name_of)
def test_images_hold_every_package_of_the_project(path):
    copied = {rest.split()[0] for word, rest in instructions(path) if word == "COPY"}

    assert {"mone_core", "cluster", "pipelines"} <= copied


def test_every_command_of_the_readme_is_a_verb_of_mone():
    text = (INFRA / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```\n(.*?)```", text, re.DOTALL))
    called = re.findall(r"^\s*mone (\w+)", blocks, re.MULTILINE)
    submitted = re.findall(r"mone submit .*? -- (\w+)", blocks)

    assert set(called) == {"submit", "schedule"}
    assert submitted == ["demo"]
    assert set(called) | set(submitted) <= set(VERBS)


@pytest.mark.parametrize("owner", sorted(pods()))
def test_no_pod_runs_as_root_or_gains_rights(owner):
    pod = pods()[owner]

    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("owner", ["head", "cpu", "gpu", "tpu"])
def test_ray_pods_share_the_storage_and_have_time_to_write_a_checkpoint(owner):
    pod = pods()[owner]
    size = pod["containers"][0]["resources"]

    assert pod["containers"][0]["volumeMounts"] == [{"name": "storage", "mountPath": STORAGE_PATH}]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "mone-storage"
    assert pod["terminationGracePeriodSeconds"] == GRACE_SECONDS
    assert pod["securityContext"]["runAsUser"] == USER_ID
    assert size["requests"] == size["limits"]  # Ray counts on what it was promised


def test_every_volume_claim_that_a_pod_uses_is_made_here():
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pods().values()
        for volume in pod["volumes"]
    }

    assert used == named("PersistentVolumeClaim")


def test_schedules_rely_on_what_is_made_here():
    defaults = Schedule(name="n", cron="0 0 * * *", command=("retrain",), image="i")

    assert defaults.storage_claim in named("PersistentVolumeClaim")
    assert defaults.token_secret == ray_cluster()["spec"]["authOptions"]["secretName"]


def test_accelerators_are_asked_for_as_their_device_plugins_name_them():
    groups = worker_groups()
    gpu, tpu = (groups[name]["template"]["spec"] for name in ("gpu", "tpu"))
    selector = tpu["nodeSelector"]
    chips = int(tpu["containers"][0]["resources"]["limits"]["google.com/tpu"])
    rows, columns = selector["cloud.google.com/gke-tpu-topology"].split("x")

    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v6e-slice"
    assert groups["tpu"]["numOfHosts"] * chips == int(rows) * int(columns)


def test_the_cluster_scales_with_the_second_autoscaler_within_bounds():
    spec = ray_cluster()["spec"]

    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    for group in worker_groups().values():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["template"]["spec"]["restartPolicy"] == "Never"


def test_ray_answers_only_with_the_token_and_only_inside():
    spec = ray_cluster()["spec"]
    policy = next(doc for doc in objects() if doc["metadata"]["name"] == "ray-stays-inside")["spec"]
    own_namespace, operator = policy["ingress"]

    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert policy["policyTypes"] == ["Ingress"]
    assert policy["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert own_namespace == {"from": [{"podSelector": {}}]}
    assert [port["port"] for port in operator["ports"]] == [8265, 52365]


def test_nothing_is_exposed_outside_a_cluster_or_a_machine():
    services = [doc for doc in objects() if doc["kind"] == "Service"]
    compose = documents(INFRA / "mlflow" / "compose.yaml")[0]["services"]
    published = [port for service in compose.values() for port in service.get("ports", [])]

    assert services
    assert all(service["spec"].get("type", "ClusterIP") == "ClusterIP" for service in services)
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert not named("Ingress")


def workloads() -> list[dict]:
    return [doc for doc in objects() if doc["kind"] in ("Deployment", "StatefulSet")]


def test_selectors_match_labels_and_services_lead_to_container_ports():
    templates = {doc["metadata"]["name"]: doc["spec"]["template"] for doc in workloads()}

    assert templates
    for doc in workloads():
        assert (
            doc["spec"]["selector"]["matchLabels"] == doc["spec"]["template"]["metadata"]["labels"]
        )
    for service in (doc for doc in objects() if doc["kind"] == "Service"):
        template = templates[service["metadata"]["name"]]
        ports = {
            p["name"]: p["containerPort"]
            for c in template["spec"]["containers"]
            for p in c["ports"]
        }
        assert service["spec"]["selector"] == template["metadata"]["labels"]
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]


def test_network_policies_of_mlflow_select_its_pods_and_ports():
    labels = [doc["spec"]["template"]["metadata"]["labels"] for doc in workloads()]
    policies = [doc["spec"] for doc in objects() if doc["kind"] == "NetworkPolicy"]
    selected = [policy["podSelector"]["matchLabels"] for policy in policies]

    assert all(label in selected for label in labels)


def mlflow_commands() -> dict[str, list[str]]:
    compose = documents(INFRA / "mlflow" / "compose.yaml")[0]["services"]["mlflow"]
    return {"compose": compose["command"], "kubernetes": pods()["mlflow"]["containers"][0]["args"]}


@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_mlflow_takes_the_host_names_that_clients_use_and_no_others(where):
    arguments = mlflow_commands()[where]
    options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    hosts = options["allowed-hosts"].split(",")
    expected = {"localhost:5000", "127.0.0.1:5000"}
    if where == "kubernetes":
        expected |= {
            f"mlflow{end}:5000" for end in ("", ".mone", ".mone.svc", ".mone.svc.cluster.local")
        }

    assert set(hosts) == expected
    assert re.fullmatch(r"postgresql://mlflow@[\w-]+:5432/mlflow", options["backend-store-uri"])
    assert options["artifacts-destination"] == "/mlflow/artifacts"


def test_mlflow_is_asked_for_its_health_where_its_host_check_lets_probes_through():
    container = pods()["mlflow"]["containers"][0]
    compose = documents(INFRA / "mlflow" / "compose.yaml")[0]["services"]["mlflow"]

    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert "/health" in compose["healthcheck"]["test"][-1]


def keys_and_values(node: object) -> Iterator[tuple[str, object]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield str(key), value
            yield from keys_and_values(value)
        if {"name", "value"} <= set(node):
            yield str(node["name"]), node["value"]
    elif isinstance(node, list):
        for value in node:
            yield from keys_and_values(value)


SECRET = re.compile(r"passw|token$|api_?key|access_?key|credential", re.IGNORECASE)
REFERENCE = re.compile(r"\$\{\w+:\?[^}]*\}")


@pytest.mark.parametrize("path", YAMLS, ids=name_of)
def test_secrets_are_referred_to_and_never_written_down(path):
    for document in documents(path):
        if isinstance(document, dict):
            assert document.get("kind") != "Secret"
        for key, value in keys_and_values(document):
            if SECRET.search(key) and isinstance(value, str):
                assert REFERENCE.fullmatch(value), f"{key} in {name_of(path)}"
            if isinstance(value, str):
                assert not re.search(r"://[^/@\s]+:[^/@\s]+@", value), f"{key} in {name_of(path)}"


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_no_secret_is_built_into_an_image(path):
    names = [rest.split("=")[0] for word, rest in instructions(path) if word in ("ENV", "ARG")]

    assert [name for name in names if SECRET.search(name)] == []
