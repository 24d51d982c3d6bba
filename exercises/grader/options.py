"""The options of the exercises.

A plug-in of its own (pyproject.toml), so that pytest knows them before it reads the folders it is
given.
"""


def pytest_addoption(parser):
    group = parser.getgroup("exercises")
    group.addoption(
        "--impl",
        metavar="DIR",
        help="grade this folder's files instead of the reference (--impl=DIR if it lies elsewhere)",
    )
    group.addoption("--report", metavar="FILE", help="write the exercises' points as JSON")
    group.addoption(
        "--course",
        metavar="N",
        type=int,
        default=0,
        help="the number that decides the inputs which no handout shows (default 0)",
    )
