"""``infra/aws``: the launcher's file by Ray's own code, what the account gives, and both against moto's AWS."""

import json
import os
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore import xform_name
from botocore.exceptions import ClientError
from commands import code_blocks
from tools import INFRA, ROOT, run, tool

AWS = INFRA / "aws"
CLUSTER, ACCOUNT, NOTICE = AWS / "cluster.yaml", AWS / "account.yaml", AWS / "spot-notice.sh"
NO_GROUP = "sg-00000000000000000"
_SECRET = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|(?i:secret|password|passwd)\w*\s*[:=]\s*\S")


def cluster_complaints(text: str) -> list[str]:
    """What is wrong with a launcher's file: first by Ray's own code, then by what we hold of ours."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = yaml.safe_load(text)
    try:
        config = prepare_config(given)
        validate_config(config)
    except Exception as error:  # jsonschema's, Ray's own, or an assertion
        return [f"Ray: {error}".splitlines()[0]]
    found = ["holds a secret"] if _SECRET.search(text) else []
    for name, kind in config["available_node_types"].items():
        found += [f"{name}: {why}" for why in _of_machine(kind["node_config"], name == config["head_node_type"])]
        found += [f"{name}: does not shrink to nothing"] * bool(kind["min_workers"])
    for part in ("head", "worker"):
        for command in config[f"{part}_start_ray_commands"]:
            found += [f"{part}: {why}" for why in _of_ray(shlex.split(command))]
            if " ray start" in f" {command}" and "RAY_AUTH_MODE=token" not in command:
                found.append(f"{part}: Ray starts without its token")
            if "--head" in command and "--dashboard-host=127.0.0.1" not in command:
                found.append("the dashboard listens to other machines")
    found += ["the token is not brought to the machines"] * ("auth_token" not in " ".join(given["file_mounts"]))
    found += ["ended workers would be kept, and paid for"] * config["provider"].get("cache_stopped_nodes", True)
    found += ["idle workers stay"] * (not 0 < given.get("idle_timeout_minutes", 0) <= 15)
    return found


def _of_ray(words: list[str]) -> list[str]:
    """What Ray's own command line would not take of a command."""
    import click
    from ray.scripts.scripts import cli

    if "ray" not in words:
        return []
    verb, *rest = words[words.index("ray") + 1 :]
    try:
        cli.commands[verb].make_context(verb, rest)
    except click.UsageError as error:
        return [error.format_message()]
    return []


def _of_machine(machine: dict[str, Any], head: bool) -> list[str]:
    found = []
    # By itself Ray makes a group that lets in ssh from everywhere, and a role with all rights on EC2 and S3.
    if not machine.get("SecurityGroupIds"):
        found.append("Ray would make a security group that is open to the world")
    if machine.get("IamInstanceProfile") != {"Name": f"distill-jobs-{'head' if head else 'worker'}"}:
        found.append("has not the role of its kind")
    if (machine.get("InstanceMarketOptions", {}).get("MarketType") == "spot") is head:
        found.append("a spot head takes the cluster with it" if head else "is not spot")
    if machine.get("MetadataOptions", {}).get("HttpTokens") != "required":
        found.append("gives its role's keys to whoever can make it fetch an address")
    disks = [disk["Ebs"] for disk in machine.get("BlockDeviceMappings", [])]
    if not disks or not all(disk.get("Encrypted") and disk.get("DeleteOnTermination") for disk in disks):
        found.append("a disk is not encrypted, or stays when the machine has gone")
    return found


def test_the_launchers_file_is_right() -> None:
    assert cluster_complaints(CLUSTER.read_text()) == []


