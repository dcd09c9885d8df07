"""The nms that stands in for torchvision's, against cases with known answers."""

import torch

from guardtest.torchvision_ops import nms

BOXES = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 30, 30], [0, 0, 10, 4]]).float()


def test_of_boxes_that_overlap_the_best_stays():
    assert nms(BOXES, torch.tensor([0.5, 0.9, 0.3, 0.1]), 0.5).tolist() == [1, 2, 3]


def test_what_a_dropped_box_overlaps_is_not_dropped_for_it():
    chain = torch.tensor([[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]]).float()
    assert nms(chain, torch.tensor([0.9, 0.8, 0.7]), 0.4).tolist() == [0, 2]


def test_no_boxes():
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []
