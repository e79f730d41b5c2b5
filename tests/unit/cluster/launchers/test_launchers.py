"""What the launchers write, held against the tools that will read it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatoken.cluster.cli.__main__ import main
from megatoken.cluster.launchers.artefact import Artefact
from megatoken.cluster.launchers.kuberay.manifest import RAY_VERSION
from megatoken.cluster.launchers.load import launch_of
from megatoken.cluster.launchers.node.environment import AddressError, node_environment, resolve_address
from megatoken.cluster.launchers.render import RENDERERS, render
from megatoken.cluster.launchers.ssh.run import LaunchError, explain, read_or_make_token
from megatoken.cluster.launchers.ssh.script import ssh_artefacts
from megatoken.cluster.launchers.ssh.steps import SshStep, ssh_plan
from megatoken.cluster.launchers.systemd import quoted
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.load import SpecError, load_spec, parse_spec
from tests.support.paths import REPOSITORY

ROOT = REPOSITORY
DOCUMENT: dict[str, Any] = {
    "cluster": "demo",
    "models": [{"name": "chat", "source": "/models/chat", "replicas": 2, "parallel": {"tensor": 8}}],
    "network": {"env": {"NCCL_IB_HCA": "mlx5_0,mlx5_1", "TRICKY": "it's $HOME 100%"}},
    "launch": {
        "ssh": {
            "user": "mega",
            "identity_file": "~/.ssh/id_ed25519",
            "hosts": [
                {"host": "gpu-a", "address": "10.0.0.1", "gpus": 8, "device_kind": "mi355x", "link_domains": [4, 4]},
                {"host": "cpu-b", "address": "10.0.0.2", "cpu_devices": 2, "rack": "r2", "interface": "bond0"},
            ],
        },
        "slurm": {
            "nodes": 11,
            "partition": "mi355x",
            "gpus": 8,
            "device_kind": "mi355x",
            "setup": ["module load rocm"],
        },
        "kuberay": {
            "models_claim": "models",
            "workers": [
                {
                    "name": "mi355x",
                    "pods": 11,
                    "gpus": 8,
                    "device_kind": "mi355x",
                    "device_resource": "amd.com/gpu",
                    "rack": "r1",
                    "node_selector": {"gpu": "mi355x"},
                    "tolerations": [{"key": "amd.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
                },
                {"name": "cpu", "pods": 2, "cpu_devices": 2},
            ],
        },
        "compose": {"nodes": 2, "cpu_devices": 1, "models": "/srv/models"},
    },
}


def spec_of(document: dict[str, Any] = DOCUMENT) -> ClusterSpec:
    return parse_spec(document)


def rendered(way: str) -> dict[str, Artefact]:
    spec = spec_of()
    return {artefact.name: artefact for artefact in render(way, spec, launch_of(spec.launch))}


def changed(**sections: Any) -> dict[str, Any]:
    return {**DOCUMENT, "launch": {**DOCUMENT["launch"], **sections}}


@pytest.mark.parametrize("way", sorted(RENDERERS))
def test_every_way_renders_the_same_twice_and_hands_over_a_spec_that_launches_nothing(way: str) -> None:
    artefacts = rendered(way)
    assert artefacts == rendered(way)
    if way == "slurm":
        handed = (
            artefacts["megatoken.sbatch"].text.partition("<<'MEGATOKEN_SPEC'\n")[2].partition("MEGATOKEN_SPEC\n")[0]
        )
    else:
        handed = artefacts["spec.yaml"].text if "spec.yaml" in artefacts else _config_map_spec(artefacts)
    spec = load_spec(handed)
    assert spec.models == spec_of().models
    assert spec.launch is None
    assert spec.ray.address != "local"


def _config_map_spec(artefacts: dict[str, Artefact]) -> str:
    documents = yaml.safe_load_all(artefacts["raycluster.yaml"].text)
    return str(next(d for d in documents if d["kind"] == "ConfigMap")["data"]["spec.yaml"])


@pytest.mark.parametrize("way", sorted(RENDERERS))
def test_a_missing_section_is_one_clear_error(way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("models: []\n")
    assert main(["render", way, "-f", str(path)]) == 2
    assert capsys.readouterr().err.startswith("megatoken: launch.")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"ssh": {"hosts": []}}, "launch.ssh.hosts"),
        ({"ssh": {"hosts": [{"host": "a"}, {"host": "a"}]}}, "'a' is given 2 times"),
        ({"ssh": {"hosts": [{"host": "a; rm -rf /"}]}}, "launch.ssh.hosts.0.host"),
        ({"ssh": {"hosts": [{"host": "a", "rack": "r 1"}]}}, "label rack: 'r 1' is not allowed"),
        ({"ssh": {"hosts": [{"host": "a", "env": {"A B": "x"}}]}}, "'A B' is not allowed"),
        ({"ssh": {"hosts": [{"host": "a", "gpu": 8}]}}, "launch.ssh.hosts.0.gpu: is not a field"),
        ({"slurm": {"nodes": 0}}, "launch.slurm.nodes: 0 is not allowed"),
        ({"slurm": {"nodes": 1, "partition": "a b"}}, "launch.slurm.partition"),
        ({"kuberay": {"workers": [{"name": "w", "pods": 1, "gpus": 8}]}}, "gpus and device_resource belong together"),
        ({"ports": {"workers": [2000, 1000]}}, "[first, last]"),
        ({"nomad": {}}, "launch.nomad: is not a field"),
    ],
)
def test_a_wrong_launch_section_names_the_field(section: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        launch_of(section)
    assert said in str(caught.value)


def test_ssh_checks_host_keys_and_keeps_the_token_off_command_lines() -> None:
    spec = spec_of()
    plan = ssh_plan(spec, launch_of(spec.launch))
    for step in (*plan.checks, plan.head, *plan.others, plan.controller, plan.controller_stop, *plan.stops):
        assert "StrictHostKeyChecking=yes" in step.argv
        assert "BatchMode=yes" in step.argv
        assert "mega@" in step.argv[-2]
    assert plan.head.stdin == "token"
    for step in (plan.head, *plan.others):
        assert dict(step.env)["TRICKY"] == "it's $HOME 100%"
        assert not any("TRICKY" in word or "mlx5_0" in word for word in step.argv), (
            "what the spec gives may be a secret"
        )
    (up,) = [file for file in ssh_artefacts(spec, launch_of(spec.launch)) if file.name == "up.sh"]
    for line in up.text.splitlines():
        assert not ("ssh -o" in line and "TRICKY" in line.partition("| ssh -o")[2])
    assert plan.ray_address == "10.0.0.1:6379"


def test_the_remote_command_survives_the_remote_shell(tmp_path: Path) -> None:
    """What bash makes of the command line is, word for word, what was meant."""
    spec = spec_of()
    step = ssh_plan(spec, launch_of(spec.launch)).others[0]
    show = "python3 -c 'import json, os, sys; print(json.dumps([sys.argv[1:], os.environ[\"TRICKY\"]]))'"
    shown = subprocess.run(
        ["bash", "-c", step.argv[-1].replace("/opt/megatoken/bin/python -m megatoken.cluster.launchers.node", show)],
        input="the-token\n" + "".join(f"{name}={value}\n" for name, value in step.env),
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    arguments, tricky = json.loads(shown.stdout)
    assert tricky == "it's $HOME 100%"
    token = tmp_path / ".megatoken" / "demo" / "ray_token"
    assert token.read_text() == "the-token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert arguments[:3] == ["start", "--directory", f"{tmp_path}/.megatoken/demo"]
    assert arguments[arguments.index("--interface") + 1] == "bond0"
    ray = arguments[arguments.index("--") + 1 :]
    assert ray[:2] == ["/opt/megatoken/bin/ray", "start"]
    assert '--resources={"cpu_device":2}' in ray
    assert "--address=10.0.0.1:6379" in ray
    assert "--labels=rack=r2" in ray


@pytest.mark.parametrize(
    ("status", "stderr", "said"),
    [
        (255, "@@@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @@@", "host h: its host key is not the known one"),
        (255, "No ED25519 host key is known for h\nHost key verification failed.", "host h: its host key is not known"),
        (255, "mega@h: Permission denied (publickey).", "host h: login was refused"),
        (255, "ssh: connect to host h port 22: Connection refused", "host h: nothing listens on its ssh port"),
        (255, "ssh: connect to host h port 22: Connection timed out", "host h: it is unreachable"),
        (255, "ssh: Could not resolve hostname h", "host h: the name does not resolve"),
        (255, "", "host h: ssh failed: it said nothing"),
        (127, "bash: /opt/megatoken/bin/python: No such file or directory", "host h: Megatoken is not installed under"),
        (1, "No module named 'cluster'", "host h: Megatoken is not installed under"),
        (1, "megatoken node: Ray did not start: no memory", "host h: could not start Ray: megatoken node: Ray did not"),
    ],
)
def test_a_failed_step_is_one_sentence(status: int, stderr: str, said: str) -> None:
    assert explain(SshStep("h", "start Ray", ("ssh",)), status, stderr).startswith(said)


def test_the_token_file_is_made_once_and_refused_when_others_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "state" / "demo.token"
    token = read_or_make_token(path)
    assert len(token) == 64
    assert read_or_make_token(path) == token
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(LaunchError, match="others may read this token"):
        read_or_make_token(path)


@pytest.mark.parametrize("way", ["ssh", "slurm"])
def test_shell_scripts_pass_shellcheck(way: str, tmp_path: Path) -> None:
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is not installed")
    scripts = [artefact for artefact in rendered(way).values() if artefact.executable]
    assert scripts
    for script in scripts:
        (tmp_path / script.name).write_text(script.text)
        checked = subprocess.run(
            [checker, tmp_path / script.name], capture_output=True, text=True, timeout=60, check=False
        )
        assert checked.returncode == 0, checked.stdout


def test_deployed_shell_scripts_pass_shellcheck() -> None:
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is not installed")
    scripts = [
        path
        for path in [*(ROOT / "deploy").rglob("*"), ROOT / ".ci" / "run", ROOT / "proto" / "regenerate"]
        if path.is_file() and path.read_bytes()[:64].splitlines()[:1] in ([b"#!/usr/bin/env bash"], [b"#!/bin/sh"])
    ]
    checked = subprocess.run([checker, *scripts], capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_slurm_job_asks_for_what_the_spec_says() -> None:
    text = rendered("slurm")["megatoken.sbatch"].text
    directives = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert text.splitlines()[1] == directives[0], "Slurm reads directives only before the first command"
    for wanted in ("--nodes=11", "--ntasks-per-node=1", "--partition=mi355x", "--gpus-per-node=8", "--exclusive"):
        assert f"#SBATCH {wanted}" in directives
    assert "#SBATCH --no-kill" in directives, "a lost node does not end the others"
    assert text.index("module load rocm") < text.index("srun")
    assert f"export TRICKY={shlex.quote(DOCUMENT['network']['env']['TRICKY'])}" in text


def test_kubernetes_manifests_fit_the_published_schemas() -> None:
    """Core kinds and pod templates by Kubernetes' own schemas; the RayCluster's own fields by the test below."""
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate carries the schemas").validate
    for document in yaml.safe_load_all(rendered("kuberay")["raycluster.yaml"].text):
        if document["kind"] != "RayCluster":
            validate(document, "1.30", strict=True)
            continue
        for group in [document["spec"]["headGroupSpec"], *document["spec"]["workerGroupSpecs"]]:
            template = group["template"]
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"], "spec": template["spec"]}
            validate(pod, "1.30", strict=True)


def closed(schema: Any) -> Any:
    """A CRD's schema as JSON Schema in which a field that it does not name is an error, as for a structural one."""
    if isinstance(schema, list):
        return [closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(value) for name, value in schema.items() if name not in ("properties", "format")}
    if "properties" in schema:
        made["properties"] = {name: closed(value) for name, value in schema["properties"].items()}
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
        made |= {} if open_ended else {"additionalProperties": False}
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    return made


