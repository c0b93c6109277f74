"""`check_claims.py FOLDER`: every claim left a valid record and a picture, and the leaderboard page has them.

Verdicts may be what they are.
"""

import sys
from pathlib import Path

from pixlat.evaluation.records.claims import PICTURE_FILE, read_claims
from pixlat.evaluation.studies.claim_tools.framework import all_claims


def main(folder: Path) -> None:
    left_out: list[str] = []
    found = read_claims(folder, left_out)
    assert not left_out, left_out
    assert {record["name"] for record, _ in found} == set(all_claims()), [record["name"] for record, _ in found]
    page = (folder / "leaderboard.html").read_text(encoding="utf-8")
    for record, place in found:
        assert (place / PICTURE_FILE).stat().st_size > 1000, place
        assert f'"name":"{record["name"]}"' in page, record["name"]
        print(f"{record['name']}: {record['verdict']} ({record['seconds']:.0f} s)")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
