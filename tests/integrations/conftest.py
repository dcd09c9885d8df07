"""The trainers under test stay offline, and find a torchvision that can be imported."""

import os

from guardtest.torchvision_ops import define_missing_operators

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is first imported
define_missing_operators()
