"""ops/kubernetes: Kubernetes' schemas, references that lead somewhere, command lines that the programs take, a kustomization."""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from fumi_edge.backends.dialing import RESOLVE_INTERVAL
from tests.bench import environment
from tests.support.certificates import CertificateFiles, self_signed
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.starter import BIN
from tests.support.waiting import until

OPS = Path(__file__).parents[2] / "ops"
KUBERNETES = OPS / "kubernetes"
MANIFESTS = sorted((KUBERNETES / "manifests").iterdir())
KINDS = {
    "Namespace": "v1",
    "Service": "v1",
    "Deployment": "apps/v1",
    "PodDisruptionBudget": "policy/v1",
    "HorizontalPodAutoscaler": "autoscaling/v2",
    "NetworkPolicy": "networking.k8s.io/v1",
    "Certificate": "cert-manager.io/v1",
}
SCHEMAS = "kubernetes-validate==1.37.0"
"""PyPI's package of the schemas of Kubernetes. Its "strict" ones refuse unknown keys."""
VERSIONS = [f"1.{minor}.0" for minor in range(30, 38)]
STRICTLY = """
import json, pathlib, sys
from jsonschema.validators import Draft202012Validator
from referencing import Registry, Resource
objects, versions, directory = json.load(sys.stdin)
for version in versions:
    schemas = pathlib.Path(directory, f"v{version}-local-strict")
    definitions = Resource.from_contents(json.loads((schemas / "_definitions.json").read_text()))
    for each in objects:
        group, _, number = each["apiVersion"].rpartition("/")
        name = "-".join([each["kind"].lower(), *filter(None, [group.partition(".")[0]]), number])
        schema = json.loads((schemas / f"{name}.json").read_text())
        registry = definitions @ (Resource.from_contents(schema) @ Registry())
        for error in Draft202012Validator(schema, registry=registry).iter_errors(each):
            print(version, each["kind"], *error.path, error.message)
"""
Objects = dict[tuple[str, str], Any]
PROGRAMS = ["fumi-core", "fumi-edge"]


@pytest.fixture
def objects(read_yaml: Callable[[Path], list[Any]]) -> Objects:
    """All objects, by kind and name."""
    everything = [each for path in MANIFESTS for each in read_yaml(path)]
    found = {(each["kind"], each["metadata"]["name"]): each for each in everything}
    assert len(found) == len(everything)
    return found


