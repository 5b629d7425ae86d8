"""The demo, run as a user runs it, on a small model with random weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("av")
iio = pytest.importorskip("imageio.v3")

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "quickstart.py"
SIZE = (4, 24, 24)
STEPS, CLIPS = 2, 2


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=3,
        out_channels=3, text_dim=32, freq_dim=16, ffn_dim=64, num_layers=2, cross_attn_norm=True,
        rope_max_seq_len=16,
    )  # fmt: skip
    with torch.no_grad():
        for block in model.blocks:
            # queries and keys that tell tokens apart, so that what is left out matters
            block.attn1.norm_q.weight.fill_(3.0)
            block.attn1.norm_k.weight.fill_(3.0)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


def demo(model: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = ["--model", model, "--output", output, "--size", *SIZE, "--steps", STEPS]
    arguments += ["--clips", CLIPS, "--device", "cpu", "--inner", "eager", *more]
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        timeout=600,
        check=False,
    )


def test_the_demo_reports_and_draws_what_it_measured(model_folder, tmp_path):
    done = demo(model_folder, tmp_path, "--density", "0.3")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["sites"], result["rewritten"]) == (4, 2)
    assert 0.2 < result["density"] <= 0.35
    assert result["speedup_step"] == pytest.approx(
        result["step_dense_s"] / result["step_veda_s"], rel=0.02
    )
    assert result["speedup_attention"] == pytest.approx(
        result["attention_dense_s"] / result["attention_veda_s"], rel=0.2
    )
    assert result["attention_share"] > 0.0
    assert 5.0 < result["psnr_db"] < 80.0
    assert 0.0 < result["ssim"] < 1.0
    assert result["options"]["min_tokens"] == 0

    assert "min_tokens=0 makes it go sparse" in " ".join(done.stdout.split())
    for shown in ("blocks.0..1.attn1 x2", "CROSS_ATTENTION", "PSNR", "speed-up"):
        assert shown in done.stdout

    frames = iio.imread(tmp_path / "side_by_side.mp4", plugin="pyav")
    assert len(frames) % SIZE[0] == 0
    assert "plans.png" in done.stdout
    assert iio.imread(tmp_path / "plans.png").std() > 0
    sheet = iio.imread(tmp_path / "contact_sheet.png")
    assert sheet.shape[0] >= 3 * CLIPS * SIZE[1]  # dense, veda and difference of every clip
    assert sheet.std() > 0


def test_json_prints_one_line_and_full_density_gives_the_dense_clips(model_folder, tmp_path):
    done = demo(model_folder, tmp_path, "--json", "--density", "1.0")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["density"] == 1.0
    assert result["psnr_db"] is None or result["psnr_db"] > 80.0
    assert result["ssim"] > 0.9999


def test_a_folder_without_a_model_is_named(tmp_path):
    done = demo(tmp_path, tmp_path)
    assert done.returncode != 0
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr
