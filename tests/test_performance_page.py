"""The page on performance: made of the recorded results, and up to date."""

from benchmarks.gpu.results import Results
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.tables import tables
from benchmarks.report_performance import PAGE, RESULTS, page


def test_the_page_on_performance_is_up_to_date():
    assert PAGE.read_text() == page(RESULTS)


def test_the_page_says_that_there_is_nothing_yet(setting, tmp_path):
    setting.results.add("check", "a", "ok", {"error": 0.0})  # on a CPU
    assert "There is no GPU result yet" in page(tmp_path)


def test_the_page_shows_the_newest_record_of_each_case(tmp_path):
    about = {
        "device_type": "cuda", "device": "NVIDIA Z1", "commit": "abc1234", "torch": "2.11",
        "triton": "3.6", "capability": "9.0", "driver": "1", "cuda": "13.0",
    }  # fmt: skip
    timing = {"median": 2.0, "min": 1.0, "p25": 1.5, "p75": 2.5, "runs": 5, "host": 0.1}
    for i, speedup in enumerate((1.5, 1.75)):
        results = Results(tmp_path / f"{i}.json", about)
        results.add(
            "break_even", "4096 tokens", "ok",
            {
                "heads": 12, "tokens": 4096, "tile": (4, 4, 4), "best": "sdpa", "speedup": speedup,
                "speedup_with_launching": 1.1, "times": {"sdpa": timing, "sparse": timing},
            },
        )  # fmt: skip
    shown = page(tmp_path)
    assert "NVIDIA Z1, commit abc1234" in shown and "no GPU result" not in shown
    assert "1.75x" in shown and "1.50x" not in shown
    assert "With 12 heads sparse is faster, launching counted, from 4,096 tokens on." in shown


def test_every_stage_has_tables():
    for name in STAGES:
        assert tables(name, [])[1:] == []
