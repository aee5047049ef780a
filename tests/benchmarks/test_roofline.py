"""What the roofline counts, on operations whose numbers are known."""

import pytest
import roofline
import torch


def test_a_product_moves_its_matrices_and_computes_two_operations_a_multiplication():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    with roofline.Counter(bandwidth=1e3, rate=10.0) as counter:
        a @ b
    assert counter.operations == 2 * 3 * 5 * 7
    assert counter.bytes == 4 * (15 + 35 + 21)
    assert counter.seconds == pytest.approx(21.0)  # operations / rate, which is longer than bytes / bandwidth


def test_views_and_empty_tensors_are_free_and_an_expanded_tensor_counts_once():
    a = torch.randn(4, 1)
    with roofline.Counter(bandwidth=1.0, rate=1.0) as counter:
        wide = a.expand(4, 100).transpose(0, 1)
        torch.empty(1000)
        assert counter.bytes == 0
        wide.sum()
    assert (counter.bytes, counter.operations) == (4 * (4 + 1), 0)


def test_gradients_are_counted_too():
    weight = torch.randn(5, 7, requires_grad=True)
    with roofline.Counter(bandwidth=1.0, rate=1.0) as counter:
        (torch.randn(3, 5) @ weight).sum().backward()
    assert counter.operations == 2 * (2 * 3 * 5 * 7)


def test_the_table_compares_with_the_first_encoding_of_the_same_precision():
    row = {"bytes": 1e9, "operations": 1e9, "allowed_ms": 50.0}
    rows = [row | {"encoding": name, "precision": p, "ms": ms} for name, p, ms in
            [("ape", "fp32", 100.0), ("rope", "fp32", 150.0), ("ape", "bf16", 10.0), ("rope", "bf16", 20.0)]]  # fmt: skip
    assert [line.split("|")[4].strip() for line in roofline.table(rows).splitlines()[2:]] == ["1.00", "1.50", "1.00", "2.00"]