@pytest.fixture
def settings(objects: Objects, parse_flags: Callable[[list[str]], dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    def of(name: str) -> dict[str, Any]:
        container = container_of(objects, name)
        return parse_flags([*container["command"], *container["args"]])

    return of


def pod_of(objects: Objects, name: str) -> Any:
    return objects["Deployment", name]["spec"]["template"]


def container_of(objects: Objects, name: str) -> Any:
    (container,) = pod_of(objects, name)["spec"]["containers"]
    return container


def test_the_namespace_is_the_first_to_be_made(read_yaml: Callable[[Path], list[Any]]) -> None:
    # kubectl takes the files of a directory by name, and does not come back to what was too early.
    assert read_yaml(MANIFESTS[0])[0]["kind"] == "Namespace"


def test_every_object_is_of_a_known_kind_and_in_the_namespace(objects: Objects) -> None:
    for (kind, _), each in objects.items():
        assert each["apiVersion"] == KINDS[kind]
        if kind != "Namespace":
            assert ("Namespace", each["metadata"]["namespace"]) in objects


@pytest.fixture(scope="session")
def schemas() -> Path:
    """What imports jsonschema and has the schemas of Kubernetes: of the package's 36,000 files only those that are needed."""
    made = environment.INSTALLED / SCHEMAS
    if not (made / "installed").exists():
        pip = [sys.executable, "-m", "pip", "--quiet"]
        environment.run(*pip, "install", "--upgrade", "--target", str(made), "jsonschema==4.26.0")
        environment.run(*pip, "download", "--no-deps", "--dest", str(made), SCHEMAS)
        (archive,) = made.glob("*.whl")
        kinds = "|".join(["_definitions", *(f"{kind.lower()}-[a-z0-9-]+" for kind in KINDS)])
        wanted = re.compile(rf"/v({'|'.join(map(re.escape, VERSIONS))})-local-strict/({kinds})\.json$")
        with zipfile.ZipFile(archive) as files:
            files.extractall(made, [name for name in files.namelist() if wanted.search(name)])
        archive.unlink()
        (made / "installed").touch()
    return made


def strictly(schemas: Path, objects: Iterable[Any]) -> list[str]:
    """What the schemas of all these versions do not allow, unknown keys among it."""
    directory = schemas / "kubernetes_validate" / "kubernetes-json-schema"
    given = json.dumps([list(objects), VERSIONS, str(directory)]).encode()
    search = {**os.environ, "PYTHONPATH": str(schemas)}
    done = subprocess.run([sys.executable, "-c", STRICTLY], input=given, env=search, capture_output=True, check=True)
    return done.stdout.decode().splitlines()


def test_eight_versions_of_kubernetes_accept_the_manifests(schemas: Path, objects: Objects) -> None:
    assert strictly(schemas, (each for (kind, _), each in objects.items() if kind != "Certificate")) == []


@pytest.mark.parametrize(("key", "value"), [("timeoutSecond", 5), ("timeoutSeconds", "five")], ids=["misspelt", "not a number"])
def test_the_schemas_would_find_a_mistake(schemas: Path, objects: Objects, key: str, value: object) -> None:
    deployment = objects["Deployment", "fumi-edge"]
    container_of(objects, "fumi-edge")["readinessProbe"][key] = value
    found = strictly(schemas, [deployment])
    assert [line.split()[0] for line in found] == VERSIONS
    assert all(str(value if value == "five" else key) in line for line in found)


def test_the_certificate_has_only_keys_that_cert_manager_knows(objects: Objects) -> None:
    """Its kinds are not in Kubernetes' schemas. https://cert-manager.io/docs/reference/api-docs/#cert-manager.io/v1.Certificate"""
    spec = objects["Certificate", "fumi-edge"]["spec"]
    assert spec.keys() <= {"secretName", "dnsNames", "privateKey", "issuerRef", "duration", "renewBefore", "usages", "subject"}
    assert spec["privateKey"].keys() <= {"algorithm", "size", "rotationPolicy", "encoding"}
    assert spec["issuerRef"].keys() <= {"name", "kind", "group"}
    assert (spec["privateKey"]["algorithm"], spec["privateKey"]["size"]) in [("ECDSA", 256), ("ECDSA", 384), ("RSA", 2048)]
    assert spec["privateKey"]["rotationPolicy"] in ("Always", "Never")
    assert spec["issuerRef"]["kind"] in ("Issuer", "ClusterIssuer")


def test_every_selector_selects_the_pods_of_its_name(objects: Objects) -> None:
    for (kind, name), each in objects.items():
        selector = each["spec"].get("selector", each["spec"].get("podSelector")) if kind != "Namespace" else None
        if selector is not None:
            labels = selector if kind == "Service" else selector["matchLabels"]
            assert labels.items() <= pod_of(objects, name)["metadata"]["labels"].items(), (kind, name)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_pods_of_a_program_are_spread_over_the_nodes(name: str, objects: Objects) -> None:
    (spread,) = pod_of(objects, name)["spec"]["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["maxSkew"]) == ("kubernetes.io/hostname", 1)
    assert spread["labelSelector"]["matchLabels"] == pod_of(objects, name)["metadata"]["labels"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_ports_are_what_the_program_listens_on(name: str, objects: Objects, settings: Callable[[str], dict[str, Any]]) -> None:
    container, flags = container_of(objects, name), settings(name)
    addresses = [*flags["listen"], *flags.get("starttls_listen", ()), flags["metrics"]]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert sorted(ports.values()) == sorted(address.port for address in addresses)
    for each in objects["Service", name]["spec"]["ports"]:
        assert each["targetPort"] in ports
    for probe, path in (("startupProbe", "/readyz"), ("readinessProbe", "/healthz"), ("livenessProbe", "/healthz")):
        assert container[probe]["httpGet"] == {"path": path, "port": "metrics"}
        assert container[probe]["timeoutSeconds"] == 5
    annotations = pod_of(objects, name)["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(ports["metrics"])


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_pod_has_the_time_to_drain(name: str, objects: Objects, settings: Callable[[str], dict[str, Any]]) -> None:
    pause = int(container_of(objects, name)["lifecycle"]["preStop"]["exec"]["command"][1])
    grace = pod_of(objects, name)["spec"]["terminationGracePeriodSeconds"]
    assert grace > pause + settings(name)["drain_timeout"]


def test_a_core_that_ends_serves_until_edges_have_resolved_its_name_again(objects: Objects) -> None:
    assert int(container_of(objects, "fumi-core")["lifecycle"]["preStop"]["exec"]["command"][1]) > RESOLVE_INTERVAL


def test_the_core_has_the_name_that_the_certificate_is_for(objects: Objects, settings: Callable[[str], dict[str, Any]]) -> None:
    assert [settings("fumi-core")["name"]] == objects["Certificate", "fumi-edge"]["spec"]["dnsNames"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_pod_may_do_nothing_it_need_not(name: str, objects: Objects) -> None:
    pod, container = pod_of(objects, name)["spec"], container_of(objects, name)
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == 10001
    assert "USER 10001:" in (OPS / "docker" / "Dockerfile").read_text()
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_edge_finds_the_cores_and_believes_the_balancer(objects: Objects, settings: Callable[[str], dict[str, Any]]) -> None:
    (backend,) = settings("fumi-edge")["backend"]
    assert objects["Service", backend.host]["spec"]["clusterIP"] == "None"
    # The name leads to the pods themselves, and nothing between translates the port.
    assert backend.port in [each["containerPort"] for each in container_of(objects, backend.host)["ports"]]
    assert backend.port in [each["port"] for each in objects["Service", backend.host]["spec"]["ports"]]
    annotations = objects["Service", "fumi-edge"]["metadata"]["annotations"]
    assert settings("fumi-edge")["accept_proxy"]
    assert any("proxy" in name.rpartition("/")[2] for name in annotations)
    assert all(isinstance(value, str) for value in annotations.values())
    assert {each["port"] for each in objects["Service", "fumi-edge"]["spec"]["ports"]} == {25, 465, 587}


def test_no_client_can_bypass_the_edge_or_the_balancer(objects: Objects, settings: Callable[[str], dict[str, Any]]) -> None:
    for name in PROGRAMS:
        policy = objects["NetworkPolicy", name]["spec"]
        assert policy["policyTypes"] == ["Ingress"]
        ports = {each["name"] for each in container_of(objects, name)["ports"]}
        clients, monitoring = policy["ingress"]
        assert [each["port"] for each in monitoring["ports"]] == ["metrics"]
        assert {each["port"] for each in clients["ports"]} == ports - {"metrics"}
        if name == "fumi-core":
            (source,) = clients["from"]
            labels = source["podSelector"]["matchLabels"]
            assert labels.items() <= pod_of(objects, "fumi-edge")["metadata"]["labels"].items()
        else:
            assert tuple(each["ipBlock"]["cidr"] for each in clients["from"]) == settings(name)["trusted_proxy"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_memory_limit_suffices_for_max_clients(
    name: str, objects: Objects, settings: Callable[[str], dict[str, Any]]
) -> None:
    readme = (OPS / "README.md").read_text()
    column = {"fumi-edge": 1, "fumi-core": 2}[name]
    program, connection = (
        int(re.findall(r"\d+", row.split("|")[column + 1])[0]) for row in re.findall(r"^\| memory of .*$", readme, re.MULTILINE)
    )
    limit = int(container_of(objects, name)["resources"]["limits"]["memory"].removesuffix("Mi"))
    assert 0.2 * limit < program + settings(name)["max_clients"] * connection / 1024 < 0.75 * limit


@pytest.mark.parametrize("name", PROGRAMS)
def test_variables_that_kubernetes_sets_for_services_are_not_flags(name: str, objects: Objects) -> None:
    assert pod_of(objects, name)["spec"]["enableServiceLinks"] is False


def test_the_certificate_is_mounted_where_the_edge_reads_it(objects: Objects, settings: Callable[[str], dict[str, Any]]) -> None:
    (volume,) = pod_of(objects, "fumi-edge")["spec"]["volumes"]
    (mount,) = container_of(objects, "fumi-edge")["volumeMounts"]
    assert volume["secret"]["secretName"] == objects["Certificate", "fumi-edge"]["spec"]["secretName"]
    assert (volume["name"], mount["readOnly"]) == (mount["name"], True)
    flags = settings("fumi-edge")
    assert flags["cert"] == (f"{mount['mountPath']}/tls.crt",)
    assert flags["key"] == (f"{mount['mountPath']}/tls.key",)
    assert flags["cert_reload_interval"] > 0


def test_disruptions_and_the_autoscaler_leave_one_that_serves(objects: Objects) -> None:
    scaler = objects["HorizontalPodAutoscaler", "fumi-edge"]["spec"]
    target = scaler["scaleTargetRef"]
    deployment = objects[target["kind"], target["name"]]
    assert target["apiVersion"] == deployment["apiVersion"]
    assert "replicas" not in deployment["spec"]
    assert min(scaler["minReplicas"], objects["Deployment", "fumi-core"]["spec"]["replicas"]) == 2
    for name in PROGRAMS:
        assert objects["PodDisruptionBudget", name]["spec"]["maxUnavailable"] == 1
        assert objects["Deployment", name]["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    (policy,) = scaler["behavior"]["scaleDown"]["policies"]
    assert (policy["type"], policy["value"]) == ("Pods", 1)
    # One has ended before the next is removed.
    assert policy["periodSeconds"] > pod_of(objects, "fumi-edge")["spec"]["terminationGracePeriodSeconds"]
    (metric,) = scaler["metrics"]
    assert metric["pods"]["metric"]["name"] in (OPS / "grafana" / "fumi.json").read_text()


def test_the_kustomization_has_all_manifests_and_is_not_among_them(read_yaml: Callable[[Path], list[Any]]) -> None:
    # kubectl apply -f DIRECTORY would take it for an object of the cluster.
    (kustomization,) = read_yaml(KUBERNETES / "kustomization.yaml")
    assert kustomization["resources"] == [f"manifests/{path.name}" for path in MANIFESTS]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not in Debian")
def test_the_kustomization_of_the_readme_changes_what_it_names_and_nothing_else(
    tmp_path: Path, objects: Objects, read_yaml: Callable[[Path], list[Any]]
) -> None:
    (example,) = re.findall(r"```yaml\n(resources: .*?)```", (OPS / "README.md").read_text(), re.DOTALL)
    shutil.copytree(OPS, tmp_path / "fumi" / "ops")
    (tmp_path / "kustomization.yaml").write_text(example)
    done = subprocess.run(["kubectl", "kustomize", tmp_path], capture_output=True, check=True)
    (tmp_path / "built.yaml").write_bytes(done.stdout)
    built = {(each["kind"], each["metadata"]["name"]): each for each in read_yaml(tmp_path / "built.yaml")}
    assert container_of(built, "fumi-core")["args"] != container_of(objects, "fumi-core")["args"]
    for name in PROGRAMS:
        assert container_of(built, name)["image"] == "registry.example.net/fumi:0.2.0"
        container_of(objects, name)["image"] = container_of(built, name)["image"]
    objects["Certificate", "fumi-edge"]["spec"]["dnsNames"] = ["mx.example.net"]
    arguments = container_of(objects, "fumi-core")["args"]
    arguments[arguments.index("--name=mx.example.org")] = "--name=mx.example.net"
    assert built == objects


def test_a_secret_that_the_kubelet_renews_is_loaded(programs: Programs, certificate: CertificateFiles) -> None:
    """It puts the files into a directory of their own, to which ..data is turned by renaming a link."""
    mount = programs.directory / "certs"
    mount.mkdir()
    publish(mount, "..first", *certificate)
    for name in ("tls.crt", "tls.key"):
        (mount / name).symlink_to(f"..data/{name}")
    port = free_port()
    flags = ["--cert", f"{mount}/tls.crt", "--key", f"{mount}/tls.key", "--cert-reload-interval", "0.1"]
    flags += ["--backend", "127.0.0.1:1", "--listen", f"127.0.0.1:{port}"]
    programs.start(BIN / "fumi-edge", *flags, port=port, log="edge.log")
    before = ssl.get_server_certificate(("127.0.0.1", port))
    assert before == certificate[0].read_text()
    new = self_signed(programs.directory, "new")
    publish(mount, "..second", *new)
    until(lambda: ssl.get_server_certificate(("127.0.0.1", port)) == new[0].read_text(), "the new certificate")
    assert "certificate not loaded" not in (programs.directory / "edge.log").read_text()


def publish(mount: Path, name: str, cert: Path, key: Path) -> None:
    (mount / name).mkdir()
    shutil.copy(cert, mount / name / "tls.crt")
    shutil.copy(key, mount / name / "tls.key")
    (mount / "..data_tmp").symlink_to(name)
    os.replace(mount / "..data_tmp", mount / "..data")
