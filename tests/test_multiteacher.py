"""Distillation from several noisy teachers, against losses that are written out."""

import pytest
import torch
import torch.nn.functional as F
from by_hand import succeed
from pydantic import ValidationError

from correctnet.crossbar.convert import convert, program
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.files import storage
from correctnet.methods.distillation import distil, learn_from
from correctnet.methods.multiteacher import chip_of_teacher, train_teachers, with_chips
from correctnet.noise import streams
from correctnet.settings import Distil
from correctnet.training.loop import Hooks, fit

DEVICE = LogNormalVariation(0.5)
SECTION = Distil(epochs=2, batch=50, teachers=(0.2, 0.6), temperature=3.0, alpha=0.7, batchnorm="frozen")


def test_each_teacher_is_the_network_trained_at_its_own_sigma(tiny, blobs):
    found = train_teachers(tiny, blobs, DEVICE, SECTION, 5, quiet=True)
    for number, sigma in enumerate(SECTION.teachers):
        own = convert(tiny, LogNormalVariation(sigma), 5)
        chips = lambda draw, own=own, k=number: program(own, chip_of_teacher(k, draw, teaching=False))  # noqa: E731
        hooks = Hooks(before_batch=chips, update_batchnorm=False)
        fit(own, blobs, SECTION, 5, stage=f"distil-teacher-{sigma}", hooks=hooks, quiet=True)
        for name, value in own.state_dict().items():
            assert torch.equal(found[number].state_dict()[name], value)
    assert any(not torch.equal(a, b) for a, b in zip(*(t.state_dict().values() for t in found), strict=True))


def test_the_term_is_the_divergence_from_the_mean_of_their_logits_on_chips(tiny, blobs):
    teachers = [convert(tiny, LogNormalVariation(sigma), 5).eval() for sigma in SECTION.teachers]
    hooks, drawn = Hooks(before_batch=lambda draw: drawn.append(draw)), []
    with_chips(hooks, teachers)
    learn_from(teachers, hooks, SECTION)
    x, z = blobs.images[:20], torch.randn(20, 3)
    hooks.before_batch(4)
    assert drawn == [4], "the student's chips as before"
    logits = []
    for number, sigma in enumerate(SECTION.teachers):
        own = convert(tiny, LogNormalVariation(sigma), 5).eval()
        program(own, streams.chip("train-distil", (1 << 27) + (number + 1) * (1 << 24) + 4))
        logits.append(own(x))
    wanted = (logits[0] + logits[1]) / 2
    kl = F.kl_div((z / 3).log_softmax(1), (wanted / 3).softmax(1), reduction="batchmean")
    torch.testing.assert_close(hooks.term(x, z), 0.7 * 9 * kl, rtol=1e-5, atol=1e-7)
    assert hooks.loss_weight == pytest.approx(0.3)
    hooks.before_batch(5)
    assert not torch.allclose(hooks.term(x, z), 0.7 * 9 * kl), "other chips in the next batch"


def test_no_two_teachers_nor_the_student_share_chips():
    numbers = [chip_of_teacher(k, draw, teaching) for k in range(3) for draw in (0, 9) for teaching in (False, True)]
    numbers += [streams.chip("train-distil", draw) for draw in (0, 9)]
    assert len(set(numbers)) == 14


def test_a_stopped_call_goes_on(tiny, blobs, tmp_path):
    how = {"epochs": 1, "batch": 100, "teachers": (0.3, 0.6), "progress": False}
    once = distil(tiny, blobs, DEVICE, **how)
    for _ in range(2):  # the second one finds everything done
        again = distil(tiny, blobs, DEVICE, work=tmp_path, **how)
        assert all(
            torch.equal(a, b) for a, b in zip(once.state_dict().values(), again.state_dict().values(), strict=True)
        )
    assert len(list(tmp_path.iterdir())) == 3
    alone = distil(tiny, blobs, DEVICE, **{**how, "teachers": ()})
    assert any(
        not torch.equal(a, b) for a, b in zip(once.state_dict().values(), alone.state_dict().values(), strict=True)
    )


def test_the_stage(tmp_path):
    fast = ["--quiet", "--threads", 1, "--batch", 256, "--epochs", 1]
    succeed("pretrain", *fast, "--out", tmp_path / "p")
    succeed("distil", *fast, "--teachers", "0.2,0.5", "--pretrained", tmp_path / "p", "--out", tmp_path / "d")
    _, description = storage.read_model(tmp_path / "d")
    assert description["history"][-1]["settings"]["distil"]["teachers"] == [0.2, 0.5]
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["log.csv", "model.json", "model.safetensors"]


def test_sigmas_of_teachers_are_checked():
    for wrong in ((0.0,), (0.5, 0.5), (4.0,)):
        with pytest.raises(ValidationError):
            Distil(teachers=wrong)
    assert "teachers" not in Distil().model_dump()
