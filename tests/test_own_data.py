"""Data of one's own: pictures in folders, arrays in files, arrays of functions."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from correctnet.datasets import loading, own, pictures
from correctnet.errors import UserError

RNG = np.random.default_rng(0)
COLOURED = RNG.integers(0, 256, (30, 20, 24, 3), dtype=np.uint8)
LABELS = np.arange(30) % 3
NAMES = ("ant", "bee", "cat")


def folder_of(path, images=COLOURED, labels=LABELS, parts=False, suffix="png"):
    """The pictures as files, the last third as test images where there are `parts`."""
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        part = ("test" if i >= 20 else "train") if parts else ""
        place = path / part / NAMES[label] / f"{i:03d}.{suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
    return path


def npz_of(path, **arrays):
    np.savez(path, **arrays)
    return path


def records_of(split):
    """The set of a split's records, in bytes of 8 bits: normalisation undone by the extremes is not needed."""
    return sorted(zip(split.labels.tolist(), map(bytes, split.images.numpy()), strict=True))


def normalised(images, train):
    """(N, H, W, C) of 8 bits as float32 (N, C, H, W), by the moments of `train`; independently of the module."""
    scaled = train.astype(np.float64) / 255
    mean, std = scaled.mean((0, 1, 2)), scaled.std((0, 1, 2))
    return torch.from_numpy(((images / 255 - mean) / std).transpose(0, 3, 1, 2)).float()


def test_pictures_with_a_test_folder(tmp_path):
    place = folder_of(tmp_path / "insects", parts=True)
    described = own.describe("folder", str(place))
    facts = described.facts
    assert (facts.train, facts.test, facts.classes, facts.channels, facts.height, facts.width) == (20, 10, 3, 3, 20, 24)
    data = loading.load_own("folder", str(place), validation=0.25, seed=2)
    assert (data.name, data.classes, data.channels, data.digest) == ("insects", 3, 3, described.digest)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [15, 5, 10]
    expected = normalised(COLOURED, COLOURED[:20])
    for rows, part in ((range(20), [data.train, data.validation]), (range(20, 30), [data.test])):
        images, labels = torch.cat([p.images for p in part]), torch.cat([p.labels for p in part])
        for image, label in zip(images, labels, strict=True):
            near = [i for i in rows if torch.allclose(expected[i], image, atol=1e-5)]
            assert [LABELS[i] for i in near] == [label]


def test_pictures_without_a_test_folder_hold_the_same_fifth_out(tmp_path):
    place = folder_of(tmp_path / "a")
    facts = own.describe("folder", str(place)).facts
    assert (facts.train, facts.test) == (24, 6)
    first = loading.load_own("folder", str(place), validation=0.5, seed=1)
    second = loading.load_own("folder", str(place), validation=0.1, seed=9)
    assert records_of(first.test) == records_of(second.test)
    assert len(first.test) == 6
    assert len({row for split in (first.train, first.validation, first.test) for row in records_of(split)}) == 30


def test_names_and_copies_of_pictures_do_not_matter_and_pixels_do(tmp_path):
    one = folder_of(tmp_path / "one")
    order = np.random.default_rng(1).permutation(30)
    two = folder_of(tmp_path / "two", COLOURED[order], LABELS[order])
    first, second = (loading.load_own("folder", str(place)) for place in (one, two))
    assert first.digest == second.digest
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(first, part).images, getattr(second, part).images)
    before = own.describe("folder", str(one)).digest
    changed = COLOURED[0].copy()
    changed[0, 0, 0] ^= 1
    Image.fromarray(changed).save(one / "ant" / "000.png")
    assert own.describe("folder", str(one)).digest != before
    with pytest.raises(UserError, match=r"one: has changed \(digest [0-9a-f]{12}, [0-9a-f]{12} is expected\)"):
        loading.load_own("folder", str(one), before)
    moved = next((two / "ant").iterdir())
    moved.rename(two / "bee" / moved.name)
    assert own.describe("folder", str(two)).digest != before, "another class is another picture"