BROKEN = [
    ("max_workers: 16", "max_wrokers: 16", "Ray: Additional properties"),
    ("head_node_type: head", "head_node_type: hed", "Ray: `head_node_type` must be one of"),
    ("min_workers: 0", "min_workers: 17", "Ray: The specified global `max_workers`"),
    ("    resources: {}\n", "", "Ray: 'resources' is a required property"),
    ("min_workers: 0", "min_workers: 1", "does not shrink to nothing"),
    ("idle_timeout_minutes: 5", "idle_timeout_minutes: 600", "idle workers stay"),
    ("cache_stopped_nodes: false", "cache_stopped_nodes: true", "would be kept, and paid for"),
    (f"      SecurityGroupIds: [{NO_GROUP}]", "      Monitoring: {}", "open to the world"),
    ("{Name: distill-jobs-worker}", "{Name: distill-jobs-head}", "teacher: has not the role of its kind"),
    ("{MarketType: spot,", "{MarketType: capacity-block,", "teacher: is not spot"),
    ("      InstanceType: m7i.large", "      InstanceMarketOptions: {MarketType: spot}", "head: a spot head"),
    ("HttpTokens: required", "HttpTokens: optional", "gives its role's keys"),
    ("Encrypted: true", "Encrypted: false", "not encrypted"),
    ("RAY_AUTH_MODE=token ray start --address", "ray start --address", "worker: Ray starts without its token"),
    ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "the dashboard listens"),
    ("--autoscaling-config", "--autoscaler-config", "head: No such option"),
    ("  ssh_user: ubuntu", "  ssh_user: ubuntu  # AKIAIOSFODNN7EXAMPLE", "holds a secret"),
    ("/home/distill/.ray/auth_token: ~/.ray/auth_token", "/home/distill/x: x", "token is not brought"),
]


@pytest.mark.parametrize(("old", "new", "said"), BROKEN)
def test_a_broken_launchers_file_is_told_of(old: str, new: str, said: str) -> None:
    text = CLUSTER.read_text()
    assert old in text
    assert any(said in why for why in cluster_complaints(text.replace(old, new))), said


def test_the_files_fit_each_other() -> None:
    config, text = yaml.safe_load(CLUSTER.read_text()), ACCOUNT.read_text()
    assert f"    Default: {config['cluster_name']}\n" in text
    mounted = [path for path in config["file_mounts"].values() if not path.startswith("~")]
    assert mounted == ["infra/aws/spot-notice.sh"] and all((ROOT / path).exists() for path in mounted)
    registry = config["docker"]["image"].partition("/")[0]
    assert registry.split(".")[3] == config["provider"]["region"]
    assert all(
        registry in line and f"--region {registry.split('.')[3]} " in line for line in config["initialization_commands"]
    )
    assert config["docker"]["image"].partition("/")[2].partition(":")[0] == "distill-jobs"
    assert ":repository/distill-jobs" in text


def aws_complaints(line: str) -> list[str]:
    """What a command of the page asks of the aws program that AWS has not."""
    _, service, verb, *rest = shlex.split(line)
    client = boto3.client(service, region_name="us-east-1")  # type: ignore[call-overload]
    # `deploy` is the program's own, around a change set.
    operation = client.meta.method_to_api_mapping.get({"deploy": "create_change_set"}.get(verb, verb.replace("-", "_")))
    if operation is None:
        return [f"aws {service} has no {verb}"]
    known = {xform_name(name) for name in client.meta.service_model.operation_model(operation).input_shape.members}
    known |= {"query"} | ({"template_file", "parameter_overrides"} if verb == "deploy" else set())
    options = {word[2:].partition("=")[0].replace("-", "_") for word in rest if word.startswith("--")}
    return [f"aws {service} {verb} has no --{name}" for name in sorted(options - known)]


def test_the_pages_commands_are_awss() -> None:
    lines = [line for line in code_blocks(INFRA / "README.md") if line.startswith("aws ")]
    assert len(lines) >= 4 and [why for line in lines for why in aws_complaints(line)] == []
    assert aws_complaints("aws ecr create-repo --x y") == ["aws ecr has no create-repo"]
    broken = "aws ecr create-repository --name x"
    assert aws_complaints(broken) == ["aws ecr create-repository has no --name"]


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    return run(tool("cfn-lint"), "--regions", "us-east-1", "--", str(path))


def test_the_accounts_template_is_sound() -> None:
    found = lint(ACCOUNT)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.slow
def test_a_broken_template_is_told_of(tmp_path: Path) -> None:
    broken = tmp_path / "account.yaml"
    broken.write_text(ACCOUNT.read_text().replace("GroupDescription", "GroupDescripton"))
    assert lint(broken).returncode != 0


