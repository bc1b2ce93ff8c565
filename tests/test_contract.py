# ruff: noqa: E501  one row of the table is one line
"""Shapes declared in letters, and the errors they give."""

import pytest
import torch

from kdkernels.contract import Contract, check_choice, show

CONTRACT = Contract(student="... d_s", student_proj="D d_s?", bias="D?", weights="...?")


def test_letters_are_bound():
    sizes = CONTRACT.bind(
        {"student": torch.ones(2, 3, 5), "student_proj": torch.ones(7, 5), "bias": None, "weights": torch.ones(2, 3)}
    )
    assert sizes == {"...": (2, 3), "d_s": 5, "D": 7}


def test_a_single_vector_has_no_leading_dimensions():
    assert CONTRACT.bind({"student": torch.ones(5)}) == {"...": (), "d_s": 5}


def test_one_letter_may_equal_another():
    with pytest.raises(ValueError, match=r"bias has shape \(4\), but must be \(D\) with D = 5, as in student"):
        CONTRACT.bind({"student": torch.ones(2, 5), "bias": torch.ones(4)}, same={"d_s": "D"})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"student": torch.ones(2, 5), "student_proj": torch.ones(7, 6)}, r"student_proj has shape \(7, 6\), but must be \(D, d_s\) with d_s = 5, as in student"),
        ({"student": torch.ones(2, 5), "student_proj": torch.ones(5)}, r"student_proj has shape \(5\), but must be \(D, d_s\)"),
        ({"student": torch.ones(2, 5), "student_proj": torch.ones(1, 7, 5)}, r"student_proj has shape \(1, 7, 5\), but must be \(D, d_s\)"),
        ({"student": torch.ones(())}, r"student has shape \(\), but must be \(\.\.\., d_s\)"),
        ({"student": torch.ones(2, 5), "weights": torch.ones(2, 1)}, r"weights has shape \(2, 1\), but must be \(\.\.\.\) with \.\.\. = \(2\), as in student"),
        ({"student": torch.ones(2, 5), "bias": torch.ones(3, device="meta")}, r"bias is on meta, but student is on cpu"),
    ],
)  # fmt: skip
def test_shapes_and_devices_that_do_not_fit_are_named(tensors, message):
    with pytest.raises(ValueError, match=message):
        CONTRACT.bind(tensors)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "student is NoneType, but must be a torch.Tensor"),
        ([1.0], "student is list, but must be a torch.Tensor"),
        (torch.ones(2, 5, dtype=torch.int64), "student has dtype torch.int64, but must be a floating-point tensor"),
        (torch.ones(2, 5, dtype=torch.complex64), "student has dtype torch.complex64"),
        (torch.ones(2, 5).to_sparse(), "student has layout torch.sparse_coo, but must be dense"),
    ],
)
def test_what_is_no_dense_real_tensor_is_named(value, message):
    with pytest.raises(TypeError, match=message):
        CONTRACT.bind({"student": value})


def test_choices_are_listed():
    with pytest.raises(ValueError, match="metric is 'l3', but must be one of 'l1', 'l2'"):
        check_choice("metric", "l3", ("l1", "l2"))


def test_shapes_are_shown_without_a_trailing_comma():
    assert [show(()), show((3,)), show((8, 3))] == ["()", "(3)", "(8, 3)"]