def test_files_that_were_not_touched_are_read_once(tmp_path, monkeypatch):
    place = folder_of(tmp_path / "a")
    first = own.describe("folder", str(place))
    monkeypatch.setattr(pictures, "_bytes", None)
    assert own.describe("folder", str(place)) == first
    monkeypatch.setattr(pictures, "listing", None)
    assert own.describe("folder", str(place), first.digest) == first, "as often as a workflow asks"


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp"])
def test_grey_pictures_have_one_channel_unless_one_is_coloured(tmp_path, suffix):
    grey = folder_of(tmp_path / "grey", COLOURED[..., 0], suffix=suffix)
    assert own.describe("folder", str(grey)).facts.channels == 1
    assert loading.load_own("folder", str(grey)).train.images.shape[1:] == (1, 20, 24)
    Image.fromarray(COLOURED[0]).save(grey / "cat" / f"999.{suffix}")
    assert own.describe("folder", str(grey)).facts.channels == 3
    images, _ = own.read("folder", str(grey))[0]
    assert images.shape[1:] == (3, 20, 24)
    assert sum((image[0] == image[1]).all() for image in images) >= len(images) - 1


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (("train_images", "train_labels", "test_images", "test_labels"), (0, 1, 2, 3)),
        (("x_train", "y_train", "x_test", "y_test"), (0, 3, 1, 2)),
    ],
)
def test_arrays_give_what_the_same_pictures_give(tmp_path, names, layout):
    pictures = loading.load_own("folder", str(folder_of(tmp_path / "a", parts=True)))
    images = COLOURED.transpose(layout)
    arrays = (images[:20], LABELS[:20].astype(np.uint8)[:, None], images[20:], LABELS[20:].astype(np.int16))
    place = npz_of(tmp_path / "a.npz", **dict(zip(names, arrays, strict=True)))
    assert own.describe("npz", str(place)).facts == own.describe("folder", str(tmp_path / "a")).facts
    data = loading.load_own("npz", str(place))
    assert records_of(data.test) == records_of(pictures.test)
    both = [sorted(records_of(d.train) + records_of(d.validation)) for d in (data, pictures)]
    assert both[0] == both[1]


