import pytest

from correctnet.pipeline.specs import STAGES
from correctnet.pipeline.workload import Costs
from correctnet.settings import Settings


@pytest.mark.parametrize("stage", ["pretrain", "suppress"])
def test_epochs_on_smaller_images_take_their_share_of_pixels(stage):
    settings = Settings.model_validate(
        {"data": {"dataset": "cifar10", "validation": 0.1}, stage: {"epochs": 4, "sizes": [16, 24]}}
    )
    seconds = STAGES[stage].seconds(settings, Costs(train=0.01, test=0, sample=0, layers=15), None)
    assert seconds == pytest.approx((16**2 / 32**2 + 24**2 / 32**2 + 2) * 45_000 * 0.01)


@pytest.mark.parametrize("stage", ["pretrain", "suppress"])
def test_more_sizes_than_epochs_are_not_counted(stage):
    settings = Settings.model_validate(
        {"data": {"dataset": "cifar10", "validation": 0.1}, stage: {"epochs": 1, "sizes": [16] * 3}}
    )
    seconds = STAGES[stage].seconds(settings, Costs(train=0.01, test=0, sample=0, layers=15), None)
    assert seconds == pytest.approx(0.25 * 45_000 * 0.01)


def test_compensators_are_trained_and_judged_on_ten_chips_with_and_without():
    settings = Settings.model_validate(
        {"data": {"dataset": "cifar10", "validation": 0.1}, "compensate": {"epochs": 2, "batch": 32}}
    )
    seconds = STAGES["compensate"].seconds(settings, Costs(train=0.01, test=1e-4, sample=0.32, layers=5), None)
    assert seconds == pytest.approx(2 * 45_000 * (0.01 + 0.01) + 2 * 10 * 5_000 * 1e-4)


def test_a_teacher_sees_each_image_as_well():
    settings = Settings.model_validate(
        {"data": {"dataset": "cifar10", "validation": 0.1}, "distil": {"epochs": 2, "batch": 32}}
    )
    seconds = STAGES["distil"].seconds(settings, Costs(train=0.01, test=1e-3, sample=0.32, layers=5), None)
    assert seconds == pytest.approx(2 * 45_000 * (0.01 + 0.01 + 1e-3))


def test_a_chip_that_is_trained_takes_a_training_more():
    data, cost = {"dataset": "cifar10", "validation": 0.1}, Costs(train=0.01, test=1e-3, sample=0.32, layers=5)

    def seconds(**sections):
        return STAGES["evaluate"].seconds(Settings.model_validate({"data": data, **sections}), cost, 4)

    bare = seconds()
    assert bare == pytest.approx(4 * 10_000 * 1e-3)
    assert seconds(protect={"fraction": 0.1, "select": "random"}) == bare
    chosen = seconds(protect={"fraction": 0.1, "images": 500})
    assert chosen == pytest.approx(bare + 500 * 2 * 0.01)
    adapted = seconds(protect={"fraction": 0.1, "images": 500}, adapt={"passes": 2, "images": 3200, "batch": 32})
    assert adapted == pytest.approx(chosen + 4 * 2 * 3200 * (0.01 + 0.01))
    assert seconds(calibrate={"images": 10}) == pytest.approx(seconds() + 4 * 10 * 6 * 1e-3)


def test_sparse_paths_are_placed_by_an_importance_that_takes_a_pass():
    settings = {"data": {"dataset": "cifar10", "validation": 0.1}, "sidepath": {"epochs": 2, "batch": 32}}
    cost = Costs(train=0.01, test=1e-3, sample=0.32, layers=5)
    of_lora = STAGES["sidepath"].seconds(Settings.model_validate(settings), cost, None)
    assert of_lora == pytest.approx(2 * 45_000 * (0.01 + 0.01))
    settings["sidepath"] |= {"path": "sparse", "select_images": 500}
    of_sparse = STAGES["sidepath"].seconds(Settings.model_validate(settings), cost, None)
    assert of_sparse == pytest.approx(of_lora + 500 * 2 * 0.01)


def test_teachers_are_trained_before_and_each_sees_every_image():
    settings = Settings.model_validate(
        {
            "data": {"dataset": "cifar10", "validation": 0.1},
            "distil": {"epochs": 2, "batch": 32, "teachers": [0.1, 0.5]},
        }
    )
    seconds = STAGES["distil"].seconds(settings, Costs(train=0.01, test=1e-3, sample=0.32, layers=5), None)
    assert seconds == pytest.approx(2 * 45_000 * (3 * (0.01 + 0.01) + 2 * (1e-3 + 0.01)))


def test_moments_take_two_products_a_layer():
    settings = Settings.model_validate({"data": {"dataset": "cifar10", "validation": 0.1}, "moments": {"epochs": 3}})
    seconds = STAGES["moments"].seconds(settings, Costs(train=0.01, test=1e-3, sample=0.32, layers=5), None)
    assert seconds == pytest.approx(2 * 3 * 45_000 * 0.01)
