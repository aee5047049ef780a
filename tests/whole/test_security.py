"""What docs/security.md promises: nothing from a file is executed, nothing is read or written outside, no network unasked."""

import ast
import contextlib
import io
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import dependency_table
import pytest
import torch
from study_cases import TINY

import sape2
from sape2.adapters.files import load_adapter
from sape2.cli import main
from sape2.data.webdataset import index_shard
from sape2.detection.coco import CocoImages
from sape2.models.vit import ViT, create_model
from sape2.runs.checkpoint import last_checkpoint
from sape2.runs.files import safe_name

ROOT = Path(__file__).parents[2]
SETTINGS = [text for setting in TINY for text in ("--set", setting)]
TRAIN = ["train", "digits", "--encoding", "ape", *SETTINGS, "--out"]


pytestmark = pytest.mark.usefixtures("as_users_run_it")


# --- nothing is unpickled --------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def plain(mark):
    return pickle.dumps(Bomb(mark))


def inside_torch(mark):
    file = io.BytesIO()
    torch.save({"optimizer": Bomb(mark)}, file)
    return file.getvalue()


def test_the_bombs_go_off_where_they_are_unpickled(tmp_path):
    pickle.loads(plain(tmp_path / "plain"))
    torch.load(io.BytesIO(inside_torch(tmp_path / "torch")), weights_only=False)
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "torch"}


CHECKPOINT = ("model.safetensors", "optimizer.pt", "progress.json")
READERS = {
    "evaluate": ["config.json", "model.safetensors", "metrics.jsonl", "results.jsonl"],
    "train": ["data.json", *(f"checkpoint/{name}" for name in CHECKPOINT)],
}


@pytest.mark.parametrize(("command", "name"), [(command, name) for command, names in READERS.items() for name in names])
def test_no_file_of_a_run_folder_is_unpickled(finished, tmp_path, capfd, command, name):
    for bomb in (plain, inside_torch) if name.endswith(("optimizer.pt", "model.safetensors")) else (plain,):
        run, mark = Path(shutil.copytree(finished, tmp_path / bomb.__name__)), tmp_path / "mark"
        path = last_checkpoint(run) / Path(name).name if name.startswith("checkpoint/") else run / name
        path.write_bytes(bomb(mark))
        if command == "train":
            (run / "model.safetensors").unlink()
        assert main([*TRAIN, str(run)] if command == "train" else ["evaluate", str(run)]) == 2
        assert "Traceback" not in capfd.readouterr().err
        assert not mark.exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "adapter.json", "adapter.safetensors"])
def test_no_file_of_a_hub_folder_or_an_adapter_is_unpickled(tmp_path, name):
    mark, folder = tmp_path / "mark", tmp_path / "hub"
    model = create_model("vit_nano", image_size=8, patch_size=4, in_channels=1)
    model.save_pretrained(folder)
    (folder / name).write_bytes(plain(mark))
    with contextlib.suppress(ValueError, OSError):
        ViT.from_pretrained(str(folder))
    with contextlib.suppress(ValueError, OSError):
        load_adapter(model, folder)
    assert not mark.exists()


