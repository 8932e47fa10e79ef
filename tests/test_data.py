import dataclasses
import errno
import gzip
import hashlib
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
from PIL import Image

from correctnet.datasets import DATASETS, cifar, files, loading, transforms
from correctnet.errors import UserError

REAL = os.environ.get("CORRECTNET_DATA", "data")


def put(patch, name, source):
    """Have `source` be that of a data set."""
    module, attribute = DATASETS[name].where.split(":")
    patch.setattr(f"correctnet.datasets.{module}.{attribute}", source)


def need(name):
    """Skip the test where the real files of a data set are absent."""
    source = DATASETS[name].source()
    if not all((Path(REAL) / source.folder / f.name).exists() for f in (*source.train, *source.test)):
        pytest.skip(f"no {name} under {REAL} (CORRECTNET_DATA says where)")


def real(name):
    """The real data set, or a skip where its files are absent."""
    need(name)
    return loading.load(name, REAL)


@pytest.fixture(scope="module")
def mnist_files(tmp_path_factory):
    """Files of MNIST's exact sizes with random images in them."""
    folder = tmp_path_factory.mktemp("mnist")
    rng = np.random.default_rng(0)
    write_mnist(folder, *(random_records(rng, n) for n in (60000, 10000)))
    return folder


def random_records(rng, n):
    return rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.uint8)


def write_mnist(folder, train, test):
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, (images, labels) in (("train", train), ("t10k", test)):
        header = np.array([0x803, *images.shape], ">u4").tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = np.array([0x801, len(labels)], ">u4").tobytes()
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def content(images, labels):
    """The digest of a part's records, in the order of their own digests: hashed here for itself."""
    records = (image.tobytes() + bytes([label]) for image, label in zip(images, labels, strict=True))
    digests = sorted(hashlib.blake2b(record, digest_size=16).digest() for record in records)
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def taken_for(patch, name, train, test):
    """Have (images, labels) of the right shapes taken for the data set `name`."""
    digests = {"train": content(*train), "test": content(*test)}
    put(patch, name, dataclasses.replace(DATASETS[name].source(), digests=digests))


def stored_mnist(folder, prefix, n):
    raw = folder / "MNIST" / "raw"
    images = np.fromfile(raw / f"{prefix}-images-idx3-ubyte", np.uint8)[16:].reshape(n, 28, 28)
    return images, np.fromfile(raw / f"{prefix}-labels-idx1-ubyte", np.uint8)[8:]


@pytest.fixture(scope="module")
def as_mnist(mnist_files):
    """A function that has the random images taken for MNIST, until a patch is undone."""
    parts = []
    for prefix, n in (("train", 60000), ("t10k", 10000)):
        images, labels = stored_mnist(mnist_files, prefix, n)
        parts.append((np.pad(images, ((0, 0), (2, 2), (2, 2))), labels))
    with pytest.MonkeyPatch.context() as patch:
        taken_for(patch, "mnist", *parts)
        source = DATASETS["mnist"].source()
    return lambda patch: put(patch, "mnist", source)


def rows(split):
    """The set of a split's records, as digests."""
    return {
        hashlib.md5(image.numpy().tobytes() + bytes([label])).hexdigest()
        for image, label in zip(split.images, split.labels, strict=True)
    }


