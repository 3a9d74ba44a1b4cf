"""Is a demo's result what it should be? The paper's claim at our size, a whole report, real files."""

import json
import re
import sys
from pathlib import Path

from pma import engine


def main() -> None:
    folder = Path(sys.argv[1])
    results = json.loads((folder / "results.json").read_text())
    rows = {row["name"]: row for row in results["comparison"]}
    page = (folder / "report.html").read_text()
    head = page[: page.index("<script")]
    checks = {
        "sma beats last, 95% interval above zero": rows["sma"]["improvement"]["low"] > 0,
        "annealing beats last, 95% interval above zero": rows["annealed"]["improvement"]["low"] > 0,
        "the share of annealing's gain is given": rows["sma"]["gain_recovered"] is not None,
        "the model has learnt more than its vocabulary's frequencies": rows["last"]["bits_per_byte"] < 3,
        "the written merge is right, derived again from its sources": engine.verify(
            folder / "merged" / "sma", samples=1000
        ).findings
        == (),
        "the report carries its charts and what draws them": "const specs" in page and len(page) > 500_000,
        "the report loads nothing from elsewhere": not re.search(r'(?:src|href)="(?!data:)', head),
        "pictures": len(list(folder.glob("*.png"))) == 3,
    }
    print(results["verdict"])
    print(f"the demo took {results['seconds']:.0f} s")
    for what, holds in checks.items():
        print(f"{'ok' if holds else 'FAILED'}: {what}")
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