# KubeRay's ray-operator/config/crd/bases/ray.io_rayclusters.yaml, a megabyte that is not ours to keep.
CRD = Path(os.environ.get("MEGATOKEN_RAY_CRD", ROOT.parent / "shared" / "schemas" / "ray.io_rayclusters.yaml"))


@pytest.mark.skipif(not CRD.is_file(), reason="MEGATOKEN_RAY_CRD names no ray.io_rayclusters.yaml of KubeRay")
def test_the_ray_cluster_is_what_its_crd_takes_and_has_no_field_beside() -> None:
    validator = pytest.importorskip("jsonschema", reason="jsonschema validates").Draft202012Validator
    crd = yaml.safe_load(CRD.read_text())
    (version,) = [entry for entry in crd["spec"]["versions"] if entry["name"] == "v1"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own
    documents = yaml.safe_load_all(rendered("kuberay")["raycluster.yaml"].text)
    (cluster,) = [document for document in documents if document["kind"] == "RayCluster"]
    assert [error.message for error in validator(schema).iter_errors(cluster)] == []
    cluster["spec"]["headGroupSpec"]["colour"] = "red"
    assert not validator(schema).is_valid(cluster), "an unknown field is an error"


# Fields of ray.io/v1 RayCluster that we use, from the CRD that the test above takes, where there is none.
SPEC_FIELDS = {"rayVersion": str, "authOptions": dict, "headGroupSpec": dict, "workerGroupSpecs": list}
HEAD_FIELDS = {"rayStartParams": dict, "template": dict}
WORKER_FIELDS = {**HEAD_FIELDS, "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}


def test_the_ray_cluster_has_the_fields_of_its_crd() -> None:
    documents = list(yaml.safe_load_all(rendered("kuberay")["raycluster.yaml"].text))
    (cluster,) = [document for document in documents if document["kind"] == "RayCluster"]
    spec = cluster["spec"]
    assert cluster["apiVersion"] == "ray.io/v1"
    for fields, values in ((SPEC_FIELDS, spec), (HEAD_FIELDS, spec["headGroupSpec"])):
        assert {name: type(value) for name, value in values.items()} == fields
    for group in spec["workerGroupSpecs"]:
        assert {name: type(value) for name, value in group.items()} == WORKER_FIELDS
    assert spec["authOptions"] == {"mode": "token"}
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        params = group["rayStartParams"]
        assert all(isinstance(value, str) for value in params.values()), "the CRD takes strings only"
        assert "labels" not in params, "the operator refuses labels among rayStartParams"
        json.loads(params.get("resources", "'{}'").strip("'"))


def test_kuberay_pods_start_ray_under_our_supervisor_with_their_labels_and_devices() -> None:
    documents = list(yaml.safe_load_all(rendered("kuberay")["raycluster.yaml"].text))
    (cluster,) = [document for document in documents if document["kind"] == "RayCluster"]
    gpu, cpu = cluster["spec"]["workerGroupSpecs"]
    container = gpu["template"]["spec"]["containers"][0]
    assert "--labels=device_kind=mi355x,rack=r1" in container["args"][0]
    assert "$KUBERAY_GEN_RAY_START_CMD" in container["args"][0]
    assert container["resources"]["limits"]["amd.com/gpu"] == "8"
    assert cpu["rayStartParams"]["resources"] == "'{\"cpu_device\":2}'"
    assert "megatoken up" in cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["args"][0]
    assert RAY_VERSION in (ROOT / "pyproject.toml").read_text(), "the pinned Ray and the rendered one are the same"


def test_helm_values_say_the_same_as_the_manifest() -> None:
    artefacts = rendered("kuberay")
    values = yaml.safe_load(artefacts["values.yaml"].text)
    (cluster,) = [d for d in yaml.safe_load_all(artefacts["raycluster.yaml"].text) if d["kind"] == "RayCluster"]
    container = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    assert values["worker"]["args"] == container["args"]
    assert values["worker"]["resources"] == container["resources"]
    assert values["worker"]["replicas"] == 11
    assert values["additionalWorkerGroups"]["cpu"]["replicas"] == 2
    (token,) = [env for env in values["head"]["containerEnv"] if env["name"] == "RAY_AUTH_TOKEN"]
    assert token["valueFrom"]["secretKeyRef"] == {"name": "megatoken-demo-token", "key": "auth_token"}


def test_the_compose_file_has_a_head_nodes_and_a_secret_token() -> None:
    document = yaml.safe_load(rendered("compose")["compose.yaml"].text)
    assert sorted(document["services"]) == ["head", "node0", "node1"]
    for name, service in document["services"].items():
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert service["environment"]["TRICKY"] == "it's $$HOME 100%", "compose expands a single dollar"
        assert service["secrets"] == ["ray_token"]
        assert service["shm_size"] == "2gb"
        assert (name == "head") == ("ports" in service)
    assert all(port.startswith("127.0.0.1:") for port in document["services"]["head"]["ports"])
    assert document["services"]["node0"]["depends_on"]["head"]["condition"] == "service_healthy"


def test_the_compose_file_is_one_that_compose_reads(tmp_path: Path) -> None:
    compose = shutil.which("docker-compose")
    if compose is None:
        pytest.skip("docker-compose is not installed")
    for artefact in rendered("compose").values():
        (tmp_path / artefact.name).write_text(artefact.text)
    (tmp_path / "ray_token").write_text("0")
    read = subprocess.run(
        [compose, "config", "--quiet"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert read.returncode == 0, read.stderr


def test_systemd_units_quote_their_words_and_end_with_their_ray(tmp_path: Path) -> None:
    units = {name: artefact.text for name, artefact in rendered("systemd").items() if name.endswith(".service")}
    assert sorted(units) == ["cpu-b.service", "gpu-a.service"]
    assert '"--resources={\\"cpu_device\\":2}"' in units["cpu-b.service"]
    assert "megatoken up --detach" in units["gpu-a.service"]
    assert "megatoken up" not in units["cpu-b.service"]
    assert 'Environment="TRICKY=it\'s $$HOME 100%%"' in units["cpu-b.service"]
    verifier = shutil.which("systemd-analyze")
    if verifier is None:
        return  # the words above are then the whole check
    for name, text in units.items():
        (tmp_path / name).write_text(text.replace("/opt/megatoken/bin/python", "/usr/bin/env"))
        seen = subprocess.run(
            [verifier, "verify", tmp_path / name], capture_output=True, text=True, timeout=60, check=False
        )
        assert name not in seen.stderr, seen.stderr


@pytest.mark.parametrize(
    ("word", "text"), [("plain", "plain"), ("a b", '"a b"'), ("50%", "50%%"), ("$X", "$$X"), ("", '""')]
)
def test_systemd_words(word: str, text: str) -> None:
    assert quoted(word) == text


INTERFACES = {"lo": ("127.0.0.1", "::1"), "eth0": ("10.0.0.5",), "ib0": ("192.168.7.5",)}


def test_a_nodes_environment_follows_from_its_address() -> None:
    found = node_environment("192.168.7.5", None, INTERFACES, {})
    assert found["VLLM_HOST_IP"] == "192.168.7.5"
    assert found["GLOO_SOCKET_IFNAME"] == found["NCCL_SOCKET_IFNAME"] == "ib0"


def test_an_override_and_the_operators_own_environment_win() -> None:
    assert node_environment("10.0.0.5", "ib0", INTERFACES, {})["NCCL_SOCKET_IFNAME"] == "ib0"
    found = node_environment("10.0.0.5", None, INTERFACES, {"NCCL_SOCKET_IFNAME": "bond0"})
    assert "NCCL_SOCKET_IFNAME" not in found
    assert found["GLOO_SOCKET_IFNAME"] == "eth0"


def test_an_address_or_interface_that_is_not_this_machines_is_refused() -> None:
    with pytest.raises(AddressError, match=r"address: '10.9.9.9' is not allowed; this machine has: eth0 10.0.0.5"):
        node_environment("10.9.9.9", None, INTERFACES, {})
    with pytest.raises(AddressError, match="interface: 'eth9' is not allowed; one of eth0, ib0, lo"):
        node_environment("10.0.0.5", "eth9", INTERFACES, {})


def test_auto_is_the_address_that_reaches_the_head() -> None:
    assert resolve_address("auto", "127.0.0.1:6379") == "127.0.0.1"
    assert resolve_address("127.0.0.1", None) == "127.0.0.1"
    with pytest.raises(AddressError, match="does not resolve"):
        resolve_address("no-such-host.invalid", None)
