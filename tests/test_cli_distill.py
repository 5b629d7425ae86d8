"""`veda distill` on a diffusers pipeline that a test writes to disk: from prompts to a sidecar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_transformers import QUICK, distance, run, wan_inputs
from typer.testing import CliRunner

import veda_compile
from veda_compile import Sidecar
from veda_compile.cli import app

pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("fresh_compiler")

WORDS = ("a", "red", "disc", "moves", "up", "two", "rings", "orbit")
SIZE = {"frames": 33, "height": 256, "width": 256}
GRID = (9, 16, 16)
"""Of SIZE under the VAE's 4 x 8 x 8 and the transformer's patches: above the CPU's break-even."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan pipeline with every part small and random."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
    from small_transformers import wan
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(("<pad>", "<unk>", *WORDS))}, "<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    text = UMT5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    made = tmp_path_factory.mktemp("pipeline")
    WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"
        ),
        text_encoder=UMT5EncoderModel(text),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=wan(layers=2),
    ).save_pretrained(made)
    return made


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("# what is generated\na red disc moves up\n\ntwo rings orbit\n")
    return path


def invoke(model: Path, prompts: Path, out: Path, **more: Any) -> Any:
    options = {"prompts": prompts, "out": out, "dtype": "float32", "device": "cpu", **more}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return CliRunner().invoke(app, ["distill", str(model), *words])


def test_prompts_become_a_sidecar_that_the_backend_takes(
    folder: Path, prompts: Path, tmp_path: Path
) -> None:
    from diffusers import WanTransformer3DModel

    out = tmp_path / "wan.veda.safetensors"
    done = invoke(folder, prompts, out, **SIZE, steps=3, guidance=4.0, density=0.3)
    assert done.exit_code == 0, done.stderr

    assert "WanTransformer3DModel: 2 layers" in done.stdout
    assert "of 12 calls measured in 2 generations" in done.stdout
    assert "grid 9 x 16 x 16" in done.stdout
    assert f"written: {out}" in done.stdout

    sidecar = Sidecar.load(out)
    assert [card.name for card in sidecar.model.layers] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert sidecar.grids == (GRID,)
    kept = [density for layer in sidecar.plans[0].density for density in layer]
    assert sum(kept) / len(kept) <= 0.3 + 1e-9
    made = sidecar.provenance
    assert (made["complete"], made["runs"], made["model_calls"]) == (True, 2, 12)
    assert made["timesteps"][0] == 1000.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", out.name]

    # the sidecar fits the model as users load it
    model = WanTransformer3DModel.from_pretrained(folder / "transformer")
    inputs = wan_inputs(GRID)
    dense = run(model, inputs)
    sparse = torch.compile(model, backend="veda", options={**QUICK, "sidecar": str(out)})
    assert 1e-6 < distance(run(sparse, inputs), dense) < 0.5
    veda_compile.report().require()


def test_what_is_wrong_is_one_line_and_nothing_is_written(
    folder: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "wan.veda.safetensors"
    empty, nothing = tmp_path / "empty.txt", tmp_path / "none.txt"
    empty.write_text("# only a comment\n\n")
    cases: list[tuple[Path, Path, dict[str, Any], str]] = [
        (folder, nothing, {}, "cannot be read"),
        (folder, tmp_path, {}, "cannot be read"),
        (folder, empty, {}, "no prompt in it"),
        (tmp_path, prompts, {}, "no pipeline could be loaded"),
        (folder, prompts, {"component": "transformer_3"}, "name one of"),
        (folder, prompts, {"component": "tokenizer"}, "name one of"),
        (folder, prompts, {"dtype": "int8"}, "must be one of bfloat16"),
        (folder, prompts, {"density": 2}, "density is 2"),
        (folder, prompts, {"policy": "best"}, "must be one of mixed, scored, static"),
        (folder, prompts, {"out": tmp_path / "wan.bin"}, "must end in"),
    ]
    for model, listed, more, message in cases:
        done = invoke(model, listed, **{"out": out, **more})
        assert done.exit_code == 2, (more, done.output)
        line = done.stderr.strip().splitlines()[-1]
        assert line.startswith("veda: ") and message in line
        assert "Traceback" not in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "prompts.txt"]


def test_other_components_than_the_video_transformer_are_refused(
    folder: Path, prompts: Path, tmp_path: Path
) -> None:
    """A model of the pipeline without video attention: nothing is learned, and that is said."""
    out = tmp_path / "vae.veda.safetensors"
    done = invoke(folder, prompts, out, frames=5, height=32, width=32, steps=1, component="vae")
    assert done.exit_code == 2
    assert "no attention call of AutoencoderKLWan was seen" in done.stderr
    assert not out.exists()
