"""A report of exercises/grade.py in the form that Gradescope reads.

Run: python results.py points.json results.json
"""

import json
import sys
from pathlib import Path


def results(report):
    """Gradescope's results: an entry for each test, and one for an exercise without a report."""
    tests = []
    for number, exercise in report.items():
        for test in exercise["tests"]:
            name, text = f"Exercise {number}, {test['test']}", test["message"] or "passed"
            tests.append(dict(name=name, score=test["points"], max_score=test["of"], output=text))
        if not exercise["tests"]:
            name, text = f"Exercise {number}", exercise["note"]
            tests.append(dict(name=name, score=0, max_score=exercise["of"], output=text))
    return dict(score=sum(test["score"] for test in tests), output_format="text", tests=tests)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    report = json.loads(source.read_text(encoding="utf-8"))
    target.write_text(json.dumps(results(report), indent=1), encoding="utf-8")
