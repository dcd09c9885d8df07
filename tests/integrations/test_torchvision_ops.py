"""The replacement of torchvision's nms gives the known results."""

import torch

from guardtest.torchvision_ops import nms

BOXES = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 30, 30], [0, 0, 10, 4]]).float()


def test_the_best_of_overlapping_boxes_is_kept():
    assert nms(BOXES, torch.tensor([0.5, 0.9, 0.3, 0.1]), 0.5).tolist() == [1, 2, 3]


def test_a_dropped_box_suppresses_no_other_box():
    chain = torch.tensor([[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]]).float()
    assert nms(chain, torch.tensor([0.9, 0.8, 0.7]), 0.4).tolist() == [0, 2]


def test_no_boxes():
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []
