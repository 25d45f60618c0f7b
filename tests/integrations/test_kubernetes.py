"""The Kubernetes manifests: valid by Kubernetes' own schema, consistent with each other, and true
of what they start."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kit.etcd import require
from kit.launches import launch_of
from kit.servers.certificates import Authority
from kit.servers.process import ServerProcess, free_port
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from ckpt.cluster.membership.open import open_membership
from ckpt.cluster.membership.records import NodeInfo
from ckpt.cluster.secret import read_secret
from ckpt.cluster.tls import check_tls
from ckpt.errors import UnavailableError, UsageError
from ckpt.ipc.cluster_spec import NodesSpec
from ckpt.ipc.messages import Policy
from ckpt.keyspace.address import EtcdOptions

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "integrations" / "kubernetes"
VERSION = "1.33"
"""The first in which all that the manifests use is stable, as README.md says."""


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def found(name: str, kind: str, named: str | None = None) -> dict:
    [one] = [
        document
        for document in documents(name)
        if document["kind"] == kind and (named is None or document["metadata"]["name"] == named)
    ]
    return one


def resources() -> list[dict]:
    return [
        document
        for name in found("kustomization.yaml", "Kustomization")["resources"]
        for document in documents(name)
    ]


JOB = found("job.yaml", "Job")["spec"]
POD = JOB["template"]["spec"]
[TRAIN] = POD["containers"]
ETCD = found("etcd.yaml", "StatefulSet")
[MEMBER] = ETCD["spec"]["template"]["spec"]["containers"]
INIT = {one["name"]: one for one in POD["initContainers"]}
CERTIFICATE = found("certificates.yaml", "Certificate", "train")["spec"]

CERT_MANAGER = "cert-manager.io/"
FIELDS = {
    "Issuer": {"selfSigned": dict, "ca": dict},
    "Certificate": {
        "commonName": str,
        "dnsNames": list,
        "duration": str,
        "isCA": bool,
        "issuerRef": dict,
        "privateKey": dict,
        "renewBefore": str,
        "secretName": str,
        "usages": list,
    },
    "issuerRef": {"name": str, "kind": str, "group": str},
    "privateKey": {"algorithm": str, "size": int, "rotationPolicy": str},
    "ca": {"secretName": str},
    "selfSigned": {},
}
"""What ``cert-manager.io/v1`` knows, as far as it is used here."""
VALUES = {
    "algorithm": ("ECDSA",),
    "size": (256,),
    "rotationPolicy": ("Always", "Never"),
    "group": ("cert-manager.io",),
    "kind": ("Issuer",),
    "usages": ("digital signature", "server auth", "client auth"),
}


@pytest.mark.slow
def test_manifests_are_valid_by_the_schema_of_kubernetes() -> None:
    for document in resources():
        if document["apiVersion"].startswith(CERT_MANAGER):
            continue  # not Kubernetes' own; see below
        kubernetes_validate.validate(document, VERSION, strict=True)
    assert f"Kubernetes {VERSION}" in (FOLDER / "README.md").read_text()


def test_jobset_wraps_the_very_same_job() -> None:
    [group] = found("jobset.yaml", "JobSet")["spec"]["replicatedJobs"]
    assert group["template"]["spec"] == JOB


def test_options_are_those_of_ckpt_run() -> None:
    args, settings = launch_of([*TRAIN["command"], *TRAIN["args"]])
    assert args.training_script == TRAIN["args"][-1]
    assert settings is not None and settings.nodes is not None
    assert (
        settings.nodes.nodes_max
        == settings.nodes.nodes_min
        < JOB["completions"]
        == JOB["parallelism"]
    )
    standbys = JOB["completions"] - settings.nodes.nodes_max
    assert JOB["successPolicy"]["rules"] == [{"succeededCount": standbys + 1}]
    assert args.max_restarts > 0, "a drain of one pod ends all"
    assert not settings.nodes.plaintext, "pods are on different machines"


def test_variables_in_arguments_are_set() -> None:
    for container in (TRAIN, MEMBER, INIT["name"]):
        used = set(
            re.findall(r"\$\(?(\w+)\)?", " ".join([*container["command"], *container["args"]]))
        )
        assert used <= {one["name"] for one in container["env"]}
        for at, one in enumerate(container["env"]):  # a value's variables come before it
            used = set(re.findall(r"\$\((\w+)\)", one.get("value", "")))
            assert used <= {known["name"] for known in container["env"][:at]}


def test_certificates_have_fields_that_cert_manager_knows() -> None:
    def check(kind: str, fields: dict) -> None:
        for name, value in fields.items():
            assert isinstance(value, FIELDS[kind][name]), (kind, name)
            if isinstance(value, dict):
                check(name, value)
            elif name in VALUES:
                assert (
                    {*value} <= {*VALUES[name]}
                    if isinstance(value, list)
                    else value in VALUES[name]
                ), (kind, name)

    for document in documents("certificates.yaml"):
        assert document.keys() == {"apiVersion", "kind", "metadata", "spec"}
        assert document["apiVersion"] == f"{CERT_MANAGER}v1"
        assert (
            document["metadata"]["namespace"]
            == found("namespace.yaml", "Namespace")["metadata"]["name"]
        )
        check(document["kind"], document["spec"])
        if document["kind"] == "Certificate":
            assert {"secretName", "issuerRef"} <= document["spec"].keys(), "they must be there"
            found("certificates.yaml", "Issuer", document["spec"]["issuerRef"]["name"])


def test_authority_outlives_what_it_signs_and_no_pod_has_its_key() -> None:
    def hours(text: str) -> int:
        return int(re.fullmatch(r"(\d+)h", text)[1])  # type: ignore[index]

    issuer = found("certificates.yaml", "Issuer", CERTIFICATE["issuerRef"]["name"])["spec"]
    authority = found("certificates.yaml", "Certificate", "ckpt-ca")["spec"]
    assert issuer["ca"]["secretName"] == authority["secretName"]
    assert authority["isCA"] and "isCA" not in CERTIFICATE
    assert (
        hours(authority["duration"])
        > hours(authority["renewBefore"])
        > hours(CERTIFICATE["duration"])
    )
    assert authority["privateKey"]["rotationPolicy"] == "Never", (
        "running nodes believe the file that they read"
    )
    assert hours(CERTIFICATE["duration"]) - hours(CERTIFICATE["renewBefore"]) >= 24
    assert {"server auth", "client auth"} <= {*CERTIFICATE["usages"]}
    assert authority["secretName"] not in [
        one.get("secret", {}).get("secretName") for one in POD["volumes"]
    ]


def pods() -> Iterator[str]:
    """``--host`` of every pod of the Job and of the JobSet; a pod's host name is its job's name and
    its index."""
    jobset = found("jobset.yaml", "JobSet")
    [group] = jobset["spec"]["replicatedJobs"]
    jobs = [found("job.yaml", "Job")["metadata"]["name"]]
    jobs += [f"{jobset['metadata']['name']}-{group['name']}-{n}" for n in range(group["replicas"])]
    for container in (TRAIN, INIT["name"]):
        env = {one["name"]: one for one in container["env"]}
        assert env["JOB_NAME"]["valueFrom"]["fieldRef"]["fieldPath"].endswith("job-name']")
        assert env["POD_INDEX"]["valueFrom"]["fieldRef"]["fieldPath"].endswith(
            "job-completion-index']"
        )
        for job in jobs:
            for index in range(JOB["completions"]):
                yield (
                    env["NODE_HOST"]["value"]
                    .replace("$(JOB_NAME)", job)
                    .replace("$(POD_INDEX)", str(index))
                )


def test_pods_are_called_by_names_that_their_service_gives_them() -> None:
    assert "--host=$(NODE_HOST)" in TRAIN["args"]
    service = found("job.yaml", "Service")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == JOB["template"]["metadata"]["labels"]
    name = service["metadata"]["name"]
    network = found("jobset.yaml", "JobSet")["spec"][
        "network"
    ]  # from which JobSet makes such a Service
    assert network == {
        "enableDNSHostnames": True,
        "subdomain": name,
        "publishNotReadyAddresses": True,
    }
    assert POD["subdomain"] == name
    names = {*pods()}
    suffix = f".{name}.{service['metadata']['namespace']}.svc"
    assert names == {
        f"{pod}-{n}{suffix}" for pod in ("train", "train-node-0") for n in range(JOB["completions"])
    }


def nodes_of(cert: Path, key: Path, ca: Path) -> NodesSpec:
    return NodesSpec(
        where="/f",
        job="j",
        nodes_min=2,
        nodes_max=2,
        tls_cert=str(cert),
        tls_key=str(key),
        tls_ca=str(ca),
    )


def test_certificate_with_the_names_of_cert_managers_is_accepted_at_every_pod(
    tmp_path: Path,
) -> None:
    files = Authority(tmp_path / "ca").sign("train", *CERTIFICATE["dnsNames"])
    for host in pods():
        assert check_tls(nodes_of(files.cert, files.key, files.ca), host) is not None
    with pytest.raises(UsageError, match="would refuse"):
        check_tls(nodes_of(files.cert, files.key, files.ca), "train-0.other.ckpt.svc")


def test_files_of_the_command_that_does_without_cert_manager_are_accepted_at_every_pod(
    tmp_path: Path,
) -> None:
    require("openssl")
    [line] = re.findall(r"^openssl req .*$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    (tmp_path / "secrets").mkdir()
    subprocess.run(shlex.split(line), cwd=tmp_path, check=True, capture_output=True, timeout=60)
    text = (FOLDER / "kustomization.yaml").read_text()
    more = [
        line.replace("# ", "", 1)
        for line in text.splitlines()
        if re.match(r"  # (-|  files)", line)
    ]
    [made] = yaml.safe_load("\n".join(more))
    assert made["name"] == CERTIFICATE["secretName"]
    paths = dict(name.split("=") for name in made["files"])
    cert, key, ca = (tmp_path / paths[name] for name in ("tls.crt", "tls.key", "ca.crt"))
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    for host in pods():
        ends_s = check_tls(nodes_of(cert, key, ca), host)
        assert ends_s is not None and ends_s - time.time() > 180 * 86_400


@pytest.mark.slow
def test_pod_waits_until_dns_has_its_name_at_its_address() -> None:
    command = [*INIT["name"]["command"], *INIT["name"]["args"]]
    here = {**os.environ, "NODE_HOST": "localhost", "POD_IP": "127.0.0.1"}
    subprocess.run(command, env=here, check=True, timeout=30)
    for address in ("27.0.0.1", "127.0.0.12"):
        waiting = subprocess.Popen(
            command, env={**here, "POD_IP": address}, stdout=subprocess.PIPE, text=True
        )
        try:
            assert waiting.stdout is not None
            assert waiting.stdout.readline().startswith("waiting until DNS says that ")
            assert waiting.poll() is None
        finally:
            waiting.kill()
            waiting.communicate()


def test_endpoints_are_the_members_of_etcd() -> None:
    _, settings = launch_of([*TRAIN["command"], *TRAIN["args"]])
    assert settings is not None and settings.nodes is not None
    service = found("etcd.yaml", "Service")
    assert (
        service["metadata"]["name"] == ETCD["spec"]["serviceName"]
        and service["spec"]["clusterIP"] == "None"
    )
    suffix = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc"
    names = [f"{ETCD['metadata']['name']}-{n}" for n in range(ETCD["spec"]["replicas"])]
    ports = {one["name"]: one["port"] for one in service["spec"]["ports"]}
    assert settings.nodes.where == "etcd://" + ",".join(
        f"{name}.{suffix}:{ports['client']}" for name in names
    )
    cluster = ",".join(f"{name}=https://{name}.{suffix}:{ports['peer']}" for name in names)
    assert f"--initial-cluster={cluster}" in MEMBER["args"]
    assert {one["name"]: one["containerPort"] for one in MEMBER["ports"]}.items() >= ports.items()


def test_labels_meet_their_selectors() -> None:
    labels = {
        "train": JOB["template"]["metadata"]["labels"],
        "etcd": ETCD["spec"]["template"]["metadata"]["labels"],
    }
    assert ETCD["spec"]["selector"]["matchLabels"] == labels["etcd"]
    assert found("etcd.yaml", "Service")["spec"]["selector"] == labels["etcd"]
    assert (
        found("etcd.yaml", "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]
        == labels["etcd"]
    )
    ports = {one["name"] for one in MEMBER["ports"]}
    for policy in documents("network.yaml"):
        name = policy["metadata"]["name"]
        assert policy["spec"]["podSelector"]["matchLabels"] == labels[name]
        for rule in policy["spec"]["ingress"]:
            assert {one["port"] for one in rule.get("ports", ())} <= ports
            for source in rule["from"]:
                assert (
                    source.get("podSelector", {}).get("matchLabels", labels[name])
                    in labels.values()
                )
    for pod in (POD, ETCD["spec"]["template"]["spec"]):
        terms = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        own = labels["train"] if pod is POD else labels["etcd"]
        assert [
            one["labelSelector"]["matchLabels"]
            for one in (*terms, *pod["topologySpreadConstraints"])
        ] == [
            own,
            own,
        ]


def test_shared_memory_is_more_than_a_container_has_by_itself() -> None:
    pod = JOB["template"]["spec"]
    [mount] = [one for one in TRAIN["volumeMounts"] if one["mountPath"] == "/dev/shm"]
    [volume] = [one for one in pod["volumes"] if one["name"] == mount["name"]]
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}


def test_volumes_secrets_and_paths_agree() -> None:
    made = {
        one["name"]: one["files"]
        for one in found("kustomization.yaml", "Kustomization")["secretGenerator"]
    }
    made[CERTIFICATE["secretName"]] = ["ca.crt", "tls.crt", "tls.key"]  # what cert-manager writes
    for pod in (POD, ETCD["spec"]["template"]["spec"]):
        volumes = {one["name"]: one for one in pod["volumes"]}
        claims = (
            {one["metadata"]["name"] for one in ETCD["spec"]["volumeClaimTemplates"]}
            if pod is not POD
            else set()
        )
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            readable: list[str] = []
            for mount in container.get("volumeMounts", ()):
                assert mount["name"] in volumes.keys() | claims
                secret = volumes.get(mount["name"], {}).get("secret")
                if secret is not None:
                    keys = [
                        name.partition("=")[0].rpartition("/")[2]
                        for name in made[secret["secretName"]]
                    ]
                    readable += [f"{mount['mountPath']}/{key}" for key in keys]
            words = " ".join([*container["command"], *container.get("args", ())])
            in_secrets = re.findall(r"/etc/(?:ckpt|etcd)/[\w./]+", words)
            assert set(in_secrets) <= set(readable)
            assert in_secrets or "volumeMounts" not in container
    init = INIT["secret"]
    target = init["command"][-1]
    assert f"--secret={target}" in TRAIN["args"]
    for container in (init, TRAIN):  # both see the volume that it is copied to
        assert str(Path(target).parent) in [
            mount["mountPath"] for mount in container["volumeMounts"]
        ]


def test_time_to_stop_exceeds_that_of_agents_which_exceeds_that_of_programs() -> None:
    agent_s = inspect.signature(LocalElasticAgent._shutdown).parameters["timeout"].default
    assert Policy().grace_s < agent_s < POD["terminationGracePeriodSeconds"]
    assert POD["restartPolicy"] == "Never"  # asked for by podFailurePolicy


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """What ``make-secrets.sh`` makes."""
    require("openssl")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    folder = tmp_path / "secrets"
    environment = {**os.environ, "PATH": path, "EXTRA_NAMES": "IP:127.0.0.2"}
    done = subprocess.run(
        [FOLDER / "make-secrets.sh", folder],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_secrets_that_the_kustomization_names_are_made_and_private(secrets: Path) -> None:
    names = [
        name.rpartition("=")[2]
        for one in found("kustomization.yaml", "Kustomization")["secretGenerator"]
        for name in one["files"]
    ]
    for name in names:
        assert stat.S_IMODE((secrets.parent / name).stat().st_mode) == 0o600, name
    assert not any("ca.key" in name for name in names)
    assert len(read_secret(secrets / "job.secret")) == 32


@pytest.mark.slow
def test_secret_of_a_volume_is_believed_only_once_the_init_container_has_copied_it(
    secrets: Path, tmp_path: Path
) -> None:
    """A Secret's volume: files are links through ``..data``; with fsGroup they get the group's read
    permission."""
    volume, run = tmp_path / "volume", tmp_path / "run"
    (volume / "..2026").mkdir(parents=True)
    run.mkdir()
    real = volume / "..2026" / "job.secret"
    real.write_bytes((secrets / "job.secret").read_bytes())
    (volume / "..data").symlink_to("..2026")
    (volume / "job.secret").symlink_to("..data/job.secret")
    [mode] = [one["secret"]["defaultMode"] for one in POD["volumes"] if one["name"] == "job-secret"]
    real.chmod(mode)
    with pytest.raises(UsageError, match="can be read by others"):
        read_secret(volume / "job.secret")
    init = INIT["secret"]
    places = {
        mount["mountPath"]: folder
        for mount, folder in zip(init["volumeMounts"], (volume, run), strict=True)
    }
    command = [
        str(places[str(Path(word).parent)] / Path(word).name) if word.startswith("/") else word
        for word in init["command"]
    ]
    for _ in range(2):  # an init container may run again
        subprocess.run(command, check=True, timeout=30)
        assert read_secret(run / "job.secret") == bytes.fromhex(real.read_text())
    assert stat.S_IMODE((run / "job.secret").stat().st_mode) == 0o600
    real.chmod(0o400)  # a pod that runs as root, without fsGroup, needs no copy
    assert len(read_secret(volume / "job.secret")) == 32


@pytest.fixture
def etcd(secrets: Path, tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """The StatefulSet's members with their own arguments, but for addresses, ports and paths; their
    endpoints."""
    require()
    names = [f"{ETCD['metadata']['name']}-{n}" for n in range(ETCD["spec"]["replicas"])]
    ports = {(name, port): free_port() for name in names for port in ("2379", "2380", "2381")}
    for key, name in (("ca.crt", "ca.crt"), ("tls.crt", "etcd.crt"), ("tls.key", "etcd.key")):
        (tmp_path / key).write_bytes((secrets / name).read_bytes())

    def here(argument: str, own: str) -> str:
        argument = argument.replace("$(POD_NAME)", own)
        argument = re.sub(
            r"(etcd-\d)\.etcd\.ckpt\.svc:(\d+)",
            lambda at: f"127.0.0.1:{ports[at[1], at[2]]}",
            argument,
        )
        argument = re.sub(
            r"0\.0\.0\.0:(\d+)", lambda at: f"127.0.0.1:{ports[own, at[1]]}", argument
        )
        return argument.replace("/var/lib/etcd", str(tmp_path / own)).replace(
            "/etc/etcd/tls", str(tmp_path)
        )

    servers: list[ServerProcess] = []
    try:
        for name in names:
            ready = (
                f"http://127.0.0.1:{ports[name, '2381']}{MEMBER['startupProbe']['httpGet']['path']}"
            )
            command = [
                "etcd",
                *(here(argument, name) for argument in MEMBER["args"]),
                "--log-level=error",
            ]
            servers.append(
                ServerProcess(command, ready_url=ready, log=tmp_path / f"{name}.log", env={})
            )
        for server in servers:
            server.wait_ready()
        for probe in ("livenessProbe", "readinessProbe"):
            servers[
                0
            ]._ready_url = (
                f"http://127.0.0.1:{ports[names[0], '2381']}{MEMBER[probe]['httpGet']['path']}"
            )
            servers[0].wait_ready()
        yield tuple(f"127.0.0.1:{ports[name, '2379']}" for name in names)
    finally:
        for server in servers:
            server.kill()


@pytest.mark.slow
def test_etcd_of_the_statefulset_takes_a_node_with_the_clients_certificate_and_nobody_else(
    etcd: tuple[str, ...], secrets: Path
) -> None:
    known = EtcdOptions(
        endpoints=etcd,
        ca=secrets / "ca.crt",
        cert=secrets / "client.crt",
        key=secrets / "client.key",
        call_s=5.0,
    )
    member = open_membership(known, "train", ttl_s=30.0)
    ticket = member.join(NodeInfo(node="a", host="h", slots=8))
    assert member.view().by_node.keys() == {ticket.node}
    member.leave()
    for stranger in (
        EtcdOptions(endpoints=etcd, ca=secrets / "ca.crt"),
        EtcdOptions(endpoints=etcd),
    ):
        unknown = open_membership(stranger, "train")
        with pytest.raises(UnavailableError):
            unknown.view()
        unknown.leave()
