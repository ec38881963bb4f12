"""The Hub on loopback answers the real clients: what they push comes back whole, what is missing is a 404."""

import hashlib
import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.loopback_hub import TOKEN, loopback_hub

PHOTO = Path(__file__).parents[1] / "assets/photos/test/farm_dog.webp"


@pytest.fixture
def hub(tmp_path):
    with loopback_hub(tmp_path / "hub") as running:
        yield running


def client(hub, code: str, *arguments: str, **environment: str):
    """Run code in a fresh interpreter pointed at the Hub; its last printed line is JSON."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=hub.environment(**environment), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_folder_round_trip_with_lfs(hub, tmp_path):
    source = tmp_path / "model"
    (source / "unet").mkdir(parents=True)
    (source / "checkpoint-5").mkdir()
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (source / "empty.txt").write_text("")
    (source / "checkpoint-5/state.json").write_text("{}")
    weights = hashlib.shake_256(b"weights").digest(11 * 1024 * 1024 + 1)  # above the size that goes to LFS
    (source / "unet/weights.dat").write_bytes(weights)
    (source / "unet/small.safetensors").write_bytes(b"text, but LFS by its name")
    code = """
import json, sys
from huggingface_hub import HfApi, snapshot_download
api = HfApi()
assert api.whoami()["name"] == "tester"
api.create_repo("tester/model")
api.create_repo("tester/model", exist_ok=True)
what = dict(repo_id="tester/model", folder_path=sys.argv[1], ignore_patterns="checkpoint-*/**")
first = api.upload_folder(**what)
second = api.upload_folder(**what)  # nothing changed: no new commit
folder = snapshot_download("tester/model")
part = api.hf_hub_download("tester/model", "README.md", revision=first.oid, local_dir=sys.argv[2])
info = api.model_info("tester/model", files_metadata=True)
commits = [commit.title for commit in api.list_repo_commits("tester/model")]
print(json.dumps({"folder": folder, "same": first.oid == second.oid == info.sha, "commits": commits,
                  "sizes": {s.rfilename: s.size for s in info.siblings}}))
"""
    result = client(hub, code, str(source), str(tmp_path / "part"))
    downloaded = Path(result["folder"])
    expected = {".gitattributes", "README.md", "empty.txt", "unet/weights.dat", "unet/small.safetensors"}
    assert {str(p.relative_to(downloaded)) for p in downloaded.rglob("*") if p.is_file()} == expected
    assert (downloaded / "unet/weights.dat").read_bytes() == weights
    assert (downloaded / "README.md").read_bytes() == (source / "README.md").read_bytes()
    assert (tmp_path / "part/README.md").read_bytes() == (source / "README.md").read_bytes()
    assert result["same"] and len(result["commits"]) == 2 and result["sizes"]["unet/weights.dat"] == len(weights)

    assert hub.files("tester/model") == sorted(expected)
    assert hub.read("tester/model", "unet/weights.dat") == weights
    [push] = hub.pushes("tester/model")
    assert set(push.added) == expected - {".gitattributes"}
    tree = hub._commit("tester/model", "model", "main").tree
    assert {path for path, entry in tree.items() if entry.lfs} == {
        "unet/weights.dat",
        "unet/small.safetensors",
    }


def test_dataset_push_and_load(hub):
    code = """
import json, sys
from datasets import Dataset, Image, load_dataset
rows = {"image": [sys.argv[1]] * 3, "edit_prompt": ["one", "two", "three"]}
dataset = Dataset.from_dict(rows).cast_column("image", Image())
dataset.push_to_hub("tester/pairs", private=True)
loaded = load_dataset("tester/pairs")
again = load_dataset("tester/pairs", split="train", revision="main")
print(json.dumps({"splits": list(loaded), "prompts": again["edit_prompt"][:], "size": again[2]["image"].size,
                  "columns": again.column_names}))
