import json
import pickle
from pathlib import Path

import pytest
import torch

from shardwise.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_tensors,
    read_state,
    read_tensors,
    save_checkpoint,
)


def tensors(start: float = 0.0) -> dict[str, torch.Tensor]:
    return {
        "model.table.weight": torch.arange(12.0).reshape(4, 3) + start,
        "optimizer.state.table.weight.step": torch.tensor(7) + int(start),
    }


def save(folder: Path, step: int = 3) -> Path:
    return save_checkpoint(folder, step, tensors(), {"epoch": 1}, keep=2)


def test_what_was_saved_is_loaded(tmp_path):
    path = save(tmp_path)
    into = tensors(start=5.0)
    load_tensors(path, into)
    assert read_state(path) == {"epoch": 1}
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors().items())


def test_a_part_is_read_by_its_prefix(tmp_path):
    assert list(read_tensors(save(tmp_path), "model.")) == ["model.table.weight"]


def test_latest_checkpoints_are_kept(tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_10", "step_11"]
    assert find_checkpoint(tmp_path) == tmp_path / "step_11"
    assert find_checkpoint(tmp_path / "step_10") == tmp_path / "step_10"


def test_unfinished_checkpoint_is_not_found(tmp_path):
    save(tmp_path).rename(tmp_path / ".step_3.unfinished")
    with pytest.raises(FileNotFoundError, match=r"no step_<n> in this folder"):
        find_checkpoint(tmp_path)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        find_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_cut_off_file_is_named(tmp_path, name):
    file = save(tmp_path) / name
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"step_3: file {name} has \d+ bytes, \d+ were written"):
        read_state(tmp_path / "step_3")


def test_missing_file_is_named(tmp_path):
    (save(tmp_path) / "__0_0.distcp").unlink()
    with pytest.raises(FileNotFoundError, match=r"step_3: file __0_0.distcp is missing"):
        read_state(tmp_path / "step_3")


@pytest.mark.parametrize("text", ["", '{"step": 3', "[]", "{}"])
def test_damaged_state_file_is_named(tmp_path, text):
    (save(tmp_path) / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"step_3: state.json is cut off or damaged"):
        read_state(tmp_path / "step_3")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.table.weight", torch.zeros(5, 3), r"is \[4, 3\] torch.float32 there and \[5, 3\]"),
        ("model.table.weight", torch.zeros(4, 3).half(), "there and .* torch.float16 here"),
        ("model.other", torch.zeros(2), r"it lacks \['model.other'\] and has \[\] too many"),
    ],
)
def test_mismatch_is_named_and_changes_nothing(tmp_path, name, tensor, message):
    into = tensors(start=5.0) | {name: tensor}
    with pytest.raises(ValueError, match=message):
        load_tensors(save(tmp_path), into)
    assert into["optimizer.state.table.weight.step"] == 12


def test_damaged_data_is_named(tmp_path):
    file = save(tmp_path) / "__0_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(ValueError, match="step_3: the data of its tensors is damaged"):
        read_tensors(tmp_path / "step_3")


class Intruder:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_no_code_in_a_file_is_run(tmp_path):
    path, mark = save(tmp_path), tmp_path / "mark"
    (path / ".metadata").write_bytes(pickle.dumps(Intruder(mark)))
    with pytest.raises(ValueError, match=r"file .metadata is damaged .*pathlib"):
        read_tensors(path)
    assert not mark.exists()


def test_state_is_json_that_anyone_can_read(tmp_path):
    assert json.loads((save(tmp_path) / "state.json").read_text())["state"] == {"epoch": 1}