def policy_complaints(statements: list[dict[str, Any]], bucket: str) -> list[str]:
    """Which statements of the roles allow more than they should."""
    found = []
    for statement in statements:
        name, actions = statement["Sid"], as_list(statement["Action"])
        for resource in as_list(statement["Resource"]):
            if (
                any(action.startswith("s3:") for action in actions)
                and resource.split(":::")[-1].split("/")[0] != bucket
            ):
                found.append(f"{name}: reaches {resource}")
            # Those that AWS knows for all resources alone.
            anywhere = {"ec2:DescribeInstances", "ec2:DescribeInstanceTypes", "ecr:GetAuthorizationToken"}
            if resource == "*" and not set(actions) <= anywhere:
                found.append(f"{name}: on everything")
        if any("*" in action for action in actions) or statement["Effect"] != "Allow":
            found.append(f"{name}: does everything")
        kinds = {resource.split(":")[-1] for resource in as_list(statement["Resource"])}
        changes = not any(action.split(":")[1].startswith("Describe") for action in actions)
        if "instance/*" in kinds and changes and "ray-cluster-name" not in json.dumps(statement.get("Condition", {})):
            found.append(f"{name}: touches machines of others")
        if "iam:PassRole" in actions and not statement.get("Condition"):
            found.append(f"{name}: gives its role to any service")
    return found


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A pretended account with our stack in it; what the stack made, and the bucket's name."""
    from moto import mock_aws

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps a private key under it
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        vpc = boto3.client("ec2").describe_vpcs()["Vpcs"][0]["VpcId"]
        given = {"Bucket": "our-bucket", "Vpc": vpc, "From": "203.0.113.7/32"}
        stacks = boto3.client("cloudformation")
        stacks.create_stack(
            StackName="distill-jobs",
            TemplateBody=ACCOUNT.read_text(),
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        made = stacks.describe_stack_resources(StackName="distill-jobs")["StackResources"]
        yield {one["LogicalResourceId"]: one.get("PhysicalResourceId") for one in made} | given


def policy(arn: str) -> list[dict[str, Any]]:
    iam = boto3.client("iam")
    version = iam.get_policy(PolicyArn=arn)["Policy"]["DefaultVersionId"]
    document: dict[str, Any] = iam.get_policy_version(PolicyArn=arn, VersionId=version)["PolicyVersion"]["Document"]
    found: list[dict[str, Any]] = document["Statement"]
    return found


@pytest.mark.slow
def test_the_roles_allow_what_they_need_and_no_more(account: dict[str, Any]) -> None:
    statements = policy(account["Work"]) + policy(account["Launch"])
    assert policy_complaints(statements, "our-bucket") == []
    for change in ({"Resource": "*"}, {"Action": "s3:*"}, {"Resource": "arn:aws:s3:::another/*"}, {"Effect": "Deny"}):
        assert policy_complaints([{**statements[1], **change}], "our-bucket"), change
    for own in ("StartOwn", "TagAndEndOwn", "GiveWorkersTheirRole"):
        bare = [{**one, "Condition": {}} for one in statements if one["Sid"] == own]
        assert policy_complaints(bare, "our-bucket"), own


@pytest.mark.slow
def test_a_worker_reaches_its_bucket_and_no_other(account: dict[str, Any]) -> None:
    from moto.core import set_initial_no_auth_action_count

    for bucket in ("our-bucket", "another"):
        boto3.client("s3").create_bucket(Bucket=bucket)
        boto3.client("s3").put_object(Bucket=bucket, Key="x", Body=b"x")
    role = boto3.client("iam").get_role(RoleName=account["WorkerRole"])["Role"]["Arn"]
    keys = boto3.client("sts").assume_role(RoleArn=role, RoleSessionName="worker")["Credentials"]
    named = {
        "aws_access_key_id": "AccessKeyId",
        "aws_secret_access_key": "SecretAccessKey",
        "aws_session_token": "SessionToken",
    }
    worker = boto3.Session(**{name: keys[key] for name, key in named.items()})

    @set_initial_no_auth_action_count(0)
    def held() -> None:
        assert worker.client("s3").get_object(Bucket="our-bucket", Key="x")["Body"].read() == b"x"
        worker.client("s3").put_object(Bucket="our-bucket", Key="y", Body=b"y")
        refused: list[Callable[[], Any]] = [
            lambda: worker.client("s3").get_object(Bucket="another", Key="x"),
            lambda: worker.client("s3").delete_bucket(Bucket="our-bucket"),
            lambda: worker.client("ec2").run_instances(ImageId="ami-1", MinCount=1, MaxCount=1),
            lambda: worker.client("iam").list_roles(),
        ]
        for call in refused:
            with pytest.raises(ClientError, match=r"AccessDenied|UnauthorizedOperation"):
                call()

    held()


@pytest.mark.slow
def test_rays_launcher_starts_and_ends_what_the_file_says(account: dict[str, Any]) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    config = prepare_config(yaml.safe_load(CLUSTER.read_text().replace(NO_GROUP, account["Group"])))
    config = bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(config))
    kinds = config["available_node_types"]
    assert kinds["head"]["resources"]["CPU"] == 0
    assert {"CPU": 8, "GPU": 1, "teacher": 1}.items() <= kinds["teacher"]["resources"].items()
    assert {"CPU": 48, "GPU": 4}.items() <= kinds["student"]["resources"].items()
    assert kinds["cpu"]["resources"]["CPU"] == 16 and "GPU" not in kinds["cpu"]["resources"]

    ec2 = boto3.client("ec2")
    groups = [group for group in ec2.describe_security_groups()["SecurityGroups"] if group["GroupName"] != "default"]
    assert [group["GroupId"] for group in groups] == [account["Group"]], "Ray has made one of its own"
    rules = [(rule.get("FromPort"), rule["IpRanges"], rule["UserIdGroupPairs"]) for rule in groups[0]["IpPermissions"]]
    assert [(port, ranges[0]["CidrIp"]) for port, ranges, _ in rules if ranges] == [(22, "203.0.113.7/32")]
    assert all(pair["GroupId"] == account["Group"] for _, _, pairs in rules for pair in pairs)
    assert [key.name for key in Path(os.environ["HOME"], ".ssh").glob("*.pem") if key.stat().st_mode & 0o077 == 0]

    provider, asked = AWSNodeProvider(config["provider"], config["cluster_name"]), set()
    for client in (provider.ec2.meta.client, provider.ec2_fail_fast.meta.client):
        client.meta.events.register("before-call.ec2", lambda model, **_: asked.add(f"ec2:{model.name}"))
    for name, kind in kinds.items():
        made = provider.create_node(kind["node_config"], {"ray-node-type": "worker", "ray-user-node-type": name}, 1)
        [machine] = made.values()
        provider.non_terminated_nodes({})  # as the autoscaler asks, again and again
        role = "head" if name == "head" else "worker"
        assert machine.iam_instance_profile["Arn"].endswith(f"/distill-jobs-{role}")
        assert machine.instance_lifecycle == (None if name == "head" else "spot")
        assert {"Key": "ray-cluster-name", "Value": "distill-jobs"} in machine.tags
        provider.set_node_tags(machine.id, {"ray-node-status": "up-to-date"})
    end = time.monotonic() + 20
    while "ec2:CreateTags" not in asked and time.monotonic() < end:  # Ray tags in a thread
        time.sleep(0.1)
    running = provider.non_terminated_nodes({})
    assert len(running) == 4
    provider.terminate_nodes(running)
    assert provider.non_terminated_nodes({}) == []
    # What the head asks of AWS while it works, the roles allow.
    allowed = {action for one in policy(account["Launch"]) for action in as_list(one["Action"])}
    assert {"ec2:RunInstances", "ec2:TerminateInstances", "ec2:CreateTags"} <= asked <= allowed, asked - allowed