"""
    result = client(hub, code, str(PHOTO))
    assert result["splits"] == ["train"] and result["prompts"] == ["one", "two", "three"]
    assert result["columns"] == ["image", "edit_prompt"] and min(result["size"]) > 100
    assert "data/train-00000-of-00001.parquet" in hub.files("tester/pairs", "dataset")
    assert len(hub.pushes("tester/pairs", "dataset")) == 1


def test_missing_things_and_failing_pushes(hub, tmp_path):
    folder = tmp_path / "push"
    folder.mkdir()
    (folder / "one.safetensors").write_bytes(b"one")
    code = """
import json, sys
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
api = HfApi()
def outcome(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except (HfHubHTTPError, RuntimeError) as error:
        return type(error).__name__
    return "fine"
api.create_repo("tester/secret", private=True)
found = {
    "repo": outcome(api.model_info, "tester/nothing"),
    "kind": outcome(api.dataset_info, "tester/secret"),
    "revision": outcome(api.hf_hub_download, "tester/secret", "README.md", revision="old"),
    "entry": outcome(api.hf_hub_download, "tester/secret", "README.md"),
    "stranger": outcome(HfApi(token=False).model_info, "tester/secret"),
    "stranger_push": outcome(HfApi(token="hf_wrong").create_repo, "tester/other"),
    "upload": outcome(api.upload_folder, repo_id="tester/secret", folder_path=sys.argv[1]),
    "exists": [api.repo_exists("tester/secret"), api.repo_exists("tester/nothing"),
               api.file_exists("tester/secret", ".gitattributes"), api.file_exists("tester/secret", "a")],
}
print(json.dumps(found))
"""
    hub.fail("upload")
    result = client(hub, code, str(folder))
    assert result == {
        "repo": "RepositoryNotFoundError",
        "kind": "RepositoryNotFoundError",
        "revision": "RevisionNotFoundError",
        "entry": "RemoteEntryNotFoundError",
        "stranger": "RepositoryNotFoundError",
        "stranger_push": "HfHubHTTPError",
        "upload": "RuntimeError",
        "exists": [True, False, True, False],
    }
    assert hub.pushes("tester/secret") == [] and not hub.exists("tester/other")
    assert ("GET", "/api/models/tester/nothing", 404) in hub.requests

    hub.recover()
    hub.fail("commit", status=500)
    again = 'print(json.dumps(outcome(api.upload_folder, repo_id="tester/secret", folder_path=sys.argv[1])))'
    code = code.split("api.create_repo")[0] + again
    assert client(hub, code, str(folder)) == "HfHubHTTPError" and hub.pushes("tester/secret") == []
    hub.recover()
    assert client(hub, code, str(folder)) == "fine"
    assert [push.added for push in hub.pushes("tester/secret")] == [("one.safetensors",)]


def test_ranges_and_unknown_addresses(hub):
    """Without a client library: partial reads as RFC 9110 defines them, and a gap that names itself."""

    def request(path, method="GET", body=None, **headers):
        headers = {"Authorization": f"Bearer {TOKEN}"} | {k.replace("_", "-"): v for k, v in headers.items()}
        return urllib.request.urlopen(urllib.request.Request(hub.url + path, body, headers, method=method), timeout=30)

    request("/api/repos/create", "POST", json.dumps({"name": "m", "type": "model"}).encode())
    whole = request("/tester/m/resolve/main/.gitattributes").read()
    for wanted, part in {"bytes=2-5": whole[2:6], "bytes=7-": whole[7:], "bytes=-4": whole[-4:]}.items():
        answer = request("/tester/m/resolve/main/.gitattributes", Range=wanted)
        assert (answer.status, answer.read()) == (206, part)
    head = request("/tester/m/resolve/main/.gitattributes", "HEAD")
    assert int(head.headers["Content-Length"]) == len(whole) and len(head.headers["X-Repo-Commit"]) == 40
    for path, headers, status in [
        ("/tester/m/resolve/main/.gitattributes", {"Range": f"bytes={len(whole)}-"}, 416),
        ("/api/models/tester/m/xet-write-token/main", {}, 501),
    ]:
        with pytest.raises(urllib.error.HTTPError) as refused:
            request(path, **headers)
        assert refused.value.code == status
