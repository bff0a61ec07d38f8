"""The benchmark of candidates runs and prints its figures; what they are is not tested."""

import json
import math

from benchmarks import candidate


def test_quick_run_prints_one_json_line_with_every_ratio(capsys, tmp_path):
    out = tmp_path / "out.json"
    candidate.main(["--quick", "--networks", "resnet20", "--candidates", "2", "--out", str(out)])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["benchmark"] == "candidate"
    assert set(line["figures"]) == {
        f"ratio_{what}_resnet20{how}" for what in candidate.RATIOS for how in ("", "_no_correction")
    }
    assert all(math.isfinite(v) and v > 0 for v in line["figures"].values())
    assert json.loads(out.read_text())["details"]["resnet20"]["kept_mib"] > 0