class Metadata(BaseHTTPRequestHandler):
    """What a spot machine sees: nothing twice, then the notice; only for who has fetched a token."""

    asked = 0

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, code: int, body: bytes = b"") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        asked = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"] == "60"
        self.answer(200 if asked else 400, b"a-token")

    def do_GET(self) -> None:
        if self.headers["X-aws-ec2-metadata-token"] != "a-token":
            return self.answer(401)
        type(self).asked += 1
        there = type(self).asked > 2 and self.path == "/latest/meta-data/spot/instance-action"
        return self.answer(200 if there else 404, b'{"action": "terminate"}')


def test_a_spot_notice_drains_the_node(tmp_path: Path) -> None:
    ray = tmp_path / "ray"
    ray.write_text('#!/bin/sh\necho "$@" > "$(dirname "$0")/told"\n')
    ray.chmod(0o755)
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "METADATA": f"http://127.0.0.1:{server.server_port}"}
    done = subprocess.run(
        [tool("bash"), NOTICE], env={**given, "SECONDS_BETWEEN": "0.05"}, capture_output=True, text=True, timeout=30
    )
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert Metadata.asked == 3
    told = (tmp_path / "told").read_text()
    assert (
        told.startswith("drain-node --reason DRAIN_NODE_REASON_PREEMPTION")
        and "--deadline-remaining-seconds 110" in told
    )


def test_the_script_is_sound() -> None:
    found = run(tool("shellcheck"), str(NOTICE))
    assert found.stdout == ""
