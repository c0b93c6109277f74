"""`check_demo.py UNTRAINED TRAINED`: the records of two runs are sound, and training helped."""

import json
import math
import sys
from pathlib import Path


def main(untrained: Path, trained: Path) -> None:
    before, after = (json.loads((folder / "result.json").read_text()) for folder in (untrained, trained))
    for record in (before, after):
        for name, entry in record["metrics"].items():
            assert math.isfinite(entry["value"]), (name, entry)
    assert before["protocol_hash"] == after["protocol_hash"]
    first, last = (record["metrics"]["fd_ratio"]["value"] for record in (before, after))
    assert last < 0.9 * first, f"fd_ratio is {last:.2f} after training and {first:.2f} before"
    for name in ("samples.png", "neighbours.png", "training.png", "metrics.jsonl", "config.yaml", "starts.jsonl"):
        assert (trained / name).stat().st_size > 0, name
    print(f"fd_ratio: {first:.2f} untrained, {last:.2f} after {after['train']['images_seen']} images")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
