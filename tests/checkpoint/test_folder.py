"""Which checkpoints there are, which stay, and that a broken one is refused by name."""

import json
import pickle
import resource
import signal
import zlib
from pathlib import Path

import pytest
import torch

from shardwise.checkpoint import (
    Checkpoints,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_checkpoint,
    read_values,
    save_checkpoint,
)

DATA = "__0_0.distcp"


def tensors(start: float = 0.0) -> dict[str, torch.Tensor]:
    return {"table": torch.arange(12.0).reshape(4, 3) + start, "step": torch.tensor(7) + int(start)}


def save(folder: Path, step: int = 3, **options) -> Path:
    return save_checkpoint(folder, step, {"model": tensors(), "epoch": 1}, **options)


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def everything(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_latest_and_best_stay(tmp_path):
    for step in (8, 9, 10, 11, 12):
        save(tmp_path, step, keep=2, is_best=step in (8, 9))
    assert names(tmp_path) == ["step_9", "step_11", "step_12"]
    assert find_checkpoint(tmp_path) == tmp_path / "step_12"
    assert find_checkpoint(tmp_path, "best") == tmp_path / "step_9"
    assert find_checkpoint(tmp_path, 11) == tmp_path / "step_11"
    assert find_checkpoint(tmp_path / "step_11") == tmp_path / "step_11"


@pytest.mark.parametrize(
    ("which", "message"),
    [("best", r"no best one .* only steps \[3\]"), (4, r"no step_4 .* only steps \[3\]")],
)
def test_what_is_not_there_is_named(tmp_path, which, message):
    save(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        find_checkpoint(tmp_path, which)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        find_checkpoint(tmp_path / "nowhere")


def test_unfinished_checkpoint_is_not_found_and_goes_with_the_next(tmp_path):
    (tmp_path / ".step_3.unfinished").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no step_<n> in this folder"):
        find_checkpoint(tmp_path)
    save(tmp_path, 4)
    assert everything(tmp_path) == ["step_4"]


def test_saving_a_step_again_never_leaves_it_without_a_checkpoint(tmp_path, monkeypatch):
    save(tmp_path)

    rename = Path.rename

    def crash(path, target):
        rename(path, target)
        if target.name.endswith("replaced"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", crash)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path)
    assert read_values(tmp_path)["epoch"] == 1
    save(tmp_path)
    assert everything(tmp_path) == ["step_3"]


# ---- attacks


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[data.find(torch.arange(12.0).numpy().tobytes()) + 5] ^= 4
    file.write_bytes(data)


def garble(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"epoch"', b'"epoxy"'))


def rewrite(change):
    """Change the manifest and make its checksum right."""

    def attack(file: Path) -> None:
        head, _, body = file.read_bytes().partition(b"\n")
        content = json.loads(body)
        change(content)
        body = json.dumps(content).encode()
        told = json.loads(head) | {"crc32": zlib.crc32(body)}
        file.write_bytes(json.dumps(told).encode() + b"\n" + body)

    return attack


def point_outside(content) -> None:
    content["files"]["../secret"] = 4


def point_elsewhere(content) -> None:
    content["tensors"]["model.table"]["chunks"][0][2] = "elsewhere"


def point_past_the_end(content) -> None:
    content["tensors"]["model.table"]["chunks"][0][3] = 10**6


def drop_a_chunk(content) -> None:
    content["tensors"]["model.table"]["chunks"] = []


def name_no_dtype(content) -> None:
    content["tensors"]["model.table"]["dtype"] = "load"


ATTACKS = [
    (DATA, cut, rf"file {DATA} has \d+ bytes, \d+ were written"),
    (DATA, Path.unlink, f"file {DATA} is missing"),
    (DATA, flip, f"file {DATA} is damaged in tensor 'model.table', between bytes"),
    (".metadata", Path.unlink, "file .metadata is missing"),
    ("manifest.json", cut, r"manifest.json is cut off or damaged \(\d+ bytes, \d+ were written\)"),
    ("manifest.json", garble, "manifest.json is cut off or damaged"),
    ("manifest.json", lambda f: f.write_bytes(b""), "is no manifest of a checkpoint"),
    ("manifest.json", lambda f: f.write_bytes(b"[]\n"), "is no manifest of a checkpoint"),
    (
        "manifest.json",
        lambda f: f.write_bytes(b'{"format": "other 7", "crc32": 0}\n'),
        "it is of format 'other 7'; this reads 'shardwise checkpoint 1'",
    ),
    ("manifest.json", rewrite(point_outside), "file ../secret is missing"),
    ("manifest.json", rewrite(point_elsewhere), r"no sizes of \['elsewhere'\]"),
    ("manifest.json", rewrite(point_past_the_end), f"file {DATA} is damaged"),
    ("manifest.json", rewrite(drop_a_chunk), "tensor 'model.table' lacks 12 of the elements"),
    ("manifest.json", rewrite(name_no_dtype), "'load' is no dtype"),
    ("manifest.json", rewrite(dict.clear), "manifest.json is damaged .*'step'"),
]


@pytest.mark.parametrize(("name", "attack", "message"), ATTACKS)
def test_broken_checkpoint_is_refused_by_name(tmp_path, name, attack, message):
    (tmp_path / "secret").write_text("1234")
    attack(save(tmp_path) / name)
    with pytest.raises((ValueError, FileNotFoundError), match=f"step_3: .*{message}"):
        load_checkpoint(tmp_path / "step_3", {"model": tensors(1.0)})


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_no_code_in_a_file_is_run(tmp_path):
    path, mark = save(tmp_path), tmp_path / "mark"
    into = tensors(1.0)
    bomb = pickle.dumps(Bomb(mark))
    size = (path / ".metadata").stat().st_size
    (path / ".metadata").write_bytes(bomb + b"\0" * (size - len(bomb)))  # of the right size
    load_checkpoint(path, {"model": into})
    assert torch.equal(into["table"], tensors()["table"])
    assert not mark.exists()


# ---- full disks


def limit_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.fixture
def full_disk():
    limit_files(2**16)
    yield
    limit_files(resource.RLIM_INFINITY)


@pytest.mark.parametrize("wait", [True, False])
def test_full_disk_loses_nothing_and_says_so(tmp_path, full_disk, wait):
    run = Checkpoints(tmp_path)
    run.save(3, {"model": tensors()})
    with pytest.raises(
        OSError, match=r"step_4 could not be written: .*earlier checkpoints are whole"
    ):
        run.save(4, {"model": {"table": torch.ones(2**16)}}, wait=wait).result()
    assert everything(tmp_path) == ["step_3"]
    run.save(5, {"model": tensors()})
    assert names(tmp_path) == ["step_3", "step_5"]


def test_error_of_a_save_in_the_background_is_raised_by_the_next(tmp_path, full_disk):
    run = Checkpoints(tmp_path)
    run.save(4, {"model": {"table": torch.ones(2**16)}}, wait=False)
    with pytest.raises(OSError, match="step_4 could not be written"):
        run.save(5, {"model": tensors()})
    run.save(6, {"model": tensors()})
    assert list(read_checkpoint(tmp_path)) == ["model.table", "model.step"]
