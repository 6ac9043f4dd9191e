"""docker/helm: every values file under ci/, rendered by Helm's own engine, against Kubernetes and the server."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from helm_python.errors import HelmError

from textgen_client.health import probe_parameters
from textgen_engine.configure import build_config
from textgen_engine.options import OPTIONS, UNSUPPORTED_OPTIONS

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "docker" / "helm" / "triton-textgen"
CASES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").iterdir())
KUBERNETES = ["1.30", "1.37"]
# Kinds of the Prometheus operator, of KEDA and of LeaderWorkerSet: no schema here.
NOT_KUBERNETES_OWN = {"PodMonitor", "ScaledObject", "LeaderWorkerSet"}


def render(values: Mapping[str, Any], name: str = "textgen") -> dict[str, Any]:
    """Kind -> document, as `helm template` prints them; the chart makes at most one of each kind."""
    with helm_python.Chart.load(str(CHART)) as chart:
        texts = chart.render(dict(values), name=name, namespace="texts")
    documents = [document for text in texts.values() for document in yaml.safe_load_all(text) if document]
    assert len({document["kind"] for document in documents}) == len(documents)
    return {document["kind"]: document for document in documents}


def values_of(case: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CHART / "ci" / f"{case}-values.yaml").read_text())
    return found


@cache
def rendered(case: str) -> dict[str, Any]:
    return render(values_of(case))


def templates(case: str) -> dict[str, dict[str, Any]]:
    """Role -> pod template: `server`, and `worker` where there are several hosts."""
    documents = rendered(case)
    if "Deployment" in documents:
        return {"server": documents["Deployment"]["spec"]["template"]}
    group = documents["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    return {"server": group["leaderTemplate"], "worker": group["workerTemplate"]}


def pod(case: str, role: str = "server") -> dict[str, Any]:
    found: dict[str, Any] = templates(case)[role]["spec"]
    return found


def environment(case: str, role: str = "server") -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in pod(case, role)["containers"][0]["env"]}


def test_there_is_a_case_for_each_way_to_run() -> None:
    assert CASES == ["cpu", "gpu", "gpus", "hpa-pvc", "keda", "leader-worker"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", KUBERNETES)
def test_documents_are_valid_kubernetes(case: str, version: str) -> None:
    kinds = set()
    for kind, document in rendered(case).items():
        if kind not in NOT_KUBERNETES_OWN:
            kubernetes_validate.validate(document, version, strict=True)
            kinds.add(kind)
    assert kinds >= {"Service", "PodDisruptionBudget", "NetworkPolicy"}
    for template in templates(case).values():
        document = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_pods_are_confined(case: str) -> None:
    for role in templates(case):
        check_confined(pod(case, role))


def check_confined(spec: dict[str, Any]) -> None:
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 1000, "the user of the images"
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["mountPath"]: mount for mount in spec["containers"][0]["volumeMounts"]}
    assert set(mounts) == {"/models", "/dev/shm", "/cache", "/tmp"}, "what the server writes to, and the model"
    assert mounts["/models"]["readOnly"] is True
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert set(volumes) == {mount["name"] for mount in mounts.values()}
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("case", CASES)
def test_probes_ask_for_a_real_token_and_allow_for_their_own_start(case: str) -> None:
    container = pod(case)["containers"][0]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = container[name]["exec"]["command"]
        asked = ["--url", "localhost:8001", "--metrics-url", "http://localhost:8002/metrics", "--timeout"]
        assert command[:-1] == ["textgen", "health", *asked]
        assert container[name]["timeoutSeconds"] > float(command[-1])
    assert probe_parameters()["max_new_tokens"] == 1
    startup = container["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] >= 600
    if "Deployment" in rendered(case):
        deadline = rendered(case)["Deployment"]["spec"]["progressDeadlineSeconds"]
        assert deadline > startup["failureThreshold"] * startup["periodSeconds"]


@pytest.mark.parametrize("case", CASES)
def test_a_pod_may_drain_before_it_is_killed(case: str) -> None:
    wait = int(pod(case)["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = int(environment(case)["GRACEFUL_TERMINATION_TIMEOUT"])
    assert pod(case)["terminationGracePeriodSeconds"] > wait + drain


@pytest.mark.parametrize("case", CASES)
def test_the_engine_takes_the_environment(case: str) -> None:
    given = environment(case)
    assert set(values_of(case).get("options", {})) <= {option.env for option in OPTIONS}
    assert not set(given) & {name.upper() for name in UNSUPPORTED_OPTIONS}
    if "TEXTGEN_GROUP_SECRET" in given:
        # What the pod gets from a secret, and from LeaderWorkerSet by way of a flag.
        given |= {"TEXTGEN_GROUP_SECRET": "shared", "MASTER_ADDR": "leader"}
    build_config({}, given, has_gpu=case == "gpu")
    assert pod(case)["enableServiceLinks"] is False, "a Service named textgen would set TEXTGEN_SERVICE_HOST"


def test_numbers_reach_the_server_as_they_were_written() -> None:
    given = environment("cpu")
    assert given["MAX_BATCH_TOTAL_TOKENS"] == "1000000"
    assert given["TEXTGEN_MAX_KV_CACHE_GIB"] == "1.5"
    assert given["PREFIX_CACHING"] == "true"


@pytest.mark.parametrize("case", CASES)
def test_everything_selects_the_pods_and_names_their_ports(case: str) -> None:
    documents = rendered(case)
    labels = templates(case)["server"]["metadata"]["labels"].items()
    ports = {port["name"] for port in pod(case)["containers"][0]["ports"]}
    service = documents["Service"]["spec"]
    assert {port["targetPort"] for port in service["ports"]} == ports == {"http", "grpc", "metrics", "gateway"}
    selectors = [service["selector"]]
    if "Deployment" in documents:
        selectors.append(documents["Deployment"]["spec"]["selector"]["matchLabels"])
    selectors.append(documents["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"])
    selectors.append(documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"])
    if "PodMonitor" in documents:
        monitor = documents["PodMonitor"]["spec"]
        selectors.append(monitor["selector"]["matchLabels"])
        assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == ["metrics"]
    assert all(selector.items() <= labels for selector in selectors)
    allowed = {port["port"] for rule in documents["NetworkPolicy"]["spec"]["ingress"] for port in rule.get("ports", [])}
    assert allowed == ports
    if case not in ("gpus", "leader-worker"):
        assert documents["NetworkPolicy"]["spec"]["egress"] == []


def test_gpu_key_and_claim() -> None:
    container = pod("gpu")["containers"][0]
    assert container["resources"]["limits"] == {"memory": "32Gi", "nvidia.com/gpu": 1}
    key = next(entry for entry in container["env"] if entry["name"] == "RESTRICTED_API_KEY")
    assert key["valueFrom"]["secretKeyRef"] == {"name": "triton-textgen-admin", "key": "admin-key"}
    assert container["volumeMounts"][0]["subPath"] == "llama"
    assert "nvidia.com/gpu" not in str(pod("cpu"))
    assert pod("cpu")["initContainers"][0]["command"] == ["cp", "-r", "/model", environment("cpu")["MODEL_ID"]]


def test_scaling_is_by_queue_and_cache() -> None:
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": rendered("keda")["Deployment"]["metadata"]["name"]}
    scaler = rendered("hpa-pvc")["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"] == target
    wanted = {m["pods"]["metric"]["name"]: m["pods"]["target"]["averageValue"] for m in scaler["metrics"]}
    assert wanted == {"tgi_queue_size": "8", "tgi_kv_cache_usage_ratio": "750m"}
    keda = rendered("keda")["ScaledObject"]["spec"]
    assert keda["scaleTargetRef"] == target
    assert [trigger["metadata"]["query"] for trigger in keda["triggers"]] == [
        f'sum(tgi_queue_size{{namespace="texts",pod=~"{target["name"]}-.*"}})',
        f'100 * sum(tgi_kv_cache_usage_ratio{{namespace="texts",pod=~"{target["name"]}-.*"}})',
    ]
    assert all(trigger["metadata"]["serverAddress"] for trigger in keda["triggers"])
    for case in ("hpa-pvc", "keda"):
        assert "replicas" not in rendered(case)["Deployment"]["spec"], "the scaler's alone"


def test_one_model_over_several_hosts() -> None:
    spec = rendered("leader-worker")["LeaderWorkerSet"]["spec"]
    assert spec["leaderWorkerTemplate"]["size"] == 2
    roles = templates("leader-worker")
    service = rendered("leader-worker")["Service"]["spec"]["selector"].items()
    assert service <= roles["server"]["metadata"]["labels"].items()
    assert not service <= roles["worker"]["metadata"]["labels"].items()
    shared = ("NUM_SHARD", "TEXTGEN_NUM_NODES", "MASTER_PORT", "MODEL_ID")
    leader, worker = environment("leader-worker"), environment("leader-worker", "worker")
    assert {name: leader[name] for name in shared} == {name: worker[name] for name in shared}
    assert (leader["NUM_SHARD"], leader["TEXTGEN_NUM_NODES"]) == ("8", "2")
    assert "NODE_RANK" in worker and "NODE_RANK" not in leader
    assert "RESTRICTED_API_KEY" in leader and "RESTRICTED_API_KEY" not in worker
    (container,) = pod("leader-worker", "worker")["containers"]
    assert container["command"] == ["python3", "scripts/worker.py", "--master-addr=$(LWS_LEADER_ADDRESS)"]
    assert (ROOT / container["command"][1]).exists()
    assert "livenessProbe" not in container, "a worker waits for its server by itself"
    assert pod("leader-worker")["containers"][0]["args"] == ["--master-addr=$(LWS_LEADER_ADDRESS)"]
    keda = rendered("leader-worker")["ScaledObject"]["spec"]["scaleTargetRef"]
    assert (keda["kind"], keda["apiVersion"]) == ("LeaderWorkerSet", "leaderworkerset.x-k8s.io/v1")


def test_one_model_over_the_gpus_of_a_pod() -> None:
    assert environment("gpus")["NUM_SHARD"] == "4"
    assert pod("gpus")["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert "NUM_SHARD" not in environment("gpu")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of"),
        ({"model": {"pvc": {"claimName": "a"}, "init": {"image": "b"}}}, "exactly one of"),
        ({"model": {"pvc": {"claimName": "a"}}, "options": {"MODEL_ID": "/x"}}, "the chart sets it"),
        ({"model": {"pvc": {"claimName": "a"}}, "autoscaling": {"kind": "keda"}}, "prometheusAddress is needed"),
        ({"model": {"pvc": {"claimName": "a"}}, "autoscaling": {"kind": "vpa"}}, "must be hpa, keda or empty"),
        ({"model": {"pvc": {"claimName": "a"}}, "leaderWorkerSet": {"enabled": True}}, "existingSecret is needed"),
        (
            {
                "model": {"pvc": {"claimName": "a"}},
                "gpu": {"enabled": True, "count": 2},
                "options": {"NUM_SHARD": 4},
            },
            "the chart sets it",
        ),
        ({"model": {"pvc": {"claimName": "a"}}, "options": {"ROPE_SCALING": "linear"}}, "not supported"),
    ],
)
def test_what_cannot_work_is_refused_before_it_is_installed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmError, match=message):
        render(values)


def test_the_chart_refuses_what_the_engine_refuses() -> None:
    """The list in the chart is the engine's own: what the engine learns, the chart must offer."""
    helpers = (CHART / "templates" / "_helpers.tpl").read_text()
    line = next(line for line in helpers.splitlines() if "$unsupported :=" in line)
    assert set(line.split('"')[1::2]) == {name.upper() for name in UNSUPPORTED_OPTIONS}
