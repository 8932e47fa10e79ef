import errno
import io
import json
import os
import threading

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from correctnet.errors import UserError
from correctnet.files import storage

TENSORS = {"a": torch.arange(1000.0), "b": torch.ones(3, 4, dtype=torch.int64)}


def test_tensors_come_back(tmp_path):
    storage.write_tensors(tmp_path / "x.safetensors", TENSORS, {"epoch": 3})
    tensors, metadata = storage.read_tensors(tmp_path / "x.safetensors")
    assert metadata == {"epoch": 3}
    assert all(torch.equal(tensors[k], v) for k, v in TENSORS.items())


def test_tensors_that_share_memory_and_are_not_contiguous(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    storage.write_tensors(tmp_path / "x.safetensors", {"a": base, "b": base, "c": base.t()})
    tensors, _ = storage.read_tensors(tmp_path / "x.safetensors")
    assert torch.equal(tensors["c"], base.t())
    assert torch.equal(tensors["b"], base)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_floats_in_a_table_come_back_to_the_last_bit(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    storage.write_csv(path, pd.DataFrame({"x": values}))
    assert [x.hex() for x in storage.read_csv(path)["x"].astype(float)] == [float(x).hex() for x in values]


def test_model_comes_back(tmp_path):
    storage.write_model(tmp_path, TENSORS, {"network": "n"})
    for name in (tmp_path, tmp_path / "model.json", tmp_path / "model.safetensors"):
        tensors, description = storage.read_model(name)
        assert description["network"] == "n"
        assert torch.equal(tensors["a"], TENSORS["a"])


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("sigma0.3.safetensors", "sigma0.3"),
        ("sigma0.5.json", "sigma0.5"),
        ("a.json", "a"),
        ("v1.0.safetensors.json", "v1.0.safetensors"),
        ("run.v1", "run.v1/model"),
        ("run.v1/0.5", "run.v1/0.5/model"),
        ("run.v1/model.safetensors", "run.v1/model"),
        (".json", ".json/model"),
    ],
)
def test_dots_in_a_name_belong_to_it(tmp_path, name, stem):
    files = storage.model_files(tmp_path / name)
    assert files == (tmp_path / f"{stem}.safetensors", tmp_path / f"{stem}.json")
    storage.write_model(tmp_path / name, TENSORS, {"network": "n"})
    assert all(file.is_file() for file in files)
    for again in (name, *(file.relative_to(tmp_path) for file in files)):
        assert storage.read_model(tmp_path / again)[1]["network"] == "n"


def test_names_that_differ_behind_a_dot_are_two_models(tmp_path):
    for k in (3, 5):
        storage.write_model(tmp_path / f"sigma0.{k}.safetensors", {"a": torch.full((2,), float(k))}, {"k": k})
    assert len(os.listdir(tmp_path)) == 4
    for k in (3, 5):
        tensors, description = storage.read_model(tmp_path / f"sigma0.{k}.safetensors")
        assert (tensors["a"].tolist(), description["k"]) == ([k, k], k)


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_model_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, name):
    storage.write_model(tmp_path, TENSORS, {})
    forbid(monkeypatch, tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: cannot be read.*Permission denied") as caught:
        storage.read_model(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def forbid(monkeypatch, path):
    """Nobody may read `path`; what root may do, too, it may not do here."""
    real = io.open

    def refusing(file, *arguments, **options):
        if not isinstance(file, int) and os.fspath(file) == os.fspath(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return real(file, *arguments, **options)

    monkeypatch.setattr("builtins.open", refusing)
    monkeypatch.setattr(io, "open", refusing)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_file_cut_short_is_refused_by_name(tmp_path, keep):
    storage.write_model(tmp_path, TENSORS, {})
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    for read in (storage.read_tensors, storage.read_model):
        with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
            read(path)


def test_a_changed_byte_and_a_swapped_pair_are_refused(tmp_path):
    storage.write_model(tmp_path, TENSORS, {})
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match="damaged"):
        storage.read_model(tmp_path)
    storage.write_tensors(path, {"a": torch.zeros(2)})
    with pytest.raises(UserError, match="not the file that"):
        storage.read_model(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"format": 99}'])
def test_a_broken_description_is_refused(tmp_path, text):
    storage.write_model(tmp_path, TENSORS, {})
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.json"):
        storage.read_model(tmp_path)


def test_absent_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        storage.read_model(tmp_path / "nothing")
    with pytest.raises(UserError, match="no such file"):
        storage.read_tensors(tmp_path / "nothing.safetensors")


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "log.csv"
    storage.write_text(path, "old")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"log\.csv: cannot be written: No space left on device"):
        storage.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["log.csv"]


def test_a_failure_half_way_leaves_nothing(tmp_path):
    def half():
        with storage.replacing(tmp_path / "x") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        storage.write_json(tmp_path / "file" / "x.json", {})


def test_readers_see_the_old_file_or_the_new_one(tmp_path):
    path, seen, stop = tmp_path / "x.json", set(), threading.Event()
    storage.write_json(path, [0] * 10000)

    def read():
        while not stop.is_set():
            seen.add(len(json.loads(path.read_text())))

    reader = threading.Thread(target=read)
    reader.start()
    for n in (10000, 20000) * 20:
        storage.write_json(path, [0] * n)
    stop.set()
    reader.join()
    assert seen <= {10000, 20000}