def test_arrays_of_floats_are_normalised_by_channel(tmp_path):
    images = RNG.normal(3, 2, (40, 2, 5, 6))
    images[:, 1] = 7.0
    place = npz_of(tmp_path / "f.npz", images=images, labels=np.arange(40) % 4)
    facts = own.describe("npz", str(place)).facts
    assert (facts.train, facts.test, facts.channels, facts.height, facts.width) == (32, 8, 2, 5, 6)
    data = loading.load_own("npz", str(place))
    train = torch.cat([data.train.images, data.validation.images])
    assert train.dtype == torch.float32
    torch.testing.assert_close(train[:, 0].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(train[:, 0].std(correction=0), torch.tensor(1.0), atol=1e-5, rtol=0)
    assert not train[:, 1].any(), "a constant channel is 0"


def test_a_function_of_a_module_in_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_helper_a.py").write_text("LEVEL = 3\n")
    (tmp_path / "own_data_a.py").write_text(
        "import torch\nfrom own_helper_a import LEVEL\n\n\ndef load():\n"
        "    x = torch.arange(48.0).view(12, 1, 2, 2) * LEVEL\n    y = torch.arange(12) % 2\n"
        "    return (x[:8], y[:8]), (x[8:], y[8:])\n"
    )
    described = own.describe("factory", "own_data_a:load")
    assert described.facts is None
    data = loading.load_own("factory", "own_data_a:load", described.digest, validation=0.25)
    assert (data.name, data.classes, data.channels) == ("load", 2, 1)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [6, 2, 4]
    (tmp_path / "own_helper_a.py").write_text("LEVEL = 4\n")
    assert own.describe("factory", "own_data_a:load").digest != described.digest, "what it imports counts"


def test_a_function_may_return_data_sets_of_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_data_c.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n\nX = torch.arange(96.0).view(12, 2, 2, 2)\n"
        "Y = torch.arange(12) % 2\n\n\ndef two():\n    return TensorDataset(X[:8], Y[:8]), TensorDataset(X[8:], Y[8:])"
        "\n\n\ndef one():\n    return TensorDataset(X, Y)\n"
        "\n\ndef arrays():\n    return (X[:8], Y[:8]), (X[8:], Y[8:])\n"
    )
    two, arrays = (own.read("factory", f"own_data_c:{name}") for name in ("two", "arrays"))
    for found, expected in zip(two[:2], arrays[:2], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    train, test, _, classes = own.read("factory", "own_data_c:one")
    assert (len(train[1]), len(test[1]), classes) == (10, 2, 2)
    facts = own.describe("factory", "own_data_c:one").facts
    assert (facts.train, facts.test, facts.channels, facts.height) == (10, 2, 2, 2), "known once they were read"


def test_data_is_described_without_torch(tmp_path):
    folder_of(tmp_path / "a")
    npz_of(tmp_path / "b.npz", images=COLOURED, labels=LABELS)
    (tmp_path / "c.py").write_text("import torch\n\n\ndef load():\n    return None\n")
    code = (
        "import sys; from correctnet.datasets import own; own.describe('folder', 'a'); own.describe('npz', 'b.npz'); "
        "own.describe('factory', 'c:load'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def one_class(path):
    return folder_of(path, COLOURED[:3], [0, 0, 0])


def another_size(path):
    Image.fromarray(COLOURED[0, :9]).save(folder_of(path) / "bee" / "odd.png")


def empty_class(path):
    (folder_of(path) / "dog").mkdir()


def no_test_folder(path):
    folder_of(path / "train")


def other_classes(path):
    folder_of(path, parts=True)
    (path / "test" / "cat").rename(path / "test" / "dog")


def further_folder(path):
    folder_of(path, parts=True)
    (path / "val").mkdir()


def a_text(path):
    (folder_of(path) / "ant" / "notes.txt").write_text("x")


def damaged(path):
    (folder_of(path) / "ant" / "x.png").write_bytes(b"no picture")


def cut(path):
    picture = folder_of(path) / "ant" / "000.png"
    picture.write_bytes(picture.read_bytes()[:700])


def sixteen_bits(path):
    Image.fromarray(RNG.integers(0, 65535, (20, 24), dtype=np.uint16)).save(folder_of(path) / "ant" / "x.png")


def nested(path):
    (folder_of(path) / "ant" / "more").mkdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "{}: no such file or folder"),
        (one_class, "{}: a sub-folder for each class is expected, two or more, not 1"),
        (empty_class, "{}/dog: the class has no picture; remove the folder or fill it"),
        (
            another_size,
            "{}/bee/odd.png: 24 x 9 pixels, and {}/ant/000.png has 24 x 20; images of one size are expected",
        ),
        (no_test_folder, "{}: has train and no test"),
        (other_classes, "{}: class 'cat' is in one of train and test only"),
        (further_folder, "{}/val: beside train and test no other folder is expected"),
        (a_text, "{}/ant/notes.txt: no picture by its name (.bmp, "),
        (damaged, "{}/ant/x.png: no picture that can be read (unknown format)"),
        (cut, "{}/ant/000.png: cannot be read: "),
        (sixteen_bits, "{}/ant/x.png: pictures of 8 bits a channel are read, not of mode I;16; use an .npz"),
        (nested, "{}/ant/more: a folder inside that of a class; pictures are expected"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, make, message):
    place = tmp_path / "pictures"
    make(place)
    with pytest.raises(UserError) as caught:
        own.read("folder", str(place))
    text = str(caught.value)
    assert text.startswith(message.replace("{}", str(place)))
    assert len(text.splitlines()) == 1
    if make is not cut:
        with pytest.raises(UserError) as before:
            own.describe("folder", str(place))
        assert str(before.value) == text


def split(**changes):
    arrays = {"train_images": COLOURED[:20], "train_labels": LABELS[:20]}
    return arrays | {"test_images": COLOURED[20:], "test_labels": LABELS[20:]} | changes


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"pictures": COLOURED},
            "arrays train_images, train_labels, test_images and test_labels, or images and labels",
        ),
        (
            split(train_images=COLOURED[:20].astype(np.int64)),
            "train images: uint8 or floating point is expected, not i",
        ),
        (split(train_images=COLOURED[:20, 0, 0]), "train images: (N, H, W), (N, C, H, W) or (N, H, W, C) is expected"),
        (split(test_images=COLOURED[20:, :5]), "train images are (3, 20, 24) and test images (3, 5, 24) (channels, "),
        (split(train_labels=LABELS[:19]), "train labels: 19 of them for 20 images"),
        (split(train_labels=LABELS[:20] - 1), "train labels: classes from 0 on are expected; there is a -1"),
        (split(train_labels=LABELS[:20] * 1.0), "train labels: whole numbers (N,) are expected, not (20,) float64"),
        (split(test_labels=LABELS[20:] + 2), "class 3 of 5 has no training image"),
        (split(train_labels=LABELS[:20] * 0, test_labels=LABELS[20:] * 0), "two classes or more are expected"),
        (split(train_labels=np.array([{}] * 20, dtype=object)), "no .npz file that can be read (Object arrays cannot"),
        ({"images": COLOURED[:2], "labels": np.arange(2)}, "too few images to hold 20% of them out as test images"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path, arrays, message):
    place = npz_of(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError) as caught:
        own.describe("npz", str(place))
    text = str(caught.value)
    assert text.startswith(f"{place}: {message}")
    assert len(text.splitlines()) == 1


