"""The calibration error: by hand, at the edges of bins, and against torchmetrics."""

import pytest
import torch
from evaluation_cases import CircularConvolution, labelled_images

from sape2.evaluation import MEASURES
from sape2.evaluation.accuracy import calibration_error


def theirs(probabilities, labels):
    from torchmetrics.functional.classification import multiclass_calibration_error  # seconds, not at collection

    return multiclass_calibration_error(probabilities, labels, probabilities.shape[1], n_bins=15, norm="l1")


def two_classes(confidences):
    """Answers for class 0, each with its confidence."""
    first = torch.tensor(confidences)
    return torch.stack([first, 1 - first], 1)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize(("images", "classes"), [(1, 2), (7, 3), (2000, 10)])
def test_it_is_that_of_torchmetrics_to_the_last_bit(images, classes, scale):
    generator = torch.Generator().manual_seed(images)
    probabilities = (scale * torch.randn(images, classes, generator=generator)).softmax(1)
    labels = torch.randint(0, classes, (images,), generator=generator)
    assert torch.equal(calibration_error(probabilities, labels), theirs(probabilities, labels))


@pytest.mark.parametrize(
    ("confidences", "labels", "error"),
    [
        ([1.0], [0], 0.0),
        ([1.0], [1], 1.0),
        ([0.9], [0], 0.1),
        ([0.62, 0.65], [0, 1], 0.135),  # one bin: half are right, at 0.635 on average
        ([0.62, 0.7], [0, 1], 0.54),  # two bins: (0.38 + 0.7) / 2
        ([0.6, 0.65], [0, 1], 0.125),  # 9/15 is the lower edge of the bin of 0.65
        ([1.0, 0.95], [1, 0], 0.525),  # 1 is not in the bin of 0.95: (1 + 0.05) / 2
    ],
)
def test_it_is_what_one_computes_by_hand(confidences, labels, error):
    probabilities, labels = two_classes(confidences), torch.tensor(labels)
    assert calibration_error(probabilities, labels).item() == pytest.approx(error, abs=1e-6)
    assert torch.equal(calibration_error(probabilities, labels), theirs(probabilities, labels))


def test_every_edge_of_a_bin_is_treated_as_by_torchmetrics():
    edges = torch.linspace(0, 1, 16)[8:]
    near = torch.cat([edges, edges.nextafter(torch.tensor(0.0)), edges.nextafter(torch.tensor(2.0)).clamp(max=1)])
    for confidence in near.tolist():
        probabilities, labels = two_classes([confidence, 0.75]), torch.tensor([1, 0])
        assert torch.equal(calibration_error(probabilities, labels), theirs(probabilities, labels))


def test_what_is_not_a_number_stays_visible():
    assert calibration_error(torch.full((2, 3), float("nan")), torch.tensor([0, 1])).isnan()


@pytest.mark.parametrize("measure", ["accuracy", "shift", "resolution"])
def test_an_image_without_a_number_has_no_class(measure):
    model = CircularConvolution()
    model.patch_size = 4
    with torch.no_grad():
        model.head.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"NaN for \d+ of \d+ images, which then have no class"):
        list(MEASURES[measure](model, labelled_images(6)))