FORBIDDEN = {
    "pickle.load",
    "pickle.loads",
    "yaml.load",
    "eval",
    "exec",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "os.system",
}
UNPICKLED_FROM_OTHERS = {  # whatever torch.distributed is called
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip
TRUSTING = {"processes.py": ["dist.all_gather_object", "dist.broadcast_object_list"]}  # see docs/security.md


def dangerous_calls(source):
    """Calls that can execute what a file holds: those above, and torch.load or numpy.load that allow pickles."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        unsafe = (name == "torch.load" and options.get("weights_only") != "True") or options.get("allow_pickle") == "True"
        unsafe = unsafe or name.rpartition(".")[2] in UNPICKLED_FROM_OTHERS
        if name in FORBIDDEN or unsafe or options.get("shell") == "True" or options.get("trust_remote_code") == "True":
            found.append(name)
    return found


def test_no_call_in_the_package_can_execute_what_a_file_holds():
    source = {path: path.read_text() for path in Path(sape2.__file__).parent.rglob("*.py")}
    found = {path.name: sorted(set(dangerous_calls(text))) for path, text in source.items() if dangerous_calls(text)}
    assert found == TRUSTING
    assert not any(re.search(r"^\s*(import|from) yaml", text, re.MULTILINE) for text in source.values())


@pytest.mark.parametrize(
    "call",
    ["pickle.loads(x)", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "eval(x)",
     "yaml.load(x)", "run(x, shell=True)", "dist.all_gather_object(a, b)", "torch.distributed.broadcast_object_list(a)",
     "gather_object(a)"],
)  # fmt: skip
def test_the_checker_sees_dangerous_calls(call):
    assert dangerous_calls(call)


# --- nothing leaves its folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/passwd", "a/../../secret.png", "link/secret.png", "link"])
def test_an_image_of_coco_cannot_lie_outside_of_its_folder(tmp_path, name):
    images = tmp_path / "set" / "images"
    images.mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (images / "link").symlink_to(tmp_path)
    entry = {"id": 1, "file_name": name, "height": 8, "width": 8}
    annotations = tmp_path / "set" / "annotations.json"
    annotations.write_text(json.dumps({"images": [entry], "annotations": [], "categories": [{"id": 1, "name": "a"}]}))
    with pytest.raises(ValueError, match=r"image 1 lies outside of .*images"):
        CocoImages(annotations, images)


@pytest.mark.parametrize("name", ["../../out.png", "/tmp/out.png", "a/../../../out.png"])
def test_names_in_a_shard_lead_nowhere(tmp_path, name):
    """They are keys of samples; nothing is unpacked, and no link is followed."""
    shard = tmp_path / "deep" / "train-0.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as tar:
        for member_name, content in ((name, b"image"), (name.replace(".png", ".cls"), b"3")):
            member = tarfile.TarInfo(member_name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    ((key, offset, size, label),) = index_shard(shard)
    assert (shard.read_bytes()[offset : offset + size], label) == (b"image", 3)
    assert key == name.removesuffix(".png")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/../../b", "..\\x", "sape2:count=../../x"])
def test_a_recipe_string_makes_no_path(name):
    assert Path(safe_name(name)).name == safe_name(name)
    assert safe_name(name) not in ("", ".", "..")


def test_an_encoding_in_a_foreign_run_folder_is_only_a_name(finished, tmp_path, capfd):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    text = (run / "config.json").read_text()
    for name in ("../../x", "ape/../..", "__import__('os').mkdir('x')"):
        (run / "config.json").write_text(text.replace('"encoding": "ape"', f'"encoding": {json.dumps(name)}'))
        assert main(["evaluate", str(run)]) == 2
        assert "unknown encoding" in capfd.readouterr().err


def test_a_run_writes_into_its_folder_only(tmp_path, monkeypatch, capfd):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert main([*TRAIN, str(tmp_path / "out")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"work", "out"}
    assert list((tmp_path / "work").iterdir()) == []


# --- no network ------------------------------------------------------------------------------------------------------


class Reached(Exception):
    """Something wanted the network."""


@pytest.fixture
def no_network(monkeypatch):
    """Every way to another machine raises and is noted."""
    tried = []

    def refuse(*arguments, **_):
        tried.append(arguments)
        raise Reached(str(arguments[-1]))

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    return tried


def test_no_command_wants_the_network(finished, tmp_path, no_network, capfd):
    commands = [
        [*TRAIN, str(tmp_path / "run")],
        ["evaluate", str(finished)],
        ["export", str(finished), "--format", "hub", "--out", str(tmp_path / "hub")],
        ["list", "encodings"],
    ]
    for argv in commands:
        assert main(argv) == 0, argv
    assert no_network == []


def test_a_wish_for_the_network_would_be_seen(no_network):
    with pytest.raises(Reached):
        socket.create_connection(("example.org", 80))
    with pytest.raises(Reached):
        socket.socket().connect(("127.0.0.1", 80))
    assert len(no_network) == 2


@pytest.mark.slow
def test_a_process_of_its_own_does_not_want_the_network(tmp_path):
    """Without the settings of the tests that keep libraries off the network, telemetry at import included."""
    code = (
        "import sys, socket\n"
        "def hook(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'):\n"
        "        print('NETWORK', event, arguments[1:], flush=True)\n"
        "sys.addaudithook(hook)\n"
        "from sape2.cli import main\n"
        f"sys.exit(main({[*TRAIN, str(tmp_path / 'run')]!r}))"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "GRADIO_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "NETWORK" not in done.stdout


# --- dependencies ----------------------------------------------------------------------------------------------------


def test_the_table_of_dependencies_names_exactly_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = dependency_table.dependencies(project)
    listed = re.findall(r"^\| `([\w.-]+)` \|", (ROOT / "docs" / "security.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(wanted)
    assert set(dependency_table.WHY) == set(wanted)
    assert all(wanted.values())


def test_a_dependency_without_a_reason_would_be_seen():
    project = {"dependencies": ["torch>=2.9"], "optional-dependencies": {"train": ["left-pad[x]>=1; python_version>'3'"]}}
    assert dependency_table.dependencies(project) == {"torch": ["always"], "left-pad": ["train"]}
    with pytest.raises(KeyError, match="left-pad"):
        dependency_table.table(project)