def test_files_that_are_no_arrays(tmp_path):
    place = tmp_path / "a.npz"
    with pytest.raises(UserError, match=r"a\.npz: no such file or folder"):
        own.describe("npz", str(place))
    place.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match=r"a\.npz: no \.npz file that can be read"):
        own.describe("npz", str(place))
    with open(place, "wb") as file:
        np.save(file, COLOURED)
    with pytest.raises(UserError, match=r"a\.npz: a single array"):
        own.describe("npz", str(place))
    images = RNG.normal(size=(10, 3, 3))
    images[4, 1, 1] = np.nan
    npz_of(place, images=images, labels=np.arange(10) % 2)
    with pytest.raises(UserError, match=r"a\.npz: images with numbers that are not finite"):
        own.read("npz", str(place))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("no_such_module:load", r"data\.factory: no_such_module:load: no module 'no_such_module' here"),
        ("own_data_b:lood", r"data\.factory: own_data_b:lood: own_data_b has no 'lood'"),
        ("own_data_b:NUMBER", r"data\.factory: own_data_b:NUMBER: a function is expected, not int"),
        ("own_data_b:fails", r"data\.factory: own_data_b:fails: ZeroDivisionError: division by zero$"),
        ("own_data_b:nothing", r"data\.factory: own_data_b:nothing: .* are expected, not NoneType$"),
        ("own_data_b:ragged", r"data\.factory: own_data_b:ragged: .*, arrays or tensors \("),
    ],
)
def test_functions_that_cannot_be_used(tmp_path, monkeypatch, factory, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_data_b.py").write_text(
        "NUMBER = 3\n\n\ndef fails():\n    return 1 / 0\n\n\ndef nothing():\n    return None\n\n\n"
        "def ragged():\n    return [[[1], [2, 3]], [0, 1]], ([1], [1])\n"
    )
    with pytest.raises(UserError, match=message) as caught:
        own.read("factory", factory)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "place", "name"),
    [
        ("folder", "pictures/v1.2/", "v1.2"),
        ("folder", ".", "here"),
        ("npz", "a/b.c.npz", "b.c"),
        ("factory", "a.b:f", "f"),
    ],
)
def test_what_own_data_is_called(tmp_path, monkeypatch, kind, place, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert own.name_of(kind, place) == name
