"""The environment of these tests contains the frameworks that the pages describe."""

import json
import re
from pathlib import Path

import torch

from fastguard.commands import cli
from guardtest import require

ROOT = Path(__file__).parents[2]
PINS = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
FRAMEWORKS = ("transformers", "accelerate", "lightning", "ultralytics")


def test_fastguard_env_lists_the_frameworks(capsys):
    for name in FRAMEWORKS:
        require(name)
    capsys.readouterr()  # some frameworks print a message on import
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["frameworks"]
    assert {name: found[name] for name in FRAMEWORKS} == {name: PINS[name] for name in FRAMEWORKS}


def test_torchvision_can_be_imported():
    torchvision = require("torchvision")
    assert torchvision.transforms.functional.hflip(torch.tensor([[1, 2]])).tolist() == [[2, 1]]
