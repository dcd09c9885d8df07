"""docs/compiled-optimizers.md is correct about supported and refused optimizers.

By default, the tests run one optimizer of each library and outcome. If the environment variable
FASTGUARD_LONG_TESTS is 1, as in the workflow of GitHub Actions, they run all optimizers, which
takes about ten minutes.
"""

import re
from importlib.metadata import version

import pytest

from guardtest import long_tests
from guardtest.compiled_survey import (
    PAGE,
    Finding,
    distribution,
    finding_of,
    findings_on,
    page_of,
)
from guardtest.third_party import PACKAGES, driven

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of the libraries

TEXT = PAGE.read_text()
ON_PAGE = findings_on(TEXT)
KNOWN = ("schedulefree.AdamWScheduleFree", "pytorch_optimizer.Adan", "timm.optim.Lion")


def chosen() -> list[str]:
    """One optimizer of each library and outcome and some well-known ones, or all optimizers."""
    if long_tests():
        return list(ON_PAGE)
    by_outcome: dict[tuple[str, str], str] = {}
    for name, finding in ON_PAGE.items():
        by_outcome.setdefault((distribution(name), finding.why), name)
    return sorted({*by_outcome.values(), *KNOWN})


@pytest.mark.parametrize("name", chosen())
def test_the_page_is_correct(name: str) -> None:
    assert finding_of(name) == ON_PAGE[name]


def test_the_page_has_every_optimizer_and_equals_the_generated_one() -> None:
    assert sorted(ON_PAGE) == driven()
    assert page_of(ON_PAGE) == TEXT


def test_the_page_names_the_versions_that_are_installed() -> None:
    found = dict(re.findall(r"^## (\w+) ([\d.]+)$", TEXT, re.M))
    assert found == {name: version(name).split("+")[0] for name in map(distribution, PACKAGES)}


def test_a_wrong_row_is_found() -> None:
    wrong = TEXT.replace("Supported (", "Supported (1", 1).replace(" Adan,", "", 1)
    assert findings_on(wrong) != ON_PAGE
    assert finding_of("timm.optim.Lion") != Finding(False, "", "cannot be traced")