def equal(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


@pytest.fixture(scope="module")
def mnist(mnist_files, as_mnist):
    with pytest.MonkeyPatch.context() as patch:
        as_mnist(patch)
        return loading.load("mnist", mnist_files, 0.1, seed=3)


def test_shapes_types_and_sizes(mnist):
    assert (len(mnist.train), len(mnist.validation), len(mnist.test)) == (54000, 6000, 10000)
    for split in (mnist.train, mnist.validation, mnist.test):
        assert split.images.shape[1:] == (1, 32, 32)
        assert (split.images.dtype, split.labels.dtype) == (torch.float32, torch.int64)
    assert (mnist.classes, mnist.channels) == (10, 1)


def test_splits_hold_every_record_once(mnist):
    parts = [rows(mnist.train), rows(mnist.validation)]
    assert len(parts[0]) == 54000
    assert len(parts[1]) == 6000
    assert not parts[0] & parts[1]


def test_a_copy_in_another_order_gives_the_same_splits(mnist_files, mnist, as_mnist, tmp_path, monkeypatch):
    as_mnist(monkeypatch)
    rng = np.random.default_rng(9)
    parts = []
    for prefix, n in (("train", 60000), ("t10k", 10000)):
        images, labels = stored_mnist(mnist_files, prefix, n)
        order = rng.permutation(n)
        parts.append((images[order], labels[order]))
    write_mnist(tmp_path, *parts)
    copy = loading.load("mnist", tmp_path, 0.1, seed=3)
    for name in ("train", "validation", "test"):
        assert equal(getattr(mnist, name), getattr(copy, name)), name


def test_the_seed_moves_the_validation_split_and_not_the_test_set(mnist_files, mnist, as_mnist, monkeypatch):
    as_mnist(monkeypatch)
    other = loading.load("mnist", mnist_files, 0.1, seed=4)
    assert equal(mnist.test, other.test)
    assert rows(mnist.validation) != rows(other.validation)
    assert rows(mnist.validation) | rows(mnist.train) == rows(other.validation) | rows(other.train)


def test_normalisation_and_padding(mnist_files, mnist):
    pixels = (mnist.test.images * 0.3081 + 0.1307) * 255
    border = pixels.clone()
    border[:, :, 2:30, 2:30] = 0
    assert border.abs().max() < 1e-3
    stored = np.fromfile(mnist_files / "MNIST" / "raw" / "t10k-images-idx3-ubyte", np.uint8)[16:]
    assert pixels.round().sum().item() == pytest.approx(stored.sum(dtype=np.int64), rel=1e-6)


def test_digits_are_scikit_learn_s():
    digits = loading.load("digits", validation=0.1)
    assert len(digits.train) + len(digits.validation) + len(digits.test) == 1797
    assert equal(digits.test, loading.load("digits", validation=0.3, seed=5).test)
    labels = torch.cat([s.labels for s in (digits.train, digits.validation, digits.test)])
    # scikit-learn's documentation: about 180 a class.
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    everything = torch.cat([digits.train.images, digits.validation.images])
    assert everything.mean().abs() < 0.02
    assert (everything.std() - 1).abs() < 0.02


def test_prefixes_are_fair_samples(mnist):
    counts = mnist.test.take(2000).labels.bincount(minlength=10)
    assert counts.sum() == 2000
    assert counts.min() > 130  # 200 +- 13.4 by chance
    assert mnist.test.take(None) is mnist.test


def test_real_mnist():
    mnist = real("mnist")
    both = torch.cat([mnist.train.labels, mnist.validation.labels])
    # The official counts of each digit.
    assert both.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_real_cifar(name):
    cifar = real(name)
    labels = torch.cat([cifar.train.labels, cifar.validation.labels])
    assert set(labels.bincount().tolist()) == {50000 // cifar.classes}
    assert set(cifar.test.labels.bincount().tolist()) == {10000 // cifar.classes}
    # Normalised by the published means and standard deviations, the training pixels have mean 0 and deviation 1.
    for channel in range(3):
        values = torch.cat([cifar.train.images[:, channel].flatten(), cifar.validation.images[:, channel].flatten()])
        assert values.double().mean().abs() < 1e-3
        assert (values.double().std() - 1).abs() < 1e-3


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train-images-idx3-ubyte", lambda b: b[:-1], "47040015 bytes, 47040016 expected"),
        ("t10k-labels-idx1-ubyte", lambda b: b"", "0 bytes, 10008 expected"),
        ("train-labels-idx1-ubyte", lambda b: b"\0\0\x08\x03" + b[4:], "wrong header"),
        ("t10k-images-idx3-ubyte", lambda b: b[:4] + b"\0\0\0\1" + b[8:], "wrong header"),
        ("train-labels-idx1-ubyte", lambda b: b[:-1] + b"\x0b", "label 11 where labels are below 10"),
    ],
)
def test_damaged_files_are_refused_by_name(mnist_files, tmp_path, file, damage, message):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for source in (mnist_files / "MNIST" / "raw").iterdir():
        if source.name == file:
            (raw / file).write_bytes(damage(source.read_bytes()))
        else:
            (raw / source.name).symlink_to(source)
    with pytest.raises(UserError) as caught:
        loading.load("mnist", tmp_path)
    assert str(raw / file) in str(caught.value)
    assert message in str(caught.value)


def test_cifar_records_and_labels(tmp_path, monkeypatch):
    # Two files of the official sizes whose first record is known.
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    parts = []
    for name, n in (("train.bin", 50000), ("test.bin", 10000)):
        records = rng.integers(0, 256, (n, 3074), dtype=np.uint8)
        records[:, 0], records[:, 1] = 19, np.arange(n) % 100
        records.tofile(folder / name)
        parts.append((records[:, 2:], records[:, 1]))
    taken_for(monkeypatch, "cifar100", *parts)
    cifar = loading.load("cifar100", tmp_path)
    assert set(cifar.test.labels.bincount().tolist()) == {100}, "the fine label, not the coarse one"
    pixel = records[7, 2:].reshape(3, 32, 32)
    mean, std = torch.tensor(DATASETS["cifar100"].source().mean), torch.tensor(DATASETS["cifar100"].source().std)
    wanted = (torch.tensor(pixel) / 255 - mean[:, None, None]) / std[:, None, None]
    assert (cifar.test.images - wanted).abs().amax((1, 2, 3)).min() < 1e-5
    records[5, 1] = 100
    records.tofile(folder / "test.bin")
    with pytest.raises(UserError, match=r"test\.bin: label 100 where labels are below 100"):
        loading.load("cifar100", tmp_path)


def copied(name, folder, **changed):
    """The real files of a data set, linked into `folder`, some of them replaced by other bytes."""
    need(name)
    source = DATASETS[name].source()
    (folder / source.folder).mkdir(parents=True)
    for file in (*source.train, *source.test):
        path = folder / source.folder / file.name
        if file.name in changed:
            changed[file.name].tofile(path)
        else:
            path.symlink_to((Path(REAL) / source.folder / file.name).resolve())
    return folder / source.folder


def stored(name, file):
    need(name)
    return np.fromfile(Path(REAL) / DATASETS[name].source().folder / file, np.uint8)


def refused(name, folder):
    with pytest.raises(UserError) as caught:
        loading.load(name, folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def cut(raw):
    raw[len(raw) // 2 :] = 0  # the space was reserved, and the download ended
    return raw


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("data_batch_3.bin", lambda: cut(stored("cifar10", "data_batch_3.bin")), "records that occur twice"),
        ("test_batch.bin", lambda: cut(stored("cifar10", "test_batch.bin")), "records that occur twice"),
        ("test_batch.bin", lambda: stored("cifar10", "data_batch_2.bin"), "10000 records of the other part"),
        ("data_batch_4.bin", lambda: stored("cifar10", "test_batch.bin"), "10000 records of the other part"),
    ],
)
def test_cifar10_that_was_damaged_without_losing_its_size(tmp_path, file, content, message):
    folder = copied("cifar10", tmp_path, **{file: content()})
    text = refused("cifar10", tmp_path)
    assert text.startswith(f"{folder / file}: not what cifar10 has for its ")
    assert message in text
    assert text.count(".bin") == 1, "no other file is suspected"


def test_a_batch_that_stands_there_twice(tmp_path):
    folder = copied("cifar10", tmp_path, **{"data_batch_5.bin": stored("cifar10", "data_batch_1.bin")})
    text = refused("cifar10", tmp_path)
    assert text.startswith(f"{folder / 'data_batch_1.bin'}, {folder / 'data_batch_5.bin'}: not what cifar10 has")
    assert "10000 records that occur twice" in text


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_one_pixel_is_enough(tmp_path, name):
    file = DATASETS[name].source().test[0].name
    raw = stored(name, file)
    raw[-1] ^= 1
    folder = copied(name, tmp_path, **{file: raw})
    assert refused(name, tmp_path).startswith(f"{folder / file}: not what {name} has for its test images")


def test_a_look_alike_of_mnist_is_not_mnist(mnist_files):
    raw = mnist_files / "MNIST" / "raw"
    files = ", ".join(str(raw / f"train-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    wanted = f"{files}: not what mnist has for its training images (damaged, or another data set of the same sizes)"
    assert refused("mnist", mnist_files).startswith(wanted)


def test_the_same_labels_in_another_order_are_other_records(tmp_path):
    labels = stored("mnist", "t10k-labels-idx1-ubyte")
    labels[8:] = labels[8:][::-1]
    folder = copied("mnist", tmp_path, **{"t10k-labels-idx1-ubyte": labels})
    assert str(folder / "t10k-labels-idx1-ubyte") in refused("mnist", tmp_path)


def test_a_data_set_is_known_by_a_digest_of_its_own(mnist):
    assert loading.load("digits").digest == loading.digest("digits")
    assert len({loading.digest(name) for name in DATASETS}) == len(DATASETS)
    cifar = real("cifar100")
    assert cifar.digest == loading.digest("cifar100") == cifar.to("cpu").digest
    assert mnist.digest != loading.digest("mnist")


def test_files_and_folders_that_are_closed_to_this_user(mnist_files, tmp_path, monkeypatch):
    closed = tmp_path / "MNIST" / "raw"
    shutil.copytree(mnist_files, tmp_path, dirs_exist_ok=True)

    def forbid(owner, function):
        allowed = getattr(owner, function)

        def refusing(path, *arguments, **options):
            if str(path).startswith(str(closed)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return allowed(path, *arguments, **options)

        return lambda patch: patch.setattr(owner, function, refusing)

    for place, call in ((forbid(np, "fromfile"), loading.load), (forbid(Path, "stat"), loading.fetch)):
        with monkeypatch.context() as patch:
            place(patch)
            with pytest.raises(UserError) as caught:
                call("mnist", tmp_path)
        assert str(caught.value) == f"{closed / 'train-images-idx3-ubyte'}: cannot be read: Permission denied"


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    def closed(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "downloads"))

    monkeypatch.setattr(pooch, "retrieve", closed)
    with pytest.raises(UserError, match=r"downloads: cannot be written: Permission denied$"):
        loading.fetch("cifar10", tmp_path)


def test_no_network_is_one_line_that_says_what_to_do(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("Network is unreachable")

    monkeypatch.setattr(pooch, "retrieve", no_network)
    with pytest.raises(UserError) as caught:
        loading.load("cifar10", tmp_path)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    for part in ("data_batch_1.bin", "test_batch.bin", str(tmp_path), "data_dir", "CORRECTNET_DATA"):
        assert part in text


def served(monkeypatch, content):
    """pooch downloads `content` from a folder instead of the network; checksums are still pooch's to check."""

    class Downloader:
        def __call__(self, url, output_file, pooch):
            Path(output_file).write_bytes(content)

    retrieve = pooch.retrieve

    def local(url, **options):
        options["progressbar"] = False
        return retrieve(url, downloader=Downloader(), **options)

    monkeypatch.setattr(pooch, "retrieve", local)


def small_archive(monkeypatch):
    """A CIFAR-100 of two records, as a tar.gz, with the sizes and checksum that the source expects."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ("train.bin", "test.bin"):
            info = tarfile.TarInfo(f"cifar-100-binary/{name}")
            info.size = 2 * 3074
            archive.addfile(info, io.BytesIO(bytes(2 * 3074)))
    content = buffer.getvalue()
    md5 = {cifar.CIFAR100_ARCHIVE: hashlib.md5(content).hexdigest()}
    changed = {**DATASETS["cifar100"].source().__dict__, "archives": md5}
    put(monkeypatch, "cifar100", files.FileSource(**changed))
    return content


def test_a_download_is_unpacked_into_the_publisher_s_layout(tmp_path, monkeypatch):
    served(monkeypatch, small_archive(monkeypatch))
    assert loading.fetch("cifar100", tmp_path) == tmp_path / "cifar-100-binary"
    assert sorted(p.name for p in (tmp_path / "cifar-100-binary").iterdir()) == ["test.bin", "train.bin"]
    assert (tmp_path / "cifar-100-binary" / "test.bin").stat().st_size == 2 * 3074
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_download_with_a_wrong_checksum_leaves_nothing(tmp_path, monkeypatch):
    served(monkeypatch, small_archive(monkeypatch)[:-7])
    with pytest.raises(UserError, match="cannot be had"):
        loading.fetch("cifar100", tmp_path)
    assert not (tmp_path / "cifar-100-binary").exists()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == []


def test_gzipped_downloads(tmp_path, monkeypatch):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"payload"))
    file = DATASETS["mnist"].source().train[0]
    assert files._extract(path, DATASETS["mnist"].source(), file) == b"payload"


def test_files_directly_under_data_dir(mnist_files, tmp_path, mnist, as_mnist, monkeypatch):
    as_mnist(monkeypatch)
    for source in (mnist_files / "MNIST" / "raw").iterdir():
        (tmp_path / source.name).symlink_to(source)
    assert equal(loading.load("mnist", tmp_path, 0.1, seed=3).test, mnist.test)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mnits"}, "unknown data set 'mnits' .did you mean 'mnist'"),
        ({"name": "imagenet"}, "known: digits"),
        ({"name": "digits", "validation": 0.0}, "fraction between 0 and 1"),
        ({"name": "digits", "validation": 1.5}, "fraction between 0 and 1"),
        ({"name": "digits", "validation": 1e-6}, "leaves one part empty"),
    ],
)
def test_bad_calls(arguments, message):
    with pytest.raises(UserError, match=message):
        loading.load(**arguments)


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_is_a_crop_and_a_flip_of_each_image(flip):
    images = torch.randn(40, 3, 32, 32)
    found = transforms.augment(images, torch.Generator().manual_seed(1), padding=4, flip=flip)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    seen = set()
    for image, got in zip(padded, found, strict=True):
        options = {
            (top, left, mirrored): torch.equal(crop.flip(-1) if mirrored else crop, got)
            for top in range(9)
            for left in range(9)
            for mirrored in ((False, True) if flip else (False,))
            for crop in [image[:, top : top + 32, left : left + 32]]
        }
        assert sum(options.values()) == 1
        seen.add(next(k for k, v in options.items() if v))
    assert len(seen) > 25, "each image has a crop of its own"
    assert {s[2] for s in seen} == ({False, True} if flip else {False})
    again = transforms.augment(images, torch.Generator().manual_seed(1), padding=4, flip=flip)
    assert torch.equal(found, again)


def test_resizing_averages_the_pixels_that_a_smaller_one_covers():
    # PIL's bilinear filter with its support scaled by the reduction is the independent reference.
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = transforms.resize(images, 16)
    for image, small in zip(images.flatten(0, 1), found.flatten(0, 1), strict=True):
        expected = Image.fromarray(image.numpy(), mode="F").resize((16, 16), Image.Resampling.BILINEAR)
        torch.testing.assert_close(small, torch.from_numpy(np.array(expected)), rtol=0, atol=1e-5)
    assert transforms.resize(images, 32) is images
